"""How many blocks leave, and from which list."""

from __future__ import annotations

from collections.abc import Mapping

from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.depth import DepthPath
from upvits.toolchain.scores import Scores

Pairs = tuple[tuple[int, int], ...]


def blocks_left(scores: Scores, removed: Mapping[str, int], why: str) -> dict[str, Pairs]:
    """What is left of every list from which blocks leave.

    Args:
        scores: with depth paths.
        removed: list of blocks -> how many leave.
        why: what asks for it, the beginning of the error.

    Raises:
        UserError: the scores say nothing, or not enough, on a list.
    """
    left = {}
    for name, count in removed.items():
        if count == 0:
            continue
        if name not in scores.depth or len(scores.depth[name].steps) < count:
            raise UserError(
                f"{why}, and these scores do not say which blocks of {name} can go.",
                why="Blocks leave by what the output loses with them, which has to be measured.",
                fix="Score this network again with depth.",
            )
        left[name] = scores.depth[name].steps[count - 1]
    return left


def blocks_at_ratio(scores: Scores, lists: Mapping[str, int], ratio: float) -> dict[str, Pairs]:
    """What is left when the share `ratio` of all blocks leaves, the cheapest step first.

    Args:
        scores: with depth paths.
        lists: list of blocks -> its length.
        ratio: share of all blocks to remove; rounded to whole blocks.

    Raises:
        UserError: more blocks would leave than can (every list keeps one), or the scores say nothing on depth.
    """
    total = sum(lists.values())
    count = int(total * ratio + 0.5)
    if count > total - len(lists):
        raise UserError(
            f"depth_ratio {ratio:g} would remove {count} of {total} blocks.",
            why=f"Every list of blocks keeps one, so at most {total - len(lists)} can leave.",
            fix=f"Give a depth_ratio of at most {(total - len(lists)) / total:.2g}.",
        )
    if ratio and not count:
        raise UserError(
            f"depth_ratio {ratio:g} of {total} blocks is no whole block.",
            fix=f"Give at least {1 / total:.2g}, or leave it out.",
        )
    needed = {name: 0 if length == 1 else 1 for name, length in lists.items()} if count else {}
    blocks_left(scores, needed, f"depth_ratio {ratio:g} removes blocks")  # all that could lose one must be known
    order = merged_steps({name: scores.depth[name] for name in lists if name in scores.depth})[:count]
    if len(order) < count:
        raise UserError(
            f"depth_ratio {ratio:g} removes {count} blocks, and these scores go as far as {len(order)}.",
            fix="Score this network again with depth, or remove fewer blocks.",
        )
    return blocks_left(scores, {name: order.count(name) for name in lists}, "")


def merged_steps(paths: Mapping[str, DepthPath]) -> list[str]:
    """The lists in the order in which they lose their next block, the smallest increase of the loss first."""
    order: list[str] = []
    taken = dict.fromkeys(paths, 0)
    while True:
        steps = {name: increase(path, taken[name]) for name, path in paths.items() if taken[name] < len(path.steps)}
        if not steps:
            return order
        cheapest = min(steps, key=lambda name: steps[name])
        taken[cheapest] += 1
        order.append(cheapest)


def increase(path: DepthPath, step: int) -> float:
    """Loss in nats that one more removal adds, after `step` of them."""
    return path.loss[step] - (path.loss[step - 1] if step else 0.0)
