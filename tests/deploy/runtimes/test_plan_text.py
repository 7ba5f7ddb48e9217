"""What TensorRT-RTX compiled, read from its plans. These tests fail when NVIDIA changes the text; builds do not."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.deploy.conftest import Exported, preprocess_for, small_model
from upvits.calib_data.errors import GateError
from upvits.deploy.graphs.export import export_onnx
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.precision import calibrate, convert
from upvits.deploy.runtimes import BatchProfile, BuildOptions, Engine
from upvits.deploy.runtimes.kernels import Compiled, Kernel, built_from
from upvits.deploy.runtimes.plan_text import read_plan
from upvits.deploy.runtimes.tensorrt_rtx import TENSORRT_RTX

PROFILE = BatchProfile(1, 8, 32)


def built_engine(
    onnx_path: Path, precision: str, folder: Path, *targets: str, images: np.ndarray | None = None, fused: bool = False
) -> Engine:
    """Convert a model with these calibration images, and build it."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    model = onnx.load(onnx_path)
    ranges = calibrate(model, [images], quiet=True) if images is not None else None
    folder.mkdir()
    onnx.save(convert(model, precision, ranges=ranges).model, folder / "converted.onnx")
    options = BuildOptions(precision, PROFILE, targets, require_fused_attention=fused)
    return TENSORRT_RTX.build(folder / "converted.onnx", folder / "engine", options)


@pytest.mark.parametrize(("name", "products", "blocks", "fused"), [("vit", 10, 2, 2), ("pvt", 32, 4, 2)])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_was_built_is_what_was_planned(
    name: str, products: int, blocks: int, fused: int, precision: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The last two stages of this PVTv2 have heads of 8 channels, which no fused kernel takes."""
    exported: Exported = request.getfixturevalue(name)
    images = exported.images.numpy() if precision == "int8" else None
    built = built_engine(exported.report.path, precision, tmp_path / "work", images=images).built
    assert built is not None, "the text of plans has changed: deploy/runtimes/plan_text.py"
    assert built.source == "compiled graph in the plan"
    assert built.gemms == built.planned == {precision: products}
    assert built.planned == GraphFacts(onnx.load(tmp_path / "work/converted.onnx")).gemms()
    assert (built.attention_fused, built.attention_blocks) == (fused, blocks)
    assert sum(built.by_precision.values()) == built.layers
    assert built.by_precision[precision] >= products / 2
    assert built.memory_bytes is not None
    assert built.memory_bytes > 2**20


def test_attention_that_is_not_fused_is_refused_on_request(pvt: Exported, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="fused 2 of 4 attention blocks") as refusal:
        built_engine(pvt.report.path, "fp16", tmp_path / "work", "sm89", fused=True)
    assert refusal.value.exit_code == 4
    assert "multiple of 8 in 16..256" in refusal.value.fix
    assert not (tmp_path / "work/engine").exists()


def test_fp32_fuses_no_attention_and_says_so(vit: Exported, tmp_path: Path) -> None:
    built = built_engine(vit.report.path, "fp32", tmp_path / "work").built
    assert built is not None
    assert (built.attention_fused, built.attention_blocks) == (0, 2)
    assert built.gemms == {"fp32": 10}


def test_targets_share_one_compiled_graph(vit: Exported, tmp_path: Path) -> None:
    one = built_engine(vit.report.path, "fp16", tmp_path / "one", "sm86")
    three = built_engine(vit.report.path, "fp16", tmp_path / "three", "sm86", "sm89", "sm120")
    assert one.built == three.built
    assert three.bytes < 1.01 * one.bytes


WHOLE: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "deit_tiny": ("deit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 14, 3),
    "deit_tiny_half": ("deit_tiny_patch16_224", {"img_size": 64, "depth": 3, "embed_dim": 96}, 14, 3),
    "pvt_v2_b0": ("pvt_v2_b0", {}, 59, 8),
    "pvt_v2_b0_half": ("pvt_v2_b0", {"embed_dims": (16, 32, 80, 128)}, 59, 8),
}


@pytest.fixture(scope="module", params=WHOLE)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """DeiT-T of three blocks, which are all alike, and PVTv2-B0 with random weights, as wide as they are and half as
    wide; their products and attention blocks."""
    name, arguments, products, blocks = WHOLE[request.param]
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export_onnx(small_model(name, **arguments), path, preprocess_for(64), metadata={})
    return path, products, blocks


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_whole_models_are_fused_and_in_the_precision_asked_for(
    whole: tuple[Path, int, int], precision: str, tmp_path: Path
) -> None:
    path, products, blocks = whole
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32) if precision == "int8" else None
    engine = built_engine(path, precision, tmp_path / "work", "sm86", "sm89", "sm120", images=images, fused=True)
    assert engine.built is not None
    assert engine.built.gemms == engine.built.planned == {precision: products}
    assert engine.built.attention_fused == engine.built.attention_blocks == blocks


GRAPH = """header {
  accelerators={sm86 }
  region = { name=devmem_topdown_0 size=4096 alignment=128 instance=0 type=user place=accelerator unified=false }
  region = { name=system_hmem size=4232 alignment=128 instance=0 type=system place=host unified=false }
}
descriptors {
  tensor={ alignment=128 dims={ 1 } name="n{a}" offset=0 strides={ 1 } type=int64 }
  tensor={ alignment=128 dims={ 8 } name="x" offset=0 strides={ 1 } type=half }
  tensor={ alignment=128 dims={ 8 } name="xq" offset=0 strides={ 1 } type=int8 }
  tensor={ alignment=128 dims={ 8 } name="w" offset=0 strides={ 1 } type=int8 }
  tensor={ alignment=128 dims={ 8 } name="s" offset=0 strides={ 1 } type=float }
  sub_tensor={ base="x" const_offset=0 dims={ 8 } name="y^deref" offset=0 strides={ 1 } type=half }
}
main {
 label bb1:
  shape_call={ name="c" stream=0  layers="" subg_id=0 }
  function={ name=__myl_Cast fqn=c input_args={ "x" "n{a}" } output_args={ "xq" } layers="[ONNX Layer: q]" }
  fully_connected={ name="fc" output={"y^deref" } input={"xq" "w" "s" } layers="[ONNX Layer: fc]\x1f[ONNX Layer: dq]" }
  runtime_fusion={ name=__myl_FcAdd input_args={ "x" } output_args={ "x" } layers="[ONNX Layer: fused]" backbone=gemm }
  function={ name=_gemm_mha_v2 fqn=m input_args={ "x" } output_args={ "x" } layers="[ONNX Layer: soft]" }
  function={ name=__myl_ReshTran fqn=f input_args={ "x" } output_args={ "x" } layers="[ONNX Layer: t]" }
  signal={ name="e" stream=1 event=1 layers="" }
}
shape_main {
  mul={ name="host" output={"n{a}" } input={"n{a}" } stream=0  layers="" }
}
"""
NESTED = """header {
  accelerators={*}
}
descriptors {
  tensor={ dims={ 8 } name="x" offset=0 type=bf16 }
}
main {
 label bb1:
  fully_connected={ name="fused" output={"z" } input={"x" "x" } layers="[ONNX Layer: fused]" }
}
"""


def test_the_text_is_found_between_binary_parts() -> None:
    compiled = read_plan(b"\x00\x01ftrt\xff\x00" + GRAPH.encode() + b"\x00\x02" + NESTED.encode() + b"\x00\x07")
    assert compiled is not None
    assert [(kernel.name, kernel.op, kernel.precision) for kernel in compiled.kernels] == [
        ("__myl_Cast", "cast", "fp16"),
        ("fc", "MatMul", "int8"),
        ("__myl_FcAdd", "MatMul", "bf16"),
        ("_gemm_mha_v2", "attention", "fp16"),
        ("__myl_ReshTran", "reformat", "fp16"),
    ]
    assert compiled.products == {"fc": "int8", "dq": "int8", "fused": "bf16"}
    assert compiled.kernels[1].nodes == ("fc", "dq")
    assert compiled.memory_bytes == 4096


@pytest.mark.parametrize(
    "plan",
    [b"", b"\x00" * 100, b"header {\n", GRAPH.replace("main {", "body {").encode(), GRAPH[: len(GRAPH) // 2].encode()],
)
def test_what_cannot_be_read_is_unknown(plan: bytes) -> None:
    assert read_plan(plan) is None


def test_another_graph_is_unknown(vit: Exported) -> None:
    facts = GraphFacts(onnx.load(vit.report.path))
    assert built_from(None, facts) is None
    strange = Compiled("test", (Kernel("k", "MatMul", "fp16", ("not in the graph",)),), {}, None)
    assert built_from(strange, facts) is None


def test_products_without_a_kernel_are_said_to_be_removed(vit: Exported) -> None:
    facts = GraphFacts(onnx.load(vit.report.path))
    first, second, *_ = facts.gemm_nodes()
    kernels = (Kernel("a", "MatMul", "fp16", (first,)), Kernel("b", "elementwise", "fp32", (second,)))
    built = built_from(Compiled("test", kernels, {first: "fp16"}, None), facts)
    assert built is not None
    assert built.gemms == {"fp16": 1, "fp32": 1, "removed": 8}
