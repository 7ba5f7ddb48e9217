"""The graph of a detector: its parts, its shapes, its precisions, and engines that are built from it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.detection.conftest import detect, refused, small_retinanet
from upvits.calib_data import Preprocess
from upvits.deploy.detectors.export import SHAPES, in_shape, whole_graph
from upvits.deploy.detectors.graph import BOX_OUTPUTS, LEVEL_OUTPUTS, network_of, with_network
from upvits.deploy.detectors.predictions import agreement, by_session, by_torch
from upvits.deploy.detectors.suppression import Limits, suppress
from upvits.deploy.graphs.files import load_model
from upvits.deploy.precision import convert
from upvits.deploy.runtimes import RUNTIMES, BatchProfile, BuildOptions, open_model
from upvits.detection.decode import DecodedBoxes, Levels
from upvits.detection.detector import DetectorInfo, save_detector
from upvits.detection.pictures import Fitted, fit

pytestmark = pytest.mark.usefixtures("mmdet")

SIZE = (64, 96)
IMAGENET = Preprocess((3, *SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 1.0, "border")


def images(count: int = 2) -> np.ndarray:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(3)).numpy()


def pictures(count: int) -> list[Fitted]:
    height, width = SIZE
    return [
        Fitted(i, torch.from_numpy(pixels), (1, 1), (width, height), (width, height))
        for i, pixels in enumerate(images(count))
    ]


@pytest.fixture(scope="module")
def files(mmdet: None, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One detector in all shapes."""
    detector, model = small_retinanet(folders["uniform"], 3)
    info = DetectorInfo(model, ("a", "b", "c"), (1, 5, 9), (96, 64))
    place = tmp_path_factory.mktemp("onnx")
    whole = whole_graph(detector, info, SIZE)
    for shape in SHAPES:
        onnx.save(in_shape(whole, shape, SIZE, info), place / f"{shape}.onnx")
    return {shape: place / f"{shape}.onnx" for shape in SHAPES}


def test_raw_gives_the_levels(files: dict[str, Path], folders: dict[str, Path]) -> None:
    detector, _ = small_retinanet(folders["uniform"], 3)
    with torch.inference_mode():
        levels = Levels(detector)(torch.from_numpy(images(3)))
    with open_model(load_model(files["raw"])) as session:
        outputs = session.run({"images": images(3)})
    assert tuple(outputs) == LEVEL_OUTPUTS
    for name, level in zip(LEVEL_OUTPUTS, levels, strict=True):
        assert np.allclose(outputs[name], level.numpy(), rtol=1e-3, atol=1e-4)


def test_decode_agrees_with_pytorch_box_by_box(files: dict[str, Path], folders: dict[str, Path]) -> None:
    detector, _ = small_retinanet(folders["uniform"], 3)
    model = load_model(files["decode"])
    assert tuple(value.name for value in model.graph.output) == BOX_OUTPUTS
    with open_model(model) as session:
        agreed = agreement(by_torch(DecodedBoxes(detector, SIZE).eval()), by_session(session), pictures(5))
    assert agreed.boxes > 50
    assert agreed.matched >= 0.99 * agreed.boxes
    assert agreed.max_score_difference <= 1e-3


def test_suppression_in_the_graph_is_that_on_the_host(files: dict[str, Path]) -> None:
    with open_model(load_model(files["decode"])) as decode, open_model(load_model(files["decode+nms"])) as whole:
        boxes, scores, labels = by_session(decode)(images())
        outputs = whole.run({"images": images()})
    for index in range(2):
        kept, sure, kind = suppress(boxes[index], scores[index], labels[index])
        mine = outputs["image"] == index
        order = np.argsort(-outputs["scores"][mine], kind="stable")
        best_scores = np.sort(sure)[::-1][:20]
        assert np.allclose(outputs["scores"][mine][order][:20], best_scores, atol=1e-5)
        best = outputs["boxes"][mine][order][0]
        assert np.allclose(best, kept[int(np.argmax(sure))], atol=1e-2)
        assert int(outputs["labels"][mine][order][0]) == int(kind[int(np.argmax(sure))])


def test_a_network_in_another_precision_goes_back_into_the_graph(files: dict[str, Path]) -> None:
    decode = load_model(files["decode"])
    network = network_of(decode)
    assert tuple(value.name for value in network.graph.output) == LEVEL_OUTPUTS
    with open_model(decode) as session, open_model(with_network(decode, network)) as same:
        for before, after in zip(by_session(session)(images()), by_session(same)(images()), strict=True):
            assert np.array_equal(np.asarray(before), np.asarray(after))
    half = with_network(decode, convert(network, "fp16").model)
    types = {value.name: value.type.tensor_type.elem_type for value in half.graph.output}
    assert types["boxes"] == onnx.TensorProto.FLOAT
    tail = [node for node in half.graph.node if node.op_type in ("TopK", "Exp")]
    inferred = onnx.shape_inference.infer_shapes(half)
    known = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert tail
    assert all(known.get(node.input[0], onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT for node in tail)


@pytest.mark.parametrize("shape", ["raw", "decode"])
def test_tensorrt_rtx_builds_it(shape: str, files: dict[str, Path], tmp_path: Path) -> None:
    runtime = RUNTIMES["tensorrt-rtx"]
    missing = runtime.missing_to_build()
    if missing is not None:
        pytest.skip(missing.why)
    model = load_model(files[shape])
    network = convert(model if shape == "raw" else network_of(model), "fp16").model
    onnx.save(network if shape == "raw" else with_network(model, network), tmp_path / "model.onnx")
    options = BuildOptions(precision="fp16", batch=BatchProfile(1, 1, 4))
    engine = runtime.build(tmp_path / "model.onnx", tmp_path / "engine", options)
    assert engine.bytes > 100_000


def test_openvino_runs_it(files: dict[str, Path], tmp_path: Path) -> None:
    runtime = RUNTIMES["openvino"]
    missing = runtime.missing_to_build()
    if missing is not None:
        pytest.skip(missing.why)
    runtime.build(files["decode"], tmp_path / "engine", BuildOptions(batch=BatchProfile(1, 1, 4)))
    with runtime.open(tmp_path / "engine") as engine, open_model(load_model(files["decode"])) as session:
        agreed = agreement(by_session(session), by_session(engine), pictures(2))
    assert agreed.matched >= 0.98 * agreed.boxes > 10


def test_what_cannot_be_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    detector, model = small_retinanet(folders["dense"], 3)
    save_detector(detector, DetectorInfo(model, ("a", "b", "c"), (1, 5, 9), (96, 64)), tmp_path / "detector")
    with refused("Unknown shape"):
        detect("export", tmp_path / "detector", "-o", tmp_path / "x.onnx", "--shape", "boxes")
    assert not (tmp_path / "x.onnx").exists()


def test_the_example_of_a_package_draws_what_the_detector_finds(
    files: dict[str, Path], scenes: Path, tmp_path: Path, repository: Path
) -> None:
    script = tmp_path / "run_detector.py"
    script.write_text((repository / "deploy/templates/package/run_detector.jinja").read_text())
    assert len(script.read_text().splitlines()) <= 40
    (tmp_path / "detector").mkdir()
    shutil.copy(files["decode"], tmp_path / "detector/model.onnx")
    picture = next((scenes / "val/images").iterdir())
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'deploy', 'detection', 'toolchain', 'mmdet']))"
    code = f"{blocked}; import runpy; sys.argv = ['x', {str(picture)!r}]; runpy.run_path({str(script)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with Image.open(picture) as opened:
        image = fit(opened, 0, IMAGENET)
    with open_model(load_model(files["decode"])) as session:
        boxes, scores, labels = (output[0] for output in by_session(session)(image.pixels.numpy()[None]))
    _, sure, kind = suppress(boxes, scores, labels, Limits(score=0.3, boxes=10_000))
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines
    assert [line[1] for line in lines] == ["abc"[label] for label in kind]
    assert np.allclose([float(line[0]) for line in lines], sure, atol=0.006)
    with Image.open(tmp_path / "detected.png") as drawn, Image.open(picture) as opened:
        assert drawn.size == opened.size
        assert np.abs(np.asarray(drawn, np.int16) - np.asarray(opened.convert("RGB"), np.int16)).max() > 50
