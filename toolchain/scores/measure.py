"""How much the output changes when a unit leaves: the importance of every unit of every group.

`kl` is the paper's definition (UP-ViTs, arXiv 2111.15127, section 3.2): remove one unit from the dense network and take
KL(p_dense || p_without), here as the mean over the images, in nats. `fisher` is its second-order equivalent at a
fraction of the cost: at the dense network the KL and its gradient are zero, so with a mask m on each unit

    KL(unit removed) ~ 1/2 E_image E_{y ~ p} [ (d log p_y / d m)^2 ],

and one backward pass gives the gradient of every mask at once. Networks without a classifier are scored by their
pooled features, read as a Gaussian whose variance is that of the dense features: KL = |difference|^2 / (2 variance).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from calib_data.errors import UserError
from toolchain.checkpoints import weights_digest
from toolchain.families import groups_of
from toolchain.scores.divergence import output_scale
from toolchain.scores.document import Method, Scores
from toolchain.scores.exact import exact_kl
from toolchain.scores.fisher import fisher
from toolchain.scores.simple import magnitude, random_scores


def score(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    method: Method = "fisher",
    batch_size: int = 16,
    seed: int = 0,
    units: Mapping[str, Sequence[int]] | None = None,
    quiet: bool = True,
) -> Scores:
    """Measure the importance of every unit of every group.

    Args:
        model: a timm network of a supported family; it is not changed.
        images: the proxy set [N, 3, H, W], normalised as the network expects; labels are not needed. Not used by
            `magnitude` and `random`.
        method: `fisher` (default), `kl` (exact, one forward pass per unit and image), `magnitude` or `random`.
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
    if method in ("fisher", "kl"):
        if images is None or len(images) == 0:
            raise UserError(f"Scores by {method} need images.", fix="Give a proxy set: a few images per class will do.")
        was_training = model.training
        model.eval()
        batches = torch.split(images, batch_size)
        scale = output_scale(model, batches)
        if method == "fisher":
            values = fisher(model, groups, batches, scale, seed, quiet)
        else:
            values = exact_kl(model, groups, batches, scale, units, quiet)
        model.train(was_training)
        count, unit = len(images), "nats"
    else:
        values = magnitude(model, groups) if method == "magnitude" else random_scores(groups, seed)
        count, unit = 0, "none"
    return Scores(method, unit, values, count, seed, weights_digest(model))
