"""How much the width of a stream counts against the widths of its branches, found by trying.

Curves of branches are local, quadratic estimates, each with all else in place; joint cuts lose several times as much.
Curves of streams are measured, without a refit; cuts lose less. How far the two are off differs from network to
network, and sums of both would choose streams that are too wide. So a few plans are compressed, each with another
weight on the streams, and the one that is closest to the dense network decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from upvits.calib_data.prepared import ImageSet, in_batches
from upvits.calib_data.progress import watched
from upvits.toolchain.compensation.compress import compress
from upvits.toolchain.compensation.curves import mean_of, with_joint_units
from upvits.toolchain.families import groups_of
from upvits.toolchain.planning import Curve, PruningPlan
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores import divergence
from upvits.toolchain.scores.divergence import device_of, output_scale

WEIGHTS = (1.0, 0.3, 0.1)
"""Of the measured losses of streams. On two networks (a ViT-S and a PVTv2-B0) 0.2 to 0.3 would have been right."""


def weigh_streams(
    model: nn.Module,
    images: ImageSet,
    curves: Mapping[str, Curve],
    plan_by: Callable[[Mapping[str, Curve]], PruningPlan],
    *,
    weights: Sequence[float] = WEIGHTS,
    batch_size: int = 32,
    quiet: bool = True,
) -> dict[str, Curve]:
    """The curves with the weight on streams whose plan loses least once it is compressed.

    Args:
        model: the dense network, in eval mode.
        images: calibration images [N, 3, H, W]: every second one fits, the others judge.
        curves: of `compensated_curves`.
        plan_by: makes a plan with given curves; called once for every weight.
        weights: to try, the first one where all give the same plan.
        batch_size: images per pass.
        quiet: no progress bar.

    Raises:
        UserError: half of the images are too few for a refit.
    """
    weighted = [_weighted(model, curves, weight) for weight in weights]
    plans = [plan_by(candidate) for candidate in weighted]
    different = [i for i, plan in enumerate(plans) if not any(plan.cut == other.cut for other in plans[:i])]
    if len(different) == 1:
        return weighted[0]
    fit, judged = images[::2], in_batches(images[1::2], batch_size)
    scale = output_scale(model, judged)
    judge, device = shared().mine(judged), device_of(model)
    losses = {}
    with torch.inference_mode():
        dense = [model(part.to(device)) for _, part in judge]
    for index in watched(different, "Trying widths of the stream", quiet=quiet, total=len(different)):
        network = compress(model, with_joint_units(plans[index], curves), fit, batch_size=batch_size).model
        with torch.inference_mode():
            divergences = [
                divergence(whole, network(part.to(device)), scale)
                for whole, (_, part) in zip(dense, judge, strict=True)
            ]
        losses[index] = mean_of(divergences, device)
    return weighted[min(losses, key=lambda index: losses[index])]


def _weighted(model: nn.Module, curves: Mapping[str, Curve], weight: float) -> dict[str, Curve]:
    streams = {group.name for group in groups_of(model) if group.kind == "embed"}
    return {n: Curve(curve.order, curve.loss * weight) if n in streams else curve for n, curve in curves.items()}
