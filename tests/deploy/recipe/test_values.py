"""What recipes say in text: parsed once, and written back as it was spelled."""

from typing import Any

import pytest

from upvits.calib_data.errors import UserError
from upvits.deploy.choices import BatchProfile
from upvits.deploy.recipe.document import Recipe, make_recipe

TEXTS = {
    "plan": {"target_latency": "2.0ms"},
    "engine": {"precision": "fp16,int8", "batch": "1:2:4", "targets": ["sm86", "sm120"]},
}


def recipe_of(part: str, **values: Any) -> Recipe:
    return make_recipe({"model": "pvt_v2_b0", part: values})


def test_text_becomes_values() -> None:
    recipe = make_recipe({"model": "pvt_v2_b0", **TEXTS})
    assert recipe.engine.precision == ("fp16", "int8")
    assert recipe.engine.batch == BatchProfile(1, 2, 4)
    assert recipe.engine.targets == ("sm86", "sm120")
    assert recipe.plan.latency is not None
    assert (recipe.plan.latency.ms, recipe.plan.latency.text) == (2.0, "2 ms")
    assert recipe_of("plan", speedup="1.50x").plan.latency.speedup == 1.5  # type: ignore[union-attr]


def test_values_are_written_as_they_were_spelled() -> None:
    recipe = make_recipe({"model": "pvt_v2_b0", **TEXTS})
    written = recipe.model_dump()
    assert written["plan"]["target_latency"] == "2.0ms"
    assert {name: written["engine"][name] for name in ("precision", "batch")} == {
        "precision": "fp16,int8",
        "batch": "1:2:4",
    }
    assert make_recipe(written) == recipe
    assert recipe_of("plan", speedup="1.50x").model_dump()["plan"]["speedup"] == "1.50x"
    assert recipe_of("plan").model_dump()["engine"]["precision"] == "auto"


@pytest.mark.parametrize(
    ("part", "values", "text"),
    [
        ("engine", {"precision": "fp17"}, "Unknown precision 'fp17'; did you mean fp16?"),
        ("engine", {"precision": ""}, "Unknown precision ''"),
        ("engine", {"precision": ["fp17"]}, "engine.precision.0: Input should be 'fp32'"),
        ("engine", {"batch": "8"}, "Batch profile '8' is not valid."),
        ("engine", {"batch": "4:2:1"}, "batch profile 4:2:1 is not in order"),
        ("engine", {"targets": ["86"]}, "Unknown target '86'."),
        ("plan", {"target_latency": "2s"}, "The latency target '2s' is not valid."),
        ("plan", {"speedup": "half"}, "The speed-up 'half' is not valid."),
        ("plan", {"speedup": 2}, "plan.speedup: "),
    ],
)
def test_what_says_nothing_is_refused(part: str, values: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe_of(part, **values)
    assert text in caught.value.what


@pytest.mark.parametrize(
    "values",
    [
        {"distill": {"epochs": True}}, {"plan": {"ratio": True}}, {"bench": {"batches": [True, 2]}}, {"seed": False},
        {"detect": {"epochs": True}}, {"detect": True}, {"model": True}, {"mean": [True, 1.0, 1.0]},
        {"engine": {"batch": True}}, {"plan": True},
    ],
)  # fmt: skip
def test_true_and_false_are_no_numbers(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="Input should be no truth value"):
        make_recipe({"model": "pvt_v2_b0", **values})


def test_true_and_false_are_taken_where_they_are_meant() -> None:
    recipe = make_recipe({
        "model": "deit_tiny", "compensate": {"enabled": True}, "engine": {"require_fused_attention": True},
        "allow_weak": True, "model_args": {"qkv_bias": False}, "detect": {"amp": True, "epochs": 1},
    })  # fmt: skip
    assert recipe.compensate.enabled
    assert recipe.model_args == {"qkv_bias": False}
    assert recipe.detect is not None
    assert recipe.detect.amp
