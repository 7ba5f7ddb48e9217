"""Predictions: what networks see in pictures is what PyTorch computes of them, wherever the networks come from."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tests.deploy.conftest import Exported
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.deploy.cli.app import app
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.predict.predictions import Predictions, figures_of, predict
from upvits.deploy.runtimes import BuildOptions, runtime_named
from upvits.deploy.store.artifacts import run_stage
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.structure.timm_config import update_config

LABELS = tuple(f"class {number}" for number in "abcdefghijkl")


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """The demo network, and one that does not answer like it; with names of classes."""
    networks = {"dense": toolchain.create_model("pvtv2_b0", weights="demo")}
    shallow = {"depths": (1, 1, 1, 1)}
    networks["pruned"] = toolchain.create_model(
        "pvtv2_b0", weights="random", num_classes=12, image_size=64, model_args=shallow
    )
    for network in networks.values():
        update_config(network, label_names=LABELS)
    return networks


@pytest.fixture(scope="module")
def run(networks: dict[str, nn.Module], demo_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of these, with engines of ONNX Runtime."""
    run, parts = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("parts")
    for name, network in networks.items():
        metadata = {"labels": json.dumps(LABELS), "variant": name}
        path = parts / f"export/{name}/model.onnx"
        if name == "dense":
            graph = onnx.load(demo_graph)
            update = {entry.key: entry.value for entry in graph.metadata_props} | metadata
            onnx.helper.set_model_props(graph, update)
            path.parent.mkdir(parents=True)
            onnx.save(graph, path)
        else:
            export_onnx(network, path, preprocess_of(network), metadata=metadata, uint8_input=True)
        runtime_named("onnxruntime").build(path, parts / f"engines/{name}", BuildOptions())

    def copy(name: str, folder: Path) -> None:
        shutil.copytree(parts / name, folder, dirs_exist_ok=True)

    exported = run_stage(run, "4-export", {}, {}, functools.partial(copy, "export"))
    inputs = {"onnx": exported.digest}
    run_stage(run, "5-engine/onnxruntime-fp32", {}, inputs, functools.partial(copy, "engines"))
    (run / "recipe.toml").write_text('model = "pvt_v2_b0"\n')
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of odd sizes, one of them no picture, one in a folder below."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    noise = np.random.default_rng(0)
    for name, width, height in (("a.png", 97, 151), ("b.png", 300, 64), ("more/c.png", 64, 64)):
        coarse = Image.fromarray(noise.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        coarse.resize((width, height)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    (folder / "notes.txt").write_text("no picture, and not asked for")
    return folder


def probabilities(network: nn.Module, path: Path) -> np.ndarray[Any, Any]:
    """Percent of every class, in PyTorch."""
    with Image.open(path) as image:
        tensor = preprocess_of(network).eval_transform()(image.convert("RGB"))
    with torch.inference_mode():
        return np.asarray(100 * network(tensor[None]).softmax(1)[0].numpy())


def hold(made: Predictions, name: str, network: nn.Module) -> None:
    """The five classes and their shares are those of the network in PyTorch."""
    for picture in made.pictures:
        shares = probabilities(network, Path(picture.path))
        top = picture.predictions[name].top
        assert [guess.index for guess in top] == list(np.argsort(-shares, kind="stable")[:5])
        assert [guess.label for guess in top] == [LABELS[guess.index] for guess in top]
        assert [guess.percent for guess in top] == pytest.approx([shares[guess.index] for guess in top], abs=0.05)
        assert picture.predictions[name].ms > 0


@pytest.mark.parametrize("engine", [{}, {"runtime": "onnxruntime"}, {"precision": "fp32"}])
def test_a_run_shows_both_networks(
    run: Path, networks: dict[str, nn.Module], pictures: Path, engine: dict[str, str]
) -> None:
    """The pruned one takes raw pixels: its answers differ by their rounding."""
    made = predict(run, [pictures], **engine)  # type: ignore[arg-type]
    assert [Path(one.path).name for one in made.pictures] == ["a.png", "b.png", "c.png"]
    assert [Path(one.path).name for one in made.unread] == ["broken.jpg"]
    assert made.networks == {"dense": "onnxruntime fp32", "pruned": "onnxruntime fp32"}
    hold(made, "dense", networks["dense"])
    same = 0
    for picture in made.pictures:
        shares = probabilities(networks["pruned"], Path(picture.path))
        assert picture.predictions["pruned"].top[0].percent == pytest.approx(shares.max(), abs=1)
        firsts = {prediction.top[0].index for prediction in picture.predictions.values()}
        assert picture.agree == (len(firsts) == 1)
        same += picture.agree
    assert made.agreement == pytest.approx(100 * same / 3)


def test_folders_and_files_answer_like_runs(
    run: Path, networks: dict[str, nn.Module], pictures: Path, tmp_path: Path
) -> None:
    toolchain.save(networks["dense"], tmp_path / "folder")
    hold(predict(tmp_path / "folder", [pictures]), "network", networks["dense"])
    made = predict(run / "4-export/dense/model.onnx", [pictures / "a.png", pictures / "a.png"])
    assert (len(made.pictures), made.agreement) == (1, None)
    hold(made, "dense", networks["dense"])


def test_a_class_map_names_the_classes(run: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"one": 0, "last": 11}')
    made = predict(run, [pictures / "a.png"], class_map=tmp_path / "map.json")
    known = {0: "one", 11: "last"}
    for guess in made.pictures[0].predictions["dense"].top:
        assert guess.label == known.get(guess.index, f"class {guess.index}")
    (tmp_path / "map.json").write_text('{"one": 12}')
    with pytest.raises(UserError, match=r"numbers up to 12, but .* has 12 classes"):
        predict(run, [pictures / "a.png"], class_map=tmp_path / "map.json")


def changed(source: Path, target: Path, **entries: str | None) -> Path:
    """A copy of an ONNX file with other entries in its metadata; None removes one."""
    model = onnx.load(source)
    told = {entry.key: entry.value for entry in model.metadata_props} | entries
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: value for key, value in told.items() if value is not None})
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": None}, "does not say what its 12 classes are called"),
        ({"labels": '["one"]'}, "does not say what its 12 classes are called"),
        ({"labels": "cat, dog"}, "is not valid"),
        ({"labels": '[["cat"]]'}, "is not valid"),
        ({"mean": None, "crop_pct": None}, "does not say how pictures are prepared"),
        ({"mean": "null"}, "no value for mean"),
        ({"mean": "[0.5]"}, "of another one"),
        ({"std": "[0, 0, 0]"}, "is not valid"),
        ({"input_size": "[3, 4000, 4000]"}, "of another one"),
        ({"input_size": "[1, 64, 64]"}, "of another one"),
        ({"crop_mode": 'center", "x": "'}, "is not valid"),
        ({"interpolation": "[" * 100_000}, "is not valid"),
    ],
)
def test_files_that_say_too_little_or_nonsense_are_refused(
    run: Path, pictures: Path, tmp_path: Path, entries: dict[str, str | None], message: str
) -> None:
    path = changed(run / "4-export/dense/model.onnx", tmp_path / "model.onnx", **entries)
    with pytest.raises(UserError, match=message) as caught:
        predict(path, [pictures])
    assert caught.value.fix


def test_what_is_no_source_is_refused(run: Path, vit: Exported, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("")
    for source, arguments, message, advice in (
        (pictures, {}, "nothing to predict with", "Name a run"),
        (tmp_path / "absent", {}, "There is no", "Name a run"),
        (tmp_path, {}, "has no .*model.onnx yet", "upvits-deploy export"),
        (run / "5-engine/onnxruntime-fp32/dense", {}, "engine alone", "--runtime onnxruntime --precision fp32"),
        (run, {"precision": "int8"}, "no engine of onnxruntime in int8", "--runtime"),
        (run / "4-export/dense/model.onnx", {"runtime": "onnxruntime"}, "no engines to choose", "name the run"),
        (vit.report.path, {}, "does not say what its 7 classes", "class_map"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            predict(source, [pictures], **arguments)  # type: ignore[arg-type]
        assert advice in caught.value.fix
    with pytest.raises(UserError, match="None of the 1 pictures can be read"):
        predict(run, [pictures / "broken.jpg"])
    with pytest.raises(UserError, match="no pictures in"):
        predict(run, [tmp_path])


def test_the_command_prints_tables_json_and_a_page(run: Path, pictures: Path, tmp_path: Path) -> None:
    def call(*arguments: str | Path) -> Any:
        return CliRunner().invoke(app, ["predict", *map(str, arguments)], env={"COLUMNS": "80"})

    page = tmp_path / "page.html"
    result = call(run, pictures / "a.png", pictures / "b.png", "-o", page)
    assert result.exit_code == 0, result.output
    *tables, place = result.stdout.splitlines()
    assert max(map(len, tables)) <= 80
    assert place == f"The page is {page}"
    assert "dense and pruned have the same first class on" in result.stdout
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 2
    assert text.count("<table>") == 4
    assert "http" not in text.replace("http://www.w3.org", "")
    assert call(run, pictures / "a.png", "-o", page).exit_code == 0  # its own page is replaced
    page.write_text("mine")
    refused = call(run, pictures / "a.png", "-o", page)
    assert isinstance(refused.exception, UserError)
    assert page.read_text() == "mine"
    result = call(run, pictures, "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, len(document["unread"]), len(document["pictures"])) == (2, 1, 3)
    assert set(document["pictures"][0]) == {"path", "predictions", "agree"}


def test_names_of_classes_are_only_text(run: Path, pictures: Path, tmp_path: Path) -> None:
    names = ["<b>\x1b[31mred</b>"] * 12
    path = changed(run / "4-export/dense/model.onnx", tmp_path / "model.onnx", labels=json.dumps(names))
    arguments = ["predict", str(path), str(pictures / "a.png"), "-o", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0
    text = (tmp_path / "page.html").read_text()
    assert "\x1b" not in result.output
    assert "\x1b" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;?[31mred" in text


def test_figures_are_plain_values(run: Path, pictures: Path) -> None:
    made = predict(run, [pictures / "a.png"], thumbnails=True)
    assert made.pictures[0].thumbnail
    assert json.loads(json.dumps(figures_of(made))) == figures_of(made)


@pytest.mark.parametrize("name", ["missing.png", "https://example.com/cat.jpg"])
def test_pictures_that_are_not_there_end_it_before_anything_is_opened(run: Path, pictures: Path, name: str) -> None:
    with pytest.raises(UserError, match="There is no picture") as caught:
        predict(run, [pictures / "a.png", Path(name)])
    assert ("Download" in caught.value.fix) == name.startswith("http")


def test_a_checkpoint_alone_is_nothing_to_predict_with(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    with pytest.raises(UserError, match="nothing to predict with") as caught:
        predict(tmp_path / "w.pth", [pictures / "a.png"])
    assert "upvits.save" in caught.value.fix


def test_pictures_of_more_than_eight_bits_have_one_scale(run: Path, tmp_path: Path) -> None:
    """The dark one alone would be as bright as the other."""
    for name, brightest in (("bright", 65_535), ("dark", 4095)):
        ramp = np.tile(np.linspace(0, brightest, 64), (64, 1)).astype(np.uint16)
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    black = tmp_path / "black.png"
    Image.fromarray(np.tile(np.linspace(0, 4095, 64) * 255 / 65_535, (64, 1)).astype(np.uint8)).save(black)
    both = predict(run, [tmp_path / "bright.png", tmp_path / "dark.png", black])
    alone = predict(run, [tmp_path / "dark.png"])
    dark, same = both.pictures[1].predictions["dense"].top, both.pictures[2].predictions["dense"].top
    assert [guess.percent for guess in dark] == pytest.approx([guess.percent for guess in same], abs=0.2)
    assert dark[0].percent != pytest.approx(alone.pictures[0].predictions["dense"].top[0].percent, abs=0.2)
