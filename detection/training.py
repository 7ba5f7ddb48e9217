"""Training a detector with mmengine's Runner."""

from __future__ import annotations

import contextlib
import errno
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upvits.calib_data.documents import Count, Name, Number, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import progress_bar
from upvits.detection import openmm
from upvits.detection.coco import CocoData
from upvits.detection.configs import Config, Schedule, training
from upvits.detection.detector import load_detector, read_weights
from upvits.toolchain.processes.crew import crew

Losses = dict[str, float]

_HISTORY, _PROCESSES = "history.json", "processes"


@dataclass(frozen=True, slots=True)
class Trained:
    """A detector and how it was trained.

    Attributes:
        detector: in eval mode on the CPU.
        config: of the model, as mmdet builds it; options are merged in.
        history: means of all losses by epoch.
    """

    detector: nn.Module
    config: Config
    history: dict[int, Losses] = field(default_factory=dict)


def train_detector(
    model: Config,
    data: CocoData,
    schedule: Schedule,
    work_dir: Path,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    teacher: Path | None = None,
    distill_weight: float = 1.0,
    start: Path | None = None,
    quiet: bool = True,
) -> Trained:
    """Train a detector, or go on where a training in the same folder was stopped. All processes of the crew train.

    Args:
        model: its configuration (`detection.configs`).
        data: what it is trained on.
        schedule: how long and how fast.
        work_dir: folder of checkpoints and logs; those in it already have to be of the same training.
        seed: of new weights, order and flips.
        options: values by dotted key of mmengine's configuration, which replace those of `configs.training`.
        teacher: folder of a detector whose pyramid's features are imitated too.
        distill_weight: of that imitation.
        start: folder of a detector of the same structure whose weights it starts from.
        quiet: no progress bar.

    Raises:
        MissingDependencyError: mmdet is not installed.
        UserError: an option names no key of the configuration, or a value that nothing can be built from.
    """
    options = dict(options or {})
    if openmm.last_checkpoint(work_dir) is not None:
        options.pop("load_from", None)  # was for the first epoch
    _check_options(options, model)
    _require_same_crew(work_dir, crew().size)
    return crew().together(
        _train, model, data, schedule, work_dir, seed, options, teacher, distill_weight, start, quiet
    )


def _train(
    model: Config,
    data: CocoData,
    schedule: Schedule,
    work_dir: Path,
    seed: int,
    options: Mapping[str, Any],
    teacher: Path | None,
    distill_weight: float,
    start: Path | None,
    quiet: bool,
) -> Trained:
    """One of the processes of a training."""
    last, quiet = openmm.last_checkpoint(work_dir), quiet or not crew().is_leader
    values = training(model, data, schedule, work_dir=str(work_dir), seed=seed, gpu=torch.cuda.is_available(),
                      processes=crew().size)  # fmt: skip
    if last is not None:
        values |= {"resume": True, "load_from": str(last.path)}
    config = openmm.config_of(values, options)
    sums: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    history = {} if last is None else _history_until(work_dir, last.epoch)
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("training", total=None)

        def advance(epoch: int, step: int, steps: int, losses: Losses) -> None:
            for name, value in losses.items():
                sums[epoch + 1][name].append(value)
            done = epoch * steps + step + 1
            bar.update(
                task, completed=done, total=config.train_cfg.max_epochs * steps, description=f"epoch {epoch + 1}"
            )
            if step + 1 == steps:
                history[epoch + 1] = {name: sum(values) / len(values) for name, values in sums[epoch + 1].items()}
                if crew().is_leader:
                    (work_dir / _HISTORY).write_text(json.dumps(history))
                    (work_dir / _PROCESSES).write_text(str(crew().size))

        try:
            runner = openmm.make_runner(config, [openmm.progress_hook(advance)])
            if teacher is not None:
                openmm.add_loss(runner, imitation(load_detector(teacher)[0], distill_weight))
            if start is not None and last is None:
                openmm.set_weights(runner, read_weights(start))
            openmm.train(runner)
        except Exception as error:  # of any kind, depending on what an option is for
            of_the_machine = isinstance(error, (UserError, MemoryError, torch.OutOfMemoryError)) or (
                isinstance(error, OSError) and error.errno == errno.ENOSPC
            )
            if not options or sums or of_the_machine:  # after the first step: all options could be built
                raise
            raise UserError(
                f"mmengine cannot build what `options=` asks for: {str(error).strip().splitlines()[-1]}",
                fix=f"Check {', '.join(options)}.",
            ) from error
    return Trained(openmm.trained_model(runner), config.model.to_dict(), history)


def _check_options(options: Mapping[str, Any], model: Config) -> None:
    """Refuse options that decide where the training is kept, and a checkpoint that is of no use for it.

    Raises:
        UserError: names the option.
    """
    taken = sorted({"work_dir", "resume"} & {name.partition(".")[0] for name in options})
    if taken:
        raise UserError(
            f"`options=` cannot set {' and '.join(taken)}.",
            why="Checkpoints lie in the run, and a training that was stopped goes on by itself.",
            fix="Leave it out.",
        )
    if options.get("load_from") is not None:
        openmm.require_weights(Path(str(options["load_from"])), model)


def _require_same_crew(work_dir: Path, processes: int) -> None:
    """Refuse another number of processes than at the start: learning rate and order of images depend on it.

    Raises:
        UserError: more or fewer processes continue.
    """
    with contextlib.suppress(OSError, ValueError):
        before = int((work_dir / _PROCESSES).read_text()) if (work_dir / _PROCESSES).is_file() else processes
        if before != processes:
            raise UserError(
                f"This training was begun by {before} processes, and is continued by {processes}.",
                why="The learning rate is for the images that a step has, and does not change on the way.",
                fix=f"Continue with {before}, or delete {work_dir} to begin again.",
            )


def _history_until(work_dir: Path, last: int) -> dict[int, Losses]:
    """Losses of the epochs up to the last one that has a checkpoint, as far as they were written."""
    with contextlib.suppress(UserError):  # a kill may have torn the file: losses are for people to look at
        history = read_document(work_dir / _HISTORY, dict[Count, dict[Name, Number]], fix="")
        return {epoch: losses for epoch, losses in history.items() if epoch <= last}
    return {}


def imitation(teacher: nn.Module, weight: float) -> Any:
    """An extra loss: how far the pyramid's features are from the teacher's (PKD, arXiv 2207.02039).

    Features are standardised per channel over batch and positions, so that only their pattern is imitated.
    """
    teacher = teacher.eval().requires_grad_(False)

    def extra(features: Sequence[Tensor], images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = teacher.to(images.device).extract_feat(images)  # type: ignore[operator]
        gaps = [
            (_standard(level) - _standard(target)).square().mean() / 2
            for level, target in zip(features, targets, strict=True)
        ]
        return {"loss_imitation": weight * torch.stack(gaps).mean()}

    return extra


def _standard(features: Tensor) -> Tensor:
    """Features [B, C, H, W] with mean 0 and deviation 1 in every channel."""
    deviation, mean = torch.std_mean(features, dim=(0, 2, 3), keepdim=True, correction=0)
    return (features - mean) / (deviation + 1e-6)
