"""ONNX files that lie, do not end, need more memory than there is, or name other files."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.robustness.case import Arguments, Case, Ground
from benchmarks.robustness.documents import reseal, without_markup
from benchmarks.robustness.mutations import MARKUP, TEXTS, is_file_name, no_documents, shown

Node = onnx.NodeProto
_GRAPH = "4-export/pruned/model.onnx"


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """`bench` of each file with ONNX Runtime; of a few with every runtime that is installed."""
    files = {**references(), **_tensors(), **structures(), **_shapes(), **endless(), **_bytes(ground, random)}
    for what, raw in files.items():
        yield Case(f"ONNX: {what}", functools.partial(_bench, raw, "m.onnx", ("--runtime", "onnxruntime")))
    for what in (*random.sample(sorted(files), 12), *endless()):
        yield Case(f"ONNX, all runtimes: {what}", functools.partial(_bench, files[what], "m.onnx", ()))
    plain = model_of().SerializeToString()
    for text in random.sample([text for text in TEXTS if is_file_name(text)], 12):
        yield Case(f"ONNX, file name {shown(text)}", functools.partial(_bench, plain, f"{text}.onnx", ()))
    for key in ("labels", "upvits", "mean", "std", "preprocess", "producer", "description"):
        for text in random.sample([*TEXTS, MARKUP, "[" * 100_000, '{"a": [1, "x"]}'], 3):
            arrange = functools.partial(_in_run, ground, key, text)
            yield Case(f"ONNX of a run: {key} = {shown(text)}", arrange, check=without_markup)
    for shape in (
        "x",
        "x=\u00b2x4",
        "x=0x4",
        "nope=1x4",
        "x=1x5",
        "x=99999999x99999999",
        "x=" + "1x" * 3000 + "1",
        "=",
        "x=x",
    ):
        options = ("--runtime", "onnxruntime", "--input-shape", shape)
        yield Case(f"--input-shape {shown(shape)}", functools.partial(_bench, plain, "m.onnx", options))


def _bench(raw: bytes, name: str, options: Sequence[str], here: Path) -> Arguments:
    (here / name).write_bytes(raw)
    os.mkfifo(here / "pipe")
    (here / "link").symlink_to("/etc/passwd")
    return ["bench", here / name, "--seconds", "0.05", *options]


def _in_run(ground: Ground, key: str, text: str, here: Path) -> Arguments:
    """A package of a run whose graph has other notes than the tool wrote."""
    run = ground.copy_of_run(here)
    model = onnx.load(str(run / _GRAPH))
    if key == "producer":
        model.producer_name = text
    elif key == "description":
        model.doc_string = model.graph.doc_string = text
    else:
        notes = {entry.key: entry.value for entry in model.metadata_props}
        helper.set_model_props(model, {**notes, key: text})
    (run / _GRAPH).write_bytes(model.SerializeToString())
    reseal(run, _GRAPH)
    return ["package", run, "-o", here / "package", "--quiet"]


def value(name: str = "x", shape: Sequence[int | str] | None = ("N", 4), kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    nodes: Sequence[Node] | None = None,
    inputs: Sequence[Any] | None = None,
    tensors: Sequence[TensorProto] = (),
    *,
    outputs: Sequence[Any] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A model from x to y; one Relu unless more is said."""
    graph = helper.make_graph(
        [node("Relu", "x", "y")] if nodes is None else nodes,
        "g",
        [value()] if inputs is None else inputs,
        [value("y", None)] if outputs is None else outputs,
        list(tensors),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Node:
    return helper.make_node(kind, inputs.split(" ") if inputs else [], outputs.split(" "), **attributes)


def _constant(name: str, value: Any) -> TensorProto:
    return numpy_helper.from_array(np.array(value), name)


def _added(tensor: TensorProto) -> bytes:
    tensor.name = "w"
    return bytes(model_of([node("Add", "x w", "y")], tensors=[tensor]).SerializeToString())


def references() -> dict[str, bytes]:
    """Weights in files of their own that are elsewhere, no files, or shorter than they are said to be."""
    places = (
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "nope",
        "",
        "a\0b",
        "/dev/zero",
        "m.onnx",
        ".",
        "x" * 5000,
        "pipe",
        "link",
        "../precious/notes.txt",
        "\x1b[31m",
    )
    made = {f"weights in {shown(place)}": _added(_outside(place)) for place in places}
    lies: dict[str, dict[str, Any]] = {
        "before the file": {"offset": "-5"},
        "no number": {"offset": "x"},
        "far behind the file": {"offset": str(10**30)},
        "of 10**15 bytes": {"length": str(10**15)},
        "2**60 large": {"dims": (2**40, 2**20)},
        "of -1": {"dims": (-1,)},
    }
    return made | {f"weights {what}": _added(_outside("m.onnx", **lie)) for what, lie in lies.items()}


def _outside(place: str, offset: str = "0", length: str = "", dims: Sequence[int] = (4,)) -> TensorProto:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", offset), ("length", length)):
        if value:
            tensor.external_data.add(key=key, value=value)
    return tensor


def _tensors() -> dict[str, bytes]:
    shapes: dict[str, tuple[Sequence[int], bytes, int]] = {
        "-1 wide": ([-1, 4], b"", 1),
        "2**40 wide": ([2**40], b"", 1),
        "2**64 large": ([2**62, 4, 0], b"", 1),
        "with too few bytes": ([4], b"12", 1),
        "with too many bytes": ([1], b"1" * 1000, 1),
        "of type 99": ([4], b"1" * 16, 99),
        "of texts": ([4], b"", TensorProto.STRING),
        "of no type": ([4], b"1" * 16, 0),
    }
    return {
        f"a tensor {what}": _added(TensorProto(dims=dims, raw_data=raw, data_type=kind))
        for what, (dims, raw, kind) in shapes.items()
    }


def structures() -> dict[str, bytes]:
    models = {
        "a cycle": model_of([node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "a", "y")]),
        "a node that reads itself": model_of([node("Add", "x y", "y")]),
        "an unknown operator": model_of([node("Evil", "x", "y")]),
        "an unknown domain": model_of([node("Evil", "x", "y", domain="com.evil")]),
        "operator set 9999": model_of(opset=9999),
        "operator set 0": model_of(opset=0),
        "operator set -1": model_of(opset=-1),
        "no nodes": model_of([]),
        "an input from nowhere": model_of([node("Relu", "nope", "y")]),
        "an output from nowhere": model_of([node("Relu", "x", "z")]),
        "no outputs": model_of(outputs=[]),
        "an output twice": model_of([node("Relu", "x", "y"), node("Relu", "x", "y")]),
        "no inputs": model_of([node("Constant", "", "y", value=_constant("c", np.ones(3, np.float32)))], []),
        "20,000 nodes": model_of(
            [*(node("Relu", f"t{i}" if i else "x", f"t{i + 1}") for i in range(20_000)), node("Relu", "t20000", "y")]
        ),
        "names with commands": model_of(
            [node("Relu", "x", "\x1b[31m[/]", name="\x1b[31m[/]"), node("Relu", "\x1b[31m[/]", "y")]
        ),
        "an input with commands": model_of([node("Relu", "\x1b[31m[/]", "y")], [value("\x1b[31m[/]", [3, 4])]),
        "an index out of range": model_of([node("Gather", "x i", "y", axis=1)], tensors=[_constant("i", [99])]),
        "a division by zero": model_of(
            [
                node("Cast", "x", "i", to=6),
                node("Sub", "i i", "z"),
                node("Div", "i z", "q"),
                node("Cast", "q", "y", to=1),
            ]
        ),
        "a function that calls itself": _recursive(),
        "another producer": model_of(),
        "attributes of other types": model_of([node("Cast", "x", "y", to="os.system")]),
    }
    models["another producer"].producer_name = "\x1b[31m" + MARKUP
    return {what: model.SerializeToString() for what, model in models.items()}


def _recursive() -> onnx.ModelProto:
    model = model_of([node("F", "x", "y", domain="d")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    model.opset_import.append(opsets[1])
    model.functions.append(helper.make_function("d", "F", ["a"], ["b"], [node("F", "a", "b", domain="d")], opsets))
    return model


def _shapes() -> dict[str, bytes]:
    """Inputs of strange shapes and types, and results that no memory holds."""
    inputs: dict[str, Any] = {
        "a scalar": value("x", []),
        "of no rank": value("x", None),
        "with nothing in it": value("x", ["N", 0]),
        "-4 wide": value("x", ["N", -4]),
        "2**40 wide": value("x", ["N", 2**40]),
        "2**124 large": value("x", [2**62, 2**62]),
        "of 4 GB": value("x", ["N", 10**9]),
        "of open sides": value("x", ["N", "H", "W"]),
        "of 64 ranks": value("x", [1] * 64),
        "of one name": value("x", ["N", "N"]),
    }
    made = {f"an input {what}": model_of(inputs=[given]) for what, given in inputs.items()}
    for kind in (
        TensorProto.STRING,
        TensorProto.COMPLEX64,
        TensorProto.BFLOAT16,
        TensorProto.UINT4,
        TensorProto.BOOL,
        99,
    ):
        made[f"an input of type {kind}"] = model_of(
            [node("Identity", "x", "y")], [value("x", ["N"], kind)], outputs=[value("y", None, kind)]
        )
    sequence = [helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    made["a sequence as input"] = model_of([node("Identity", "x", "y")], sequence[:1], outputs=sequence[1:])
    made["a constant of 4 TB"] = model_of(
        [node("ConstantOfShape", "s", "z"), node("ReduceSum", "z", "q", keepdims=0), node("Add", "x q", "y")],
        tensors=[_constant("s", [10**6, 10**6])],
    )  # fmt: skip
    made["a picture of 40 TB"] = model_of(
        [node("Resize", "x  s", "y", mode="nearest")], [value("x", ["N", 1, 8, 8])],
        [_constant("s", np.array([1, 1, 1e5, 1e5], np.float32))],
    )  # fmt: skip
    made["tiles of 4 TB"] = model_of([node("Tile", "x r", "y")], tensors=[_constant("r", [10**6, 10**6])])
    return {what: model.SerializeToString() for what, model in made.items()}


def endless() -> dict[str, bytes]:
    body = helper.make_graph(
        [node("Identity", "c", "d"), node("Identity", "v", "w")], "b",
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("v", None)],
        [value("d", [], TensorProto.BOOL), value("w", None)],
    )  # fmt: skip
    loop = model_of([node("Loop", "m c0 x", "y", body=body)], tensors=[_constant("m", 2**62), _constant("c0", True)])
    return {"a Loop without end": loop.SerializeToString(), "If, 20 deep": _nested(20), "If, 2,000 deep": _nested(2000)}


def _nested(depth: int) -> bytes:
    """Branches within branches, written byte by byte: protobuf's own library refuses to write so deep a message."""
    node = _field(4, b"Identity") + _field(1, b"x") + _field(2, b"o")
    for _ in range(depth):
        branch = _field(1, b"then_branch") + _field(6, _field(1, node))
        node = _field(4, b"If") + _field(1, b"c") + _field(2, b"o") + _field(5, branch)
    return bytes(model_of().SerializeToString()) + _field(7, _field(1, node))


def _field(number: int, data: bytes) -> bytes:
    length, head = len(data), bytes([number << 3 | 2])
    while length > 127:
        head += bytes([length & 127 | 128])
        length >>= 7
    return head + bytes([length]) + data


def _bytes(ground: Ground, random: Random) -> dict[str, bytes]:
    whole = (ground.run / _GRAPH).read_bytes()
    made = {what: raw for what, raw in no_documents(b'{"a": 1}').items() if len(raw) < 1 << 20}
    for _ in range(25):
        at, size = random.randrange(len(whole)), random.choice((1, 4, 50))
        made[f"other bytes at {at}"] = whole[:at] + random.randbytes(size) + whole[at + size :]
    for _ in range(5):
        at = random.randrange(len(whole))
        made[f"cut at {at}"] = whole[:at]
    return made
