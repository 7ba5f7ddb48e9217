"""From a recipe to a job: everything is decided and checked here, before anything is computed or written."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upvits import toolchain
from upvits.calib_data import DataSource, Preprocess, demo_weights, open_data
from upvits.calib_data.classes import with_outputs
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.loading import require_whole_batch
from upvits.calib_data.shard_files import is_url
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.recipe.checks import check_classes, check_compensation, check_forward, check_weighing
from upvits.deploy.recipe.detect import resolved as resolved_detection
from upvits.deploy.recipe.detect_data import check_detection, open_detection_data
from upvits.deploy.recipe.document import CUTS, PREPROCESS, PlanRecipe, Recipe
from upvits.deploy.recipe.engines import deployment_of, engines_of
from upvits.deploy.recipe.evidence import settled
from upvits.deploy.recipe.train_recipe import train_values
from upvits.deploy.runtimes import Runtime, RuntimeChoice, resolve_runtimes
from upvits.deploy.speed.deployment import Deployment
from upvits.deploy.speed.table import tables_folder
from upvits.detection.coco import CocoData
from upvits.toolchain.families import family_of
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.depth import last_blocks_first
from upvits.toolchain.networks.models import label_names_of
from upvits.toolchain.networks.names import asked_weights, canonical_name
from upvits.toolchain.networks.weight_files import read_weights
from upvits.toolchain.planning import DEFAULT_COMPONENTS, Component, PruningPlan, check_request
from upvits.toolchain.processes.crew import crew
from upvits.toolchain.processes.process import pick_device
from upvits.toolchain.structure.timm_config import num_classes_of
from upvits.toolchain.training.distillation import require_shareable
from upvits.toolchain.training.preparation import autocast_type
from upvits.toolchain.training.settings import DistillSettings, settings_for
from upvits.toolchain.training.teacher import Teacher, absolute_teacher, load_teacher, require_same_classes

LATENCY = ("target_latency", "speedup")
NUMBERS = ("ratio", "target_macs", "target_params")

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was found to work, with its network, its data and its folder: what all stages of a run share.

    Attributes:
        recipe: resolved.
        folder: the run directory.
        dense: the network to prune, in eval mode on the device of the run.
        dense_digest: sha256 of its weights.
        like: the published model whose widths the pruned network gets, or None.
        may_shorten: whether blocks may leave.
        first_plan: a plan with the widths of the one that will be made; None where scores decide them.
        calibration: where quantization takes its images from: the data, or what `--calib` names.
        runtimes: what engines are built for, and what was left out.
        engines: runtime and precision of every engine, in the order of building.
        deployment: where a latency target is measured; None without one.
        coco: what detectors are trained on, where `--detect` asks for them.
        notes: what was found out about the request, for the report.
        teacher: who teaches in place of the dense network.
    """

    recipe: Recipe
    folder: Path
    dense: nn.Module
    dense_digest: str
    like: nn.Module | None
    may_shorten: bool
    first_plan: PruningPlan | None
    source: DataSource
    calibration: DataSource
    preprocess: Preprocess
    runtimes: RuntimeChoice
    engines: tuple[tuple[Runtime, str], ...]
    quiet: bool
    deployment: Deployment | None = None
    coco: CocoData | None = None
    notes: tuple[str, ...] = ()
    teacher: Teacher | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the network, the data and the preprocessing."""
        preprocess = json.dumps(asdict(self.preprocess), sort_keys=True)
        return {"dense": self.dense_digest, "data": self.source.digest, "preprocess": preprocess}

    @property
    def device(self) -> torch.device:
        """Where the dense network is."""
        return next(self.dense.parameters()).device


def resolve(recipe: Recipe, out: Path | None = None, *, quiet: bool = True) -> Job:
    """Load the network and the data, fill in what depends on them, and check that the whole request can work.

    Args:
        recipe: as it was given.
        out: run directory; by default `runs/` and a name made of model and cut.
        quiet: no progress bars.

    Raises:
        UserError: a part of the request cannot work, or the parts do not fit each other.
    """
    device = pick_device(recipe.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # engines and the monitor follow PyTorch's current GPU
    recipe = with_names(recipe)
    coco = _coco_data(recipe, quiet=quiet)
    runtimes = resolve_runtimes(recipe.engine.runtime)
    engines = engines_of(recipe, runtimes.runtimes)
    dense = None if recipe.weights == "random" else _dense_network(recipe)
    source, calibration = _data(recipe, dense, quiet=quiet)
    if dense is None:
        dense = _dense_network(recipe, len(source.class_names) if source.class_names else None)
    preprocess = toolchain.preprocess_of(dense)
    check_classes(dense, source, recipe)
    check_forward(dense, source, preprocess)
    recipe, source, dense, found = settled(recipe, source, dense.to(device), _dense_network, quiet=quiet)
    preprocess = toolchain.preprocess_of(dense)
    recipe = filled_in(recipe, dense, source, device).model_copy(update={"recheck": False})  # it was done
    if recipe.distill.finetuned is not None:
        if crew().is_leader:
            read_weights(Path(recipe.distill.finetuned))  # says now what cannot be read
    elif recipe.distill.epochs:
        settings = distill_settings(recipe)
        autocast_type(device, settings.amp)
        require_shareable(settings.batch_size, crew().size, settings.accumulation)
        require_whole_batch(recipe.distill.batch_size or 1, len(source.train))
    teacher = _teacher(recipe, dense, source)
    like = _like_network(recipe, dense, preprocess.input_size[1:])
    may_shorten = _may_shorten(recipe, dense, like)
    plan = _first_plan(recipe, dense, like, preprocess)
    check_compensation(recipe, source)
    deployment = None
    if recipe.plan.planner == "latency":
        deployment = deployment_of(recipe, engines)
        tables_folder()
    return Job(
        recipe=recipe,
        folder=user_path(out or Path("runs") / run_name(recipe)).absolute(),
        dense=dense,
        dense_digest=weights_digest(dense),
        like=like,
        may_shorten=may_shorten,
        first_plan=None if may_shorten else plan,
        source=source,
        calibration=calibration,
        preprocess=preprocess,
        runtimes=runtimes,
        engines=engines,
        quiet=quiet,
        deployment=deployment,
        coco=coco,
        notes=(*source.notes, *found),
        teacher=teacher,
    )


def with_names(recipe: Recipe) -> Recipe:
    """The recipe with timm's model names, absolute paths, and weights chosen.

    Raises:
        UserError: a name is unknown, no cut or several cuts are asked for, or there are no weights to start from.
    """
    plan = with_planner(recipe.plan)
    model = canonical_name(recipe.model)
    if plan.like is not None:
        plan = plan.model_copy(update={"like": canonical_name(plan.like)})
    weights = _default_weights(model, recipe.data) if recipe.weights is None else recipe.weights
    model, weights = asked_weights(model, weights)
    if weights not in ("demo", "timm", "random"):
        weights = str(user_path(weights).absolute())
    finetuned, teacher = recipe.distill.finetuned, recipe.distill.teacher
    calib = recipe.precision.calib
    precision = recipe.precision.model_copy(update={"calib": calib and _absolute_data(calib)})
    named = recipe.model_copy(
        update={
            "model": model,
            "weights": weights,
            "data": _absolute_data(recipe.data),
            "class_map": recipe.class_map and str(user_path(recipe.class_map).absolute()),
            "plan": plan,
            "precision": precision,
            "distill": recipe.distill.model_copy(
                update={
                    "finetuned": finetuned and str(user_path(finetuned).absolute()),
                    "teacher": teacher and absolute_teacher(teacher),
                }
            ),
        }
    )
    check_weighing(named)
    return named


def with_planner(plan: PlanRecipe) -> PlanRecipe:
    """The plan's part of a recipe with its planner chosen and its request checked.

    Raises:
        UserError: no cut or several cuts are asked for, or they do not go with the planner.
    """
    given = [name for name in CUTS if getattr(plan, name) is not None]
    if not given and plan.depth_ratio:
        plan, given = plan.model_copy(update={"ratio": 0.0}), ["ratio"]
    if len(given) != 1:
        raise UserError(
            f"How much is to be cut? {'Nothing was given' if not given else 'Given were ' + ' and '.join(given)}.",
            fix="Give exactly one of --ratio, --target-macs, --target-params, --like, --target-latency and --speedup.",
        )
    planner = plan.planner or ("latency" if given[0] in LATENCY else "uniform")
    if (planner == "latency") != (given[0] in LATENCY):
        raise UserError(
            f"The {planner} planner cannot aim at {given[0].replace('_', ' ')}.",
            why="It spends milliseconds." if planner == "latency" else "Only the latency planner measures them.",
            fix="Give --target-latency or --speedup with --planner latency, and any other cut with uniform or global.",
        )
    if planner != "uniform" and (plan.like is not None or plan.depth_ratio is not None):
        raise UserError(
            f"The {planner} planner chooses widths and depth itself.",
            fix="Leave --like and --depth-ratio out, or use --planner uniform.",
        )
    if plan.like is not None and plan.components is not None and not _whole_networks(plan.components):
        raise UserError(
            f"--like takes a whole network over, not only {', '.join(plan.components)}.",
            fix="Leave --components out, or name embed, ffn and one of attention, heads and qk_v.",
        )
    if plan.rounds > 1 and (plan.like is not None or planner == "latency"):
        raise UserError(
            "Rounds need a cut that can be made in steps.",
            fix="Use --rounds with --ratio, --target-macs or --target-params.",
        )
    depth: tuple[Component, ...] = () if planner == "uniform" else ("depth",)
    components = (*DEFAULT_COMPONENTS, *depth) if plan.components is None else plan.components
    numbers = {given[0]: getattr(plan, given[0])} if given[0] in NUMBERS else {}
    check_request(numbers, plan.align, components, "uniform" if planner == "uniform" else "global")
    return plan.model_copy(update={"planner": planner, "components": components})


def _whole_networks(components: Collection[Component]) -> bool:
    return {"embed", "ffn"} < {*components} and bool({"attention", "heads", "qk_v"} & {*components})


def _default_weights(model: str, data: str) -> str:
    if data == "demo" and demo_weights(model) is not None:
        return "demo"
    raise UserError(
        f"Which weights of {model}?",
        why="Pruning needs a network that was trained on your data; only pvtv2_b0 with the demo data comes along.",
        fix="Give --weights FILE (a checkpoint in timm's naming), --weights timm (pretrained, from the hub), or "
        "--weights random to look at sizes and speed only.",
    )


def _absolute_data(spec: str) -> str:
    kind, colon, path = spec.partition(":")
    local = kind in ("imagefolder", "csv", "wds") and colon and not is_url(path)
    return f"{kind}:{user_path(path).absolute()}" if local else spec


def _coco_data(recipe: Recipe, *, quiet: bool) -> CocoData | None:
    if recipe.detect is None:
        return None
    check_detection(recipe.detect)
    return open_detection_data(recipe.detect.coco, recipe.detect.detector, quiet=quiet)


def _data(recipe: Recipe, dense: nn.Module | None, *, quiet: bool) -> tuple[DataSource, DataSource]:
    """The data, and what quantization is calibrated on; unreadable images are named."""
    names = None if dense is None else label_names_of(dense)
    read = partial(
        open_data,
        image_key=recipe.image_key,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        recheck=recipe.recheck,
        quiet=quiet,
    )
    source = read(recipe.data, class_map=recipe.class_map, class_order=recipe.class_order, class_names=names)
    if recipe.class_map is not None and dense is not None:
        source = with_outputs(source, num_classes_of(dense))
    calib = recipe.precision.calib
    calibration = source if calib is None else read(calib)
    for note in source.notes:
        _LOGGER.info("%s", note)
    if source.skipped:
        skipped = ", ".join(source.skipped[:5]) + (", ..." if len(source.skipped) > 5 else "")
        _LOGGER.warning("%d unreadable images were skipped: %s", len(source.skipped), skipped)
    return source, calibration


def _dense_network(recipe: Recipe, classes: int | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # decides random weights
        return toolchain.create_model(
            recipe.model,
            weights=str(recipe.weights),
            num_classes=classes,
            image_size=recipe.image_size,
            model_args=recipe.model_args,
            preprocess={name: value for name in PREPROCESS[1:] if (value := getattr(recipe, name)) is not None},
        )


def filled_in(recipe: Recipe, model: nn.Module, source: DataSource, device: torch.device) -> Recipe:
    """The recipe with the values that depend on the model and the data; fine-tuning gets `settings_for`."""
    images = len(source.train)
    demo = source.spec == "demo"
    suited = asdict(settings_for(model, source, compensated=recipe.compensate.enabled is not False))
    # on CPUs, reading processes would take the cores that train
    suited["workers"] = min(8, usable_cores() - 1) if device.type == "cuda" and not demo else 0
    missing = [name for name, value in recipe.distill if value is None and name in suited]
    if missing:  # not where a run goes on, whose recipe holds them all
        suited |= train_values(recipe.distill.train_recipe or "short", images)
    distill = recipe.distill.model_copy(update={name: suited[name] for name in missing})
    score = recipe.score.model_copy(
        update={"num_images": min(recipe.score.num_images or (256 if demo else 1024), images)}
    )
    compensate = recipe.compensate.model_copy(
        update={"refit_images": min(recipe.compensate.refit_images or 512, images)}
    )
    detect = None if recipe.detect is None else resolved_detection(recipe.detect)
    return recipe.model_copy(update={"distill": distill, "score": score, "compensate": compensate, "detect": detect})


def _teacher(recipe: Recipe, dense: nn.Module, source: DataSource) -> Teacher | None:
    """Who teaches, where it is not the dense network.

    Raises:
        UserError: it cannot be read, has other classes, or nothing is trained.
    """
    if recipe.distill.teacher is None:
        return None
    if recipe.distill.finetuned is not None or not recipe.distill.epochs:
        raise UserError(
            "--teacher has nobody to teach.",
            why="--finetuned brings trained weights." if recipe.distill.finetuned else "--epochs 0 trains nothing.",
            fix="Leave --teacher out, or let the network be trained.",
        )
    teacher = load_teacher(recipe.distill.teacher)
    require_same_classes(teacher.model, num_classes_of(dense), label_names_of(dense) or source.class_names)
    return teacher


def _like_network(recipe: Recipe, dense: nn.Module, image_size: tuple[int, int]) -> nn.Module | None:
    """The published model whose widths the pruned network gets, or None."""
    if recipe.plan.like is None:
        return None
    return toolchain.create_model(
        recipe.plan.like, weights="random", num_classes=num_classes_of(dense), image_size=image_size
    )


def _may_shorten(recipe: Recipe, dense: nn.Module, like: nn.Module | None) -> bool:
    """Whether blocks may leave."""
    lists = [family_of(model).block_lists(model) for model in (dense, like or dense)]
    return lists[0] != lists[1] or recipe.plan.depth_ratio is not None or "depth" in (recipe.plan.components or ())


def _first_plan(recipe: Recipe, dense: nn.Module, like: nn.Module | None, preprocess: Preprocess) -> PruningPlan | None:
    """The plan by random scores: with the uniform planner its widths are those of any scores, so it tells now whether a
    request can be met. None where scores decide widths.
    """
    if recipe.plan.planner != "uniform":
        return None
    scores = replace(toolchain.score(dense, method="random"), depth=last_blocks_first(dense))
    return toolchain.plan(dense, scores, like=like, **plan_arguments(recipe.plan, preprocess))


def run_name(recipe: Recipe) -> str:
    """Default name of the run's directory, e.g. `pvt_v2_b0-r0.50`."""
    plan = recipe.plan
    if plan.like is not None:
        cut = f"like-{plan.like}"
    elif plan.latency is not None:
        cut = plan.latency.spelling.replace(" ", "")
    elif plan.target_macs is not None:
        cut = f"macs{plan.target_macs:.2f}"
    elif plan.target_params is not None:
        cut = f"params{plan.target_params:.2f}"
    else:
        cut = f"r{plan.ratio or 0:.2f}"
    depth = "" if plan.depth_ratio is None else f"-d{plan.depth_ratio:.2f}"
    planner = f"-{plan.planner}" if plan.planner == "global" else ""
    return f"{recipe.model}-{cut}{depth}{planner}"


def plan_arguments(plan: PlanRecipe, preprocess: Preprocess) -> dict[str, Any]:
    """What `toolchain.plan` and `plan_in_rounds` are asked for alike."""
    return {
        "ratio": plan.ratio,
        "target_macs": plan.target_macs,
        "target_params": plan.target_params,
        "depth_ratio": plan.depth_ratio,
        "planner": "global" if plan.planner == "global" else "uniform",
        "align": plan.align,
        "components": plan.components or (),
        "input_size": preprocess.input_size,
    }


def distill_settings(recipe: Recipe) -> DistillSettings:
    """The distillation of a resolved recipe."""
    values = recipe.distill.model_dump(exclude={"finetuned", "teacher", "train_recipe"})
    return DistillSettings(**values, seed=recipe.seed)
