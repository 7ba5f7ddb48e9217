"""Inspector JSON as TensorRT 10 and 11 write it (the field names are those of NVIDIA's documentation and issues)."""

import json
from typing import Any

import pytest

from upvits.deploy.runtimes.inspector import read_inspector
from upvits.deploy.runtimes.kernels import op_of


def tensor(said: str, *, dims: list[int] | None = None, version: int = 10) -> dict[str, Any]:
    kinds = {"Format/Datatype": said} if version == 10 else {"Format": "Row major linear", "DataType": said}
    return {"Name": "t", "Location": "Device", "Dimensions": dims or [2, 3], **kinds}


def layer(name: str, kind: str, reads: dict[str, Any], writes: dict[str, Any], nodes: str = "") -> dict[str, Any]:
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return {"Name": name, "LayerType": kind, "Inputs": [reads], "Outputs": [writes], "Metadata": metadata}


LAYERS = [
    layer("Reformatting CopyNode for Input Tensor 0", "Reformat", tensor("Row major linear FP32"), tensor("Int8")),
    layer(
        "conv_myl0_0",
        "CaskConvolution",
        tensor("Thirty-two wide channel vectorized row major Int8 format"),
        tensor("Half"),
        "conv",
    ),
    layer("a/MatMul+b/MatMul_myl0_3", "gemm", tensor("Int8"), tensor("Half"), "a/MatMul b/MatMul"),
    layer("/mha/key/MatMul_myl0_4", "gemm", tensor("BFloat16"), tensor("Float"), "/mha/key/MatMul"),
    layer("_gemm_mha_v2_myl0_5", "kgen", tensor("Half"), tensor("Half"), "softmax"),
    layer("__myl_FcAddAdd_myl0_6", "fusion", tensor("FP8"), tensor("Half"), "proj"),
    layer("__myl_CastMeanSubMulMeanAddSqrtDiv_myl0_7", "kgen", tensor("Half"), tensor("Float"), "norm"),
    layer("__myl_MoveCast_myl0_8", "kgen", tensor("Float"), tensor("Half"), "cast"),
    layer("gather", "NoOp", tensor("Int64"), tensor("Int64")),
]


def test_layers_of_tensorrt_10() -> None:
    compiled = read_inspector(json.dumps({"Layers": LAYERS, "Bindings": ["images"]}), 4096)
    assert compiled is not None
    assert [(kernel.op, kernel.precision) for kernel in compiled.kernels] == [
        ("reformat", "fp32"),
        ("Conv", "int8"),
        ("MatMul", "int8"),
        ("MatMul", "bf16"),  # a layer of a module called mha is no fused attention
        ("attention", "fp16"),
        ("MatMul", "fp8"),
        ("LayerNormalization", "fp32"),
        ("cast", "fp32"),
    ]
    assert compiled.products == {
        "conv": "int8", "a/MatMul": "int8", "b/MatMul": "int8", "/mha/key/MatMul": "bf16", "proj": "fp8",
    }  # fmt: skip
    assert compiled.memory_bytes == 4096
    assert compiled.kernels[4].bytes == 2 * (6 * 2)


def test_layers_of_tensorrt_11_have_their_type_apart() -> None:
    reads, writes = tensor("Int8", dims=[8, 4], version=11), tensor("Float", dims=[8, 2], version=11)
    weights = {"Weights": {"Type": "Int8", "Count": 8}}
    text = json.dumps({"Layers": [{**layer("fc", "gemm", reads, writes), **weights}], "I/O Tensors": [{"Name": "x"}]})
    compiled = read_inspector(text)
    assert compiled is not None
    (kernel,) = compiled.kernels
    assert (kernel.op, kernel.precision, kernel.nodes) == ("MatMul", "int8", ("fc",))
    assert kernel.bytes == 32 * 1 + 16 * 4 + 8 * 1


def test_nodes_are_taken_from_the_name_where_there_is_no_metadata() -> None:
    text = json.dumps({"Layers": [layer("conv1 + relu1", "CaskConvActPool", tensor("Half"), tensor("Half"))]})
    compiled = read_inspector(text)
    assert compiled is not None
    assert compiled.kernels[0].nodes == ("conv1", "relu1")


def test_a_shape_that_is_not_known_leaves_bytes_open() -> None:
    text = json.dumps({"Layers": [layer("fc", "gemm", tensor("Half", dims=[-1, 4]), tensor("Half"))]})
    compiled = read_inspector(text)
    assert compiled is not None
    assert compiled.kernels[0].bytes is None


UNREADABLE = [
    "",
    "no JSON",
    "[]",
    "{}",
    '{"Layers": []}',
    '{"Layers": ["conv1", "relu1"]}',
    '{"Layers": [{"Name": "a"}]}',
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_unknown(text: str) -> None:
    assert read_inspector(text) is None


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("_gemm_mha_v2_0x12", "attention"),
        ("__mye8037_gemm_mha_v2", "attention"),
        ("fmha_v2_flash", "attention"),
        ("_gemv_mha_v1_myl0_3", "attention"),
        ("/encoder/mha/out/Add", "elementwise"),
        ("__myl_TraSliResMov_0x1", "reformat"),
        ("__myl_CastReplConc_0x1", "cast"),
        ("__myl_MulMinMaxRounCast_0x1", "elementwise"),
        ("__myl_MaxSubExpSumDiv_0x1", "Softmax"),
        ("__myl_AddSqrtDivMulMulAddCastEtc_0x1", "LayerNormalization"),
    ],
)
def test_kernels_say_in_their_names_what_they_do(name: str, op: str) -> None:
    assert op_of(name) == op
