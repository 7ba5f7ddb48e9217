"""Where networks for predictions come from: a run, a package, a model folder, or an ONNX file that was written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from upvits.calib_data import Preprocess
from upvits.calib_data.classes import read_class_map
from upvits.calib_data.documents import read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.loading import raw_pixels
from upvits.calib_data.paths import path_inside
from upvits.deploy.choices import MODELS
from upvits.deploy.graphs.files import load_model
from upvits.deploy.graphs.metadata import labels_in, metadata_of, preprocess_in, takes_pixels
from upvits.deploy.handover.document import PACKAGE, PackageDocument
from upvits.deploy.measure.compare_targets import find_targets
from upvits.deploy.runtimes import BUILD_RECORD, Session, open_model, read_engine, runtime_named
from upvits.deploy.store.run_dir import RECIPE
from upvits.toolchain.networks.config_document import has_config
from upvits.toolchain.networks.models import label_names_of, load, preprocess_of
from upvits.toolchain.structure.timm_config import num_classes_of

Logits = np.ndarray[Any, np.dtype[np.float32]]

_FP32 = "onnxruntime fp32"
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is ready to run.

    Attributes:
        name: `dense`, `pruned` or `network`.
        runs_in: runtime and precision.
        labels: names of the classes in the order of the outputs.
        feed: an image [1, 3, H, W], normalised, as the network takes it.
        run: logits [1, K] of that.
    """

    name: str
    runs_in: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    feed: Callable[[Tensor], Any]
    run: Callable[[Any], Logits]


@contextmanager
def open_networks(
    path: Path, *, runtime: str | None = None, precision: str | None = None, class_map: Path | None = None
) -> Iterator[list[Network]]:
    """The networks of a run (dense, pruned), a package, a model folder or an ONNX file; open while the context is.

    Args:
        path: of one of these.
        runtime: of the engines to use, of a run or a package; default: ONNX Runtime where a precision is named.
        precision: of these engines; default: fp32 where a runtime is named. With neither, what was exported runs.
        class_map: names of the classes, instead of those that come with the network.

    Raises:
        UserError: it is nothing of that, has no such engine, or does not say its classes or how pictures are prepared.
        MissingDependencyError: the runtime does not work here.
    """
    path = user_path(path)
    names = None if class_map is None else read_class_map(user_path(class_map))
    engine = None if runtime is None and precision is None else (runtime or "onnxruntime", precision or "fp32")
    with ExitStack() as stack:
        if path.suffix == ".onnx" and not path.is_dir():
            _refuse_engine(path, engine)
            yield [_of_file(path, names, stack)]
        elif (path / PACKAGE).is_file():
            yield [_of_package(path, engine, names, stack)]
        elif (path / RECIPE).is_file():
            yield _of_run(path, engine, names, stack)
        elif (path / BUILD_RECORD).is_file():
            built = read_engine(path)
            raise UserError(
                f"{path} is an engine alone.",
                why="It says neither its classes nor how pictures are prepared.",
                fix=f"Name the run or the package that it is part of, with --runtime {built.runtime} "
                f"--precision {built.precision}.",
            )
        elif path.is_dir() and has_config(path):
            _refuse_engine(path, engine)
            yield [_of_folder(path, names)]
        else:
            raise UserError(
                f"{path} is nothing to predict with." if path.exists() else f"There is no {path}.",
                why="Weights alone do not say how they are built." if path.suffix in _CHECKPOINTS else "",
                fix=f"Name a run (with {RECIPE}), a package (with {PACKAGE}), a model folder (with config.json) or an "
                "ONNX file."
                + (" `upvits.create_model` and `upvits.save` make a folder." if path.suffix in _CHECKPOINTS else ""),
            )


def _refuse_engine(path: Path, engine: tuple[str, str] | None) -> None:
    if engine is not None:
        raise UserError(
            f"{path} has no engines to choose from.",
            why="Runtime and precision choose among the engines of a run or a package.",
            fix="Leave --runtime and --precision out, or name the run.",
        )


def _of_run(run: Path, engine: tuple[str, str] | None, names: dict[str, int] | None, stack: ExitStack) -> list[Network]:
    graphs = {name: path_inside(run, f"4-export/{name}/model.onnx") for name in MODELS}
    missing = [str(path) for path in graphs.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{run} has no {missing[0]} yet.",
            why="The classes and the preparation of pictures are read from what a run exports.",
            fix=f"Run `upvits-deploy export --recipe {run} --output {run}`: it continues the run.",
        )
    if engine is None:
        return [replace(_of_file(path, names, stack), name=name) for name, path in graphs.items()]
    runtime, precision = engine
    targets, skipped = find_targets([run], "auto", [1])
    chosen = {t.label.rpartition(" ")[2]: t for t in targets if (t.runtime.name, t.precision) == engine}
    if {*chosen} != {*MODELS}:
        have = sorted({f"{t.runtime.name} {t.precision}" for t in targets})
        why = "; ".join(skip.why for skip in skipped if skip.name.endswith(f"{runtime} {precision}"))
        raise _no_engine(run, engine, have, why)
    networks = []
    for name, path in graphs.items():
        target = chosen[name]
        assert target.folder is not None
        session = stack.enter_context(target.runtime.open(target.folder))
        networks.append(_network(name, " ".join(engine), load_model(path), path, names, session))
    return networks


def _of_package(
    package: Path, engine: tuple[str, str] | None, names: dict[str, int] | None, stack: ExitStack
) -> Network:
    document = read_document(package / PACKAGE, PackageDocument, fix="Make the package again: `upvits-deploy package`.")
    path = path_inside(package, document.onnx)
    if engine is None:
        return replace(_of_file(path, names, stack), name="pruned")
    packed = {(one.runtime, one.precision): one for one in document.engines}
    if engine not in packed:
        raise _no_engine(package, engine, sorted(map(" ".join, packed)), "")
    folder = path_inside(package, packed[engine].file).parent
    session = stack.enter_context(runtime_named(engine[0]).open(folder))
    return _network("pruned", " ".join(engine), load_model(path), path, names, session)


def _no_engine(place: Path, engine: tuple[str, str], have: Sequence[str], why: str) -> UserError:
    return UserError(
        f"{place} has no engine of {engine[0]} in {engine[1]} that runs here.",
        why=why or f"It has {', '.join(have) or 'none'}.",
        fix="Choose one of these with --runtime and --precision, or leave both out to run the exported ONNX file.",
    )


def _of_file(path: Path, names: dict[str, int] | None, stack: ExitStack) -> Network:
    model = load_model(path)
    variant = metadata_of(model).get("variant", "")
    preprocess_in(model, str(path))  # before a session is opened
    session = stack.enter_context(open_model(model, name=str(path)))
    return _network(variant if variant in MODELS else "network", _FP32, model, path, names, session)


def _network(
    name: str, runs_in: str, model: ModelProto, path: Path, names: dict[str, int] | None, session: Session
) -> Network:
    preprocess = preprocess_in(model, str(path))
    sizes = [size.dim_value for size in model.graph.output[0].type.tensor_type.shape.dim] if model.graph.output else []
    if len(sizes) != 2 or len(model.graph.input) != 1 or sizes[1] < 1:
        raise UserError(
            f"{path} is no classifier.",
            why=f"It has {len(model.graph.input)} inputs, and its first output has the sizes {sizes}.",
            fix="Give the network of a run; detectors are judged by `upvits-deploy detect eval`.",
        )
    image, answer = session.input_names[0], session.output_names[0]
    raw = takes_pixels(model)
    return Network(
        name,
        runs_in,
        _labels(labels_in(model, str(path)), names, sizes[1], path),
        preprocess,
        lambda tensor: raw_pixels(tensor, preprocess) if raw else np.asarray(tensor.numpy()),
        lambda pixels: np.asarray(session.run({image: pixels})[answer], np.float32),
    )


def _of_folder(folder: Path, names: dict[str, int] | None) -> Network:
    model = load(folder)
    classes = num_classes_of(model)
    if not classes:
        raise UserError(f"{folder} holds a network without classifier.", fix="Give one with classes.")
    preprocess = preprocess_of(model)
    if preprocess.input_size[0] != 3:
        raise UserError(
            f"{folder} holds a network for images of {preprocess.input_size[0]} channels.",
            why="Pictures have three.",
            fix="Give a network for pictures.",
        )
    labels = _labels(label_names_of(model), names, classes, folder)
    return Network("network", "PyTorch fp32", labels, preprocess, lambda tensor: tensor, lambda x: _logits(model, x))


def _logits(model: nn.Module, images: Tensor) -> Logits:
    with torch.inference_mode():
        return np.asarray(model(images).numpy(), np.float32)


def _labels(told: tuple[str, ...] | None, names: dict[str, int] | None, classes: int, path: Path) -> tuple[str, ...]:
    """The names of all classes, from a class map or as the network has them."""
    if names is not None:
        by_number = {number: name for name, number in names.items()}
        if max(by_number) >= classes:
            raise UserError(
                f"The class map numbers up to {max(by_number)}, but {path} has {classes} classes.",
                fix="Give the map of the data that the network was trained on.",
            )
        return tuple(by_number.get(number, f"class {number}") for number in range(classes))
    if told is None or len(told) != classes:
        raise UserError(
            f"{path} does not say what its {classes} classes are called.",
            why="Its networks were trained on data, or read from weights, without names."
            if told is None
            else f"It names {len(told)}.",
            fix="Give `class_map=`: a text file with one name a line, in the order of the network's outputs.",
        )
    return told
