"""Rotation inside attention heads: the free bases of q.k and of values, ordered by importance.

Softmax sees queries and keys of a head only through their products, and the stream sees values only through the
projection: q -> A q, k -> A^-T k and v -> B v, W_proj -> W_proj B^-1 change nothing. Of all bases, the one in which
cutting the last dims costs least is the data-aware SVD of the product (up to their second moments, the rank reduction
of weighted matrices; for language models cf. SVD-LLM, arXiv 2403.07378). Biases are exact:

- what a key adds to all logits of a query (q . b_k and the mean of the keys) cancels in the softmax, so keys count by
  their covariance within an image, and their mean leaves the bias;
- the weights of an attention row add up to one, so the mean of a head's output moves into the bias of the projection,
  and values count by the covariance of the head's output.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib_data.progress import watched
from toolchain.families import groups_of
from toolchain.scores.divergence import device_of

RIDGE = 1e-8
"""Added to second moments, relative to their mean diagonal: dims that never move stay invertible."""


@dataclass(frozen=True, slots=True)
class HeadRotation:
    """A network that computes the same, with the dims of every head in order: the first matter most.

    Attributes:
        model: same class, same shapes.
        logit_error: attention group -> [heads, qk_dim + 1] float64: expected squared error of an attention logit, as
            softmax sees it, when the last r dims of q and k are cut (r = 0 ... qk_dim).
        output_error: attention group -> [heads, v_dim + 1] float64: expected squared error |.|^2 of the branch's output
            per token when the last r value dims of the head are cut.
    """

    model: nn.Module
    logit_error: dict[str, Tensor]
    output_error: dict[str, Tensor]


@dataclass(slots=True)
class _Moments:
    """Sums over calibration tokens per head, float64, and how many tokens there were."""

    queries: Tensor  # [heads, qk_dim, qk_dim]
    keys: Tensor  # [heads, qk_dim, qk_dim], each image's mean taken out
    key_sum: Tensor  # [heads, qk_dim]
    output: Tensor  # [heads, v_dim, v_dim]
    output_sum: Tensor  # [heads, v_dim]
    query_count: int = 0
    key_count: int = 0


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
    images: Tensor,
    groups: Collection[str] | None = None,
    *,
    batch_size: int = 16,
    quiet: bool = True,
) -> HeadRotation:
    """Turn the basis of every head so that cutting its last dims is the best cut.

    Args:
        model: ViT or PVTv2, not changed.
        images: calibration images [N, 3, H, W], normalised; labels are not needed.
        groups: names of the attention groups to rotate (`blocks.0.attn`); None: all.
        batch_size: images per pass; memory grows with it, and not with the images.
        quiet: no progress bar.

    Example:
        >>> import timm, torch
        >>> dense = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        >>> rotation = rotate_heads(dense, torch.randn(4, 3, 32, 32))
        >>> rotation.logit_error["blocks.0.attn"].shape
        torch.Size([3, 65])
    """
    names = [g.name for g in groups_of(model) if g.kind == "attention" and (groups is None or g.name in groups)]
    moments = _measure(model, names, torch.split(images, batch_size), quiet)
    rotated = copy.deepcopy(model)
    logit_error, output_error = {}, {}
    with torch.no_grad():
        for name in names:
            attention: Any = rotated.get_submodule(name)
            logit_error[name] = _rotate_products(attention, moments[name])
            output_error[name] = _rotate_values(attention, moments[name])
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


def _measure(model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], quiet: bool) -> dict[str, _Moments]:
    found = {}
    was_training = model.training
    model.eval()
    with ExitStack() as hooks, torch.inference_mode():
        for name in names:
            attention: Any = model.get_submodule(name)
            rows = _rows(attention)
            found[name] = _zeros(rows, device_of(model))
            for layer in {rows.queries[0], rows.keys[0]}:
                hooks.enter_context(layer.register_forward_hook(_observe(rows, found[name])))
            hooks.enter_context(attention.proj.register_forward_pre_hook(_observe_output(rows, found[name])))
        for batch in watched(batches, "Measuring heads", quiet=quiet):
            model(batch.to(device_of(model)))
    model.train(was_training)
    return found


def _zeros(rows: _Rows, device: torch.device) -> _Moments:
    heads, qk, v = rows.heads, rows.qk_dim, rows.v_dim

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return _Moments(zeros(heads, qk, qk), zeros(heads, qk, qk), zeros(heads, qk), zeros(heads, v, v), zeros(heads, v))


def _part(output: Tensor, first: int, heads: int, dim: int) -> Tensor:
    """[B, N, heads, dim] float64 of the rows that start at `first`."""
    part = output[..., first : first + heads * dim]
    return part.reshape(*part.shape[:-1], heads, dim).double()


def _observe(rows: _Rows, sums: _Moments) -> Any:
    def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
        if layer is rows.queries[0]:
            queries = _part(output, rows.queries[1], rows.heads, rows.qk_dim)
            sums.queries += torch.einsum("bnhi,bnhj->hij", queries, queries)
            sums.query_count += queries.shape[0] * queries.shape[1]
        if layer is rows.keys[0]:
            keys = _part(output, rows.keys[1], rows.heads, rows.qk_dim)
            sums.key_sum += keys.sum(dim=(0, 1))
            keys = keys - keys.mean(dim=1, keepdim=True)
            sums.keys += torch.einsum("bnhi,bnhj->hij", keys, keys)
            sums.key_count += keys.shape[0] * keys.shape[1]

    return hook


def _observe_output(rows: _Rows, sums: _Moments) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        output = _part(args[0], 0, rows.heads, rows.v_dim)
        sums.output += torch.einsum("bnhi,bnhj->hij", output, output)
        sums.output_sum += output.sum(dim=(0, 1))

    return hook


def _rotate_products(attention: Any, sums: _Moments) -> Tensor:
    """Turn q and k of every head; the squared error of a scaled logit by dims cut, [heads, qk_dim + 1]."""
    rows = _rows(attention)
    key_mean = sums.key_sum / sums.key_count
    errors = []
    for head in range(rows.heads):
        query_root, _ = _roots(sums.queries[head] / sums.query_count)
        key_root, key_inverse = _roots(sums.keys[head] / sums.key_count)
        _, strength, right = torch.linalg.svd(query_root @ key_root)
        balance = _floored(strength).sqrt().unsqueeze(1)  # q and k of a dim get equal variance
        _turn(rows.queries, head, right @ key_root / balance, None)
        _turn(rows.keys, head, balance * (right @ key_inverse), key_mean[head])
        errors.append(_tails(strength.square() * attention.scale**2))
    return torch.stack(errors).cpu()


def _rotate_values(attention: Any, sums: _Moments) -> Tensor:
    """Turn the values of every head; the squared error of the branch's output by dims cut, [heads, v_dim + 1]."""
    rows, proj = _rows(attention), attention.proj
    mean = sums.output_sum / sums.query_count
    has_biases = rows.values[0].bias is not None and proj.bias is not None
    errors = []
    for head in range(rows.heads):
        columns = slice(head * rows.v_dim, (head + 1) * rows.v_dim)
        weight = proj.weight[:, columns].double()
        second = sums.output[head] / sums.query_count
        root, inverse = _roots(second - torch.outer(mean[head], mean[head]) if has_biases else second)
        energy, basis = torch.linalg.eigh(root @ weight.T @ weight @ root)
        energy, basis = energy.flip(0).clamp_min(0), basis.flip(1)
        balance = _floored(energy.sqrt()).sqrt()
        if has_biases:
            proj.bias += (weight @ mean[head]).to(proj.bias.dtype)
        _turn(rows.values, head, balance.unsqueeze(1) * (basis.T @ inverse), mean[head] if has_biases else None)
        proj.weight[:, columns] = (weight @ root @ basis / balance).to(proj.weight.dtype)
        errors.append(_tails(energy))
    return torch.stack(errors).cpu()


def _turn(part: tuple[nn.Linear, int], head: int, turn: Tensor, mean: Tensor | None) -> None:
    """Multiply the rows of one head by `turn` [dim, dim], after taking `mean` [dim] out of the bias."""
    layer, first = part
    own = slice(first + head * len(turn), first + (head + 1) * len(turn))
    layer.weight[own] = (turn @ layer.weight[own].double()).to(layer.weight.dtype)
    if layer.bias is not None:
        bias = layer.bias[own].double()
        layer.bias[own] = (turn @ (bias if mean is None else bias - mean)).to(layer.bias.dtype)


def _roots(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse."""
    values, vectors = torch.linalg.eigh(second_moment)
    floor = RIDGE * values.clamp_min(0).mean()
    roots = (values.clamp_min(0) + floor).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _floored(strength: Tensor) -> Tensor:
    """Strengths that may be divided by."""
    return strength.clamp_min(max(1e-8 * float(strength.max()), torch.finfo(strength.dtype).tiny))


def _tails(energy: Tensor) -> Tensor:
    """What is lost with the last r of `energy` [n], for r = 0 ... n, [n + 1]."""
    return torch.cat([energy.new_zeros(1), energy.flip(0).cumsum(0)])
