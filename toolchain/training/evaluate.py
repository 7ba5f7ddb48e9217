"""Top-1 accuracy, and how often a model agrees with another one. A model that computes NaN is refused."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upvits.calib_data import Images, Preprocess, batches
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched
from upvits.toolchain.processes.process import shared


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What a model did on a set of images."""

    top1: float | None  # percent of the labelled images; None: there are no labels, or the model has no classes
    images: int
    agreement: float | None  # percent of all images on which the prediction equals `reference`; None: not asked
    predictions: Tensor  # [images] int64 on the CPU, in the order of the batches; [0] for a model without classes
    labelled: int = 0  # images with a label, which `top1` is about
    lost: int | None = None  # labelled images that `reference` has right and the model has not; None: not asked
    won: int | None = None  # the other way round


def evaluate(
    model: nn.Module,
    prepared: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: Tensor | None = None,
    quiet: bool = True,
    total: int | None = None,
) -> Accuracy:
    """Runs the model over batches, in fp32, in eval mode and on the model's own device.

    Args:
        model: any timm classifier; its training mode is as before afterwards. Without classes (`num_classes` 0)
            it is still run, so that NaN is found, but there are no predictions.
        prepared: batches (images [B, 3, H, W] float32, labels [B] int64); label -1 means unlabelled.
        reference: predictions [images] of another model on the same batches, for `agreement`.
        total: number of batches, for the progress bar.

    Raises:
        UserError: there are no images, or the model's output has NaN or infinite values.

    >>> import torch
    >>> accuracy = evaluate(torch.nn.Flatten(), [(torch.eye(3), torch.tensor([0, 1, 1]))])
    >>> accuracy.predictions.tolist(), round(accuracy.top1, 1)
    ([0, 1, 2], 66.7)
    """
    steps = watched(prepared, "evaluate", quiet=quiet, total=total)
    answers = [(prediction, labels) for prediction, labels in _predictions(model, steps)]
    if not answers:
        raise _no_images()
    predictions, labels = (torch.cat(column).cpu() for column in zip(*answers, strict=True))
    return _accuracy(model, predictions, labels, reference)


def evaluate_images(
    model: nn.Module,
    images: Images,
    preprocess: Preprocess,
    batch_size: int,
    *,
    reference: Tensor | None = None,
    quiet: bool = True,
    workers: int = 0,
) -> Accuracy:
    """`evaluate` on pictures; processes that share it take every so-many-th batch, and all get the whole result.

    Args:
        model: any timm classifier.
        images: pictures, with labels or without.
        preprocess: how they are prepared.
        batch_size: pictures of a pass.
        reference: predictions [images] of another model, for `agreement`.
        quiet: no progress bar.
        workers: processes that read.

    Raises:
        UserError: there are no images, or the model's output has NaN or infinite values.
    """
    if not len(images):
        raise _no_images()
    process = shared()
    numbers = range(process.rank, -(-len(images) // batch_size), process.world_size)
    share = (process.rank, process.world_size)
    pin = next((parameter.is_cuda for parameter in model.parameters()), False)
    loader = batches(images, preprocess, batch_size, workers=workers, share=share, pin_memory=pin)
    steps = watched(loader, "evaluate", quiet=quiet, total=len(numbers))
    own = {number: found.cpu() for number, (found, _) in zip(numbers, _predictions(model, steps), strict=True)}
    return _accuracy(model, torch.cat(process.all_of(own)), torch.tensor(images.labels), reference)


def _predictions(model: nn.Module, steps: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """For every batch, what the model says, and the labels, [B] int64 each."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        for index, (images, labels) in enumerate(steps):
            with torch.inference_mode():
                prediction = _predict(model, images.to(device, non_blocking=True), index)
            yield prediction, labels
    finally:
        model.train(was_training)


def _no_images() -> UserError:
    return UserError("There are no images to evaluate on.", fix="Check the validation split of `data=`.")


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Refuses weights with NaN or infinite values.

    Raises:
        UserError: names the first such tensor.
    """
    for tensor_name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"The {name}'s weights have NaN or infinite values (first in {tensor_name}).",
                why="Nothing useful can be computed from them.",
                fix="Use another checkpoint: this one comes from a training that diverged or from a damaged file.",
            )


def _predict(model: nn.Module, images: Tensor, index: int) -> Tensor:
    """Predictions [B] int64 of one batch, on the model's device."""
    logits = model(images)
    if not logits.isfinite().all():
        layer = _first_broken_layer(model, images)
        raise UserError(
            f"The model's output has NaN or infinite values (batch {index}, first in {layer}).",
            why="The weights are damaged or overflow on these images.",
            fix="Check the checkpoint and the images' normalisation, or use other weights.",
        )
    prediction: Tensor = logits.argmax(dim=1)
    return prediction


def _first_broken_layer(model: nn.Module, images: Tensor) -> str:
    """The first layer, in running order, whose output is not finite: the batch is run once more with hooks."""
    broken: list[str] = []

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def check(_layer: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                broken.append(name)

        return layer.register_forward_hook(check)

    leaves = [(name, layer) for name, layer in model.named_modules() if not any(layer.children())]
    hooks = [watch(name, layer) for name, layer in leaves]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not images.isfinite().all():
        return "the input images"
    return broken[0] if broken else "the output"


def _accuracy(model: nn.Module, predictions: Tensor, labels: Tensor, reference: Tensor | None) -> Accuracy:
    images = len(labels)
    if getattr(model, "num_classes", None) == 0:
        return Accuracy(None, images, None, torch.empty(0, dtype=torch.int64))
    labelled = labels >= 0
    top1 = None
    if labelled.any():
        top1 = 100.0 * int((predictions == labels)[labelled].sum()) / int(labelled.sum())
    if reference is None:
        return Accuracy(top1, images, None, predictions, int(labelled.sum()))
    if len(reference) != images:
        raise ValueError(f"{len(reference)} reference predictions for {images} images")
    reference = reference.cpu()
    agreement = 100.0 * int((predictions == reference).sum()) / images
    right, right_before = ((answer == labels) & labelled for answer in (predictions, reference))
    lost, won = int((right_before & ~right).sum()), int((right & ~right_before).sum())
    return Accuracy(top1, images, agreement, predictions, int(labelled.sum()), lost, won)
