"""From a PyTorch model to an ONNX file that runtimes like and people can read."""

import contextlib
import copy
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import nn

from upvits.calib_data import Preprocess
from upvits.calib_data.errors import BuildError, UserError
from upvits.deploy.graphs.files import (
    MAX_FILE_BYTES,
    data_path,
    declared_only,
    model_digest,
    save_model,
    too_large_error,
    weight_bytes,
)
from upvits.deploy.graphs.names import name_after_modules
from upvits.deploy.graphs.surgery import (
    add_uint8_input,
    ffn_to_channels_first,
    name_batch_axis,
    rename_input,
    rename_outputs,
)
from upvits.toolchain.networks.models import label_names_of, preprocess_of

MIN_OPSET, MAX_OPSET = 18, 23
_EXAMPLE_BATCH = 2  # with 1 the exporter silently freezes the batch


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the ONNX file.
        sha256: of the file, and of the file with its weights where they are apart (`deploy.graphs.files.model_digest`).
        bytes: of all files together.
        nodes_before: nodes as the exporter made them.
        nodes: nodes in the file.
        rewritten_ffns: feed-forward networks that run channels-first from end to end (PVTv2; 0 for others).
        inputs: "name: type[shape]", for example "images: float32[batch, 3, 224, 224]".
        outputs: likewise.
        seconds: wall time.
    """

    path: Path
    sha256: str
    bytes: int
    opset: int
    nodes_before: int
    nodes: int
    rewritten_ffns: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float


def export_onnx(
    model: nn.Module,
    path: Path,
    preprocess: Preprocess,
    *,
    opset: int = 20,
    uint8_input: bool = False,
    external_data: bool = False,
    metadata: Mapping[str, str] | None = None,
    outputs: Sequence[str] | None = None,
) -> ExportReport:
    """Write a model as ONNX with a dynamic batch.

    The input is `images` (float32 [batch, C, H, W], normalised), or with `uint8_input` `pixels` (uint8
    [batch, H, W, C], normalised inside the graph). The output is `logits`, or `features` of a model without
    classifier, unless others are named. The model itself stays as it is: a copy is exported, in eval mode, on the CPU,
    in fp32.

    Args:
        model: takes [B, C, H, W] and returns a tensor [B, K], or as many as `outputs` names.
        path: the file to write; it appears whole or not at all.
        preprocess: input size, mean and std, stored in the file's metadata too.
        opset: 18 to 23; Gelu is a single node from 20 on.
        uint8_input: take raw pixels.
        external_data: put the weights in a file beside `path`, named like it with ".data" added.
        metadata: further entries for the file, such as labels and plan digest.
        outputs: their names, for models that are no classifiers.

    Raises:
        UserError: the opset is out of range, the model is too large for a single file, or the path cannot be written.
        BuildError: the model cannot be exported; says what the exporter stumbled over.
    """
    import onnxslim  # imports sympy, which takes longer than everything else here

    started = time.perf_counter()
    _check_request(model, opset, external_data)
    exported = _run_exporter(_frozen_copy(model), preprocess.input_size, opset)
    name_after_modules(exported)
    nodes_before = len(exported.graph.node)
    with _silence():
        graph = gs.import_onnx(onnxslim.slim(exported))
    names = outputs or ["features" if getattr(model, "num_classes", None) == 0 else "logits"]
    if len(graph.inputs) != 1 or len(graph.outputs) != len(names):
        raise BuildError(
            f"the exported model has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs",
            why=f"Only models from a single image tensor to {', '.join(names)} can be exported.",
        )
    try:
        name_batch_axis(graph)
    except ValueError as error:
        raise BuildError("the exporter fixed the batch size", why=f"{error}.") from error
    rename_input(graph, "images")
    rename_outputs(graph, names)
    rewritten = ffn_to_channels_first(graph)
    if uint8_input:
        add_uint8_input(graph, preprocess.mean, preprocess.std)
    proto = _finish(graph, opset, {**_metadata(preprocess), **(metadata or {})})
    save_model(proto, path, external_data=external_data)
    return ExportReport(
        path=path,
        sha256=model_digest(path),
        bytes=sum(file.stat().st_size for file in (path, data_path(path)) if file == path or external_data),
        opset=opset,
        nodes_before=nodes_before,
        nodes=len(proto.graph.node),
        rewritten_ffns=rewritten,
        inputs=tuple(_signature(value) for value in proto.graph.input),
        outputs=tuple(_signature(value) for value in proto.graph.output),
        seconds=time.perf_counter() - started,
    )


def export(
    model: nn.Module, path: Path | str, *, opset: int = 20, uint8_input: bool = False, external_data: bool = False
) -> ExportReport:
    """Write a timm network as one ONNX file with a dynamic batch.

    The input is `images` (float32 [batch, 3, H, W], normalised), or with `uint8_input` `pixels` (uint8
    [batch, H, W, 3], normalised inside the graph); the output is `logits`, or `features` of a network without head.
    Preprocessing and labels are in the file's metadata.

    Args:
        model: stays as it is: a copy is exported, in eval mode, on the CPU, in fp32.
        path: the file to write; it appears whole or not at all.
        opset: 18 to 23; Gelu is a single node from 20 on.
        uint8_input: take raw pixels.
        external_data: put the weights in a file beside `path`, named like it with ".data" added.

    Raises:
        UserError: the opset is out of range, the model is too large for a single file, or the path cannot be written.
        BuildError: the model cannot be exported; says what the exporter stumbled over.

    Example:
        >>> import tempfile, upvits
        >>> model = upvits.create_model("pvtv2_b0", weights="demo")
        >>> upvits.export(model, tempfile.mkdtemp() + "/model.onnx").inputs
        ('images: float32[batch, 3, 64, 64]',)
    """
    labels = label_names_of(model)
    metadata = {} if labels is None else {"labels": json.dumps(list(labels))}
    return export_onnx(
        model, Path(path), preprocess_of(model), opset=opset, uint8_input=uint8_input, external_data=external_data,
        metadata=metadata,
    )  # fmt: skip


def _check_request(model: nn.Module, opset: int, external_data: bool) -> None:
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UserError(
            f"opset {opset} is not supported",
            why="The exporter makes opset 18 or later; runtimes do not know later ones than 23 yet.",
            fix=f"Use {MIN_OPSET} to {MAX_OPSET}; 20 is the default.",
        )
    size = sum(tensor.numel() for tensor in model.state_dict().values()) * torch.float32.itemsize
    if size > MAX_FILE_BYTES and not external_data:
        raise too_large_error(size)


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy to export. timm's attention modules have a flag that says whether they call the fused kernel."""
    frozen = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    for module in frozen.modules():
        if getattr(module, "fused_attn", False):
            # Plain matrix products and a softmax: the cleaner graph, and what runtimes recognise as attention.
            module.fused_attn = False  # type: ignore[assignment]
    return frozen


def _run_exporter(model: nn.Module, input_size: tuple[int, int, int], opset: int) -> onnx.ModelProto:
    example = torch.zeros(_EXAMPLE_BATCH, *input_size)
    try:
        with _silence():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter has no common base class for what may go wrong
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise BuildError(
            f"{type(model).__name__} cannot be exported to ONNX",
            why=f"{type(cause).__name__}: {reason}",
            fix=f"The model is called with float32 images of shape {tuple(example.shape)}; check that it accepts them.",
        ) from error
    if program is None:
        raise BuildError(f"{type(model).__name__} cannot be exported to ONNX", why="The exporter returned nothing.")
    return program.model_proto


def _finish(graph: gs.Graph, opset: int, metadata: Mapping[str, str]) -> onnx.ModelProto:
    graph.name = "upvits-deploy"
    proto: onnx.ModelProto = gs.export_onnx(graph.cleanup().toposort())
    proto.producer_name, proto.producer_version = "upvits-deploy", _version()
    exported = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if exported != opset:
        raise BuildError(f"the exporter made opset {exported} instead of {opset}", fix=f"Ask for opset {exported}.")
    del proto.graph.value_info[:]
    lean = declared_only(proto)  # both would read a copy of the weights, which ends at 2 GiB
    proto.graph.value_info.extend(_inner(onnx.shape_inference.infer_shapes(lean, strict_mode=True), lean))
    onnx.helper.set_model_props(proto, dict(sorted(metadata.items())))
    onnx.checker.check_model(lean if weight_bytes(proto) > MAX_FILE_BYTES else proto)
    return proto


def _inner(inferred: onnx.ModelProto, lean: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Shapes of the tensors between nodes."""
    outside = {value.name for value in (*lean.graph.input, *lean.graph.output)}
    return [value for value in inferred.graph.value_info if value.name not in outside]


def _metadata(preprocess: Preprocess) -> dict[str, str]:
    return {
        "input_size": json.dumps(list(preprocess.input_size)),
        "mean": json.dumps(list(preprocess.mean)),
        "std": json.dumps(list(preprocess.std)),
        "interpolation": preprocess.interpolation,
        "crop_pct": json.dumps(preprocess.crop_pct),
        "crop_mode": preprocess.crop_mode,
        "upvits_deploy_version": _version(),
    }


def _version() -> str:
    try:
        return version("upvits-deploy")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0"


def _signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{value.name}: {dtype}[{shape}]"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Exporter and simplifier print, warn and log about things that nobody can act on; errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
