"""Rotation inside attention heads: the free bases of q.k and of values, ordered by importance.

Softmax sees queries and keys of a head only through their products, and the stream sees values only through the
projection: q -> A q, k -> A^-T k and v -> B v, W_proj -> W_proj B^-1 change nothing. Of all bases, the one in which
cutting the last dims costs least is the data-aware SVD of the product (up to their second moments, the rank reduction
of weighted matrices; for language models cf. SVD-LLM, arXiv 2403.07378). Biases are exact:

- what a key adds to all logits of a query (q . b_k and the mean of the keys) cancels in the softmax, so keys count by
  their covariance within an image, and their mean leaves the bias;
- the weights of an attention row add up to one, so the mean of a head's output moves into the bias of the projection,
  and values count by the covariance of the head's output.

What matters is the output of the network: tokens are weighted by the squared gradient g of the Fisher information at
the branch's output (`toolchain.scores.fisher`), and values by what the projection does along E[g g^T].
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upvits.calib_data.prepared import ImageSet
from upvits.toolchain.compensation.gradients import most_at_once, output_gradients, parts_of
from upvits.toolchain.compensation.statistics import add_gram
from upvits.toolchain.families import groups_of
from upvits.toolchain.processes.process import shared
from upvits.toolchain.scores.backward import frozen
from upvits.toolchain.scores.divergence import device_of
from upvits.toolchain.scores.room import with_room

RIDGE = 1e-8
"""Added to second moments, relative to their mean diagonal: dims that never move stay invertible."""

EVENNESS = 0.1
"""Added to the importance of every channel of a branch's output, relative to the mean one: gradients are few."""

LEAST_WEIGHT = 0.01
"""Every token counts at least this share of the mean token of its image."""

TINY = 1e-30
"""Where nothing depends on a branch, everything counts alike."""


@dataclass(frozen=True, slots=True)
class HeadRotation:
    """A network that computes the same, with the dims of every head in order: the first matter most.

    Attributes:
        model: same class, same shapes.
        logit_error: attention module -> [heads, qk_dim + 1] float64: expected squared error of an attention logit, as
            softmax sees it, when the last r dims of q and k are cut (r = 0 ... qk_dim); mean over keys, and over
            queries by their weight.
        output_error: attention module -> [heads, v_dim + 1] float64: expected loss in nats (KL to this network) when
            the last r value dims of the head are cut, in the second order of `fisher`; for networks without classes
            half the squared change of the output.
    """

    model: nn.Module
    logit_error: dict[str, Tensor]
    output_error: dict[str, Tensor]


@dataclass(slots=True)
class _Moments:
    """Sums over calibration tokens per head, float64."""

    queries: Tensor  # [heads, qk_dim, qk_dim], weighted
    keys: Tensor  # [heads, qk_dim, qk_dim], each image's mean taken out
    key_sum: Tensor  # [heads, qk_dim]
    output: Tensor  # [heads, v_dim, v_dim], weighted
    output_sum: Tensor  # [heads, v_dim], weighted
    importance: Tensor  # [d, d], of the branch's output
    counts: Tensor  # [3]: weight of all tokens, keys, images


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where q, k and v of an attention module come from: (layer, first row) each, and the dims per head."""

    heads: int
    qk_dim: int
    v_dim: int
    queries: tuple[nn.Linear, int]
    keys: tuple[nn.Linear, int]
    values: tuple[nn.Linear, int]


def rotate_heads(
    model: nn.Module,
    images: ImageSet,
    groups: Collection[str] | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    quiet: bool = True,
) -> HeadRotation:
    """Turn the basis of every head so that cutting its last dims is the best cut.

    Args:
        model: ViT or PVTv2, not changed.
        images: calibration images [N, 3, H, W], normalised; labels are not needed.
        groups: names of the attention modules to rotate (`blocks.0.attn`); None: all.
        batch_size: images per pass; memory grows with it, and not with the images.
        seed: for the random gradients.
        quiet: no progress bar.

    Example:
        >>> import timm, torch
        >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> rotation = rotate_heads(dense, torch.randn(4, 3, 32, 32))
        >>> rotation.logit_error["blocks.0.attn"].shape
        torch.Size([3, 65])
    """
    names = [g.module for g in groups_of(model) if g.kind == "qk" and (groups is None or g.module in groups)]
    network = frozen(model)
    moments = with_room(
        lambda size: _measure(network, names, images, batch_size, size, seed, quiet),
        most_at_once(model, images, batch_size),
    )
    for one in moments.values():
        shared().sum(one.queries, one.keys, one.key_sum, one.output, one.output_sum, one.importance, one.counts)
    rotated = copy.deepcopy(model)
    logit_error, output_error = {}, {}
    with torch.no_grad():
        for name in names:
            attention: Any = rotated.get_submodule(name)
            logit_error[name] = _rotate_products(attention, moments[name])
            output_error[name] = _rotate_values(attention, moments[name])
    shared().agree_on(rotated)
    return HeadRotation(rotated, logit_error, output_error)


def _rows(attention: Any) -> _Rows:
    heads = attention.num_heads
    v_dim = attention.proj.in_features // heads
    if hasattr(attention, "qkv"):
        qk = (attention.qkv.out_features - heads * v_dim) // 2
        qkv = attention.qkv
        return _Rows(heads, qk // heads, v_dim, (qkv, 0), (qkv, qk), (qkv, 2 * qk))
    qk = attention.q.out_features
    return _Rows(heads, qk // heads, v_dim, (attention.q, 0), (attention.kv, 0), (attention.kv, qk))


def _measure(
    model: nn.Module, names: Sequence[str], images: ImageSet, batch_size: int, size: int, seed: int, quiet: bool
) -> dict[str, _Moments]:
    """Sums over this process's images."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    sums = {
        name: _zeros(_rows(attention), attention.proj.out_features, device_of(model))
        for name, attention in modules.items()
    }
    seen: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for attention in modules.values():
            for layer in {_rows(attention).queries[0], _rows(attention).keys[0]}:
                hooks.enter_context(layer.register_forward_hook(_keep_output(seen)))
            hooks.enter_context(attention.proj.register_forward_pre_hook(_keep_input(seen)))
        writers = {f"{name}.proj": name for name in names}
        for part, signs in parts_of(model, images, batch_size, size, "Measuring heads", seed=seed, quiet=quiet):
            for found in output_gradients(model, list(writers), part, signs):
                for writer, (_, gradients) in found.items():
                    attention = modules[writers[writer]]
                    _add(sums[writers[writer]], _rows(attention), seen, seen[attention.proj], gradients)
                seen.clear()
    return sums


def _keep_output(seen: dict[nn.Module, Tensor]) -> Any:
    return lambda layer, _, output: seen.update({layer: output.detach()} if torch.is_grad_enabled() else {})


def _keep_input(seen: dict[nn.Module, Tensor]) -> Any:
    return lambda layer, args: seen.update({layer: args[0].detach()} if torch.is_grad_enabled() else {})


def _zeros(rows: _Rows, channels: int, device: torch.device) -> _Moments:
    heads, qk, v = rows.heads, rows.qk_dim, rows.v_dim

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return _Moments(
        queries=zeros(heads, qk, qk),
        keys=zeros(heads, qk, qk),
        key_sum=zeros(heads, qk),
        output=zeros(heads, v, v),
        output_sum=zeros(heads, v),
        importance=zeros(channels, channels),
        counts=zeros(3),
    )


def _add(sums: _Moments, rows: _Rows, seen: dict[nn.Module, Tensor], output: Tensor, gradients: Tensor) -> None:
    """Sum over a batch: `output` [B, N, heads * v_dim] enters the projection, `gradients` [draws, B, N, d] leave it."""
    queries = _part(seen[rows.queries[0]], rows.queries[1], rows.heads, rows.qk_dim)
    keys = _part(seen[rows.keys[0]], rows.keys[1], rows.heads, rows.qk_dim)
    values = _part(output, 0, rows.heads, rows.v_dim)
    weights = gradients.double().square().sum(dim=(0, 3))
    weights = (weights + LEAST_WEIGHT * weights.mean(dim=1, keepdim=True)).clamp_min(TINY)
    centred = keys - keys.mean(dim=1, keepdim=True)
    sums.queries += torch.einsum("bn,bnhi,bnhj->hij", weights, queries, queries)
    sums.keys += torch.einsum("bnhi,bnhj->hij", centred, centred)
    sums.key_sum += keys.sum(dim=(0, 1))
    sums.output += torch.einsum("bn,bnhi,bnhj->hij", weights, values, values)
    sums.output_sum += torch.einsum("bn,bnhi->hi", weights, values)
    # of one part in fp32: its rounding is far below EVENNESS
    size = weights.mean().sqrt()  # gradients may be too small for their squares
    add_gram(sums.importance, (gradients.flatten(0, -2) / size).to(gradients.dtype), float(size.square()))
    sums.counts += torch.stack([weights.sum(), *weights.new_tensor([keys.shape[0] * keys.shape[1], len(keys)])])


def _part(output: Tensor, first: int, heads: int, dim: int) -> Tensor:
    """[B, N, heads, dim] float64 of the rows that start at `first`."""
    part = output[..., first : first + heads * dim]
    return part.reshape(*part.shape[:-1], heads, dim).double()


def _rotate_products(attention: Any, sums: _Moments) -> Tensor:
    """Turn q and k of every head; the squared error of a scaled logit by dims cut, [heads, qk_dim + 1]."""
    rows = _rows(attention)
    weight, key_count, _ = sums.counts
    key_mean = sums.key_sum / key_count
    errors = []
    for head in range(rows.heads):
        query_root, _ = _roots(sums.queries[head] / weight)
        key_root, key_inverse = _roots(sums.keys[head] / key_count, key_mean[head])
        _, strength, right = torch.linalg.svd(query_root @ key_root)
        balance = _floored(strength).sqrt().unsqueeze(1)  # q and k of a dim get equal variance
        _turn(rows.queries, head, right @ key_root / balance, None)
        _turn(rows.keys, head, balance * (right @ key_inverse), key_mean[head])
        errors.append(_tails(strength.square() * attention.scale**2))
    return torch.stack(errors).cpu()


def _rotate_values(attention: Any, sums: _Moments) -> Tensor:
    """Turn the values of every head; the loss in nats by dims cut, [heads, v_dim + 1]."""
    rows, proj = _rows(attention), attention.proj
    total, _, images = sums.counts
    mean = sums.output_sum / total
    has_biases = rows.values[0].bias is not None and proj.bias is not None
    importance = sums.importance / sums.importance.trace().clamp_min(TINY)
    metric = importance + EVENNESS / len(importance) * torch.eye(len(importance)).to(importance)
    errors = []
    for head in range(rows.heads):
        columns = slice(head * rows.v_dim, (head + 1) * rows.v_dim)
        weight = proj.weight[:, columns].double()
        second = sums.output[head] / total
        centre = mean[head] if has_biases else torch.zeros_like(mean[head])
        root, inverse = _roots(second - torch.outer(centre, centre), centre)
        energy, basis = torch.linalg.eigh(root @ weight.T @ metric @ weight @ root)
        energy, basis = energy.flip(0).clamp_min(0), basis.flip(1)
        writes = weight @ root @ basis
        balance = _floored(energy.sqrt()).sqrt()
        if has_biases:
            proj.bias += (weight @ centre).to(proj.bias.dtype)
        _turn(rows.values, head, balance.unsqueeze(1) * (basis.T @ inverse), centre if has_biases else None)
        proj.weight[:, columns] = (writes / balance).to(proj.weight.dtype)
        loss = (writes * (importance @ writes)).sum(dim=0).clamp_min(0)
        errors.append(_tails(loss * total / (2 * images)))
    return torch.stack(errors).cpu()


def _turn(part: tuple[nn.Linear, int], head: int, turn: Tensor, mean: Tensor | None) -> None:
    """Multiply the rows of one head by `turn` [dim, dim], after taking `mean` [dim] out of the bias."""
    layer, first = part
    rows = slice(first + head * len(turn), first + (head + 1) * len(turn))
    layer.weight[rows] = (turn @ layer.weight[rows].double()).to(layer.weight.dtype)
    if layer.bias is not None:
        bias = layer.bias[rows].double()
        layer.bias[rows] = (turn @ (bias if mean is None else bias - mean)).to(layer.bias.dtype)


def _roots(covariance: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse.

    Args:
        covariance: [dim, dim].
        mean: [dim], what was taken out of it; where nothing else is left (a single key per image), the inverse must not
            explode.
    """
    values, vectors = torch.linalg.eigh(covariance)
    size = values.clamp_min(0).mean() + (0 if mean is None else mean.square().mean())
    roots = (values.clamp_min(0) + RIDGE * size).clamp_min(TINY).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _floored(strength: Tensor) -> Tensor:
    """Strengths that may be divided by."""
    return strength.clamp_min(max(1e-8 * float(strength.max()), TINY))


def _tails(energy: Tensor) -> Tensor:
    """What is lost with the last r of `energy` [n], for r = 0 ... n, [n + 1]."""
    return torch.cat([energy.new_zeros(1), energy.flip(0).cumsum(0)])
