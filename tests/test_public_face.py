"""`import upvits`: few names, quick to import, each with an example; its steps give what the command line gives."""

import ast
import inspect
import json
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

import upvits
from upvits.calib_data import batches
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.steps import with_units_for_refit

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", ["upvits", "upvits.calib_data", "upvits.toolchain"])
def test_type_checkers_and_programs_see_the_same_names(package: str) -> None:
    module = import_module(package)
    seen: dict[str, str | None] = {}
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                seen |= {alias.name: statement.module for alias in statement.names}
    assert sorted(seen) == sorted(module.__all__) == dir(module)
    for name, home in seen.items():
        assert getattr(module, name) is getattr(import_module(str(home)), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(module, "nothing")  # noqa: B009 -- mypy would refuse the plain spelling


@pytest.mark.parametrize("name", upvits.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(upvits, name)) or ""
    assert ">>> " in text


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, upvits; print(sorted({'torch', 'timm', 'onnx', 'pydantic', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_messages_are_shown_only_where_a_program_asks_for_them() -> None:
    code = "import logging, upvits; {}logging.getLogger('upvits.toolchain').warning('a message')"
    for setup, shown in (("", False), ("logging.basicConfig(); ", True)):
        command = [sys.executable, "-c", code.format(setup)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ("a message" in done.stderr) is shown


def test_compensation_is_the_default_and_says_what_it_needs() -> None:
    assert inspect.signature(upvits.prune).parameters["compensate"].default is True
    model = upvits.create_model("pvtv2_b0", num_classes=5)
    plan = upvits.plan(model, upvits.score(model, method="magnitude"), ratio=0.5)
    with pytest.raises(UserError, match="needs images") as error:
        upvits.prune(model, plan)
    assert "`images=`" in error.value.fix
    assert "`compensate=False`" in error.value.fix
    other = upvits.create_model("pvtv2_b0", num_classes=5)
    with pytest.raises(UserError, match="another network"):
        upvits.prune(other, plan, torch.zeros(12, 3, 64, 64))


def test_a_plan_by_other_scores_keeps_its_units() -> None:
    model = upvits.create_model("pvtv2_b0", weights="demo")
    plan = upvits.plan(model, upvits.score(model, method="magnitude"), ratio=0.5)
    assert with_units_for_refit(model, plan, torch.zeros(12, 3, 64, 64)) is plan


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in two classes, which its brightness tells apart."""
    folder, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    for split, count in (("train", 36), ("val", 12)):
        for number, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(90 * number, 90 * number + 150, (64, 64, 3), generator=generator)
                Image.fromarray(pixels.byte().numpy()).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def weights(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small PVTv2 that knows these classes."""
    sizes = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
    torch.manual_seed(0)
    model = upvits.create_model("pvtv2_b0", num_classes=2, image_size=64, model_args=sizes)
    data = upvits.open_data(f"imagefolder:{images}")
    batch, labels = next(iter(batches(data.train, preprocess_of(model), 72)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    folder = tmp_path_factory.mktemp("weights") / "model"
    upvits.save(model.eval(), folder, model_args=sizes)
    return folder


@pytest.mark.parametrize("planner", ["uniform", "global"])
def test_the_steps_give_what_the_command_line_gives(
    planner: typing.Literal["uniform", "global"], images: Path, weights: Path, tmp_path: Path
) -> None:
    components: tuple[typing.Literal["embed", "attention", "ffn"], ...] = ("embed", "attention", "ffn")
    recipe = {
        "model": "pvtv2_b0",
        "weights": str(weights),
        "data": f"imagefolder:{images}",
        "plan": {"ratio": 0.5, "planner": planner, "components": components},
    }
    run = tmp_path / "run"
    upvits.build(recipe, run, until="prune")

    model = upvits.create_model("pvtv2_b0", weights=str(weights))
    data = upvits.open_data(f"imagefolder:{images}")
    batch = upvits.calibration_images(model, data)
    plan = upvits.plan(model, upvits.score(model, batch), ratio=0.5, planner=planner, images=batch)
    small = upvits.prune(model, plan, batch)

    assert plan.widths == upvits.PruningPlan.load(run / "2-prune/plan.json").widths
    assert weights_digest(small) == weights_digest(upvits.load(run / "2-prune/model"))
    after = json.loads((run / "2-prune/accuracy.json").read_text())["after_prune"]
    assert upvits.accuracy(small, data).top1 == after["top1"]
    assert after["top1"] > 90


@pytest.mark.slow
def test_the_demo_right_after_the_cut_is_as_good_as_on_the_command_line() -> None:
    model, data = upvits.create_model("pvtv2_b0", weights="demo"), upvits.open_data("demo")
    batch = upvits.calibration_images(model, data)
    plan = upvits.plan(model, upvits.score(model, batch[:64]), ratio=0.5)
    top1 = upvits.accuracy(upvits.prune(model, plan, batch), data).top1
    assert top1 == pytest.approx(98.08, abs=0.2)  # the report's figure before fine-tuning
