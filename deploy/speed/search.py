"""The widths that meet a latency target: planned with a latency table, then built and timed, and planned again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from upvits.calib_data import Preprocess
from upvits.calib_data.documents import Count, Name, Natural, Number, Positive
from upvits.calib_data.errors import TargetError, UserError
from upvits.deploy.measure.bench import Speedup
from upvits.deploy.speed.deployment import Baseline, Deployment, check_deployment, measure, opened, opened_baseline
from upvits.deploy.speed.table import LatencyCosts, measure_table, predicted, spread
from upvits.deploy.speed.target import Target
from upvits.toolchain.planning import NotReachableError, PruningPlan
from upvits.toolchain.planning.costs import Costs
from upvits.toolchain.surgery.deletion import delete_units

Planner = Callable[[Costs, float], PruningPlan]
"""The best plan whose costs stay within a budget; raises NotReachableError below the smallest that there is."""

ALLOWED = 1.05
"""A target is met up to 5 % above it."""

_CLOSE = (0.93, 1.02)  # latency over target at which there is nothing to gain from another plan
_ATTEMPTS = 6


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Attempt(_Document):
    """One plan: what it was allowed, what the table said of it, and what it took when it was built and timed.

    `over_target` is the latency over the target's, in one interleave with the dense network, and `high_over_target`
    the same with the 10th percentile of the speed-up over rounds.
    """

    budget_ms: Number
    predicted_ms: Number
    dense_ms: Positive
    measured_ms: Positive
    speedup: Positive
    low: Positive
    high: Positive
    over_target: Number
    high_over_target: Number
    macs_share: Number
    floor: bool


class LatencyRecord(_Document):
    """How a latency target was met. Milliseconds per call; `points` is the size of the latency table,
    `points_spread` the median over its points of their 10th to 90th percentile range over rounds.
    """

    format_version: Literal[1] = 1
    asked: Name
    runtime: Name
    precision: Name
    batch: Natural
    target_ms: Positive
    chosen: Attempt
    attempts: list[Attempt]
    points: Count
    points_spread: Number


@dataclass(frozen=True, slots=True)
class FittedPlan:
    """A plan that meets the target, and how it was found."""

    plan: PruningPlan
    record: LatencyRecord


def search(
    model: nn.Module,
    preprocess: Preprocess,
    planner: Planner,
    deployment: Deployment,
    target: Target,
    *,
    align: int = 8,
    quiet: bool = True,
) -> FittedPlan:
    """The plan that uses a latency target up, checked on a network of its widths that was built and timed.

    Only shapes decide latency, so that network is cut from the dense one without any training.

    Args:
        model: the dense network on the CPU.
        preprocess: its input.
        planner: `lambda costs, budget: plan_within(model, scores, costs, budget, ...)`.
        deployment: the runtime, precision and batch size that the target is for.
        target: of `parse_target` or `parse_speedup`.
        align: widths of the plans are multiples of this.
        quiet: no progress bars.

    Raises:
        UserError: this cannot be timed here, or the dense network is fast enough.
        TargetError: no plan meets the target within 5 %; names the nearest and the floor that stops it.
    """
    check_deployment(deployment)
    with opened_baseline(model, preprocess, deployment) as dense:
        if target.ms is not None and target.ms >= dense.ms:
            raise UserError(
                f"The dense network takes {dense.ms:.3g} ms on {_where(deployment)} and meets {target.text} as it is.",
                fix="Give a lower --target-latency, or --ratio.",
            )
        costs = measure_table(dense, align=align, quiet=quiet)
        tried, floor = _attempts(dense, planner, target, costs)
    record = LatencyRecord(
        asked=target.text,
        runtime=deployment.runtime.name,
        precision=deployment.precision,
        batch=deployment.batch,
        target_ms=target.ms_of(dense.ms),
        chosen=min((attempt for attempt, _ in tried), key=lambda attempt: abs(attempt.over_target - 1)),
        attempts=[attempt for attempt, _ in tried],
        points=len(costs.points),
        points_spread=spread(costs),
    )
    met = [(attempt, plan) for attempt, plan in tried if attempt.over_target <= ALLOWED]
    if not met:
        raise _not_reached(record, floor)
    # the slowest that surely meets the target keeps the most of the network; where none is sure, the fastest
    sure = [pair for pair in met if pair[0].over_target <= _CLOSE[1] and pair[0].high_over_target <= ALLOWED]
    by_latency = sorted(sure or met, key=lambda pair: pair[0].over_target)
    chosen, plan = by_latency[-1 if sure else 0]
    return FittedPlan(plan, record.model_copy(update={"chosen": chosen}))


def _attempts(
    dense: Baseline, planner: Planner, target: Target, costs: LatencyCosts
) -> tuple[list[tuple[Attempt, PruningPlan]], NotReachableError | None]:
    """Plans and what they took, until one is close to the target; the floor, where the planner met it."""
    tried: list[tuple[Attempt, PruningPlan]] = []
    floor: NotReachableError | None = None
    budget = target.ms_of(costs.dense_ms)
    for _ in range(_ATTEMPTS):
        try:
            plan, at_floor = planner(costs, budget), False
        except NotReachableError as error:
            floor, at_floor = error, True
            plan = planner(costs, error.lowest * (1 + 1e-3))
        if any(plan.cut == other.cut for _, other in tried):
            break
        network = delete_units(dense.model, plan)
        expected = predicted(costs, network)
        dense_ms, ms, speedup = _time(network, dense)
        over = ms / target.ms if target.ms is not None else (target.speedup or 1) / speedup.median
        attempt = Attempt(
            budget_ms=budget,
            predicted_ms=expected,
            dense_ms=dense_ms,
            measured_ms=ms,
            speedup=speedup.median,
            low=speedup.low,
            high=speedup.high,
            over_target=over,
            high_over_target=over * speedup.median / speedup.low,
            macs_share=plan.after.macs / plan.before.macs,
            floor=at_floor,
        )
        tried.append((attempt, plan))
        if _CLOSE[0] <= over <= _CLOSE[1] or (at_floor and over > 1):
            break
        budget = expected / over
    return tried, floor


def _time(network: nn.Module, dense: Baseline) -> tuple[float, float, Speedup]:
    """Milliseconds of the dense and of the pruned network, in turns, and how many times faster that is."""
    with opened(dense.deployment, {"pruned": (network, dense.preprocess)}) as sessions:
        both = {"dense": dense.session, **sessions}
        report = measure(both, dict.fromkeys(both, dense.preprocess.input_size), dense.deployment)
    batch = dense.deployment.batch
    ms = {name: report.stats[name][batch].median for name in both}
    return ms["dense"], ms["pruned"], report.ratio("dense", "pruned", batch)


def _where(deployment: Deployment) -> str:
    return f"{deployment.runtime.name} {deployment.precision} at batch {deployment.batch}"


def _not_reached(record: LatencyRecord, floor: NotReachableError | None) -> TargetError:
    nearest = min(record.attempts, key=lambda attempt: attempt.over_target)
    stopped = f"{len(record.attempts)} plans were tried."
    if floor is not None:
        stopped = f"By the latency table: {floor.what} {floor.why}".strip()
    return TargetError(
        f"{record.asked} was not reached on {record.runtime} {record.precision} at batch {record.batch}.",
        why=f"The nearest takes {nearest.measured_ms:.3g} ms, {nearest.speedup:.2f}x faster than the dense network's "
        f"{nearest.dense_ms:.3g} ms, with {100 * nearest.macs_share:.0f} % of its MACs. {stopped}",
        fix="Ask for less, use a smaller --align, prune more --components, or start from a smaller model.",
    )
