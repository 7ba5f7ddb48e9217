"""What the closed forms are computed from: second moments of layers, in float64, and a look into a running network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import ImageSet, PreparedImages

Site = Literal["input", "output"]
Images = TypeVar("Images", Tensor, PreparedImages, ImageSet)


_COLUMNS = 256
"""Of a symmetric product that are computed at once."""

MIN_IMAGES = 10
"""Fewer cannot be divided into a part to fit and a part to check."""


class TooFewImagesError(UserError):
    """The calibration set does not suffice for the regressions; says how many images would."""


def require_images(images: ImageSet) -> None:
    """Refuses calibration sets with which nothing can be fitted at all.

    Raises:
        TooFewImagesError: says how many images are needed.
    """
    if len(images) < MIN_IMAGES:
        raise TooFewImagesError(
            f"{len(images)} calibration images are too few to refit a network on.",
            why="Every fifth image is held out to check what the others taught.",
            fix=f"Give at least {MIN_IMAGES}; 500 are a good number.",
        )


def split(images: Images) -> tuple[Images, Images]:
    """Calibration images for fitting and for checking: every fifth is held out."""
    held = torch.arange(len(images)) % 5 == 4
    return images[~held], images[held]


class _AllSeen(Exception):  # noqa: N818 -- no error: all sites were seen, so the pass ends early
    pass


def observe(
    run: Callable[[Tensor], Tensor], start: Tensor, sites: Sequence[tuple[nn.Module, Site]], *, to_end: bool = False
) -> list[Tensor]:
    """What enters or leaves some modules while `run(start)` goes on; it stops as soon as everything was seen.

    Args:
        run: a part of a forward pass.
        start: its argument.
        sites: modules, each of them run once, and the side to look at.
        to_end: do not stop; what `run` returns is then the last tensor.

    Returns:
        One tensor for each of `sites`.
    """
    tensors: dict[int, Tensor] = {}

    def note(index: int, tensor: Tensor) -> None:
        tensors[index] = tensor
        if len(tensors) == len(sites) and not to_end:
            raise _AllSeen

    hooks = []
    for index, (module, site) in enumerate(sites):
        if site == "input":
            hooks.append(module.register_forward_pre_hook(lambda _, args, index=index: note(index, args[0])))
        else:
            hooks.append(module.register_forward_hook(lambda _, __, output, index=index: note(index, output)))
    result = []
    try:
        result.append(run(start))
    except _AllSeen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [tensors[index] for index in range(len(sites))] + (result if to_end else [])


def linear_layers(model: nn.Module, run: Callable[[Tensor], Tensor], start: Tensor) -> list[str]:
    """Names of the Linear and (not depthwise) Conv2d layers that a part of a forward pass runs, in that order."""
    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, __, name=name: names.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    try:
        run(start)
    finally:
        for hook in hooks:
            hook.remove()
    return names


def input_rows(layer: nn.Module, tensor: Tensor) -> Tensor:
    """What a layer reads, as the rows of a matrix: tokens [T, in], for a convolution patches [T, in * kh * kw]."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)  # timm's networks give numbers
        patches = F.unfold(tensor, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return tensor.flatten(0, -2)


def output_rows(layer: nn.Module, tensor: Tensor) -> Tensor:
    """What a layer writes, as the rows of a matrix [T, out], in the order of `input_rows`."""
    if isinstance(layer, nn.Conv2d):
        return tensor.flatten(2).transpose(1, 2).flatten(0, 1)
    return tensor.flatten(0, -2)


def add_gram(sums: Tensor, rows: Tensor, times: float = 1.0) -> None:
    """Add `times` rows^T rows [d, d] to `sums`; of the product, which is symmetric, little more than half is computed.

    Products are of the type of `rows`, sums of that of `sums`.
    """
    for start in range(0, rows.shape[1], _COLUMNS):
        end = start + _COLUMNS
        upper = rows[:, start:end].T @ rows[:, start:]
        sums[start:end, start:].add_(upper, alpha=times)
        sums[end:, start:end].add_(upper[:, _COLUMNS:].T, alpha=times)


@dataclass(slots=True)
class Moments:
    """Second moments of a regression's inputs and targets, summed in float64.

    Attributes:
        xx: [d + 1, d + 1]; the last input is the constant 1 (the bias).
        xy: [d + 1, out].
        yy: [out], the diagonal only.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @staticmethod
    def zeros(inputs: int, outputs: int, device: torch.device) -> Moments:
        """Nothing summed yet."""
        size = inputs + 1
        shapes = ((size, size), (size, outputs), (outputs,))
        return Moments(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Sum over the rows of x [T, d] and y [T, out], each counted `weights` [T] times."""
        x = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        y = y.double()
        weighted = x if weights is None else x * weights.double().unsqueeze(1)
        add_gram(self.xx, x if weights is None else x * weights.double().sqrt().unsqueeze(1))
        self.xy += weighted.T @ y
        self.yy += (y.square() if weights is None else y.square() * weights.double().unsqueeze(1)).sum(dim=0)

    @property
    def count(self) -> float:
        """Rows that were summed, by weight."""
        return float(self.xx[-1, -1])

    def errors(self, coefficients: Tensor) -> Tensor:
        """Mean squared error per row of every output of x @ coefficients [d + 1, out], as [out]."""
        gap = self.yy - 2 * (coefficients * self.xy).sum(dim=0) + (coefficients * (self.xx @ coefficients)).sum(dim=0)
        return gap.clamp_min(0) / self.count

    def error(self, coefficients: Tensor) -> float:
        """Mean squared error per row, summed over the outputs."""
        return float(self.errors(coefficients).sum())

    def variance(self) -> float:
        """Mean squared distance of the targets from their mean, summed over the outputs."""
        return float((self.yy - self.xy[-1].square() / self.count).sum().clamp_min(0)) / self.count
