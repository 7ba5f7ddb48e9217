"""How much the output changes when a unit leaves: the importance of every unit of every group.

`kl` is the paper's definition (UP-ViTs, arXiv 2111.15127, section 3.2): remove one unit from the dense network and take
KL(p_dense || p_without), here as the mean over the images, in nats. `fisher` is its second-order equivalent at a
fraction of the cost: at the dense network the KL and its gradient are zero, so with a mask m on each unit

    KL(unit removed) ~ 1/2 E_image E_{y ~ p} [ (d log p_y / d m)^2 ],

and one backward pass gives the gradient of every mask at once. Networks without a classifier are scored by their
pooled features, read as a Gaussian whose variance is that of the dense features: KL = |difference|^2 / (2 variance).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import ImageSet, in_batches
from upvits.toolchain.choices import METHODS, Method
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.divergence import output_scale
from upvits.toolchain.scores.document import Scores
from upvits.toolchain.scores.exact import Units, exact_kl
from upvits.toolchain.scores.fisher import fisher
from upvits.toolchain.scores.refined import refined
from upvits.toolchain.scores.shortening import depth_paths
from upvits.toolchain.scores.simple import magnitude, random_scores
from upvits.toolchain.scores.stability import stability_of
from upvits.toolchain.structure.groups import ChannelGroup, Widths

PASS_ROWS = 32
"""Images times units in a pass of `kl`, at least: what a CPU needs to be busy."""

DEPTH_IMAGES = 64
"""Images on which blocks are taken out, at most: whole blocks are far above the noise."""


def score(
    model: nn.Module,
    images: ImageSet | None = None,
    *,
    method: Method = "fisher",
    cuts: Widths | None = None,
    batch_size: int = 8,
    seed: int = 0,
    units: Units | None = None,
    depth: bool = False,
    quiet: bool = True,
) -> Scores:
    """Measure the importance of every unit of every group.

    Args:
        model: a timm network of a supported family; it is not changed.
        images: the proxy set [N, 3, H, W], normalised as the network expects, as a tensor or to be read batch by batch
            (`calibration_images`); labels are not needed. Not used by `magnitude` and `random`.
        method: `fisher` (default), `kl` (exact, one pass through the rest of the network per unit and image), `refined`
            (`fisher`, and exact where it decides which units stay), `magnitude` or `random`.
        cuts: widths that a plan is going to keep: where `refined` looks closely and where `stability` is judged; half
            of every group by default.
        batch_size: images per pass, fewer where memory is short. Rounding depends on it, and nothing else; memory grows
            with it, and with neither the images nor the units.
        seed: for the label probes of `fisher` (more than 16 classes) and for `random`.
        units: only for `kl`: the units to measure per group (the others get NaN); all by default.
        depth: measure too how every list of blocks can get shorter, on the first 64 images at most.
        quiet: no progress bar.

    Raises:
        UserError: the model or the method is not supported, images are missing, or outputs or scores are not finite.

    Example:
        >>> import timm, torch
        >>> from upvits import toolchain
        >>> model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> scores = toolchain.score(model, torch.randn(8, 3, 32, 32))
        >>> scores.unit, sorted(name for name in scores.values if "attn" not in name)
        ('nats', ['blocks.0.mlp', 'embed'])
    """
    if method not in METHODS:
        raise UserError(f"Unknown method {method!r}.", fix=f"Choose one of: {', '.join(METHODS)}.")
    groups = groups_of(model)
    needs_images = depth or method not in ("magnitude", "random")
    if not needs_images:
        return Scores(method, "none", _without_images(model, groups, method, seed), 0, seed, weights_digest(model))
    if images is None or len(images) == 0:
        raise UserError(
            f"Scores {'of depth' if depth else f'by {method}'} need images.",
            fix="Give a proxy set: a few images per class will do.",
        )
    was_training = model.training
    model.eval()
    try:
        return _on_images(model, groups, images, method, cuts, batch_size, seed, units, depth, quiet)
    finally:
        model.train(was_training)


def _without_images(model: nn.Module, groups: Sequence[ChannelGroup], method: Method, seed: int) -> dict[str, Tensor]:
    return magnitude(model, groups) if method == "magnitude" else random_scores(groups, seed)


def _on_images(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    images: ImageSet,
    method: Method,
    cuts: Widths | None,
    batch_size: int,
    seed: int,
    units: Units | None,
    depth: bool,
    quiet: bool,
) -> Scores:
    rows = max(batch_size, PASS_ROWS)
    scale = output_scale(model, in_batches(images, batch_size))
    halves: dict[str, Tensor] = {}
    if method == "fisher":
        halves = fisher(model, groups, images, scale, batch_size=batch_size, seed=seed, quiet=quiet)
    elif method == "kl":
        chosen = units if units is not None else {group.name: range(group.size) for group in groups}
        halves = exact_kl(model, groups, in_batches(images, rows), scale, chosen, rows, quiet)
        check_finite({name: halves[name][:, list(chosen[name])] for name in chosen})
    if method == "refined":
        values, halves = refined(
            model, groups, images, scale, seed=seed, cuts=cuts, batch_size=batch_size, rows=rows, quiet=quiet
        )
    elif halves:
        values = {name: sums.sum(dim=0) / len(images) for name, sums in halves.items()}
    else:
        values = _without_images(model, groups, method, seed)
    if method != "kl":
        check_finite(values)
    told = halves if len(images) > 1 else {}  # one of two halves of a single image is empty
    paths = depth_paths(model, in_batches(images[:DEPTH_IMAGES], rows), scale, quiet) if depth else {}
    return Scores(
        method=method,
        unit="nats" if halves else "none",
        values=values,
        num_images=len(images) if halves else 0,
        seed=seed,
        model_digest=weights_digest(model),
        depth=paths,
        data_digest=shared().from_leader(lambda: images_digest(images)) if halves or depth else None,
        stability=stability_of(groups, told, cuts) if told else {},
        halves=told,
    )


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Refuse scores that are NaN or infinite, before anything is made of them."""
    bad = [name for name, scores in values.items() if not torch.isfinite(scores).all()]
    if bad:
        raise UserError(
            f"The scores of {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''} are not finite.",
            why="The network's output overflows, or becomes NaN, when units leave it.",
            fix='Check the weights; score in fp32, or by `method="magnitude"`.',
        )


def images_digest(images: ImageSet) -> str:
    """sha256 over the shape and the values of a proxy set; tells what scores were measured on."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for batch in in_batches(images, 1):
        digest.update(batch.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
