"""What a training will take here, from a few of its steps: for `distill --dry-run`."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from upvits.calib_data import DataSource, Preprocess
from upvits.toolchain.processes.crew import join_processes
from upvits.toolchain.processes.process import pick_device, shared, sharing
from upvits.toolchain.training.distillation import in_all_processes, require_shareable, train_step
from upvits.toolchain.training.evaluate import evaluate_images
from upvits.toolchain.training.preparation import prepare
from upvits.toolchain.training.settings import DistillSettings
from upvits.toolchain.training.teacher import Teacher

_WARM_UP, _STEPS, _SECONDS = 2, 20, 30.0
_EVALUATED = 256  # images


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a training takes.

    Attributes:
        epochs, steps_per_epoch: how long it is.
        batch_size: images of a step over all processes.
        processes, accumulation: among which, and in how many passes, they are shared.
        step_seconds: mean of the steps that were measured.
        evaluation_seconds: of all validation images, once.
        seconds: of the whole training.
        memory_mb: peak of the first process in 10**6 bytes, on the GPU where it trains on one.
        measured_steps: how many steps that is known from.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int
    processes: int
    accumulation: int
    step_seconds: float
    evaluation_seconds: float
    seconds: float
    memory_mb: float
    measured_steps: int

    @property
    def images_per_s(self) -> float:
        """Training images, over all processes."""
        return self.batch_size / self.step_seconds


def forecast(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    data: DataSource,
    preprocess: Preprocess,
    settings: DistillSettings,
    *,
    device: str = "auto",
) -> Forecast:
    """Train copies for some steps, as `distill` does, and reckon from them; nothing is written.

    Args:
        student: a network of the widths of the one that will be trained.

    The others are those of `distill`.

    Raises:
        UserError: as `distill` raises it.
    """
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, preprocess)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with join_processes() as process, sharing(process):
        require_shareable(settings.batch_size, process.world_size, settings.accumulation)
        run = in_all_processes(prepare(student, teacher, data, preprocess, settings, pick_device(device)))
        seconds: list[float] = []
        started = last = time.perf_counter()
        for images, labels in run.batches.epoch(0):
            train_step(run, images, labels, 0)
            run.ema.update(run.state.learner.model, 1)
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            enough = len(seconds) >= _WARM_UP + _STEPS or now - started > _SECONDS
            if shared().all_of({shared().rank: enough})[0]:  # all stop when the first one does
                break
        step = fmean(seconds[_WARM_UP:] or seconds)
        validation = _evaluation_seconds(run.state.ema, data, preprocess, settings)
    evaluations = -(-settings.epochs // settings.eval_every)
    return Forecast(
        epochs=settings.epochs,
        steps_per_epoch=run.steps_per_epoch,
        batch_size=settings.batch_size,
        processes=process.world_size,
        accumulation=settings.accumulation,
        step_seconds=step,
        evaluation_seconds=validation,
        seconds=settings.epochs * run.steps_per_epoch * step + evaluations * validation,
        memory_mb=_peak_mb(run.device),
        measured_steps=len(seconds),
    )


def _evaluation_seconds(model: nn.Module, data: DataSource, preprocess: Preprocess, settings: DistillSettings) -> float:
    count = min(len(data.val), max(_EVALUATED, settings.batch_size))
    if not count:
        return 0.0
    started = time.perf_counter()
    evaluate_images(model, data.val.spread(count), preprocess, settings.batch_size, workers=settings.workers)
    return (time.perf_counter() - started) * len(data.val) / count


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
