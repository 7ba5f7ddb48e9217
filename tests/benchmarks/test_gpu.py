"""The GPU benchmark, tried out on the CPU: it measures, records what fails, and ends in time."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from benchmarks.gpu import GPU_WAYS, Networks, main, make_networks, markdown, measure
from benchmarks.gpu_evidence import Evidence, Step
from benchmarks.torch_session import TorchSession, TorchWay
from benchmarks.width_sweep import Point, aligned_to, cost_by_alignment, rounding_up_pays, sweep
from upvits.deploy.measure.bench import BenchSettings
from upvits.deploy.runtimes.interface import Missing
from upvits.toolchain import count_macs

SHORT = BenchSettings(seconds=0.02, warmup=1, warmup_seconds=0.0, rounds=2, min_iterations=2)


@pytest.fixture(autouse=True)
def same_arithmetic_afterwards() -> Iterator[None]:
    backends: Any = torch.backends  # the name is younger than torch's own types
    before = backends.fp32_precision
    yield
    backends.fp32_precision = before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    networks = [
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=width, num_heads=2, num_classes=3)
        for width in (32, 16)
    ]
    return Networks("tiny", networks[0].eval(), networks[1].eval(), tmp_path_factory.mktemp("tiny"))


class StubbedEvidence:
    """Steps that take no time: one that finds something, one that fails, and one that there is no time for."""

    def __init__(self, device: str, *, quick: bool) -> None:
        assert (device, quick) == ("cpu", True)

    def right(self) -> Iterator[Step]:
        yield Step("scores", 1, lambda: {"least rank correlation": 0.98765, "same": True})
        yield Step("plan", 1, lambda: [][0])

    def cost(self) -> Iterator[Step]:
        yield Step("cost of a giant", 1e6, lambda: {"never": 1.0})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, tiny: Networks) -> Path:
    """Folder with the results of one run over a network that is small enough for a test."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--device", "cpu", "--quick", "--models", "test_vit", "--batches", "1,2", "--seconds", "0.05"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.gpu.make_networks", lambda name, _: dataclasses.replace(tiny, name=name))
        patch.setattr("benchmarks.gpu.Evidence", StubbedEvidence)
        assert main([*arguments, "--out", str(folder)]) == 0
    return folder


def test_what_cuda_changes_and_what_work_costs_is_in_the_document(result: Path) -> None:
    document = document_in(result)
    assert document["right"]["scores"] == {"least rank correlation": 0.98765, "same": True}
    assert document["right"]["plan"] == {"failed": "IndexError: list index out of range"}
    assert document["cost"]["cost of a giant"]["failed"].startswith("not begun: it may need 1000000 s, and ")
    text = next(result.glob("*.md")).read_text()
    assert "| scores | least rank correlation | 0.9877 |" in text
    assert "| plan | failed | IndexError: list index out of range |" in text


def test_what_is_found_is_saved_before_the_next_step_begins(
    tiny: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(StubbedEvidence):
        def right(self) -> Iterator[Step]:
            yield from super().right()
            raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.gpu.Evidence", Killed)
    with pytest.raises(KeyboardInterrupt):
        main(["--device", "cpu", "--quick", "--models", "test_vit", "--out", str(tmp_path)])
    assert set(document_in(tmp_path)["right"]) == {"scores", "plan"}


def check_evidence(device: str) -> None:
    """Every step finds figures, and those of a device are near those of the CPU."""
    evidence = Evidence(device, quick=True)
    found = {step.name: step.run() for step in (*evidence.right(), *evidence.cost())}
    assert float(found["outputs"]["fp32"]) < 1e-3
    assert float(found["outputs"]["AMP bfloat16"]) < 0.1
    assert float(found["scores"]["least rank correlation"]) > 0.9
    assert float(found["plan"]["kept units in common"]) > 0.9
    assert abs(float(found["cut and refit"]["top-1 on cpu"]) - float(found["cut and refit"][f"top-1 on {device}"])) < 10
    assert float(found["fine-tuning"]["images per second"]) > 0
    assert float(found["killed and continued"]["continued: largest change"]) < (1e-9 if device == "cpu" else 0.1)
    assert float(found["cost of test_vit"]["seconds of cut and refit"]) > 0


@pytest.mark.slow  # trains a network five times
def test_the_evidence_can_be_gathered() -> None:
    check_evidence("cpu")


@pytest.mark.gpu
def test_a_gpu_does_what_the_cpu_does() -> None:
    check_evidence("cuda")


def document_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_every_way_and_batch_has_a_row_with_figures_or_a_reason(result: Path) -> None:
    document = document_in(result)
    rows = {(row["way"], row["batch"]): row for row in document["rows"]}
    assert set(rows) == {(w, b) for w in ("onnxruntime fp32", "PyTorch eager fp32", "tensorrt fp16") for b in (1, 2)}
    for (way, batch), row in rows.items():
        assert row["model"] == "test_vit"
        if way == "tensorrt fp16" and row["failed"] is not None:
            assert row["dense"] is None
            continue
        assert row["failed"] is None
        assert row["dense"]["batch"] == row["pruned"]["batch"] == batch
        assert row["low"] <= row["speedup"] <= row["high"]
        assert 0 < row["pruned"]["median"] < 10_000
        assert row["settings"]
    assert document["environment"]["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert document["ratio"] == 0.5


def test_the_table_says_what_the_document_says(result: Path) -> None:
    document = document_in(result)
    (path,) = result.glob("gpu-cpu-*.md")
    text = path.read_text()
    assert text == markdown(document)
    lines = [line for line in text.splitlines() if line.startswith("| test_vit")]
    assert len(lines) == len(document["rows"])
    for line, row in zip(lines, document["rows"], strict=True):
        wanted = f"{row['dense']['median']:.3f} | {row['pruned']['median']:.3f}" if row["dense"] else row["failed"]
        assert wanted in line
        assert line.count("|") == 9


class Refusing(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("no room for so many")
        return images.mean((2, 3))


def test_what_fails_is_recorded_and_the_rest_goes_on(tiny: Networks) -> None:
    odd = Networks("odd", tiny.dense, Refusing(), tiny.folder)
    ways = (TorchWay("fp32"), TorchWay("fp64"), TorchWay("bf16"))
    rows = list(measure(odd, ways, (1, 2), "cpu", SHORT, lambda: True))
    assert [(row.way, row.batch) for row in rows] == [(str(way), batch) for way in ways for batch in (1, 2)]
    assert [row.failed is None for row in rows] == [True, False, False, False, True, False]
    assert rows[1].failed == "OutOfMemoryError: no room for so many"
    assert rows[2].failed == "KeyError: 'fp64'"


def test_nothing_new_is_begun_when_the_time_is_spent(tiny: Networks) -> None:
    answers = iter([True, True])
    ways = (TorchWay("fp32"), TorchWay("bf16"))
    rows = list(measure(tiny, ways, (1, 2), "cpu", SHORT, lambda: next(answers, False)))
    assert [row.failed for row in rows] == [None] + ["the time budget was spent"] * 3


@pytest.mark.parametrize("way", [TorchWay("fp32"), TorchWay("fp32", channels_last=True), TorchWay("bf16")], ids=str)
def test_a_session_computes_what_the_network_does(tiny: Networks, way: TorchWay) -> None:
    generator = np.random.default_rng(0)
    with TorchSession(tiny.dense, way, "cpu") as session:
        for batch in (1, 3, 1):
            images = generator.standard_normal((batch, 3, 32, 32)).astype(np.float32)
            with torch.inference_mode():
                expected = tiny.dense(torch.from_numpy(images)).numpy()
            found = session.run({"images": images})["logits"]
            np.testing.assert_allclose(found, expected, atol=1e-5 if way.precision == "fp32" else 0.1)
        times = session.time({"images": images}, 5)
    assert times.total.shape == (5,)
    assert (times.total > 0).all()
    assert times.compute is None
    assert next(tiny.dense.parameters()).dtype == torch.float32  # the network itself stays as it was


@pytest.mark.gpu
@pytest.mark.parametrize("way", [way for way in GPU_WAYS if isinstance(way, TorchWay) and not way.compiled], ids=str)
def test_a_session_computes_what_the_network_does_on_a_gpu(tiny: Networks, way: TorchWay) -> None:
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = tiny.dense.cpu()(torch.from_numpy(images)).numpy()
    with TorchSession(tiny.dense, way, "cuda") as session:
        times = session.time({"images": images}, 5)
        np.testing.assert_allclose(session.run({"images": images})["logits"], expected, atol=0.1)
    assert times.compute is not None
    assert (times.compute > 0).all()
    assert (times.total > times.compute).all()


def point(width: int, ms: float, base: int = 64) -> Point:
    return Point("ffn", base, width, aligned_to(width), ms, ms * 1e9 / width)


def test_widths_are_grouped_by_what_divides_them() -> None:
    assert [aligned_to(width) for width in (1, 63, 12, 8, 48, 96, 128, 192)] == [1, 1, 4, 8, 16, 32, 64, 64]
    points = [point(64, 64.0), point(128, 128.0), point(72, 144.0), point(60, 90.0), point(62, 62.0)]
    assert cost_by_alignment(points) == {"ffn": {"2": 1.0, "4": 1.5, "8": 2.0, "64": 1.0}}
    # 60 takes longer than 64, 62 does not; 72 is a multiple of 8 already
    assert rounding_up_pays(points, 8) == {"ffn": 0.5}
    assert rounding_up_pays(points, 16) == {"ffn": round(2 / 3, 3)}  # 72 takes longer than 128, too
    assert rounding_up_pays([point(60, 9.0), point(64, 1.0, base=128)], 8) == {}  # of different bases


def test_the_sweep_times_what_it_says() -> None:
    points = sweep("cpu", torch.float32, 1, quick=True, seconds=0.01)
    assert {point.kind for point in points} == {"attention", "embed", "ffn"}
    for one in points:
        macs = {"attention": 2 * 12 * 197**2 * one.width, "embed": 197 * one.width**2, "ffn": 197 * 64 * one.width}
        assert one.ms == pytest.approx(one.ps_per_mac * macs[one.kind] * 1e-9)
        assert one.ms > 0


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.gpu.missing_gpu", lambda: Missing("No GPU was found.", "Use another machine."))
    assert main(["--out", str(tmp_path / "results")]) == 3
    assert "No GPU was found." in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_mistakes_are_found_before_anything_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--models", "deit_tny", "--out", str(tmp_path / "results")]) == 2
    assert "deit_tiny" in capsys.readouterr().err
    for arguments in (["--batches", "0"], ["--batches", "a"], ["--minutes", "0"], ["--models", ""]):
        with pytest.raises(SystemExit, match="2"):
            main(["--device", "cpu", *arguments])
    assert not (tmp_path / "results").exists()


def test_the_pruned_network_has_half_of_every_width(tmp_path: Path) -> None:
    networks = make_networks("test_vit", tmp_path)
    assert networks.size == (3, 160, 160)
    dense, pruned = (count_macs(model, networks.size) for model in (networks.dense, networks.pruned))
    assert 0.2 < pruned / dense < 0.35
