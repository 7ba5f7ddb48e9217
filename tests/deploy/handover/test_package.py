"""The hand-over folder: it is whole, it runs without this tool, and it says nothing but what the run said."""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from PIL import Image

from tests.deploy.conftest import Exported
from tests.deploy.handover.conftest import BEST, LABELS, MakeRun
from upvits import toolchain
from upvits.calib_data import Preprocess
from upvits.calib_data.errors import UserError
from upvits.deploy.graphs.surgery import add_uint8_input
from upvits.deploy.handover.document import PACKAGE
from upvits.deploy.handover.package import SUMS, package
from upvits.deploy.handover.texts import _render
from upvits.deploy.predict.predictions import predict
from upvits.deploy.runtimes import BuildOptions, runtime_named
from upvits.deploy.store.artifacts import run_stage

# Nothing of ours, no PyTorch and no exporter: what the reader of a package has.
ALONE = """
import json, runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Blocked())
answers = []
for picture in sys.argv[2:]:
    sys.argv[1:] = [picture]
    answers.append(runpy.run_path({script!r})["logits"].tolist())
print(json.dumps(answers))
"""
OURS = (
    "upvits",
    "calib_data",
    "toolchain",
    "detection",
    "deploy",
    "benchmarks",
    "torch",
    "timm",
    "torchvision",
    "onnx",
)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Noise in odd sizes, lossless."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    paths = []
    for width, height in ((32, 32), (97, 151), (40, 33), (35, 64), (300, 210)):
        paths.append(folder / f"{width}x{height}.png")
        coarse = Image.fromarray(noise.integers(0, 256, (height // 4, width // 4, 3), np.uint8))
        coarse.resize((width, height)).save(paths[-1])
    return paths


def run_alone(script: Path, pictures: list[Path], blocked: tuple[str, ...] = OURS) -> np.ndarray[Any, Any]:
    """Logits [N, K] of an example, run where this tool cannot be imported."""
    code = ALONE.format(blocked=set(blocked), script=str(script))
    command = [sys.executable, "-I", "-c", code, "-", *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 * len(pictures) + 1  # the five most likely classes of each, and ours
    return np.array(json.loads(lines[-1]))[:, 0]


def expected(model: torch.nn.Module, preprocess: Preprocess, pictures: list[Path]) -> np.ndarray[Any, Any]:
    transform = preprocess.eval_transform()
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in pictures])
    with torch.inference_mode():
        return np.asarray(model(images).numpy())


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_onnxruntime_example_answers_as_pytorch_does(
    make_run: MakeRun, vit: Exported, pictures: list[Path]
) -> None:
    folder = package(make_run())
    logits = run_alone(folder / "run_onnxruntime.py", pictures)
    reference = expected(vit.model, vit.preprocess, pictures)
    assert np.abs(logits - reference).max() < 1e-4
    assert (logits.argmax(1) == reference.argmax(1)).all()
    assert len(set(logits.argmax(1))) > 1 or np.ptp(logits[:, 0]) > 1e-2  # the pictures do decide


@pytest.mark.parametrize("engine", [{}, {"runtime": "onnxruntime"}])
def test_predictions_of_a_package_are_those_of_pytorch(
    make_run: MakeRun, vit: Exported, pictures: list[Path], engine: dict[str, str]
) -> None:
    made = predict(package(make_run()), pictures, **engine)  # type: ignore[arg-type]
    best = expected(vit.model, vit.preprocess, pictures).argmax(1)
    assert [one.predictions["pruned"].top[0].label for one in made.pictures] == [LABELS[index] for index in best]


def test_it_names_the_likeliest_class_first(make_run: MakeRun, vit: Exported, pictures: list[Path]) -> None:
    folder = package(make_run())
    script = folder / "run_onnxruntime.py"
    done = subprocess.run([sys.executable, script, pictures[1]], capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0].split()
    logits = expected(vit.model, vit.preprocess, pictures[1:2])[0]
    assert first[1] == LABELS[logits.argmax()]
    assert float(first[0].rstrip("%")) == pytest.approx(100 / np.exp(logits - logits.max()).sum(), abs=0.01)


def test_stock_timm_loads_and_answers(
    make_run: MakeRun, vit: Exported, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = package(make_run()) / "run_timm.py"
    reference = expected(vit.model, vit.preprocess, pictures)
    for picture, logits in zip(pictures, reference, strict=True):
        monkeypatch.setattr(sys, "argv", [str(script), str(picture)])
        assert np.abs(runpy.run_path(str(script))["logits"][0].numpy() - logits).max() < 1e-5
        assert capsys.readouterr().out.splitlines()[0].split()[1] == LABELS[logits.argmax()]
    imported = {
        n.name for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Import) for n in node.names
    }
    assert imported == {"json", "sys", "timm", "torch"}


def test_the_openvino_example_runs_the_engine_as_it_was_built(
    make_run: MakeRun, vit: Exported, pictures: list[Path]
) -> None:
    pytest.importorskip("openvino")
    run = make_run()
    runtime, onnx_path = runtime_named("openvino"), run / "4-export/pruned/model.onnx"

    def work(folder: Path) -> None:
        runtime.build(onnx_path, folder / "pruned", BuildOptions())

    run_stage(run, "5-engine/openvino-fp32", {}, {}, work)
    report = json.loads((run / "report.json").read_text())
    path = "5-engine/openvino-fp32/pruned/model.onnx"
    report["engines"].append({**report["engines"][0], "runtime": "openvino", "path": path})
    (run / "report.json").write_text(json.dumps(report))
    folder = package(run)
    assert "openvino==" in (folder / "requirements/openvino.txt").read_text()
    logits = run_alone(folder / "run_openvino.py", pictures)
    assert np.abs(logits - expected(vit.model, vit.preprocess, pictures)).max() < 1e-3  # in bf16 it would be 1e-2


def test_options_of_a_provider_go_into_the_script(make_run: MakeRun) -> None:
    folder = package(make_run((("onnxruntime-cuda", "fp16", ()),)))
    script = (folder / "run_onnxruntime_cuda.py").read_text()
    assert 'wanted, options = "CUDAExecutionProvider", {"use_tf32": "0"}' in script
    assert "onnxruntime-gpu[cuda,cudnn]==" in (folder / "requirements/onnxruntime_cuda.txt").read_text()


@pytest.mark.parametrize("runtime", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_an_example_for_gpus_does_not_fall_back_without_a_word(
    runtime: str, make_run: MakeRun, vit: Exported, pictures: list[Path], tmp_path: Path
) -> None:
    folder = package(make_run(((runtime, "fp32", ()),)))
    (tmp_path / "tensorrt.py").touch()  # its libraries are not there either
    script = folder / f"run_{runtime.replace('-', '_')}.py"
    here = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command: list[str | Path] = [sys.executable, script, pictures[0]]
    done = subprocess.run(command, capture_output=True, text=True, env=here)
    assert done.returncode == 3, done.stderr
    assert "There is no GPU that works for" in done.stderr
    assert "%" not in done.stdout  # no answer
    on_cpu = subprocess.run([*command, "--cpu"], capture_output=True, text=True, env=here, check=True)
    assert "runs on CPUExecutionProvider" in on_cpu.stderr
    best = expected(vit.model, vit.preprocess, pictures[:1])[0].argmax()
    assert on_cpu.stdout.splitlines()[0].split()[1] == LABELS[best]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("crop_pct", "crop_mode"), [(0.875, "center"), (0.9, "center"), (1.0, "center"), (0.9, "squash")]
)
def test_pictures_are_prepared_bit_for_bit_as_in_evaluation(
    interpolation: str, crop_pct: float, crop_mode: str, pictures: list[Path], tmp_path: Path
) -> None:
    preprocess = Preprocess(
        (3, 37, 37), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation, crop_pct, crop_mode
    )
    for pixels in (False, True):
        text = _render("_picture", squash=crop_mode == "squash", labelled=False, pixels=pixels, input="images")
        spec = {"resize": int(37 // crop_pct), "size": 37, "interpolation": interpolation}
        spec |= {"mean": preprocess.mean, "std": preprocess.std}
        (tmp_path / "preprocess.json").write_text(json.dumps(spec))
        for path in pictures:
            names: dict[str, Any] = {"__file__": str(tmp_path / "x.py"), "np": np, "json": json, "Image": Image}
            names |= {"Path": Path, "sys": type("sys", (), {"argv": ["x", str(path)]})}
            exec(text, names)
            wanted = preprocess.eval_transform()(Image.open(path).convert("RGB")).numpy()
            if pixels:
                found = ((names["images"][0] / 255 - preprocess.mean) / preprocess.std).transpose(2, 0, 1)
                np.testing.assert_allclose(found, wanted, atol=1e-5)
            else:
                np.testing.assert_array_equal(names["images"][0], wanted)


def test_raw_pixels_go_in_where_the_model_normalises(vit: Exported, make_run: MakeRun, pictures: list[Path]) -> None:
    run = make_run()
    proto = onnx.load(run / "4-export/pruned/model.onnx")
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    graph = gs.import_onnx(proto)
    add_uint8_input(graph, vit.preprocess.mean, vit.preprocess.std)
    raw = gs.export_onnx(graph.cleanup().toposort())
    onnx.helper.set_model_props(raw, metadata)

    def work(folder: Path) -> None:
        (folder / "pruned").mkdir()
        onnx.save(raw, folder / "pruned/model.onnx")

    run_stage(run, "4-export", {"uint8_input": True}, {}, work)
    (run / "5-engine/onnxruntime-fp32").rename(run / "away")
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "engines": [], "best": []}))
    folder = package(run)
    spec = json.loads((folder / "preprocess.json").read_text())
    assert (spec["input"], spec["dtype"], spec["layout"]) == ("pixels", "uint8", "NHWC")
    logits = run_alone(folder / "run_onnxruntime.py", pictures)
    assert np.abs(logits - expected(vit.model, vit.preprocess, pictures)).max() < 1e-3


def test_every_file_is_in_the_sums_and_they_hold(make_run: MakeRun) -> None:
    folder = package(make_run())
    listed = {line.split("  ", 1)[1] for line in (folder / SUMS).read_text().splitlines()}
    assert listed == set(files_in(folder)) - {SUMS}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=True)
        (folder / "labels.json").write_text("[]")
        assert subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True).returncode != 0


def test_only_the_best_measured_precision_and_everything_for_other_devices(make_run: MakeRun) -> None:
    engines = (
        ("tensorrt-rtx", "fp16", ("sm86", "sm120")),
        ("tensorrt-rtx", "int8", ("sm86",)),
        ("tensorrt", "fp16", ("sm89",)),
    )
    folder = package(make_run(engines))
    document = json.loads((folder / PACKAGE).read_text())
    handed = {(engine["runtime"], engine["precision"], tuple(engine["targets"])) for engine in document["engines"]}
    assert handed == {("onnxruntime", "fp32", ()), *engines}
    inside = files_in(folder)
    assert all(engine["file"] in inside for engine in document["engines"])
    assert inside["engines/tensorrt-rtx-fp16/engine.plan"] == b"a plan"
    assert json.loads(inside["engines/tensorrt-rtx-int8/build.json"])["targets"] == ["sm86"]
    readme, card = inside["README.md"].decode(), inside["MODEL_CARD.md"].decode()
    assert "for sm86, sm120 and tensorrt-rtx 1.2.3 only" in readme
    assert "engines/tensorrt-rtx-int8/engine.plan` was built but not run: it is for sm86" in card


def test_the_best_of_cpus_in_int8_is_served_too(make_run: MakeRun) -> None:
    int8 = BEST.model_copy(update={"precision": "int8"})
    folder = package(make_run((("onnxruntime", "int8", ()),), measured={"fp32": 2.0, "int8": 1.0}, best=[int8]))
    assert json.loads((folder / PACKAGE).read_text())["triton"] == ["deit_tiny_onnx", "deit_tiny_onnx_int8"]
    assert files_in(folder)["triton/deit_tiny_onnx_int8/1/model.onnx"] == b"a plan"
    assert "KIND_CPU" in (folder / "triton/deit_tiny_onnx_int8/config.pbtxt").read_text()
    assert "`deit_tiny_onnx_int8` runs in int8 on the CPU." in (folder / "README.md").read_text()
    card = (folder / "MODEL_CARD.md").read_text()
    assert "are against the fp32 graph, which was held against PyTorch." in card
    assert "- int8 calibrated on 64 images (digest 0123456789ab, method max)." in card


def test_an_engine_that_was_measured_and_is_not_the_best_stays_behind(make_run: MakeRun) -> None:
    folder = package(make_run(best=[BEST.model_copy(update={"precision": "int8"})]))
    assert json.loads((folder / PACKAGE).read_text())["engines"] == []
    assert "model/model.onnx" in (folder / "run_onnxruntime.py").read_text()  # there is always something to run


def test_figures_are_those_of_the_report(make_run: MakeRun) -> None:
    card = (package(make_run()) / "MODEL_CARD.md").read_text()
    for figure in ("5 000 000", "2 000 000", "91.50 %", "90.25 %", "40.50 %", "97.00 %", "| 4.000 | 2.000 | 2.00 |"):
        assert figure in card
    row = "| pruned | onnxruntime | int8 | 90.00 % | 0.25 | 98.75 % | 33.3 dB | 80 | the engine itself |"
    assert row in card
    for text in ("a processor", "top-1 on 80 validation images", "Not int8: It is slower.", "tensorrt was left out"):
        assert text in card
    assert "cut, without fine-tuning afterwards." in card  # the recipe names no epochs
    assert "To be filled in" in card.partition("## Licence")[2].splitlines()[2]
    for line in ('data = "imagefolder:shop"', 'weights = "weights.safetensors"', "- Images: imagefolder:shop"):
        assert line in card


def test_what_the_readme_names_is_there(make_run: MakeRun) -> None:
    folder = package(make_run((("tensorrt-rtx", "fp16", ("sm86",)),)))
    named = re.findall(
        r"^\| `(?:python )?([\w./-]+)|-r ([\w./-]+)|, `([\w-]+\.json)`", (folder / "README.md").read_text(), re.M
    )
    paths = {path for found in named for path in found if path}
    assert {"run_onnxruntime.py", "run_tensorrt_rtx.py", "run_timm.py", "requirements/timm.txt", "pytorch/"} <= paths
    assert [path for path in paths if not (folder / path).exists()] == []
    linked = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text())
    assert sorted(linked) == ["MODEL_CARD.md", "report.html"]


def test_no_file_names_a_place_on_this_machine(make_run: MakeRun, repository: Path) -> None:
    run = make_run()
    for name, content in files_in(package(run)).items():
        for place in (str(run.parent), str(repository), str(Path.home()), "/home/some body", "/srv/photos"):
            assert place.encode() not in content, f"{name} names {place}"


def test_requirements_are_pinned_to_what_is_here(make_run: MakeRun) -> None:
    folder = package(make_run((("tensorrt-rtx", "fp16", ("sm86",)),)))
    lines = {path.stem: path.read_text().splitlines() for path in (folder / "requirements").iterdir()}
    assert set(lines) == {"onnxruntime", "tensorrt_rtx", "timm"}
    assert f"numpy=={importlib.metadata.version('numpy')}" in lines["onnxruntime"]
    assert any(line.startswith("onnxruntime==1.") for line in lines["onnxruntime"])
    assert "tensorrt-rtx==1.2.3" in lines["tensorrt_rtx"]
    assert all("==" in line for found in lines.values() for line in found if not line.startswith("cuda"))


def test_examples_are_short_and_tensorrt_calls_exist(make_run: MakeRun) -> None:
    folder = package(make_run((("tensorrt-rtx", "fp16", ("sm86",)), ("tensorrt", "fp16", ("sm89",)))))
    for path in folder.glob("run_*.py"):
        assert len(path.read_text().splitlines()) <= 45, path.name
        assert "{" not in ast.get_docstring(ast.parse(path.read_text()))  # type: ignore[operator]
    plain = (folder / "run_tensorrt.py").read_text()
    twin = (folder / "run_tensorrt_rtx.py").read_text()
    assert plain.replace("tensorrt", "") != twin
    assert "import tensorrt as trt" in plain
    trt = pytest.importorskip("tensorrt_rtx")
    cuda = pytest.importorskip("cuda.bindings.runtime")
    homes = {"trt": trt, "cuda": cuda, "engine": trt.ICudaEngine, "context": trt.IExecutionContext}
    homes |= {"cuda.cudaMemcpyKind": cuda.cudaMemcpyKind, "trt.Runtime(trt.Logger())": trt.Runtime}
    used = [n for n in ast.walk(ast.parse(twin)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in homes]
    assert {ast.unparse(n.value) for n in used} == set(homes)
    assert [ast.unparse(n) for n in used if not hasattr(homes[ast.unparse(n.value)], n.attr)] == []


CALLS_OF_CUDA = (
    "cudaGetDeviceCount", "cudaStreamCreate", "cudaMalloc", "cudaMalloc", "cudaMemcpy", "cudaStreamSynchronize",
    "cudaMemcpy",
)  # fmt: skip
RUNS_IT = """
import runpy, sys, types, numpy as np
calls, failing, refusing = [], int(sys.argv[1]), sys.argv[2]
class Code(int):
    name = "cudaErrorOfATest"
def cuda_call(name):
    def call(*arguments):
        calls.append(name)
        return (Code(len(calls) - 1 == failing), 7)
    return call
class Context:
    def __getattr__(self, name):
        return lambda *given: (1, 7) if name == "get_tensor_shape" else name != refusing
class Engine:
    create_execution_context = lambda self: Context()
class Runtime:
    def __init__(self, log): pass
    deserialize_cuda_engine = lambda self, plan: None if refusing == "deserialize" else Engine()
runtime = types.SimpleNamespace(
    cudaError_t=types.SimpleNamespace(cudaSuccess=0),
    cudaMemcpyKind=types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
    **{name: cuda_call(name) for name in NAMES},
)
sys.modules["tensorrt_rtx"] = types.SimpleNamespace(Runtime=Runtime, Logger=lambda: None)
sys.modules["cuda"] = sys.modules["cuda.bindings"] = types.SimpleNamespace(runtime=runtime)
sys.argv = sys.argv[3:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(calls)
"""


def test_the_tensorrt_example_checks_every_call(make_run: MakeRun, pictures: list[Path]) -> None:
    folder = package(make_run((("tensorrt-rtx", "fp16", ("sm86",)),)))

    def run(failing: int, refusing: str = "-") -> subprocess.CompletedProcess[str]:
        code = RUNS_IT.replace("NAMES", repr(set(CALLS_OF_CUDA)))
        command: list[str | Path] = [sys.executable, "-c", code, str(failing), refusing]
        command += [folder / "run_tensorrt_rtx.py", pictures[0]]
        return subprocess.run(command, capture_output=True, text=True)

    whole = run(-1)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.splitlines()[-1] == str(list(CALLS_OF_CUDA))
    for number in range(len(CALLS_OF_CUDA)):
        done = run(number)
        assert (done.returncode, "cudaErrorOfATest" in done.stderr) == (3, True), CALLS_OF_CUDA[number]
        assert done.stdout.splitlines() == [str(list(CALLS_OF_CUDA[: number + 1]))]
    for refusing, said in (
        ("deserialize", "This engine is for sm86 and tensorrt-rtx 1.2.3."),
        ("set_input_shape", "does not take one picture"),
        ("execute_async_v3", "did not run"),
    ):
        done = run(-1, refusing)
        assert (done.returncode, said in done.stderr) == (1, True), refusing


def test_the_tensorrt_rtx_example_says_that_there_is_no_gpu(make_run: MakeRun, pictures: list[Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings")
    folder = package(make_run((("tensorrt-rtx", "fp16", ("sm86",)),)))
    command: list[str | Path] = [sys.executable, folder / "run_tensorrt_rtx.py", pictures[0]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 3
    assert "There is no GPU that can run this: cudaError" in done.stderr


def test_uneven_widths_are_not_offered_to_stock_timm(make_run: MakeRun) -> None:
    run = make_run()

    def work(folder: Path) -> None:
        shutil.copytree(run / "3-distill", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        path = folder / "model/config.json"
        structure = {"format": 1, "widths": {"channels": {}}}
        path.write_text(json.dumps({**json.loads(path.read_text()), "upvits": structure}))

    run_stage(run, "3-distill", {"another": 1}, {}, work)
    folder = package(run)
    assert not (folder / "run_timm.py").exists()
    assert json.loads((folder / PACKAGE).read_text())["stock_timm"] is False
    assert "which stock timm cannot build" in (folder / "README.md").read_text()


def test_a_network_of_transformers_goes_back_in_its_layout(
    make_run: MakeRun, vit: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    assert not (package(run, tmp_path / "plain") / "transformers").exists()
    config = run / "3-distill/model/config.json"
    draft = Path(shutil.copytree(run / "3-distill/model", tmp_path / "model"))
    entries = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**entries, "layout": "transformers"}))
    shutil.rmtree(config.parents[1])
    run_stage(run, "3-distill", {}, {}, lambda folder: shutil.copytree(draft, folder / "model"))  # type: ignore[arg-type]
    folder = package(run)
    told = json.loads((folder / "transformers/config.json").read_text())
    assert told["architectures"] == ["ViTForImageClassification"]
    assert json.loads((folder / PACKAGE).read_text())["transformers"] == "transformers"
    assert 'AutoModelForImageClassification.from_pretrained("transformers")' in (folder / "README.md").read_text()
    image = torch.randn(2, *vit.preprocess.input_size)
    with torch.inference_mode():
        assert torch.allclose(toolchain.load(folder / "transformers")(image), vit.model(image), atol=1e-5)
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        network = transformers.AutoModelForImageClassification.from_pretrained(folder / "transformers").eval()
        assert torch.allclose(network(image).logits, vit.model(image), rtol=1e-5, atol=1e-5)


def test_a_network_that_transformers_cannot_express_says_why(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    draft = Path(shutil.copytree(run / "3-distill/model", tmp_path / "model"))
    entries = json.loads((draft / "config.json").read_text())
    entries["model_args"] |= {"global_pool": "avg", "fc_norm": False}
    (draft / "config.json").write_text(json.dumps({**entries, "layout": "transformers"}))
    shutil.rmtree(run / "3-distill")
    run_stage(run, "3-distill", {}, {}, lambda folder: shutil.copytree(draft, folder / "model"))  # type: ignore[arg-type]
    folder = package(run)
    assert not (folder / "transformers").exists()
    assert json.loads((folder / PACKAGE).read_text())["transformers"] is None
    assert "no form in transformers: it pools by average" in (folder / "README.md").read_text()


def test_weights_in_separate_files_go_along(
    make_run: MakeRun, vit: Exported, pictures: list[Path], parts: Path
) -> None:
    run = make_run()

    def work(folder: Path) -> None:
        (folder / "pruned").mkdir()
        proto = onnx.load(parts / "4-export/pruned/model.onnx")
        path = folder / "pruned/model.onnx"
        onnx.save(proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)

    run_stage(run, "4-export", {"another": 1}, {}, work)
    folder = package(run)
    assert (folder / "model/model.onnx.data").stat().st_size > 100_000
    assert (folder / "triton/deit_tiny_onnx/1/model.onnx.data").is_file()
    script = folder / "run_onnxruntime.py"
    script.write_text(script.read_text().replace("engines/onnxruntime-fp32/model.onnx", "model/model.onnx"))
    reference = expected(vit.model, vit.preprocess, pictures)
    assert np.abs(run_alone(script, pictures) - reference).max() < 1e-4


def test_a_package_that_was_left_alone_is_replaced_and_another_folder_is_not(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    folder = package(run)
    assert folder == run.with_name("shop-package")
    before = files_in(folder)
    assert package(run) == folder
    assert files_in(folder) == before  # the same run gives the same package
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a package that was left as it was made"):
        package(run)
    assert files_in(folder) == {**before, "notes.txt": b"mine"}
    (folder / "notes.txt").unlink()
    (folder / "README.md").write_text("changed")
    with pytest.raises(UserError, match="not a package"):
        package(run)
    (tmp_path / "empty").mkdir()
    assert package(run, tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError):
        package(run, tmp_path / "file")
    assert [p.name for p in run.parent.iterdir() if p.name.startswith(".")] == []


def test_nothing_is_left_when_it_fails(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    package(run)
    before = files_in(run.parent)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("upvits.deploy.handover.package._write_sums", full)
    with pytest.raises(UserError, match="no space left"):
        package(run)
    assert files_in(run.parent) == before


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("recipe.toml", "not a run directory"),
        ("report.json", "has no report.json"),
        ("4-export/pruned/model.onnx", "4-export is missing, or a file in it was changed"),
        ("3-distill/manifest.json", "3-distill is missing"),
        ("5-engine/onnxruntime-fp32/pruned/model.onnx", "5-engine/onnxruntime-fp32 is missing"),
    ],
)
def test_an_unfinished_or_damaged_run_is_refused(make_run: MakeRun, lost: str, message: str) -> None:
    run = make_run()
    (run / lost).unlink()
    with pytest.raises(UserError, match=message):
        package(run)
    assert [path.name for path in run.parent.iterdir()] == ["shop"]


def test_an_engine_outside_of_the_run_is_refused(make_run: MakeRun) -> None:
    run = make_run(measured={})
    text = (run / "report.json").read_text().replace("5-engine/onnxruntime-fp32", "../elsewhere")
    (run / "report.json").write_text(text)
    with pytest.raises(UserError, match="outside of the run"):
        package(run)
