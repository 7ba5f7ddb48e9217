"""Every runtime for NVIDIA GPUs, on one: it computes what the CPU does, and gives its memory back."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.deploy.conftest import Exported
from upvits.deploy.precision import convert
from upvits.deploy.runtimes import RUNTIMES, BatchProfile, BuildOptions, RunOptions, Runtime, open_onnx

pytestmark = pytest.mark.gpu
ON_NVIDIA = [runtime for runtime in RUNTIMES.values() if runtime.on_nvidia]
MIB = 1 << 20


def usable(runtime: Runtime) -> None:
    missing = runtime.missing_to_build() or runtime.missing_to_run()
    if missing is not None:
        pytest.skip(f"{runtime.name}: {missing.why}")


@pytest.mark.parametrize("runtime", ON_NVIDIA, ids=lambda runtime: runtime.name)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_it_computes_what_the_cpu_does(
    runtime: Runtime, precision: str, cuda_graph: bool, vit: Exported, tmp_path: Path
) -> None:
    usable(runtime)
    path = tmp_path / "model.onnx"
    onnx.save(convert(onnx.load(vit.report.path), precision).model, path)
    runtime.build(path, tmp_path / "engine", BuildOptions(precision, BatchProfile(1, 2, 4)))
    with (
        open_onnx(vit.report.path) as reference,
        runtime.open(tmp_path / "engine", RunOptions(cuda_graph=cuda_graph)) as s,
    ):
        for size in (1, 4, 1):
            feeds = {"images": vit.images.numpy()[:size]}
            wanted = reference.run(feeds)["logits"]
            np.testing.assert_allclose(s.run(feeds)["logits"], wanted, atol=1e-3 if precision == "fp32" else 5e-2)
        times = s.time(feeds, 20)
        assert s.on_gpu
        assert times.h2d is not None
        assert times.compute is not None
        assert (times.compute > 0).all()


@pytest.mark.parametrize("runtime", ON_NVIDIA, ids=lambda runtime: runtime.name)
def test_it_gives_its_memory_back(runtime: Runtime, vit: Exported, tmp_path: Path) -> None:
    usable(runtime)
    runtime.build(vit.report.path, tmp_path / "engine", BuildOptions("fp32", BatchProfile(1, 2, 4)))
    feeds = {"images": vit.images.numpy()[:4]}
    free = []
    for _ in range(4):
        with runtime.open(tmp_path / "engine") as session:
            session.time(feeds, 3)
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] - free[-1] < 64 * MIB  # the first one also sets up what stays


@pytest.mark.parametrize("runtime", [RUNTIMES["onnxruntime-tensorrt"]], ids=lambda runtime: runtime.name)
def test_what_was_compiled_is_opened(
    runtime: Runtime, vit: Exported, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usable(runtime)
    runtime.build(vit.report.path, tmp_path / "engine", BuildOptions("fp32", BatchProfile(1, 2, 4)))
    assert list((tmp_path / "engine" / "cache").glob("*.engine"))
    runtime.open(tmp_path / "engine").close()
    assert "compiled again" not in caplog.text
