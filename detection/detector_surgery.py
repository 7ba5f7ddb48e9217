"""Surgery on a trained detector: the backbone is cut by a plan, pyramid and head by ratio, then layers are refitted.

The narrower backbone has other features (rotated ones, where it was compensated), so every convolution of pyramid and
head is fitted anew, front to back: least squares from its inputs in the cut detector to its outputs in the dense one,
on unlabelled images, accepted output by output where held-out images agree (`toolchain.compensation`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched
from upvits.detection import openmm
from upvits.detection.detector import DetectorInfo
from upvits.detection.detector_scores import DetectorScores, Maps, conv_groups
from upvits.toolchain.compensation import compress
from upvits.toolchain.compensation.refit import coefficients_of, solve
from upvits.toolchain.compensation.statistics import Moments, input_rows, output_rows, split
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.models import structure_of
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.scores.divergence import device_of

ROWS_PER_IMAGE = 1024
"""Positions of a map that a regression uses, at most: neighbours carry much the same information."""


@dataclass(frozen=True, slots=True)
class CutDetector:
    """A cut detector, and how far its maps are from the dense one's on held-out images (nats per image).

    Attributes:
        divergence_cut: before the refit: kernels are copies of the dense detector's.
        divergence: of `detector`: after the refit, unless that was worse.
        refitted: number of layers that the refit changed.
    """

    detector: nn.Module
    info: DetectorInfo
    divergence_cut: float
    divergence: float
    refitted: int


def kept_channels(
    detector: nn.Module, scores: DetectorScores, ratio: float, align: int = 8
) -> dict[str, tuple[int, ...]]:
    """Channels of pyramid and head that stay, by group: those with the highest scores, equally many in every group.

    Args:
        detector: RetinaNet.
        scores: of `score_detector`.
        ratio: share of the channels to remove.
        align: widths are multiples of this.

    Raises:
        UserError: the ratio is below 0, or would remove all channels.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"A head ratio of {ratio:g} is not possible.", fix="Give a share from 0 to below 1.")
    kept = {}
    for group in conv_groups(detector):
        count = min(group.size, max(align, round(group.size * (1 - ratio) / align) * align)) if ratio else group.size
        order = scores.neck_and_head[group.name].argsort(descending=True)[:count]
        kept[group.name] = tuple(sorted(order.tolist()))
    return kept


def cut_detector(
    detector: nn.Module,
    info: DetectorInfo,
    plan: PruningPlan,
    kept: Mapping[str, Sequence[int]],
    images: Tensor,
    *,
    compensate: bool = True,
    quiet: bool = True,
) -> CutDetector:
    """The detector that a plan for its backbone and kept channels of its pyramid and head describe.

    Args:
        detector: RetinaNet; it is not changed.
        info: what is known of it.
        plan: for `backbone.net`.
        kept: of `kept_channels`.
        images: unlabelled, [N, 3, H, W]; every fifth one checks.
        compensate: rotate and refit the backbone, refit pyramid and head; otherwise cut only.
        quiet: no progress bar.
    """
    net = detector.get_submodule("backbone.net")
    if compensate:
        pruned = compress(net, plan, images, batch_size=8, quiet=quiet).model
    else:
        pruned = toolchain.delete_units(net, plan)
    cut, new_info = _cut(detector, info, pruned.cpu(), plan, kept)
    cut.to(device_of(detector))
    held = torch.split(split(images)[1], 4)
    divergence_cut = _divergence(detector, cut, held)
    if not compensate:
        return CutDetector(cut.cpu(), new_info, divergence_cut, divergence_cut, 0)
    fitted = copy.deepcopy(cut)
    changed = _refit(fitted, detector, kept, images, quiet)
    divergence = _divergence(detector, fitted, held)
    if divergence > divergence_cut:
        return CutDetector(cut.cpu(), new_info, divergence_cut, divergence_cut, 0)
    return CutDetector(fitted.cpu(), new_info, divergence_cut, divergence, changed)


def _cut(
    detector: nn.Module, info: DetectorInfo, net: nn.Module, plan: PruningPlan, kept: Mapping[str, Sequence[int]]
) -> tuple[nn.Module, DetectorInfo]:
    """The narrower detector; its kernels are copies of the kept parts of the dense detector's."""
    config = copy.deepcopy(info.config)
    channels = [int(stage["num_chs"]) for stage in net.feature_info]  # type: ignore[union-attr]
    config["backbone"] = {**config["backbone"], "model": structure_of(net)}
    config["neck"] |= {"in_channels": channels, "out_channels": len(kept["neck.outer"])}
    config["bbox_head"] |= {
        "in_channels": len(kept["neck.outer"]),
        "feat_channels": len(kept["bbox_head.cls_convs.0"]),
    }
    made: Any = openmm.build_detector(config)
    made.backbone.net.load_state_dict(net.state_dict())
    dense, narrow = detector.state_dict(), made.state_dict()
    for layer, (inputs, outputs) in _selections(detector, plan, kept).items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in dense:
                value = dense[name][outputs]
                narrow[name] = value[:, inputs] if value.ndim > 1 else value
    made.load_state_dict(narrow)
    return made.eval(), DetectorInfo(config, info.classes, info.category_ids, info.scale)


def _selections(
    detector: nn.Module, plan: PruningPlan, kept: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Any, Any]]:
    """Inputs and outputs of every convolution of pyramid and head that stay, in the order in which they run."""
    everything = slice(None)
    features = [list(plan.keep.get(name, ())) or everything for name in _streams(detector)]
    neck: Any = detector.get_submodule("neck")
    inner, outer = list(kept["neck.inner"]), list(kept["neck.outer"])
    levels = features[neck.start_level :]
    chosen: dict[str, tuple[Any, Any]] = {}
    for i in range(len(neck.lateral_convs)):
        chosen[f"neck.lateral_convs.{i}.conv"] = (levels[i], inner)
    for i in range(len(neck.fpn_convs)):
        extra = i - len(neck.lateral_convs)
        chosen[f"neck.fpn_convs.{i}.conv"] = (inner if extra < 0 else levels[-1] if extra == 0 else outer, outer)
    for kind, last in (("cls_convs", "retina_cls"), ("reg_convs", "retina_reg")):
        before = outer
        for i in range(len(detector.get_submodule(f"bbox_head.{kind}"))):  # type: ignore[arg-type]
            channels = list(kept[f"bbox_head.{kind}.{i}"])
            chosen[f"bbox_head.{kind}.{i}.conv"] = (before, channels)
            before = channels
        chosen[f"bbox_head.{last}"] = (before, everything)
    return chosen


def _streams(detector: nn.Module) -> list[str]:
    """Names of the groups of the backbone's four widths."""
    groups = groups_of(detector.get_submodule("backbone.net"))
    return [group.name for group in groups if group.kind == "embed"]


def _refit(cut: nn.Module, dense: nn.Module, kept: Mapping[str, Sequence[int]], images: Tensor, quiet: bool) -> int:
    """Fit every convolution of pyramid and head in place; the number of those that changed."""
    fit, held = split(images)
    chunks = [(part, False) for part in torch.split(fit, 4)] + [(part, True) for part in torch.split(held, 4)]
    outputs = {f"{layer}.conv": list(kept[g.name]) for g in conv_groups(dense) for layer in g.layers}
    layers = [*outputs, "bbox_head.retina_cls", "bbox_head.retina_reg"]
    changed = 0
    for name in watched(layers, "Refitting pyramid and head", quiet=quiet, total=len(layers)):
        layer: Any = cut.get_submodule(name)
        before = coefficients_of(layer)
        moments = {
            held_out: Moments.zeros(len(before) - 1, before.shape[1], before.device) for held_out in (False, True)
        }
        for part, held_out in chunks:
            for x, y in _rows(cut, dense, name, outputs.get(name), part):
                moments[held_out].add(x, y)
        _, after = solve(name, before, moments[False], moments[True], has_bias=layer.bias is not None)
        if after is not None:
            with torch.no_grad():
                layer.weight.copy_(after[:-1].T.reshape(layer.weight.shape))
                if layer.bias is not None:
                    layer.bias.copy_(after[-1])
            changed += 1
    return changed


def _rows(
    cut: nn.Module, dense: nn.Module, name: str, outputs: list[int] | None, images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Inputs [T, in] of a layer in the cut detector and its outputs [T, out] in the dense one, level by level."""
    layer, rows = cut.get_submodule(name), []
    for x, y in zip(_seen(cut, name, images, "input"), _seen(dense, name, images, "output"), strict=True):
        inputs, targets = input_rows(layer, x), output_rows(layer, y if outputs is None else y[:, outputs])
        step = max(1, len(inputs) // (ROWS_PER_IMAGE * len(images)))
        rows.append((inputs[::step], targets[::step]))
    return rows


def _seen(network: nn.Module, name: str, images: Tensor, side: str) -> list[Tensor]:
    """Everything that enters or leaves a layer, which may run several times."""
    seen: list[Tensor] = []
    hook = network.get_submodule(name).register_forward_hook(
        lambda _, args, output: seen.append(args[0] if side == "input" else output)
    )
    try:
        with torch.inference_mode():
            Maps(network).eval()(images.to(device_of(network)))
    finally:
        hook.remove()
    return seen


def _divergence(dense: nn.Module, other: nn.Module, batches: Sequence[Tensor]) -> float:
    maps, changed = Maps(dense).eval(), Maps(other).eval()
    with torch.inference_mode():
        parts = (batch.to(device_of(dense)) for batch in batches)
        return float(torch.cat([maps.divergence(maps(part), changed(part)) for part in parts]).mean())
