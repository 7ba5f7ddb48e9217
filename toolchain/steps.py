"""The steps of a user that span several rooms: images for a network, a plan, the cut, and how good the result is.

They give what the command line gives. `compensation` and `planning` hold the parts that they are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from upvits.calib_data import DataSource, proxy_images
from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import ImageSet, PreparedImages
from upvits.toolchain.compensation import (
    TooFewImagesError,
    compensated_curves,
    compress,
    ffn_curves,
    weigh_streams,
    with_joint_units,
)
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.planning import (
    DEFAULT_COMPONENTS,
    FLOOR,
    Component,
    Curve,
    Planner,
    PruningPlan,
    plan_by_scores,
)
from upvits.toolchain.scores import Scores
from upvits.toolchain.surgery.deletion import delete_units, require_same_network
from upvits.toolchain.training.evaluate import Accuracy, evaluate_images

CURVE_IMAGES = 256
"""So many of the calibration images tell the expected losses, which take gradients."""

EVAL_BATCH = 64

_log = logging.getLogger(__name__)


def calibration_images(model: nn.Module, data: DataSource, num_images: int = 512, *, seed: int = 0) -> PreparedImages:
    """Random training images as a network reads them, for `score`, `plan` and `prune`.

    Args:
        model: says how images are resized and normalised.
        data: where they come from; classes take turns, so that each is equally frequent.
        num_images: how many; all when there are fewer. The first of them are those that a smaller number gives.
        seed: decides which.

    Returns:
        N images [N, 3, H, W] float32 that are read batch by batch; `read()` gives the tensor of all.

    Example:
        >>> import upvits
        >>> model = upvits.create_model("pvtv2_b0", weights="demo")
        >>> upvits.calibration_images(model, upvits.open_data("demo"), 24).shape
        torch.Size([24, 3, 64, 64])
    """
    return proxy_images(data, preprocess_of(model), num_images, seed)


def plan(
    model: nn.Module,
    scores: Scores,
    *,
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    like: nn.Module | None = None,
    depth_ratio: float | None = None,
    planner: Planner = "uniform",
    align: int = 8,
    components: Sequence[Component] = DEFAULT_COMPONENTS,
    floor: float = FLOOR,
    images: ImageSet | None = None,
    input_size: tuple[int, int, int] | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> PruningPlan:
    """Choose the units to keep. One of `ratio`, `target_macs`, `target_params` and `like` is given, or `depth_ratio`.

    `uniform`: all blocks of a stage get equal widths, and all heads equally many dims, so that the result is again a
    network that stock timm builds (as long as `components` prunes embedding and attention together). `global`: one
    budget over all groups; every block gets its own widths, which only `load` rebuilds.

    Args:
        model: the dense network.
        scores: measured on this very network.
        ratio: share of every prunable dimension to remove, in [0, 1). With `global`: the MACs of that uniform plan.
        target_macs: share of the multiply-accumulates to keep, in (0, 1].
        target_params: share of the parameters to keep, in (0, 1].
        like: a smaller published model of the same family and input; its depth, widths and heads are taken exactly.
            Consecutive heads are merged where it has fewer (UP-ViTs, section 3.3).
        depth_ratio: share of all blocks to remove first, in [0, 1), the cheapest first; needs scores with depth.
        planner: `uniform` or `global`.
        align: widths and head dims become multiples of this (unless they stay whole).
        components: which dimensions to prune; `heads` removes whole heads instead of dims in every head, `qk_v` lets
            q·k and v choose their own dims (and, with `global`, how many), `depth` lets `global` remove blocks.
        floor: for `global`: the share of its units that every group keeps at least.
        images: calibration images [N, 3, H, W], normalised; 500 or more are a good number. With them `global` weighs
            groups by what their cut costs after compensation (see `prune`); without them, by the scores. `uniform`
            needs none.
        input_size: (channels, height, width) for counting MACs; the model's own by default.
        seed: for the label probes of expected losses.
        quiet: no progress bars.

    Raises:
        UserError: the request is out of range, contradictory, or would leave a width of zero.

    Example:
        >>> import upvits
        >>> model = upvits.create_model("pvtv2_b0", num_classes=5)
        >>> plan = upvits.plan(model, upvits.score(model, method="magnitude"), ratio=0.5)
        >>> plan.widths.channels["stages.3"], round(plan.after.macs / plan.before.macs, 2)
        (128, 0.28)
    """

    def by(curves: Mapping[str, Curve] | None) -> PruningPlan:
        return plan_by_scores(
            model, scores, ratio=ratio, target_macs=target_macs, target_params=target_params, like=like,
            depth_ratio=depth_ratio, planner=planner, align=align, components=components, floor=floor, curves=curves,
            input_size=input_size,
        )  # fmt: skip

    if images is None or planner != "global":
        return by(None)
    curves = compensated_curves(model, images[:CURVE_IMAGES], seed=seed, quiet=quiet)
    chosen = by(weighed_losses(model, images, curves, by, quiet=quiet))
    return with_joint_units(chosen, curves) if units_by_joint_loss(chosen) else chosen


def prune(
    model: nn.Module,
    plan: PruningPlan,
    images: ImageSet | None = None,
    *,
    compensate: bool = True,
    seed: int = 0,
    quiet: bool = True,
) -> nn.Module:
    """The network that `plan` describes, so that it loses as little as closed forms allow; nothing is trained.

    Heads and the residual stream are rotated before the cut, so that their last directions matter least; after it,
    every layer that reads what was cut is refitted to what it computed in the dense network. The FFN units that leave
    are those that the others can best stand in for (where `fisher` scores made the plan; a plan by other scores keeps
    its units). The result has exactly the plan's widths, and is never worse on held-out images than plain deletion.

    Args:
        model: the dense network; it is not changed.
        plan: made for this network.
        images: calibration images [N, 3, H, W], normalised; 500 or more are a good number. Labels are not needed.
        compensate: False cuts only, as the paper does (arXiv 2111.15127); `images` are then not needed.
        seed: for the label probes that tell which FFN units leave.
        quiet: no progress bars.

    Returns:
        A network of the same timm class with its own weights, in eval mode.

    Raises:
        UserError: the plan was made for another network, or there are no images or too few of them.

    Example:
        >>> import upvits
        >>> model = upvits.create_model("pvtv2_b0", weights="demo")
        >>> plan = upvits.plan(model, upvits.score(model, method="magnitude"), ratio=0.5)
        >>> images = upvits.calibration_images(model, upvits.open_data("demo"), 40)
        >>> small = upvits.prune(model, plan, images)
        >>> upvits.count_params(small) == plan.after.params
        True
    """
    if not compensate:
        return delete_units(model, plan).eval()
    if images is None:
        raise UserError(
            "Compensation of a cut needs images.",
            why="What is left is refitted to what the dense network computes on them; labels are not needed.",
            fix="Give `images=` (500 are a good number, see `calibration_images`), or `compensate=False`, which only "
            "deletes and loses much more.",
        )
    chosen = with_units_for_refit(model, plan, images, seed=seed, quiet=quiet)
    compressed = compress(model, chosen, images, quiet=quiet)
    if compressed.report.warnings:
        _log.warning("Compensation: %s", "; ".join(compressed.report.warnings))
    return compressed.model


def weighed_losses(
    model: nn.Module,
    images: ImageSet,
    curves: Mapping[str, Curve],
    plan_by: Callable[[Mapping[str, Curve]], PruningPlan],
    *,
    quiet: bool = True,
) -> Mapping[str, Curve]:
    """Expected losses with the weight of the streams that a trial has shown to be best; as they are, where half of the
    images are too few for a trial."""
    try:
        return weigh_streams(model, images, curves, plan_by, quiet=quiet)
    except TooFewImagesError:
        return curves


def with_units_for_refit(
    model: nn.Module, plan: PruningPlan, images: ImageSet, *, seed: int = 0, quiet: bool = True
) -> PruningPlan:
    """The plan with the FFN units that the others can least stand in for; the same plan where scores are to choose.

    Raises:
        UserError: the plan was made for another network, or there are too few images.
    """
    require_same_network(model, plan)
    if not units_by_joint_loss(plan) or "ffn_units" in plan.asked:
        return plan
    return with_joint_units(plan, ffn_curves(model, images[:CURVE_IMAGES], seed=seed, quiet=quiet))


def units_by_joint_loss(plan: PruningPlan) -> bool:
    """Whether the loss after a refit chooses FFN units: not where another method or rounds were asked for, which would
    have no say otherwise."""
    return plan.method == "fisher" and "rounds" not in plan.asked


def accuracy(
    model: nn.Module, data: DataSource, *, reference: Tensor | None = None, quiet: bool = True, workers: int = 0
) -> Accuracy:
    """Top-1 of a network on all validation images, and how often it agrees with another one.

    Args:
        model: runs in eval mode on its own device.
        data: without class names there is no top-1.
        reference: predictions of another network, for `agreement`.
        quiet: no progress bar.
        workers: processes that read images.

    Raises:
        UserError: there are no validation images, or outputs are not finite.

    Example:
        >>> import dataclasses, upvits
        >>> from upvits.calib_data.demo import demo_images
        >>> few = dataclasses.replace(upvits.open_data("demo"), val=demo_images("val", 24))
        >>> upvits.accuracy(upvits.create_model("pvtv2_b0", weights="demo"), few).top1
        100.0
    """
    return evaluate_images(
        model, data.val, preprocess_of(model), EVAL_BATCH, reference=reference, quiet=quiet, workers=workers
    )
