"""The only file that imports mmdet, mmcv and mmengine: detectors, their training loop, and COCO's metric.

They are optional and, as published, need old versions of other packages. What lets them run with current versions is
here: the operators of mmcv's compiled extension where it is missing (`operators.py`), checkpoints that load without
unpickling code, and no warnings about deprecations in other projects. A full build of mmcv is used where it is
installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.installation import install_line
from upvits.calib_data.printable import printable
from upvits.detection.backbone import UPPVTv2
from upvits.detection.config_check import check_names
from upvits.detection.configs import SILENT
from upvits.detection.operators import stand_in
from upvits.detection.simple_pyramid import UPViT

TESTED = {"mmdet": ("3.3.",), "mmengine": ("0.10.",), "mmcv": ("2.0.", "2.1."), "mmcv-lite": ("2.0.", "2.1.")}
"""Beginnings of versions; mmdet itself asserts that mmcv is older than 2.2."""

_ON_CPU = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
"""How processes without a GPU share a detector; mmengine's default names a GPU."""


def missing() -> MissingDependencyError | None:
    """Why detectors cannot be used here (a package is absent, or its version does not fit); None where they can."""
    absent = [name for name in ("mmengine", "mmcv", "mmdet", "pycocotools") if importlib.util.find_spec(name) is None]
    if absent:
        return MissingDependencyError(
            f"Detection needs {', '.join(absent)}.", why="They are optional.", fix=f"Run: {install_line('detection')}"
        )
    installed = versions()
    if {"mmcv", "mmcv-lite"} <= installed.keys():
        return MissingDependencyError(
            "Both mmcv and mmcv-lite are installed.",
            why="They unpack into one folder and break each other.",
            fix="Run: pip uninstall mmcv mmcv-lite, then install one of the two again.",
        )
    untested = [f"{name} {version}" for name, version in installed.items() if not version.startswith(TESTED[name])]
    if untested:
        tested = ", ".join(f"{name} {' or '.join(f'{start}x' for start in TESTED[name])}" for name in installed)
        return MissingDependencyError(
            f"Detection does not work with {', '.join(untested)}.",
            why=f"Tested are {tested}.",
            fix=f"Run: {install_line('detection')}",
        )
    return None


def require() -> None:
    """Check early that detectors can be used here.

    Raises:
        MissingDependencyError: mmdet is not installed, or its parts do not fit each other.
    """
    _loaded()


@functools.cache
def _loaded() -> Any:
    """mmdet with everything registered, ours too.

    Raises:
        MissingDependencyError: it is not installed, or its parts do not fit each other.
    """
    fault = missing()
    if fault is not None:
        raise fault
    with _quietly():
        if importlib.util.find_spec("mmcv._ext") is None:
            sys.modules["mmcv._ext"] = stand_in()
        try:
            mmdet = importlib.import_module("mmdet")
            utils = importlib.import_module("mmdet.utils")
            registry = importlib.import_module("mmdet.registry")
            utils.register_all_modules(init_default_scope=True)
            # mmengine logs every initialised tensor to whichever logger was made last
            importlib.import_module("mmengine.logging").MMLogger.get_instance("upvits-deploy", log_level=SILENT)
        except (AssertionError, ImportError) as error:
            raise MissingDependencyError(
                f"mmdet cannot be imported: {error}.",
                why="Its versions of mmcv and mmengine have to fit.",
                fix=f"Run: {install_line('detection')}",
            ) from error
    for backbone in (UPPVTv2, UPViT):
        registry.MODELS.register_module(name=backbone.__name__, module=backbone, force=True)
    return mmdet


def versions() -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    installed = {}
    for name in ("mmdet", "mmengine", "mmcv", "mmcv-lite"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


@contextlib.contextmanager
def _quietly(*, prints: bool = False) -> Iterator[None]:
    """Without the warnings of other projects about each other, and without what they print."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if not prints:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def build_detector(config: Mapping[str, Any]) -> nn.Module:
    """A detector from its configuration, its own layers initialised, in eval mode."""
    _loaded()
    models = importlib.import_module("mmdet.registry").MODELS
    with _quietly():
        detector: nn.Module = models.build(config_of(config))
        detector.init_weights()  # type: ignore[operator]
    return detector.eval()


def shapes_of(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of a detector's weights by name. No memory is taken for them: a configuration may ask for any amount."""
    _loaded()
    with _quietly(), torch.device("meta"):
        detector: nn.Module = importlib.import_module("mmdet.registry").MODELS.build(config_of(config))
    return {name: tensor.shape for name, tensor in detector.state_dict().items()}


def build_part(config: Mapping[str, Any]) -> nn.Module:
    """A backbone, neck or head of mmdet's registry."""
    _loaded()
    with _quietly():
        part: nn.Module = importlib.import_module("mmdet.registry").MODELS.build(dict(config))
    return part


def channels_of(backbone: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels of the levels of one of our backbones."""
    channels: tuple[int, ...] = build_part(backbone).channels  # type: ignore[assignment]
    return channels


def config_of(values: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
    """mmengine's Config of plain values, with dotted options merged in.

    Raises:
        UserError: an option names nothing, or has another type than what it replaces.
    """
    _loaded()
    config = importlib.import_module("mmengine.config").Config(dict(values))
    unknown = sorted({name.partition(".")[0] for name in options or ()} - values.keys())
    if unknown:
        raise UserError(
            f"`options=`: there is no {', '.join(unknown)}.",
            fix=f"Keys start with one of {', '.join(sorted(values))}.",
        )
    if options:
        try:
            config.merge_from_dict(dict(options))
        except (KeyError, TypeError, IndexError, AssertionError) as error:
            raise UserError(
                f"`options=` cannot be taken over: {error}.",
                fix="Give keys of the configuration, e.g. optim_wrapper.optimizer.lr=2e-4.",
            ) from error
        check_names(config.to_dict(), "`options=`")
    return config


def parse_option(text: str) -> tuple[str, Any]:
    """A `key=value` as mmdet's own tools read it: numbers, booleans, None, lists `[1,2]` and tuples `(1,2)`.

    Raises:
        UserError: it is no pair.
    """
    _loaded()
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"`options=` {text!r} is not valid.", fix="Give key=value.")
    try:
        return key, importlib.import_module("mmengine.config").DictAction._parse_iterable(value)
    except AssertionError as error:
        raise UserError(f"`options=` {text!r} is not valid: {error}.", fix="Close every bracket.") from error


def make_runner(config: Any, hooks: Sequence[Any] = ()) -> Any:
    """mmengine's Runner, with checkpoints that load without unpickling code."""
    _loaded()
    runner_module = importlib.import_module("mmengine.runner")
    with _quietly(prints=_talks(config)):
        launcher = "pytorch" if dist.is_available() and dist.is_initialized() else "none"
        wrapper = {} if torch.cuda.is_available() or launcher == "none" else {"model_wrapper_cfg": _ON_CPU}
        runner = runner_module.Runner.from_cfg(_with(config, launcher=launcher, **wrapper))
    runner.register_hook(_plain_checkpoints(), priority="LOWEST")
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def _talks(config: Any) -> bool:
    """Whether somebody asked to see mmengine's own log (`--cfg-options log_level=INFO`)."""
    return bool(config.log_level != SILENT)


def _with(config: Any, **values: Any) -> Any:
    config.merge_from_dict(values)
    return config


def _plain_checkpoints() -> Any:
    """A hook that leaves in checkpoints what `torch.load(weights_only=True)` takes: tensors and plain values."""
    hook_class = importlib.import_module("mmengine.hooks").Hook

    class PlainCheckpoints(hook_class):  # type: ignore[misc, valid-type]
        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            hub = checkpoint["message_hub"]  # its curves of losses are objects, and are in the log anyway
            checkpoint["message_hub"] = {**hub, "log_scalars": {}}
            checkpoint.update({name: _plain(value) for name, value in checkpoint.items() if name != "state_dict"})

    return PlainCheckpoints()


def _plain(value: Any) -> Any:
    """The same without numpy's types."""
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def progress_hook(advance: Any) -> Any:
    """A hook that calls `advance(epoch, step, steps, losses)` after every step of training."""
    _loaded()
    hook_class = importlib.import_module("mmengine.hooks").Hook

    class Progress(hook_class):  # type: ignore[misc, valid-type]
        def after_train_iter(
            self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
        ) -> None:
            losses = {name: float(value) for name, value in (outputs or {}).items() if isinstance(value, Tensor)}
            advance(runner.epoch, batch_idx, len(runner.train_dataloader), losses)

    return Progress()


def add_loss(runner: Any, extra: Callable[[Sequence[Tensor], Tensor], dict[str, Tensor]]) -> None:
    """Add losses to those of the runner's detector.

    Args:
        runner: of `make_runner`.
        extra: from the pyramid's features [B, C, H, W] and the images [B, 3, H, W] (normalised) to losses by name.
    """
    detector = getattr(runner.model, "module", runner.model)  # inside of DistributedDataParallel
    usual_loss = detector.loss
    seen: list[Sequence[Tensor]] = []

    def loss(images: Tensor, samples: Any) -> dict[str, Any]:
        seen.clear()
        losses = usual_loss(images, samples)
        return {**losses, **extra(seen[0], images)}

    detector.loss = loss
    detector.pyramid_hook = detector.neck.register_forward_hook(lambda _, __, features: seen.append(features))


def set_weights(runner: Any, state: Mapping[str, Tensor]) -> None:
    """Start from these weights instead of new ones."""
    detector: Any = getattr(runner.model, "module", runner.model)
    with _quietly():
        detector.init_weights()  # once: the runner's own call, right before training, does nothing then
    detector.load_state_dict(state)


def trained_model(runner: Any) -> nn.Module:
    """The runner's detector, in eval mode on the CPU."""
    detector: Any = getattr(runner.model, "module", runner.model)
    if detector.__dict__.pop("loss", None) is not None:  # of `add_loss`
        detector.__dict__.pop("pyramid_hook").remove()
    result: nn.Module = detector.cpu().eval()
    return result


def train(runner: Any) -> None:
    """Train, and go on where a checkpoint in the work folder ends if the configuration says so."""
    with _quietly(prints=_talks(runner.cfg)):
        runner.train()
    runner.visualizer.close()
    for handler in [entry for entry in runner.logger.handlers if isinstance(entry, logging.FileHandler)]:
        handler.close()  # what others log later in this process is not part of this training
        runner.logger.removeHandler(handler)


class Checkpoint(NamedTuple):
    """A file that mmengine wrote after an epoch, counted from 1."""

    epoch: int
    path: Path


def last_checkpoint(work_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a training that was stopped, or None: a kill may have cut the last file short."""
    numbers = {path: path.stem.removeprefix("epoch_") for path in work_dir.glob("epoch_*.pth") if path.is_file()}
    written = [Checkpoint(int(number), path) for path, number in numbers.items() if re.fullmatch("[0-9]{1,9}", number)]
    for checkpoint in sorted(written, reverse=True):
        with contextlib.suppress(Exception):  # whatever a torn file makes torch say
            torch.load(checkpoint.path, map_location="cpu", weights_only=True)
            return checkpoint
    return None


def require_weights(path: Path, model: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a detector cannot start from.

    Args:
        path: of `load_from`.
        model: the detector's configuration.

    Raises:
        UserError: there is no such file, it holds more than tensors and plain values, or another detector's weights.
    """
    if not path.is_file():
        raise UserError(f"load_from: there is no file {path}.", fix="Give a checkpoint of mmdet's.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none makes torch say
        raise UserError(
            f"load_from: {path} is no checkpoint of tensors and plain values.",
            why="Objects in a file are code, which is never run.",
            fix="Save its `state_dict` alone, by a tool that trusts the file.",
        ) from error
    given = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    names = {name: value for name, value in given.items() if isinstance(name, str)} if isinstance(given, dict) else {}
    shapes, found = shapes_of(model), printable(", ".join(list(names)[:2]), 200)
    if not any(name in shapes and shapes[name] == getattr(value, "shape", None) for name, value in names.items()):
        raise UserError(
            f"load_from: none of the weights in {path} fits this detector.",
            why=f"It has {', '.join(list(shapes)[:2])}, ...; the file {found or 'nothing'}, ...",
            fix="Give a checkpoint of the same detector and backbone.",
        )


def predict(detector: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes [N, 4], scores [N] and labels [N] of each image [B, 3, H, W] (normalised), as mmdet predicts them."""
    shape, scale = tuple(images.shape[2:]), (1.0, 1.0)
    predicted = _instances(detector, images, [(shape, shape, scale)] * len(images), rescale=False)
    return [(instances.bboxes.cpu(), instances.scores.cpu(), instances.labels.cpu()) for instances in predicted]


class Instances(NamedTuple):
    """Predictions on one image: boxes [N, 4], masks [N, h, w] (bool), scores [N] and labels [N]."""

    boxes: Tensor
    masks: Tensor
    scores: Tensor
    labels: Tensor


def predict_masks(
    detector: nn.Module, image: Tensor, inside: tuple[int, int], original: tuple[int, int], scale: tuple[float, float]
) -> Instances:
    """Boxes and masks on one image [3, H, W], in pixels of the original.

    Args:
        detector: Mask R-CNN.
        image: normalised, padded at the right and at the bottom.
        inside: (height, width) that it covers.
        original: (h, w).
        scale: pixels of the image per pixel of the original, (x, y).
    """
    (instances,) = _instances(detector, image.unsqueeze(0), [(inside, original, scale)], rescale=True)
    return Instances(instances.bboxes.cpu(), instances.masks.cpu(), instances.scores.cpu(), instances.labels.cpu())


def _instances(
    detector: nn.Module, images: Tensor, about: Sequence[tuple[Any, Any, Any]], *, rescale: bool
) -> list[Any]:
    """Predictions of mmdet on images; `about` gives (img_shape, ori_shape, scale_factor) of each."""
    _loaded()
    sample_class = importlib.import_module("mmdet.structures").DetDataSample
    shape, samples = tuple(images.shape[2:]), []
    for inside, original, scale in about:
        known = {"img_shape": inside, "ori_shape": original, "scale_factor": scale}
        samples.append(sample_class(metainfo={**known, "pad_shape": shape, "batch_input_shape": shape}))
    with _quietly():
        predicted = detector.predict(images, samples, rescale=rescale)  # type: ignore[operator]
    return [sample.pred_instances for sample in predicted]
