"""Scores of the units of a detector: how much its maps change when a unit leaves, on unlabelled images.

The maps are those of the head, before boxes are decoded. Class logits are independent Bernoulli variables, so their KL
is the sum over all anchors and classes. Deltas count where an object is: the deviation of a box from the dense
detector's, in units of `BOX_SCALE`, is weighted by the score that the dense detector gives to its anchor,

    D = sum_anchors [ sum_classes KL(p || q) + max_class p |deltas - deltas'|^2 / (2 BOX_SCALE^2) ],

Its second-order form needs a single backward pass for all units together, as for classifiers (`toolchain.scores`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvits.detection.decode import Levels
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores import Scores
from upvits.toolchain.scores.divergence import half_sums
from upvits.toolchain.scores.fisher import DRAWS, drawn_from, mask_fisher
from upvits.toolchain.scores.masks import masked
from upvits.toolchain.scores.measure import check_finite, images_digest
from upvits.toolchain.scores.stability import stability_of

BOX_SCALE = 0.1
"""A box that is off by a tenth of its anchor's side counts half a nat where the score of the object is 1."""


class Maps(nn.Module):
    """Images [B, 3, H, W] to all class logits and deltas of a RetinaNet as one vector [B, anchors * (classes + 4)]."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.levels = Levels(detector)
        self.num_classes = int(self.levels.bbox_head.cls_out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of all anchors, level by level, then deltas."""
        levels = self.levels(images)  # logits, then deltas
        return torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels], dim=1)

    def parts(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, anchors, classes] and deltas [B, anchors, 4]."""
        anchors = maps.shape[1] // (self.num_classes + 4)
        logits, deltas = torch.split(maps, [anchors * self.num_classes, anchors * 4], dim=1)
        return logits.view(len(maps), anchors, -1), deltas.view(len(maps), anchors, 4)

    def divergence(self, dense: Tensor, other: Tensor) -> Tensor:
        """D per image [B], in nats, of maps [B, C]."""
        (z, deltas), (other_z, other_deltas) = self.parts(dense.double()), self.parts(other.double())
        p = z.sigmoid()
        kl = p * (F.logsigmoid(z) - F.logsigmoid(other_z)) + (1 - p) * (F.logsigmoid(-z) - F.logsigmoid(-other_z))
        gaps = (deltas - other_deltas).square().sum(dim=2) * p.amax(dim=2)
        result: Tensor = kl.sum(dim=(1, 2)) + gaps.sum(dim=1) / (2 * BOX_SCALE**2)
        return result

    def probes(self, maps: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Directions g [B, C] with E sum g g^T = the second derivative of D at maps [B, C]; one at a time."""
        p = self.parts(maps)[0].sigmoid()
        sure = p.amax(dim=2, keepdim=True).expand(-1, -1, 4).sqrt() / BOX_SCALE
        root = torch.cat([(p * (1 - p)).sqrt().flatten(1), sure.flatten(1)], dim=1)
        for _ in range(DRAWS):
            signs = torch.randint(0, 2, maps.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            yield signs * root / DRAWS**0.5


@dataclass(frozen=True, slots=True)
class ConvGroup:
    """Channels of convolutions that leave together; the layers give [B, size, H, W]."""

    name: str
    size: int
    layers: tuple[str, ...]


def conv_groups(detector: nn.Module) -> list[ConvGroup]:
    """Groups of a RetinaNet's pyramid and head: within the pyramid, between it and the head, and inside the head."""
    neck, head = detector.get_submodule("neck"), detector.get_submodule("bbox_head")
    inner = tuple(f"neck.lateral_convs.{i}" for i in range(len(neck.lateral_convs)))  # type: ignore[arg-type]
    outer = tuple(f"neck.fpn_convs.{i}" for i in range(len(neck.fpn_convs)))  # type: ignore[arg-type]
    width = int(neck.out_channels)  # type: ignore[arg-type]
    inside = [
        ConvGroup(name, int(head.feat_channels), (name,))  # type: ignore[arg-type]
        for kind in ("cls_convs", "reg_convs")
        for name in (f"bbox_head.{kind}.{i}" for i in range(len(head.get_submodule(kind))))  # type: ignore[arg-type]
    ]
    return [ConvGroup("neck.inner", width, inner), ConvGroup("neck.outer", width, outer), *inside]


@dataclass(frozen=True, slots=True)
class DetectorScores:
    """Scores in nats per image: of the backbone's units, and of the channels of pyramid and head by group."""

    backbone: Scores
    neck_and_head: dict[str, Tensor]


def score_detector(
    detector: nn.Module, images: Tensor, *, batch_size: int = 4, seed: int = 0, quiet: bool = True
) -> DetectorScores:
    """Score all units of a RetinaNet at once.

    Args:
        detector: with a timm network in `backbone.net`.
        images: unlabelled, [N, 3, H, W], normalised; of one size.
        batch_size: images per pass.
        seed: of the probes.
        quiet: no progress bar.

    Raises:
        UserError: it is another detector, or scores are not finite.
    """
    net, maps = detector.get_submodule("backbone.net"), Maps(detector).eval()
    groups, convs = groups_of(net), conv_groups(detector)
    sizes = {group.name: group.size for group in groups} | {group.name: group.size for group in convs}
    halves = {name: torch.zeros(2, size, dtype=torch.float64) for name, size in sizes.items()}

    @contextmanager
    def masked_by(masks: Mapping[str, Tensor]) -> Iterator[None]:
        of_backbone = {group.name: masks[group.name] for group in groups}
        with masked(net, groups, of_backbone), _masked_channels(detector, convs, masks):
            yield

    batches = shared().mine(torch.split(images, batch_size))

    def probes(outputs: Tensor, number: int) -> Iterator[Tensor]:
        return maps.probes(outputs, drawn_from(seed, number))

    for number, scores in mask_fisher(maps, sizes, masked_by, batches, probes, quiet):
        for name, per_image in scores.items():
            halves[name] += half_sums(per_image, number * batch_size).cpu()
    shared().sum(*halves.values())
    means = {name: sums.sum(dim=0) / len(images) for name, sums in halves.items()}
    check_finite(means)
    in_backbone = {group.name for group in groups}
    backbone = Scores(
        method="fisher",
        unit="nats",
        values={name: mean for name, mean in means.items() if name in in_backbone},
        num_images=len(images),
        seed=seed,
        model_digest=weights_digest(net),
        data_digest=images_digest(images),
        stability=stability_of(groups, {name: sums for name, sums in halves.items() if name in in_backbone}, None),
    )
    return DetectorScores(backbone, {group.name: means[group.name] for group in convs})


@contextmanager
def _masked_channels(detector: nn.Module, groups: Sequence[ConvGroup], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with the output channels of convolutions multiplied by masks [B, size]."""
    with ExitStack() as hooks:
        for group in groups:
            for layer in group.layers:
                hooks.enter_context(
                    detector.get_submodule(layer).register_forward_hook(
                        lambda _, __, output, mask=masks[group.name]: output * mask[:, :, None, None]
                    )
                )
        yield
