"""What a fine-tuning consists of, made from its settings: networks, optimizer, schedule, moving average, images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from upvits.calib_data import DataSource, Preprocess
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import TrainingBatches
from upvits.calib_data.printable import printable
from upvits.toolchain.choices import Amp
from upvits.toolchain.processes.process import shared
from upvits.toolchain.training.kept_logits import KeptLogits
from upvits.toolchain.training.objective import Fit, LargerPartStays, Learner, compare, mixing_of
from upvits.toolchain.training.settings import DistillSettings
from upvits.toolchain.training.state import COLUMNS, TrainState, seeded
from upvits.toolchain.training.teacher import Taught, Teacher


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a training needs, fixed before its first step; `state` holds what changes."""

    settings: DistillSettings
    data: DataSource
    batches: TrainingBatches
    preprocess: Preprocess
    device: torch.device
    fit: Fit
    mixing: LargerPartStays
    erasing: Callable[[Tensor], Tensor]
    taught: Taught
    teacher: nn.Module  # the same, compiled where that is asked for
    kept: KeptLogits | None
    module: nn.Module  # the learner, or the learner wrapped to average gradients over the processes
    ema: ModelEmaV3
    scheduler: CosineLRScheduler
    steps_per_epoch: int
    autocast: torch.dtype | None
    state: TrainState


def prepare(
    student: nn.Module,
    teacher: Teacher,
    data: DataSource,
    preprocess: Preprocess,
    settings: DistillSettings,
    device: torch.device,
    keep: tuple[Path, str] | None = None,
) -> Run:
    """Copies of both models on the device, checked against each other and the data, with their optimizer.

    Args:
        keep: folder and key for the teacher's logits, where `settings` want them kept.
    """
    if settings.compile:
        require_compiler(device)
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    student = copy.deepcopy(student).to(device).to(memory_format=layout).requires_grad_(True)
    answering = copy.deepcopy(teacher.model).to(device).to(memory_format=layout).eval().requires_grad_(False)
    taught = Taught(answering, teacher.preprocess, preprocess)
    fit = compare(student, taught, data, preprocess, settings.weights)
    ema = ModelEmaV3(student, decay=settings.ema_decay, use_warmup=True)
    if settings.drop_path is not None:
        _set_drop_path(student, settings.drop_path)
    if hasattr(student, "set_distilled_training"):  # two heads, of which the teacher teaches the second
        cast(Any, student).set_distilled_training(True)
    with seeded(device, settings.seed):
        projections = [
            nn.Linear(*widths) if weight > 0 and widths[0] != widths[1] else nn.Identity()
            for weight, widths in zip(fit.weights[3:], (fit.feature_widths, fit.map_widths), strict=True)
        ]
    learner = Learner(student, *projections).to(device).train()
    optimizer = _optimizer(learner, settings)
    steps_per_epoch = len(data.train) // settings.batch_size
    autocast = autocast_type(device, settings.amp)
    return Run(
        settings=settings,
        data=data,
        batches=TrainingBatches(
            data.train,
            preprocess,
            settings.batch_size,
            augmentation=settings.augmentation,
            seed=settings.seed,
            workers=settings.workers,
            share=(shared().rank, shared().world_size),
            device=device,
        ),
        preprocess=preprocess,
        device=device,
        fit=fit,
        mixing=mixing_of(settings, fit.classes),
        erasing=RandomErasing(settings.random_erasing, mode="pixel", device=str(device)),
        taught=taught,
        teacher=_compiled(taught, settings),
        kept=_kept_logits(keep, settings, fit, steps_per_epoch),
        module=_compiled(learner, settings),
        ema=ema,
        scheduler=_schedule(optimizer, settings, steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        autocast=autocast,
        state=TrainState(
            learner=learner,
            ema=ema.module,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cuda", enabled=autocast == torch.float16),
            history=[],
            sums=torch.zeros(COLUMNS, device=device),
        ),
    )


def _optimizer(learner: Learner, settings: DistillSettings) -> torch.optim.Optimizer:
    """timm's, at the rate of the global batch."""
    rate = settings.lr * settings.batch_size / 256
    more: dict[str, Any] = {"fused": True} if settings.optimizer == "adamw" else {}
    if settings.layer_decay < 1:
        more["param_group_fn"] = lambda learner: learner.layer_groups(settings.weight_decay, settings.layer_decay)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        learner, settings.optimizer, rate, settings.weight_decay, **more
    )
    return optimizer


def _kept_logits(
    keep: tuple[Path, str] | None, settings: DistillSettings, fit: Fit, steps_per_epoch: int
) -> KeptLogits | None:
    if keep is None or not settings.teacher_views:
        return None
    share = (shared().rank, shared().world_size)
    images = settings.batch_size // share[1]
    return KeptLogits(*keep, settings.teacher_views, steps_per_epoch, images, fit.classes, share)


def _compiled(module: nn.Module, settings: DistillSettings) -> nn.Module:
    return cast(nn.Module, torch.compile(module)) if settings.compile else module


def require_compiler(device: torch.device) -> None:
    """Refuse torch.compile where it does not work, before anything is trained.

    Raises:
        UserError: says what torch says.
    """
    try:
        torch.compile(torch.nn.ReLU())(torch.zeros(2, device=device))
    except Exception as error:  # torch has an exception of its own for each way in which it fails
        raise UserError(
            "torch.compile does not work here.",
            why=printable(str(error).strip().partition("\n")[0], 300),
            fix="Set compile = false; on a CPU it needs a C++ compiler, on a GPU Triton.",
        ) from error


def autocast_type(device: torch.device, amp: Amp) -> torch.dtype | None:
    """The type of matrix products; None: as the weights are.

    Raises:
        UserError: fp16 on a CPU, where gradients of that type are not to be had.
    """
    if amp == "fp16" and device.type != "cuda":
        raise UserError("amp fp16 needs a GPU.", why="Processors train in bf16 or fp32.", fix="Use amp auto or bf16.")
    if amp == "auto" and device.type == "cuda":  # bf16 from compute capability 8 on
        amp = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def _set_drop_path(model: nn.Module, rate: float) -> None:
    """Stochastic depth growing linearly from 0 at the first block to `rate` at the last, as timm's models have it."""
    blocks = [block for block in model.modules() if hasattr(block, "drop_path1")]
    for index, block in enumerate(blocks):
        share = rate * index / max(len(blocks) - 1, 1)
        block.drop_path1 = DropPath(share) if share > 0 else nn.Identity()
        block.drop_path2 = DropPath(share) if share > 0 else nn.Identity()


def _schedule(optimizer: torch.optim.Optimizer, settings: DistillSettings, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up from a hundredth of the peak, then half a cosine down to a hundredth; per step."""
    steps = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), steps // 2)
    edge = settings.lr * settings.batch_size / 256 / 100
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps - warmup, 1),
        lr_min=edge,
        warmup_t=warmup,
        warmup_lr_init=edge,
        warmup_prefix=True,
        t_in_epochs=False,
    )
