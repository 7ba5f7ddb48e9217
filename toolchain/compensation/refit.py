"""Refit: after a cut, every linear layer learns in closed form to give what the dense network gives.

From the input to the output, each Linear and Conv2d of the pruned network solves a ridge regression: inputs are what it
sees in the already pruned and refitted network, targets are what the dense network has at that place, on calibration
images without labels. Layers that write into the residual stream aim at the dense *stream*, so they also repair what
went wrong before them. In the spirit of Kwon et al. 2022 (arXiv 2204.09656), ZipLM (2302.04089) and SNOWS (2411.18376).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet, in_batches
from upvits.calib_data.progress import watched
from upvits.calib_data.scratch import Scratch
from upvits.toolchain.compensation.gradients import most_at_once
from upvits.toolchain.compensation.statistics import Moments, input_rows, linear_layers, observe, output_rows, split
from upvits.toolchain.families import segments_of
from upvits.toolchain.networks.depth import Blocks
from upvits.toolchain.processes.process import shared
from upvits.toolchain.structure.segments import Segment

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the mean diagonal of the inputs' covariance; every output takes that with its least held-out error."""

EXACT = 1e-9
"""Squared error in units of the target's variance that is only rounding."""

MAX_CONDITION = 1e10
"""Beyond it float64 normal equations leave too few right digits; such a ridge is not considered."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What the refit did to one layer.

    Attributes:
        layer: its name in the pruned network.
        action: `refit`, `bias` (only the bias was recalibrated), `kept` (nothing was better on held-out images),
            `exact` (no error to repair) or `skipped` (see the warning).
        error_before, error_after: held-out squared error in units of the target's variance.
        ridge: relative to the mean diagonal, the median over outputs; 0 where nothing was solved.
        condition: of the regularised normal equations, the worst of those that were used.
        rows: tokens (or patches, or images) that were fitted.
        inputs: unknowns per output, the bias not counted.
        warning: why the layer fell back, or nothing.
    """

    layer: str
    action: str
    error_before: float
    error_after: float
    ridge: float
    condition: float
    rows: int
    inputs: int
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Targets:
    """How places in the dense network look in the pruned one.

    Attributes:
        rows: layer of the pruned network -> its outputs among those of the dense layer, [out], and their factors [out]
            (queries of narrower heads are scaled).
        streams: layer that writes into the stream -> M [k, d]: the pruned stream should be M times the dense one.
        blocks: lists that are shorter in the pruned network -> which dense branches are left.
        maps: layer that writes in a rotated basis -> M [k, d]: its outputs should be M times those of the dense layer.
    """

    rows: Mapping[str, tuple[Tensor, Tensor]]
    streams: Mapping[str, Tensor]
    blocks: Blocks
    maps: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Step:
    """One segment of the pruned network and the part of the dense one that it stands for."""

    name: str
    run: Callable[[Tensor], Tensor]
    dense: Callable[[Tensor], Tensor]
    is_block: bool
    sources: tuple[str, str]  # names of the dense modules that its attention and its FFN come from


@dataclass(slots=True)
class _Pair:
    """The same images on their way through both networks, a chunk of them. Streams are on disk and read when looked at.

    Attributes:
        kept: where the streams are.
        number: of the chunk.
        held_out: whether these images only decide what is accepted.
        device: that the networks are on.
        before, behind: names of the dense network's streams that enter and leave the step; they change places after it.
        own: name of the pruned network's stream; images enter both networks.
    """

    kept: Scratch
    number: int
    held_out: bool
    device: torch.device
    before: str = "dense"
    behind: str = "after"
    own: str = "dense"

    @property
    def pruned(self) -> Tensor:
        """What enters the step in the pruned network."""
        return self.read(self.own)

    @property
    def dense(self) -> Tensor:
        """What enters it in the dense one."""
        return self.read(self.before)

    @property
    def middle(self) -> Tensor:
        """In the dense network, the stream between attention and FFN."""
        return self.read("middle")

    @property
    def after(self) -> Tensor:
        """In the dense network, what leaves the step."""
        return self.read(self.behind)

    def read(self, name: str) -> Tensor:
        return self.kept[name, self.number].to(self.device)

    def keep(self, name: str, stream: Tensor) -> None:
        self.kept[name, self.number] = stream

    def go_on(self, step: _Step) -> None:
        """Both networks are behind the step."""
        self.keep("pruned", step.run(self.pruned))
        self.own, self.before, self.behind = "pruned", self.behind, self.before


def refit(
    model: nn.Module, dense: nn.Module, images: ImageSet, targets: Targets, *, batch_size: int = 32, quiet: bool = True
) -> list[LayerReport]:
    """Refit all layers of a pruned network in place, front to back.

    Streams of all images are on disk, one of the pruned network and three of the dense one: at most 16 * images *
    tokens * channels bytes (512 images of a ViT-S at 224 pixels: 800 MB); memory does not grow with the images.

    Args:
        model: the pruned network, in eval mode; its weights are changed.
        dense: the network that it came from, in eval mode.
        images: calibration images [N, 3, H, W], normalised; every fifth only decides what is accepted.
        targets: how the two correspond.
        batch_size: images per pass, fewer where memory is short.
    """
    size = shared().from_leader(lambda: most_at_once(dense, images, batch_size))
    fit, held = (in_batches(part, size) for part in split(images))
    chunks = [(part, index) for part in (fit, held) for index in range(len(part))]
    kept, device, pairs = Scratch(), next(model.parameters()).device, []
    for number, (part, index) in shared().mine(chunks):
        pairs.append(_Pair(kept, number, part is held, device))
        pairs[-1].keep("dense", part[index])
    reports = []
    with torch.inference_mode():
        for step in watched(_steps(model, dense, targets.blocks), "Refitting", quiet=quiet):
            for pair in pairs:
                _ahead(dense, step, pair)
            for name in _layers_of(model, step, pairs):
                if name in targets.rows or name in targets.streams or name in targets.maps:
                    reports.append(_refit_layer(model, dense, name, step, pairs, targets))
            for pair in pairs:
                pair.go_on(step)
    return reports


def _layers_of(model: nn.Module, step: _Step, pairs: Sequence[_Pair]) -> list[str]:
    """Names of the layers of a step; only the first of several processes has images for sure."""
    return shared().from_leader(lambda: linear_layers(model, step.run, pairs[0].pruned[:1]))


def _ahead(dense: nn.Module, step: _Step, pair: _Pair) -> None:
    """The dense network goes through the step."""
    if not step.is_block:
        pair.keep(pair.behind, step.dense(pair.dense))
        return
    norm = dense.get_submodule(f"{step.sources[1]}.norm2")
    middle, after = observe(step.dense, pair.dense, [(norm, "input")], to_end=True)
    pair.keep("middle", middle)
    pair.keep(pair.behind, after)


def _steps(model: nn.Module, dense: nn.Module, blocks: Blocks) -> list[_Step]:
    """Segments of the pruned network; a dense block that was taken out belongs to the step before it."""
    segments, all_dense = segments_of(model), segments_of(dense)
    position = {segment.name: index for index, segment in enumerate(all_dense)}
    sources = [_sources(segment, blocks) for segment in segments]
    starts = [0] + [position[attention] for attention, _ in sources[1:]] + [len(all_dense)]
    return [
        _Step(
            segment.name,
            segment.run,
            _chain(all_dense[starts[i] : starts[i + 1]]),
            segment.kind == "block",
            sources[i],
        )
        for i, segment in enumerate(segments)
    ]


def _sources(segment: Segment, blocks: Blocks) -> tuple[str, str]:
    parent, _, index = segment.name.rpartition(".")
    if segment.kind != "block" or parent not in blocks:
        return segment.name, segment.name
    attention, ffn = blocks[parent][int(index)]
    return f"{parent}.{attention}", f"{parent}.{ffn}"


def _chain(segments: Sequence[Segment]) -> Callable[[Tensor], Tensor]:
    def run(stream: Tensor) -> Tensor:
        for segment in segments:
            stream = segment.run(stream)
        return stream

    return run


def _refit_layer(
    model: nn.Module, dense: nn.Module, name: str, step: _Step, pairs: Sequence[_Pair], targets: Targets
) -> LayerReport:
    layer = cast("nn.Linear | nn.Conv2d", model.get_submodule(name))
    now = coefficients_of(layer)
    fit, held = (Moments.zeros(len(now) - 1, now.shape[1], now.device) for _ in range(2))

    def add_up(sums: Moments, held_out: bool) -> None:
        for pair in pairs:
            if pair.held_out == held_out:
                sums.add(*_regression(model, dense, name, step, pair, targets))
        shared().sum(sums.xx, sums.xy, sums.yy)

    add_up(held, True)
    if not shared().from_leader(lambda: held.error(now) < EXACT * held.variance()):  # else nothing was changed so far
        add_up(fit, False)
    report, coefficients = _solved(name, now, fit, held, has_bias=layer.bias is not None)
    if coefficients is not None:
        layer.weight.copy_(coefficients[:-1].T.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(coefficients[-1])
    return report


def _solved(
    name: str, now: Tensor, fit: Moments, held: Moments, *, has_bias: bool
) -> tuple[LayerReport, Tensor | None]:
    """`solve` in the first of the processes that share the sums, for all of them."""
    if shared().world_size == 1:
        return solve(name, now, fit, held, has_bias=has_bias)

    def on_cpu() -> tuple[LayerReport, Tensor | None]:
        report, coefficients = solve(name, now, fit, held, has_bias=has_bias)
        return report, None if coefficients is None else coefficients.cpu()

    report, coefficients = shared().from_leader(on_cpu)
    return report, None if coefficients is None else coefficients.to(now.device)


def coefficients_of(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Weights and bias as one matrix [in + 1, out], float64."""
    weight = layer.weight.detach().flatten(1).T.double()
    bias = weight.new_zeros(1, weight.shape[1]) if layer.bias is None else layer.bias.detach().double().unsqueeze(0)
    return torch.cat([weight, bias])


def _regression(
    model: nn.Module, dense: nn.Module, name: str, step: _Step, pair: _Pair, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Inputs [T, in] and targets [T, out] of one layer on one chunk of images."""
    layer = model.get_submodule(name)
    part = name[len(step.name) + 1 :]
    if name not in targets.streams:
        source = f"{step.sources[part.startswith('mlp')]}.{part}" if name.startswith(f"{step.name}.") else name
        (x,) = observe(step.run, pair.pruned, [(layer, "input")])
        (y,) = observe(step.dense, pair.dense, [(dense.get_submodule(source), "output")])
        if name in targets.maps:
            return input_rows(layer, x), output_rows(layer, y).double() @ targets.maps[name].to(y.device).T
        rows, factors = targets.rows[name]
        return input_rows(layer, x), output_rows(layer, y)[:, rows] * factors.to(y.device)
    if part == "attn.proj":
        dense_after, norm, scale = pair.middle, "norm1", "ls1"
    else:
        dense_after, norm, scale = pair.after, "norm2", "ls2"
    before_module = model.get_submodule(f"{step.name}.{norm}")
    before, x = observe(step.run, pair.pruned, [(before_module, "input"), (layer, "input")])
    target = dense_after.flatten(0, -2).double() @ targets.streams[name].to(before.device).T
    y = target - before.flatten(0, -2)
    block: Any = model.get_submodule(step.name)
    gamma = getattr(getattr(block, scale, None), "gamma", None)
    if gamma is not None:
        y = y / torch.where(gamma == 0, torch.ones_like(gamma), gamma)
    return input_rows(layer, x), y


def solve(name: str, now: Tensor, fit: Moments, held: Moments, *, has_bias: bool) -> tuple[LayerReport, Tensor | None]:
    """Ridge regression towards the present weights; for every output, what is best on held-out data is accepted.

    The ridge pulls towards the weights that the cut left, not towards zero: with little data the result is the plain
    pruned layer.

    Args:
        name: for the report.
        now: present weights and bias [in + 1, out].
        fit, held: moments of the layer's inputs and targets.
        has_bias: whether the last row of the coefficients may be other than zero.

    Returns:
        The report, and the new coefficients or None when the layer stays as it is.
    """
    variance = max(held.variance(), 1e-300)
    before = held.error(now) / variance
    rows, inputs = int(fit.count), len(now) - 1
    report = LayerReport(name, "kept", before, before, 0.0, 1.0, rows, inputs)
    if not (fit.xx.isfinite().all() and fit.xy.isfinite().all() and math.isfinite(before)):
        return replace(report, action="skipped", warning="its inputs or targets are not finite"), None
    if before < EXACT:
        return replace(report, action="exact"), None
    if rows <= inputs:
        return replace(report, action="skipped", warning=f"{rows} rows cannot determine {inputs} inputs"), None
    mean, target_mean = fit.xx[-1:, :-1] / fit.count, fit.xy[-1:] / fit.count
    if not has_bias:
        mean, target_mean = torch.zeros_like(mean), torch.zeros_like(target_mean)
    covariance = fit.xx[:-1, :-1] / fit.count - mean.T @ mean
    missing = fit.xy[:-1] / fit.count - mean.T @ target_mean - covariance @ now[:-1]
    values, vectors = torch.linalg.eigh(covariance)
    values, projected = values.clamp_min(0), vectors.T @ missing

    def with_bias(weight: Tensor) -> Tensor:
        return torch.cat([weight, target_mean - mean @ weight])

    # every output takes what is best for it: those that were right already must not pay for those that were not
    coefficients, best = now.clone(), held.errors(now)
    ridges = torch.full_like(best, torch.inf)  # as if the ridge held everything in its place
    worst = 1.0
    for ridge in (math.inf, *RIDGES):
        finite = math.isfinite(ridge)  # an infinite one moves the bias alone
        shift = ridge * values.mean() if finite else values.new_tensor(math.inf)
        condition = float((values[-1] + shift) / (values[0] + shift)) if finite else 1.0
        if not condition <= MAX_CONDITION:
            continue
        candidate = with_bias(now[:-1] + vectors @ (projected / (values + shift)[:, None]))
        errors = held.errors(candidate)
        better = errors < best
        coefficients[:, better], best = candidate[:, better], torch.where(better, errors, best)
        ridges[better] = ridge
        worst = max(worst, condition) if better.any() else worst
    changed = (coefficients != now).any(dim=0)
    if not changed.any():
        return report, None
    if not coefficients.float().isfinite().all():
        return replace(report, action="skipped", warning="the solution is not finite"), None
    refitted = ridges.isfinite()
    ridge = float(ridges[refitted].median()) if refitted.any() else 0.0
    action, error = "refit" if refitted.any() else "bias", float(best.sum()) / variance
    return replace(report, action=action, error_after=error, ridge=ridge, condition=worst), coefficients
