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

from calib_data.errors import UserError
from toolchain.checkpoints import weights_digest
from toolchain.families import groups_of
from toolchain.groups import ChannelGroup, Widths
from toolchain.scores.divergence import output_scale
from toolchain.scores.document import Method, Scores
from toolchain.scores.exact import Units, exact_kl
from toolchain.scores.fisher import fisher
from toolchain.scores.simple import magnitude, random_scores
from toolchain.scores.stability import stability_of


def score(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    method: Method = "fisher",
    cuts: Widths | None = None,
    batch_size: int = 16,
    seed: int = 0,
    units: Units | None = None,
    quiet: bool = True,
) -> Scores:
    """Measure the importance of every unit of every group.

    Args:
        model: a timm network of a supported family; it is not changed.
        images: the proxy set [N, 3, H, W], normalised as the network expects; labels are not needed. Not used by
            `magnitude` and `random`.
        method: `fisher` (default), `kl` (exact, one pass through the rest of the network per unit and image),
            `magnitude` or `random`.
        cuts: widths that a plan is going to keep, where `stability` is judged; half of every group by default.
        batch_size: images per pass; memory grows with it, and with neither the images nor the units.
        seed: for the label probes of `fisher` (more than 16 classes) and for `random`.
        units: only for `kl`: the units to measure per group (the others get NaN); all by default.
        quiet: no progress bar.

    Raises:
        UserError: the model is not supported, images are missing, or the network gives NaN on them.

    Example:
        >>> import timm, torch, toolchain
        >>> model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> scores = toolchain.score(model, torch.randn(8, 3, 32, 32))
        >>> scores.unit, sorted(scores.values)
        ('nats', ['blocks.0.attn', 'blocks.0.attn.heads', 'blocks.0.mlp', 'embed'])
    """
    groups = groups_of(model)
    if method == "magnitude" or method == "random":
        values = magnitude(model, groups) if method == "magnitude" else random_scores(groups, seed)
        return Scores(method, "none", values, 0, seed, weights_digest(model))
    if images is None or len(images) == 0:
        raise UserError(f"Scores by {method} need images.", fix="Give a proxy set: a few images per class will do.")
    was_training = model.training
    model.eval()
    batches = torch.split(images, batch_size)
    scale = output_scale(model, batches)
    if method == "fisher":
        halves = fisher(model, groups, batches, scale, seed, quiet)
    else:
        chosen = units if units is not None else {group.name: range(group.size) for group in groups}
        halves = exact_kl(model, groups, batches, scale, chosen, batch_size, quiet)
    model.train(was_training)
    return Scores(
        method=method,
        unit="nats",
        values={name: sums.sum(dim=0) / len(images) for name, sums in halves.items()},
        num_images=len(images),
        seed=seed,
        model_digest=weights_digest(model),
        data_digest=images_digest(images),
        stability=stability_of(groups, halves, cuts),
    )


def images_digest(images: Tensor) -> str:
    """sha256 over the shape and the values of a proxy set; tells what scores were measured on."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
