"""ONNX files: reading ones that may be damaged, foreign or hostile, and writing them whole.

What a file claims is checked against its real size before anything is allocated for it.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.external_data_helper import uses_external_data

from upvits.calib_data.documents import read_regular
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.paths import path_inside
from upvits.deploy.graphs.nodes import circle_of, copied
from upvits.deploy.store.artifacts import atomic_write, whole_file
from upvits.deploy.store.disk import disk_full_error, is_disk_full, unwritable_error

MAX_FILE_BYTES = 2**31 - 2**24  # a protobuf file ends at 2 GiB; what is left is for the graph
_MAX_VALUES = 2**28  # in a tensor of one image: 1 GiB of fp32, a thousand times what a ViT-L has
_SMALL_BYTES = 1024  # tensors below this stay in the graph, where shape inference needs them
_ALIGNMENT = 4096  # of tensors in a data file, so that runtimes can map them into memory
_AGAIN = "Export the model again with `upvits-deploy export`."


def load_model(path: Path) -> ModelProto:
    """Read an ONNX file, with the weights that it keeps in other files of its folder.

    Raises:
        UserError: it cannot be read, is damaged or no ONNX model, claims sizes that it does not have or that are
            absurd, or its weights are missing, cut or outside its folder.
    """
    model = _parse(path)
    if not model.graph.node or not model.opset_import:
        raise UserError(f"{path} is not an ONNX model", why="It holds no graph.", fix=_AGAIN)
    if circle := circle_of(model):
        why = f"These tensors need each other before they can be computed: {', '.join(map(repr, circle[:6]))}."
        raise UserError(f"{path} is damaged", why=why, fix=_AGAIN)
    _check_shapes(path, model)
    for tensor in _tensors(model):
        claimed = _claimed_bytes(path, tensor)
        if uses_external_data(tensor):
            _read_external(path, tensor, claimed)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != claimed:
            stored = len(tensor.raw_data)
            why = f"Tensor {tensor.name!r} says {list(tensor.dims)}, {claimed} bytes; the file has {stored}."
            raise UserError(f"{path} is damaged", why=why, fix=_AGAIN)
        elif not tensor.HasField("raw_data") and math.prod(tensor.dims) > 2 * _stored_values(tensor):
            why = f"Tensor {tensor.name!r} says {list(tensor.dims)}; the file has {_stored_values(tensor)} values."
            raise UserError(f"{path} is damaged", why=why, fix=_AGAIN)
    return model


def save_model(model: ModelProto, path: Path, *, external_data: bool = False) -> None:
    """Write a model; the file appears whole or not at all.

    Args:
        model: with its weights in memory; it stays as it is.
        path: the file to write.
        external_data: put the weights in a file beside it, named like it with ".data" added. Needed above 2 GiB.

    Raises:
        UserError: the model is too large for a single file, the disk is full or the path cannot be written.
    """
    if not external_data and not fits_one_file(model):
        raise too_large_error(weight_bytes(model))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not external_data:
            atomic_write(path, model.SerializeToString())
            return
        data = data_path(path)
        # The old file must not survive with new weights when this is interrupted.
        path.unlink(missing_ok=True)
        lean = _write_data(model, data)
        atomic_write(path, lean.SerializeToString())
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(path.parent, "the ONNX file could not be saved") from error
        raise unwritable_error(path.parent, error) from error


def data_path(path: Path) -> Path:
    """The file that holds the weights of an ONNX file saved with external data."""
    return path.with_name(f"{path.name}.data")


def too_large_error(size: int) -> UserError:
    """The message for a model whose weights, `size` bytes, do not fit a single file."""
    return UserError(
        f"the model's weights take {size / 2**30:.1f} GiB",
        why="One ONNX file ends at 2 GiB.",
        fix="Use `external_data=True`: the weights then go to a second file beside the model.",
    )


def weight_bytes(model: ModelProto) -> int:
    """Bytes of a model's weights in memory."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def fits_one_file(model: ModelProto) -> bool:
    """Whether a model's weights leave it below protobuf's limit: above it no library takes the serialized model."""
    return weight_bytes(model) <= MAX_FILE_BYTES


def openable(model: ModelProto, folder: Path, *, apart: bool = False) -> bytes | Path:
    """What libraries can open of a model: its serialized form, or a file where that would be too large.

    Args:
        model: with its weights in memory.
        folder: where the file is written, "model.onnx" with "model.onnx.data" beside it.
        apart: write the file in any case.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    if not apart and fits_one_file(model):
        return bytes(model.SerializeToString())
    save_model(model, folder / "model.onnx", external_data=True)
    return folder / "model.onnx"


def with_shapes(model: ModelProto) -> ModelProto:
    """A copy with the shapes and types of all tensors that can be inferred; also of models above 2 GiB.

    Raises:
        onnx.shape_inference.InferenceError: as onnx does.
    """
    if fits_one_file(model):
        return onnx.shape_inference.infer_shapes(model)
    result = copied(model)
    inferred = onnx.shape_inference.infer_shapes(declared_only(model)).graph
    for field in ("value_info", "output"):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(getattr(inferred, field))
    return result


def inferred_graph(model: ModelProto) -> GraphProto:
    """The graph with all types and sizes that can be inferred, weights only declared; as it is where inference fails.

    Why it fails is not told: runtimes say it better.
    """
    try:
        return onnx.shape_inference.infer_shapes(declared_only(model), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return model.graph


def keeps_weights_apart(path: Path) -> bool:
    """Whether an ONNX file has its weights, or some, in other files.

    Raises:
        UserError: it cannot be read or is no ONNX model.
    """
    return bool(data_files(_parse(path)))


def data_files(model: ModelProto) -> tuple[str, ...]:
    """Names of the files beside a parsed ONNX file that hold its weights; none once `load_model` has read them."""
    entries = (entry for tensor in _tensors(model) if uses_external_data(tensor) for entry in tensor.external_data)
    return tuple(dict.fromkeys(entry.value for entry in entries if entry.key == "location"))


def model_digest(path: Path) -> str:
    """The sha256 of an ONNX file, and of the files with its weights where it has such: other weights, other digest."""
    digest = hashlib.sha256()
    for file in (path, *(path.parent / name for name in data_files(_parse(path)))):
        require_regular(file, fix=_AGAIN)
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def declared_only(model: ModelProto) -> ModelProto:
    """A copy for shape inference, in which large weights are only declared, as inputs, and no data are held."""
    lean = ModelProto()
    lean.ir_version = model.ir_version
    lean.opset_import.extend(model.opset_import)
    lean.functions.extend(model.functions)
    graph, kept = model.graph, lean.graph
    kept.name = graph.name or "graph"
    kept.node.extend(graph.node)
    kept.input.extend(graph.input)
    kept.output.extend(graph.output)
    declared = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if not uses_external_data(tensor) and math.prod(tensor.dims) <= _SMALL_BYTES // 8:
            kept.initializer.append(tensor)
        elif tensor.name not in declared:
            kept.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return lean


def _parse(path: Path) -> ModelProto:
    try:
        return onnx.load_model_from_string(read_regular(path, fix=_AGAIN, largest=2**31))
    except DecodeError as error:
        raise UserError(
            f"{path} is not an ONNX model", why="It is cut off, damaged or another format.", fix=_AGAIN
        ) from error


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """All tensors with data: initializers and constants, those in functions and in the branches of If, Loop and Scan.

    The type that an attribute states is not relied on.
    """
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            if sparse.HasField("values"):
                yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):  # an attribute without a graph gives an empty graph
            yield from _graph_tensors(graph)


def _claimed_bytes(path: Path, tensor: TensorProto) -> int:
    """Bytes that a tensor's type and shape stand for."""
    if any(size < 0 for size in tensor.dims):
        raise UserError(f"{path} is damaged", why=f"Tensor {tensor.name!r} has shape {list(tensor.dims)}.", fix=_AGAIN)
    values: int = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return values
    try:
        bits = _bits(tensor.data_type)
    except KeyError as error:
        why = f"Tensor {tensor.name!r} has type {tensor.data_type}, which this onnx {onnx.__version__} does not know."
        raise UserError(f"{path} cannot be read", why=why, fix="Install a newer onnx.") from error
    return (values * bits + 7) // 8


def _bits(data_type: int) -> int:
    four = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    two = tuple(getattr(TensorProto, name) for name in ("INT2", "UINT2") if hasattr(TensorProto, name))
    if data_type in (*four, *two):
        return 4 if data_type in four else 2
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def _stored_values(tensor: TensorProto) -> int:
    fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    return sum(len(getattr(tensor, field)) for field in fields)


def _read_external(path: Path, tensor: TensorProto, claimed: int) -> None:
    """Bring a tensor's data into memory.

    Raises:
        UserError: the file is missing, cut, or not below the model's folder.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        file = path_inside(path.resolve().parent, location)
    except UserError as error:
        raise UserError(
            f"{path} keeps weights outside its folder",
            why=f"Tensor {tensor.name!r} is in {location[:300]!r}; such a path could read any file of this machine.",
            fix="Put the file with the weights beside the model, and save the model with its plain name.",
        ) from error
    if not file.is_file():
        raise UserError(
            f"{path} lacks its weights",
            why=f"They are in the file {location}, which is not in {path.parent}.",
            fix=f"Copy {location} into that folder, together with the model.",
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", claimed))
    except ValueError:
        offset, length = -1, -1
    size = file.stat().st_size
    if offset < 0 or length != claimed or offset + length > size:
        raise UserError(
            f"the weights of {path} are damaged",
            why=f"Tensor {tensor.name!r} of {claimed} bytes is said to be bytes {entries.get('offset', 0)} to "
            f"{entries.get('offset', 0)} + {entries.get('length', claimed)} of {location}, which has {size}.",
            fix=f"Copy {location} again, together with the model.",
        )
    with file.open("rb") as opened:
        opened.seek(offset)
        tensor.raw_data = opened.read(length)
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


def _check_shapes(path: Path, model: ModelProto) -> None:
    """Refuse tensors that no machine could hold, before a runtime tries to."""
    values = inferred_graph(model)
    for value in (*values.input, *values.output, *values.value_info):
        fixed = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.dim_value > 0]
        if math.prod(fixed) > _MAX_VALUES:
            shape = ", ".join(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
            raise UserError(
                f"{path} has a tensor that is too large",
                why=f"{value.name} is [{shape}]: {math.prod(fixed):.1e} values.",
                fix=f"Export the model for smaller images; up to {_MAX_VALUES:.1e} values are taken.",
            )


def _write_data(model: ModelProto, data: Path) -> ModelProto:
    """Write large weights to `data`, and return the model without them. Nothing is held twice."""
    lean = ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(lean, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(lean.graph, field.name, value)
    with whole_file(data) as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _SMALL_BYTES:
                lean.graph.initializer.append(tensor)
                continue
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.seek(offset)
            file.write(tensor.raw_data)
            entries = {"location": data.name, "offset": str(offset), "length": str(len(tensor.raw_data))}
            lean.graph.initializer.append(_elsewhere(tensor, entries))
    return lean


def _elsewhere(tensor: TensorProto, entries: dict[str, str]) -> TensorProto:
    result = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    result.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        result.external_data.add(key=key, value=value)
    return result


def _copy_field(target: ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if isinstance(value, (int, str, bytes)):
        setattr(target, name, value)
    elif hasattr(value, "CopyFrom"):
        getattr(target, name).CopyFrom(value)
    else:
        getattr(target, name).extend(value)
