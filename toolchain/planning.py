"""What to keep: from scores and a ratio (or a target, or a smaller published model) to a list of units per group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from calib_data.errors import UserError
from toolchain.checkpoints import weights_digest
from toolchain.families import family_of, narrow
from toolchain.groups import ChannelGroup, Widths, widths_of
from toolchain.macs import count_macs, count_params
from toolchain.models import preprocess_of
from toolchain.scores import Scores
from toolchain.timm_config import architecture_of

Component = Literal["embed", "attention", "heads", "ffn"]
DEFAULT_COMPONENTS: tuple[Component, ...] = ("embed", "attention", "ffn")


@dataclass(frozen=True, slots=True)
class Size:
    """Multiply-accumulates of one image and number of parameters."""

    macs: int
    params: int


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What is kept, per group, and why.

    Attributes:
        keep: group name -> kept units in ascending order. Whole heads are given as all their dims.
        num_heads: attention group name -> number of heads after the cut; the kept dims are theirs in order.
        architecture: timm name of the result when it differs from the dense network's (`like`).
        asked: what was asked for, e.g. {"ratio": 0.5, "align": 8}.
        before, after: size of the dense and of the pruned network.
        dense_widths: group sizes of the dense network.
        method: scores that decided.
        model_digest: sha256 of the dense network that the plan was made for.
    """

    keep: dict[str, tuple[int, ...]]
    num_heads: dict[str, int]
    architecture: str | None
    asked: dict[str, float | int | str]
    before: Size
    after: Size
    dense_widths: Widths
    method: str
    model_digest: str
    format: int = field(default=1)

    @property
    def widths(self) -> Widths:
        """Group sizes of the pruned network."""
        return Widths(
            channels={**self.dense_widths.channels, **{name: len(units) for name, units in self.keep.items()}},
            num_heads={**self.dense_widths.num_heads, **self.num_heads},
        )

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return _DOCUMENT.dump_json(self, indent=2).decode() + "\n"

    @staticmethod
    def load(path: Path) -> PruningPlan:
        """Read a plan.

        Raises:
            UserError: the file is missing or is no plan.
        """
        try:
            return _DOCUMENT.validate_json(path.read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            raise UserError(f"{path} is no readable pruning plan: {error}") from error


_DOCUMENT = pydantic.TypeAdapter(PruningPlan)


def plan(
    model: nn.Module,
    scores: Scores,
    *,
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    like: nn.Module | None = None,
    align: int = 8,
    components: Sequence[Component] = DEFAULT_COMPONENTS,
    input_size: tuple[int, int, int] | None = None,
) -> PruningPlan:
    """Choose the units to keep. Exactly one of `ratio`, `target_macs`, `target_params` and `like` is given.

    All blocks of a stage get equal widths, and all heads equally many dims, so that the result is again a network that
    stock timm builds (as long as `components` prunes embedding and attention together).

    Args:
        model: the dense network.
        scores: measured on this very network.
        ratio: share of every prunable dimension to remove, in [0, 1).
        target_macs: share of the multiply-accumulates to keep, in (0, 1]; the ratio is searched.
        target_params: share of the parameters to keep, in (0, 1]; the ratio is searched.
        like: a smaller published model of the same family, depth and input; its widths and heads are taken exactly.
            Consecutive heads are merged where it has fewer (UP-ViTs, section 3.3).
        align: widths and head dims become multiples of this (unless they stay whole).
        components: which dimensions to prune; `heads` removes whole heads instead of dims in every head.
        input_size: (channels, height, width) for counting MACs; the model's own by default.

    Raises:
        UserError: the request is out of range, contradictory, or would leave a width of zero.

    Example:
        >>> import timm, toolchain
        >>> dense = timm.create_model("pvt_v2_b0", num_classes=5)
        >>> chosen = toolchain.plan(dense, toolchain.score(dense, method="magnitude"), ratio=0.5)
        >>> chosen.widths.channels["stages.3"], round(chosen.after.macs / chosen.before.macs, 2)
        (128, 0.28)
    """
    asked = {"ratio": ratio, "target_macs": target_macs, "target_params": target_params}
    given: dict[str, float | int | str] = {name: value for name, value in asked.items() if value is not None}
    if len(given) + (like is not None) != 1:
        raise UserError("Give exactly one of ratio, target_macs, target_params and like.")
    groups = family_of(model).groups(model)
    _check_scores(model, groups, scores)
    size = _sizer(model, input_size)
    if like is not None:
        chosen = _widths_like(model, groups, like)
        given = {"like": architecture_of(like)}
    else:
        check_request({name: value for name, value in asked.items() if value is not None}, align, components)
        if ratio is None:
            ratio = _search_ratio(groups, size, align, components, target_macs, target_params)
        chosen = _uniform_widths(groups, ratio, align, components)
        found = {} if "ratio" in given else {"found_ratio": ratio}
        given = {**given, **found, "align": align, "components": ",".join(components)}
    keep = {g.name: _keep(g, scores, chosen, "heads" in components) for g in groups if g.name in chosen.channels}
    return PruningPlan(
        keep={name: tuple(units.tolist()) for name, units in keep.items()},
        num_heads=chosen.num_heads,
        architecture=None if like is None else architecture_of(like),
        asked=given,
        before=size(widths_of(groups)),
        after=size(chosen),
        dense_widths=widths_of(groups),
        method=scores.method,
        model_digest=scores.model_digest,
    )


def _check_scores(model: nn.Module, groups: Sequence[ChannelGroup], scores: Scores) -> None:
    if scores.model_digest != weights_digest(model):
        raise UserError(
            "These scores were measured on another network.",
            why="Importance belongs to exactly the weights that it was measured on.",
            fix="Score this network again (`upvits-deploy score`).",
        )
    for group in groups:
        if torch.isnan(scores.values[group.name]).any():
            raise UserError(
                f"The scores of {group.name} hold NaN.", fix="Measure all units; NaN marks unmeasured ones."
            )


def check_request(given: Mapping[str, float], align: int, components: Sequence[str]) -> None:
    """Refuse numbers out of range and components that do not go together.

    Args:
        given: one of ratio, target_macs, target_params.

    Raises:
        UserError: says what would be right.
    """
    for name, value in given.items():
        low_ok = 0 <= value < 1 if name == "ratio" else 0 < value <= 1
        if not (math.isfinite(value) and low_ok):
            wanted = "in [0, 1): the share to remove" if name == "ratio" else "in (0, 1]: the share to keep"
            raise UserError(f"{name} {value} is out of range.", fix=f"Give a number {wanted}.")
    if align < 1:
        raise UserError(f"align {align} is out of range.", fix="Give a whole number of at least 1; kernels like 8.")
    unknown = sorted(set(components) - {"embed", "attention", "heads", "ffn"})
    if unknown or not components or {"attention", "heads"} <= set(components):
        raise UserError(
            f"Cannot prune the components {', '.join(components) or '(none)'}.",
            fix="Give some of embed, ffn and one of attention (dims in every head) or heads (whole heads).",
        )


def _sizer(model: nn.Module, input_size: tuple[int, int, int] | None) -> Callable[[Widths], Size]:
    shape = input_size or preprocess_of(model).input_size

    def size(widths: Widths) -> Size:
        narrowed = narrow(model, widths)
        return Size(count_macs(narrowed, shape), count_params(narrowed))

    return size


def _uniform_widths(
    groups: Sequence[ChannelGroup], ratio: float, align: int, components: Sequence[Component]
) -> Widths:
    """Widths after removing `ratio` of every dimension, equal within a stage."""
    channels, num_heads = {}, {}
    for group in groups:
        if group.kind not in components or (group.kind == "embed" and _follows_heads(group, groups, components)):
            continue
        if group.kind == "heads":
            target, heads = _attention_of(group, groups), max(1, int(group.size * (1 - ratio) + 0.5))
            channels[target.name], num_heads[target.name] = heads * target.head_dim, heads
        elif group.kind == "attention":
            head_dim = aligned(group.head_dim, ratio, align, group.name)
            channels[group.name], num_heads[group.name] = head_dim * group.num_heads, group.num_heads
        else:
            channels[group.name] = aligned(group.size, ratio, align, group.name)
    for group in groups:
        if group.kind == "embed" and "embed" in components and group.name not in channels:
            # heads that fill the embedding keep filling it: that is what stock timm can build
            channels[group.name] = next(
                channels[a.name] for a in groups if a.kind == "attention" and a.stage == group.stage
            )
    return Widths(channels, num_heads)


def _follows_heads(group: ChannelGroup, groups: Sequence[ChannelGroup], components: Sequence[Component]) -> bool:
    attention = [other for other in groups if other.kind == "attention" and other.stage == group.stage]
    pruned = bool({"attention", "heads"} & set(components))
    return pruned and bool(attention) and all(other.size == group.size for other in attention)


def _attention_of(heads: ChannelGroup, groups: Sequence[ChannelGroup]) -> ChannelGroup:
    return next(group for group in groups if group.kind == "attention" and f"{group.name}.heads" == heads.name)


def aligned(size: int, ratio: float, align: int, name: str) -> int:
    """`size` less the share `ratio`, rounded to a multiple of `align` (and never above `size`).

    Raises:
        UserError: nothing would be left.
    """
    width = size if ratio == 0 else min(size, int(size * (1 - ratio) / align + 0.5) * align)
    if width > 0:
        return width
    largest = 1 - 0.5 * align / size
    raise UserError(
        f"ratio {ratio:g} with alignment {align} would leave {name} (size {size}) without any channels.",
        why="A width of zero is no network.",
        fix=f"Use a ratio of at most {math.floor(largest * 100) / 100:g}, or a smaller --align."
        if largest > 0
        else f"Use --align {size // 2 or 1} or less.",
    )


def _search_ratio(
    groups: Sequence[ChannelGroup],
    size: Callable[[Widths], Size],
    align: int,
    components: Sequence[Component],
    target_macs: float | None,
    target_params: float | None,
) -> float:
    """The smallest ratio (to 1/256) whose network is at or below the target.

    Sizes fall monotonically with the ratio, so bisection finds it.
    """
    before = size(widths_of(groups))

    def share(ratio: float) -> float:
        after = size(_uniform_widths(groups, ratio, align, components))
        return after.macs / before.macs if target_macs is not None else after.params / before.params

    target = target_macs if target_macs is not None else target_params
    assert target is not None
    low, high = 0, _largest_ratio(groups, align, components)
    if share(high / 256) > target:
        raise UserError(
            f"{'target_macs' if target_macs is not None else 'target_params'} {target:g} cannot be reached.",
            why=f"Even the largest cut with alignment {align} keeps {share(high / 256):.3f}; "
            "what is left are the input layer, the head and the parts that are not pruned.",
            fix="Ask for a larger share, use a smaller --align, or prune more components.",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle / 256) <= target else (middle + 1, high)
    return low / 256


def _largest_ratio(groups: Sequence[ChannelGroup], align: int, components: Sequence[Component]) -> int:
    for step in range(255, -1, -1):
        try:
            _uniform_widths(groups, step / 256, align, components)
        except UserError:
            continue
        return step
    raise UserError(f"align {align} is larger than a width of this network.", fix="Use a smaller --align.")


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _widths_like(model: nn.Module, groups: Sequence[ChannelGroup], like: nn.Module) -> Widths:
    """The widths of a smaller published model, checked to be reachable by removing and merging."""
    name = architecture_of(like)
    if family_of(like) is not family_of(model):
        raise UserError(f"{name} is of another family.", fix="Name a smaller model of the same family.")
    target = {group.name: group for group in family_of(like).groups(like)}
    if set(target) != {group.name for group in groups}:
        raise UserError(
            f"{name} has another depth or other parts than this network.",
            why="Widths and heads can be taken over; blocks can't be removed yet.",
            fix="Name a model of the same depth, e.g. deit_tiny for deit_small or deit_base, pvtv2_b0 for pvtv2_b1.",
        )
    for group in groups:
        other = target[group.name]
        if other.size > group.size or group.num_heads % other.num_heads:
            raise UserError(
                f"{name} does not fit into this network: {group.name} has {other.size} units there ({other.num_heads} "
                f"heads) and {group.size} here ({group.num_heads} heads).",
                fix="Name a model that is smaller everywhere and whose number of heads divides this one's.",
            )
    widths = widths_of(tuple(target.values()))
    here, there = (
        {name: tensor.shape for name, tensor in m.state_dict().items()} for m in (narrow(model, widths), like)
    )
    if here != there:
        differing = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        raise UserError(
            f"{name} has other parts than this network: {', '.join(differing[:4])} differ even at its widths.",
            why="Widths and heads can be taken over; tokens, patch size and layer scales cannot.",
            fix="Name a smaller model of the same kind.",
        )
    return widths


def _keep(group: ChannelGroup, scores: Scores, widths: Widths, whole_heads: bool) -> Tensor:
    """Ascending indices of the kept units of one group."""
    values = scores.values[group.name]
    if group.kind != "attention":
        return _top(values, widths.channels[group.name])
    heads = widths.num_heads[group.name]
    if whole_heads and heads < group.num_heads:
        best = _top(scores.values[f"{group.name}.heads"], heads)
        return (best.view(-1, 1) * group.head_dim + torch.arange(group.head_dim)).flatten()
    # equally many dims from every head, or from every run of consecutive heads that is merged into one
    per_head = widths.channels[group.name] // heads
    pools = values.view(heads, -1)
    return torch.cat([_top(pool, per_head) + index * pools.shape[1] for index, pool in enumerate(pools)])


def _top(values: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest values; ties keep the earlier unit."""
    return values.sort(descending=True, stable=True).indices[:count].sort().values
