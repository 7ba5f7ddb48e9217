"""How much the output changes when a unit leaves: the importance of every unit of every group.

`kl` is the paper's definition (UP-ViTs, arXiv 2111.15127, section 3.2): remove one unit from the dense network and take
KL(p_dense || p_without), here as the mean over the images, in nats. `fisher` is its second-order equivalent at a
fraction of the cost: at the dense network the KL and its gradient are zero, so with a mask m on each unit

    KL(unit removed) ~ 1/2 E_image E_{y ~ p} [ (d log p_y / d m)^2 ],

and one backward pass gives the gradient of every mask at once. Networks without a classifier are scored by their
pooled features, read as a Gaussian whose variance is that of the dense features: KL = |difference|^2 / (2 variance).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from calib_data.errors import UserError
from calib_data.progress import watched
from toolchain.checkpoints import weights_digest
from toolchain.families import groups_of
from toolchain.groups import ChannelGroup
from toolchain.masks import masked

Method = Literal["fisher", "kl", "magnitude", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
EXACT_CLASSES = 16
"""Up to this many classes the expectation over labels is exact; beyond it, it is sampled."""
DRAWS = 8
"""Random probes per image for the label expectation with many classes."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of every unit; low means that the unit can go.

    Attributes:
        method: how they were measured.
        unit: `nats` (expected KL per image) for kl and fisher; magnitude and random have no unit.
        values: group name -> float64 tensor [size]; NaN where a unit was not measured (sampled kl).
        num_images: images that the scores were measured on (0 for magnitude and random).
        seed: seed of the label probes or of the random scores.
        model_digest: sha256 of the dense network's weights.
    """

    method: Method
    unit: str
    values: dict[str, Tensor]
    num_images: int
    seed: int
    model_digest: str

    def save(self, folder: Path) -> None:
        """Write scores.safetensors and score.json into an existing folder."""
        save_file({name: tensor.contiguous() for name, tensor in self.values.items()}, folder / "scores.safetensors")
        document = {
            "format": 1,
            "method": self.method,
            "unit": self.unit,
            "num_images": self.num_images,
            "seed": self.seed,
            "model_digest": self.model_digest,
        }
        (folder / "score.json").write_text(json.dumps(document, indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            UserError: the folder holds no scores.
        """
        try:
            document = json.loads((folder / "score.json").read_text())
            values = load_file(folder / "scores.safetensors")
            return Scores(
                method=document["method"],
                unit=document["unit"],
                values=values,
                num_images=document["num_images"],
                seed=document["seed"],
                model_digest=document["model_digest"],
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no readable scores ({error}).",
                fix="Give the folder that `upvits-deploy score --output` wrote (scores.safetensors and score.json).",
            ) from error


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
        scale = _output_scale(model, batches)
        if method == "fisher":
            values = _fisher(model, groups, batches, scale, seed, quiet)
        else:
            values = _exact_kl(model, groups, batches, scale, units, quiet)
        model.train(was_training)
        count, unit = len(images), "nats"
    else:
        values = _magnitude(model, groups) if method == "magnitude" else _random(groups, seed)
        count, unit = 0, "none"
    return Scores(method, unit, values, count, seed, weights_digest(model))


def _output_scale(model: nn.Module, batches: Sequence[Tensor]) -> float | None:
    """None for a classifier; for features, their standard deviation over the proxy set. Refuses NaN early."""
    with torch.inference_mode():
        outputs = torch.cat([model(batch.to(_device(model))).float().cpu() for batch in batches])
    if not torch.isfinite(outputs).all():
        bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
        raise UserError(
            f"The dense network gives NaN or infinity on {bad} of {len(outputs)} images.",
            why="Importance is a change of its output, which must be a number.",
            fix="Check the weights and the normalisation of the images.",
        )
    if getattr(model, "num_classes", 0) > 0:
        return None
    if len(outputs) < 2:
        raise UserError("One image is not enough to score a network without a head.", fix="Give at least two.")
    return float(outputs.std(dim=0).square().mean().sqrt().clamp_min(1e-12))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _fisher(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    scale: float | None,
    seed: int,
    quiet: bool,
) -> dict[str, Tensor]:
    """1/2 E[(probe . d output / d mask)^2] per unit, summed image by image in float64."""
    generator = torch.Generator().manual_seed(seed)
    # detached weights: nothing is kept for weight gradients, which halves time and memory
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    totals = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for batch in watched(batches, "Scoring units (fisher)", quiet=quiet):
        masks = {
            group.name: torch.ones(len(batch), group.size, device=_device(model), requires_grad=True)
            for group in groups
        }
        with torch.enable_grad(), masked(model, groups, masks):
            outputs = functional_call(model, weights, batch.to(_device(model))).float()
        probes = _probes(outputs.detach().cpu(), scale, generator).to(outputs.device)
        for index, probe in enumerate(probes):
            gradients = torch.autograd.grad(
                (probe * outputs).sum(), list(masks.values()), retain_graph=index + 1 < len(probes)
            )
            for name, gradient in zip(masks, gradients, strict=True):
                totals[name] += gradient.double().square().sum(dim=0).cpu()
    count = sum(len(batch) for batch in batches)
    return {name: total / (2 * count) for name, total in totals.items()}


def _probes(outputs: Tensor, scale: float | None, generator: torch.Generator) -> Tensor:
    """Directions g [K, B, C] with sum_k g_k g_k^T = the Fisher matrix of the output (exactly, or in expectation).

    For a softmax that matrix is diag(p) - p p^T. Exactly: one direction sqrt(p_y) (e_y - p) per class y. With many
    classes: diag(sqrt p) e - p (sqrt p . e) with random signs e, which uses all classes in every draw and so varies
    less than drawing one label.
    """
    batch, size = outputs.shape
    if scale is not None:
        signs = torch.randint(0, 2, (DRAWS, batch, size), generator=generator).mul(2).sub(1)
        return signs.float().div(scale * DRAWS**0.5)
    p = outputs.double().softmax(dim=1)
    root = p.sqrt()
    if size <= EXACT_CLASSES:
        probes = root.T.unsqueeze(2) * (torch.eye(size, dtype=p.dtype).unsqueeze(1) - p)
    else:
        signs = (torch.randint(0, 2, (DRAWS, batch, size), generator=generator) * 2 - 1).double()
        probes = (root * signs - p * (root * signs).sum(dim=2, keepdim=True)) / DRAWS**0.5
    return probes.float()


def _exact_kl(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[Tensor],
    scale: float | None,
    units: Mapping[str, Sequence[int]] | None,
    quiet: bool,
) -> dict[str, Tensor]:
    """One masked forward pass per unit and batch; the dense outputs are computed once per batch."""
    wanted = units if units is not None else {group.name: range(group.size) for group in groups}
    work = [(group, unit) for group in groups for unit in wanted.get(group.name, ())]
    values = {group.name: torch.full((group.size,), torch.nan, dtype=torch.float64) for group in groups}
    for group, unit in work:
        values[group.name][unit] = 0.0
    with torch.inference_mode():
        dense = [model(batch.to(_device(model))) for batch in batches]
        for group, unit in watched(work, "Scoring units (kl)", quiet=quiet):
            for batch, reference in zip(batches, dense, strict=True):
                mask = torch.ones(len(batch), group.size, device=_device(model))
                mask[:, unit] = 0
                with masked(model, groups, {group.name: mask}):
                    output = model(batch.to(_device(model)))
                values[group.name][unit] += divergence(reference, output, scale).sum().item()
    count = sum(len(batch) for batch in batches)
    return {name: value / count for name, value in values.items()}


def divergence(dense: Tensor, other: Tensor, scale: float | None = None) -> Tensor:
    """KL per image [B] in nats between two outputs [B, C], computed in float64 from fp32 outputs.

    Args:
        dense: the reference's logits, or its features when `scale` is given.
        other: the changed network's output.
        scale: standard deviation of the features of a network without a classifier; None for logits.
    """
    dense, other = dense.double(), other.double()
    if scale is not None:
        gap: Tensor = (dense - other).square().sum(dim=1)
        return gap / (2 * scale**2)
    log_p, log_q = dense.log_softmax(dim=1), other.log_softmax(dim=1)
    kl: Tensor = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return kl


def _magnitude(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """L2 norm over everything that a unit owns."""
    state = model.state_dict()
    values = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for piece in group.slices:
            rows = state[piece.parameter].detach().cpu().double().movedim(piece.axis, 0)
            energy = rows.square().flatten(1).sum(dim=1) if rows.ndim > 1 else rows.square()
            total += energy.view(piece.repeat, group.size, piece.unit).sum(dim=(0, 2))
        values[group.name] = total.sqrt()
    return values


def _random(groups: Sequence[ChannelGroup], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator, dtype=torch.float64) for group in groups}


def check_method(name: str) -> Method:
    """The scoring method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"Unknown scoring method {name!r}.", fix=f"Choose one of: {', '.join(METHODS)}.")
    return name
