"""The options of every command: as frozen, as the recipes say them, and as a shell completes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from upvits.deploy.cli.app import app
from upvits.deploy.cli.settings import about, settings_of
from upvits.deploy.recipe.detect import DetectRecipe, PruneRecipe
from upvits.deploy.recipe.document import CUTS, Recipe

FROZEN = Path(__file__).with_name("options.txt")

RECIPE_ONLY = {
    **dict.fromkeys(
        ("score.batch_size", "bench.warmup", "bench.rounds", "export.parity_images", "export.accuracy_images"),
        "how carefully is measured: it costs time and hardly changes a result",
    ),
    **dict.fromkeys(
        ("distill.optimizer", "distill.layer_decay", "distill.weight_decay", "distill.warmup_epochs", "distill.cutmix",
         "distill.mixup", "distill.mix_prob", "distill.label_smoothing", "distill.min_crop", "distill.auto_augment",
         "distill.color_jitter", "distill.random_erasing", "distill.repeated_augmentation", "distill.drop_path",
         "distill.label_weight", "distill.logit_weight", "distill.ema_decay", "distill.clip_grad", "distill.compile",
         "distill.temperature", "distill.hard_weight", "distill.map_weight", "distill.channels_last"),
        "a file for --train-recipe has them; its dials are epochs, rate and batch size",
    ),
    **dict.fromkeys(
        tuple(f"detect.{name}" for name in DetectRecipe.model_fields if name != "coco"),
        "`detect train` and `detect compare` have the options of a run's detectors",
    ),
}  # fmt: skip
"""Settings without an option of the main job, and why."""

DETECT_ONLY = {"weight_decay", "warmup", "grad_clip", "size"}
"""Of detectors: the published schedule, and `detect export --size`."""

PRUNE_ONLY = {"align", "seed"}
"""Of the pruning of detectors: like those of the main job, which has them."""


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        else:
            yield f"{prefix}{name}", command


def options(command: Any) -> list[str]:
    """Every spelling of every option, and arguments in capitals."""
    return sorted(
        "/".join([*sorted(param.opts), *sorted(param.secondary_opts)])
        if param.param_type_name == "option"
        else param.name.upper()
        for param in command.params
        if param.name != "help"
    )


def frozen() -> str:
    """The text of options.txt."""
    wrapper = TextWrapper(110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lists = {name: wrapper.fill(" ".join(options(command))) for name, command in sorted(COMMANDS.items())}
    return "\n".join(f"{name}\n{text}\n" for name, text in lists.items())


COMMANDS = dict(commands(typer.main.get_command(app)))


def fields(document: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Paths of all settings of a recipe."""
    for name, field in document.model_fields.items():
        inner = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if is_part(kind)]
        if inner:
            yield from fields(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_the_options_of_every_command_are_frozen() -> None:
    """An option that goes away breaks somebody's script: change this file by hand, and say so in CHANGELOG.md."""
    assert frozen() == FROZEN.read_text()


def test_every_setting_has_an_option_or_a_reason() -> None:
    assert {*settings_of(Recipe)} | {*RECIPE_ONLY} == {*fields(Recipe)}
    assert {*settings_of(Recipe)} & {*RECIPE_ONLY} == set()
    assert {*settings_of(DetectRecipe)} | DETECT_ONLY == {*fields(DetectRecipe)}
    assert {*settings_of(PruneRecipe)} | PRUNE_ONLY == {*fields(PruneRecipe)}


def test_every_setting_says_what_it_means_and_what_it_defaults_to() -> None:
    """What is off unless it is given needs no default: a cut, a limit, a second job."""
    off = {*(f"plan.{cut}" for cut in CUTS), "plan.depth_ratio", "engine.workspace_mib", "detect.coco", "model"}
    for document in (Recipe, DetectRecipe):
        for path, setting in settings_of(document).items():
            assert setting.field.description
            assert about(setting.field, "shown") or path in off or setting.field.get_default() is not None


def test_a_sweep_takes_what_a_build_takes_but_the_single_cuts() -> None:
    singles = {"/".join(sorted(settings_of(Recipe)[f"plan.{cut}"].names)) for cut in CUTS}
    assert {*options(COMMANDS["build"])} - {*options(COMMANDS["sweep"])} == singles
    assert {*options(COMMANDS["sweep"])} - {*options(COMMANDS["build"])} == {
        "--ratios", "--macs", "--speedups", "--latencies",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option_and_its_default(name: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    words = result.output.replace(",", " ").split()
    for option in (option for group in options(COMMANDS[name]) for option in group.split("/") if option[0] == "-"):
        assert option in words
    if name == "build":
        assert "(uniform, global, latency). [default: uniform; latency where one is asked for]" in result.output
        assert "(fisher, refined, kl, magnitude, random). [default: fisher]" in result.output
        assert "embed, attention, heads, qk_v, ffn, depth" in result.output
        assert "[default: 1:8:32]" in result.output
        assert "[default: 1,8]" in result.output


def test_the_schema_is_printed_and_describes_every_setting() -> None:
    result = CliRunner().invoke(app, ["recipe", "--schema"])
    schema = json.loads(result.stdout)
    assert schema == Recipe.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            assert "description" in field or "$ref" in field, name
    assert schema["$defs"]["PlanRecipe"]["properties"]["ratio"]["x-option"] == ["--ratio", "-r"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (("build", "--planner", ""), ["uniform", "global", "latency"]),
        (("sweep", "--method", "r"), ["refined", "random"]),
        (("build", "--components", "embed,h"), ["embed,heads"]),
        (("detect", "train", "--detector", "m"), ["mask-rcnn"]),
    ],
)
def test_a_shell_completes_choices(typed: tuple[str, ...], offered: list[str]) -> None:
    environment = {
        "_UPVITS_DEPLOY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("upvits-deploy", *typed)),
        "COMP_CWORD": str(len(typed)),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="upvits-deploy")
    assert result.stdout.split() == offered


def test_help_and_models_need_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from upvits.deploy.cli.app import app; "
        "codes = [CliRunner().invoke(app, words.split()).exit_code for words in ('build --help', 'models --json', "
        "'recipe --schema')]; print(codes, sorted({'torch', 'timm', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert result.stdout.strip() == "[0, 0, 0] []"
