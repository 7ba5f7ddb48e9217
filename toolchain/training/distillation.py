"""Fine-tuning of a pruned model against its dense parent: the UP-ViTs recipe (arXiv 2111.15127, section on
fine-tuning) on timm's optimizer, schedule, mixing and moving average.

Every image may be mixed with another one, teacher and student see the same mixed image, and

    loss = label_weight * cross-entropy against both labels (by their shares)
         + logit_weight * mean KL(teacher || student), temperature 1
         + feature_weight * mean squared error of the penultimate features

The paper adds 0.2 * *sum* of the KL over the 32 images of one GPU; 6.4 * mean is the same and does not depend on the
batch size. Without labels the first term is left out; without a head only the last one is there.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from upvits.calib_data import DataSource, Preprocess
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.networks.models import preprocess_of
from upvits.toolchain.processes.crew import join_processes
from upvits.toolchain.processes.process import pick_device, shared, sharing
from upvits.toolchain.training.evaluate import Accuracy, evaluate_images, require_finite_weights
from upvits.toolchain.training.kept_logits import clear
from upvits.toolchain.training.objective import LOSSES, losses, mixed
from upvits.toolchain.training.preparation import Run, prepare
from upvits.toolchain.training.progress import TrainingProgress, training_progress
from upvits.toolchain.training.settings import DistillSettings, settings_for
from upvits.toolchain.training.state import (
    EpochLog,
    keep_best,
    restore_state,
    save_state,
    seeded,
    write_log,
)
from upvits.toolchain.training.stopping import Checkpoints, requests_to_stop, stop_if_asked
from upvits.toolchain.training.teacher import Teacher


@dataclass(frozen=True, slots=True)
class DistillResult:
    """`model` is the moving average of the student's weights, a new model in eval mode on the student's device."""

    model: nn.Module
    history: tuple[EpochLog, ...]


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    data: DataSource,
    preprocess: Preprocess | None = None,
    settings: DistillSettings | None = None,
    folder: Path | None = None,
    *,
    device: str = "auto",
    quiet: bool = True,
) -> DistillResult:
    """Trains a copy of `student` on `data.train` to answer as `teacher` does.

    Several processes started by `torchrun` share every batch; all of them return the same weights. With a `folder`,
    checkpoint.safetensors and log.jsonl are replaced there at the end of every epoch, and within epochs every
    `checkpoint_minutes`: the same call, after having been killed at any moment, continues at the last checkpoint, sees
    the images that were left, and ends with the weights that it would have had: bit-identical on the same CPUs with the
    same number of threads and processes; on CUDA equal within noise (PyTorch promises equal bits only after
    `torch.use_deterministic_algorithms(True)` with CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment). Another number
    of processes continues with the same global batch. Only the first process reads and writes the folder; the others
    may have disks of their own. A folder with the checkpoint of another student, teacher, data set, preprocessing or of
    other settings is refused. A finished training returns at once. best.safetensors holds the weights of the epoch that
    was best on the validation images; the result is the last epoch's, since on few images the best one is a matter of
    luck.

    Args:
        student, teacher: timm classifiers with the same classes (`forward_features` and `forward_head`); neither is
            changed. Widths may differ (see `Learner`). A teacher that wants its images otherwise than the student comes
            from `load_teacher`.
        data: without class names the labels are not used.
        preprocess: how images are resized and normalised for the student; its own by default.
        settings: by default those that suit teacher and data (see `settings_for`).
        folder: is made when it is missing; only checkpoint.safetensors, best.safetensors and log.jsonl are
            written into it.
        device: "auto" or a torch device.

    Raises:
        StoppedError: SIGTERM or SIGUSR1 came, and there is a folder; the checkpoint is written.
        UserError: models and data do not fit each other, weights or loss are not finite (the last checkpoint then
            stays), nothing to learn from, unwritable folder, the folder of another training.

    Example:
        >>> import dataclasses, upvits
        >>> from upvits.calib_data.demo import demo_images
        >>> data = upvits.open_data("demo")
        >>> few = dataclasses.replace(data, train=demo_images("train", 24), val=demo_images("val", 12))
        >>> dense = upvits.create_model("pvtv2_b0", weights="demo")
        >>> plan = upvits.plan(dense, upvits.score(dense, method="magnitude"), ratio=0.5)
        >>> small = upvits.prune(dense, plan, compensate=False)
        >>> result = upvits.distill(small, dense, few, settings=upvits.DistillSettings(epochs=1, batch_size=12))
        >>> len(result.history), upvits.count_params(result.model) == upvits.count_params(small)
        (1, True)
    """
    preprocess = preprocess or preprocess_of(student)
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher, preprocess)
    settings = settings or settings_for(student, data)
    if settings.epochs == 0:
        return DistillResult(student, ())
    require_finite_weights(student, "student")
    require_finite_weights(teacher.model, "teacher")
    about = {name: json.dumps(value, default=str) for name, value in settings.decisive.items()}
    about |= {"data": data.digest, "preprocessing": json.dumps(asdict(preprocess), default=str)}
    about |= {"student": weights_digest(student), "teacher": weights_digest(teacher.model)}
    about |= {"images of the teacher": json.dumps(asdict(teacher.preprocess), default=str)}
    with join_processes() as process, sharing(process):
        require_shareable(settings.batch_size, process.world_size, settings.accumulation)
        if folder is not None and (process.is_main or settings.teacher_views):
            _make_folder(folder)
        keep = None if folder is None else (folder, json.dumps(about))
        run = prepare(student, teacher, data, preprocess, settings, pick_device(device), keep)
        _train(run, about, folder if process.is_main else None, quiet=quiet or not process.is_main)
    home = next(student.parameters()).device
    return DistillResult(run.state.ema.to(home).eval().requires_grad_(True), tuple(run.state.history))


def _train(run: Run, about: Mapping[str, str], folder: Path | None, *, quiet: bool) -> None:
    """Epoch by epoch from where the checkpoint in `folder` stands; checkpoint first, then the log that it holds.

    Args:
        folder: None in all processes but the first one, which reads and writes for all.
    """
    history = run.state.history
    restore_state(None if folder is None else folder / "checkpoint.safetensors", about, run.state)
    run = in_all_processes(run)
    reference = _predictions_of_teacher(run)
    if folder is not None and history:
        keep_best(folder / "best.safetensors", run.state)

    def save() -> None:
        if folder is not None:
            save_state(folder / "checkpoint.safetensors", about, run.state)

    epochs, steps, batch = run.settings.epochs, run.steps_per_epoch, run.settings.batch_size
    done = len(history) * steps + run.state.step
    with (
        requests_to_stop(listen=folder is not None) as signals,
        training_progress(epochs, steps, done, batch, quiet=quiet) as shown,
    ):
        for epoch in range(len(history), epochs):
            history.append(_train_epoch(run, epoch, reference, save, signals, shown))
            if shown is not None:
                shown.epoch(epoch + 1, history[-1].loss, history[-1].top1)
            run.state.begin_epoch()
            save()
            if folder is not None:
                keep_best(folder / "best.safetensors", run.state)
                write_log(folder / "log.jsonl", history)
            stop_if_asked(signals, f"after epoch {epoch + 1}")
    if folder is not None:
        clear(folder)
        write_log(folder / "log.jsonl", history)  # a run killed between checkpoint and log lacks the last line


def in_all_processes(run: Run) -> Run:
    """With gradients that several processes average; all of them get the weights of the first one."""
    if shared().world_size == 1:
        return run
    # Without a loss on the logits the head gets no gradient, and DDP would wait for it.
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of depthwise convolutions: harmless
    unused = not any(run.fit.weights[:3])
    return replace(run, module=DistributedDataParallel(run.module, find_unused_parameters=unused))


def _train_epoch(
    run: Run,
    epoch: int,
    reference: Tensor | None,
    save: Callable[[], None],
    signals: list[int],
    shown: TrainingProgress | None,
) -> EpochLog:
    """What is left of a pass over the images, then the moving average on the validation images."""
    settings, state = run.settings, run.state
    start, seen = time.perf_counter(), float(state.sums[-1])
    _take_steps(run, epoch, save, signals, shown)
    # The loss of the last step was finite, the weights after it may not be.
    _require_finite(torch.stack([p.detach().sum() for p in state.learner.parameters()]), settings, epoch, state.step)
    sums = state.sums.clone()
    shared().sum(sums)
    if not sums[-1]:
        raise UserError("No training images were read.", fix="Check the training split of `data=` and the batch size.")
    seconds = time.perf_counter() - start
    top1, agreement = None, None
    if epoch + 1 == settings.epochs or (epoch + 1) % settings.eval_every == 0:
        top1, agreement = _validate(run, reference)
    means = (sums[:-1] / sums[-1]).tolist()
    return EpochLog(
        epoch=epoch + 1,
        lr=max(group["lr"] for group in state.optimizer.param_groups),
        loss=_weighted(run, means),
        label_loss=means[0],
        logit_loss=means[1],
        hard_loss=means[2],
        feature_loss=means[3],
        map_loss=means[4],
        top1=top1,
        agreement=agreement,
        seconds=round(time.perf_counter() - start, 3),
        images_per_s=round((float(state.sums[-1]) - seen) * shared().world_size / seconds, 1),
    )


def _take_steps(
    run: Run, epoch: int, save: Callable[[], None], signals: list[int], shown: TrainingProgress | None
) -> None:
    """The steps of an epoch that are left, with checkpoints in between."""
    settings, process, state = run.settings, shared(), run.state
    checkpoints = Checkpoints(settings.checkpoint_minutes, signals)
    view = epoch % settings.teacher_views if settings.teacher_views else epoch
    for images, labels in run.batches.epoch(view, skip=state.step):
        done = epoch * run.steps_per_epoch + state.step
        run.scheduler.step_update(done)
        with seeded(run.device, settings.seed, view, state.step, process.rank):  # so checkpoints need no random states
            parts = train_step(run, images, labels, view)
        run.ema.update(state.learner.model, done + 1)
        state.sums += torch.cat([parts, parts.new_ones(1)]) * len(images)
        state.step += 1
        if run.device.type == "cpu" or state.step % 50 == 0:  # looking waits for the GPU
            _require_finite(state.sums, settings, epoch, state.step)
        if shown is not None and shown.due:
            shown.step(epoch + 1, state.step, _mean_loss(run))
        if checkpoints.is_due() and state.step < run.steps_per_epoch:
            state.all_sums[:] = process.all_of({process.rank: state.sums.tolist()})
            save()
            checkpoints.written()
            stop_if_asked(signals, f"in epoch {epoch + 1}, after step {state.step}")


def _mean_loss(run: Run) -> float:
    """Of the epoch so far, over the images of this process."""
    return _weighted(run, (run.state.sums[:-1] / run.state.sums[-1]).tolist())


def _weighted(run: Run, means: Sequence[float]) -> float:
    """The loss that its parts make."""
    return sum(weight * mean for weight, mean in zip(run.fit.weights, means, strict=True))


def train_step(run: Run, images: Tensor, labels: Tensor, view: int) -> Tensor:
    """Mixes, compares, updates the weights; returns the losses [5], detached."""
    state, passes = run.state, run.settings.accumulation
    images, targets = mixed(run.mixing, images, labels)
    images = run.erasing(images)
    if run.settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    kept = None if run.kept is None else run.kept.get(view, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    total, said = torch.zeros(len(LOSSES), device=run.device), []
    for number, (some, wanted) in enumerate(zip(images.chunk(passes), targets.chunk(passes), strict=True)):
        own = None if kept is None else kept.chunk(passes)[number].to(run.device)
        with _gradients_apart(run.module, number + 1 < passes):
            parts, logits = _backward(run, some, wanted, own)
        total += parts
        said.append(logits)
    if run.kept is not None and kept is None:
        run.kept.put(view, state.step, torch.cat(said))
    if run.settings.clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.learner.parameters(), run.settings.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return total


def _backward(run: Run, images: Tensor, targets: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Adds the gradients of a part of the batch; returns its share of the losses [5], and the teacher's logits.

    Args:
        kept: the teacher's logits, where they are known.
    """
    with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
        predicted = run.module(images)
        with torch.no_grad():
            answers = run.teacher(images) if kept is None else predicted._replace(logits=kept)
    if run.kept is not None and kept is None:  # as the later epochs will see them
        answers = answers._replace(logits=answers.logits.half().float())
    fit, settings = run.fit, run.settings
    parts = losses(predicted, answers, targets, fit.weights, settings.temperature) / settings.accumulation
    loss = sum(weight * part for weight, part in zip(fit.weights, parts, strict=True))
    run.state.scaler.scale(loss).backward()
    return parts.detach(), answers.logits.detach()


def _gradients_apart(module: nn.Module, apart: bool) -> AbstractContextManager[None]:
    """Processes average their gradients once in a step, in its last pass."""
    context: AbstractContextManager[None] = nullcontext()
    return module.no_sync() if apart and isinstance(module, DistributedDataParallel) else context


def _validate(run: Run, reference: Tensor | None) -> tuple[float | None, float | None]:
    """Top-1 and agreement with the teacher (`reference`) of the moving average, in percent, over all processes."""
    accuracy = _evaluate(run, run.state.ema, reference)
    if accuracy is None:
        return None, None
    return (accuracy.top1, None) if reference is None else (None, accuracy.agreement)


def _evaluate(run: Run, model: nn.Module, reference: Tensor | None = None) -> Accuracy | None:
    """On the validation images; None where there are none or nothing to compare with."""
    if run.fit.headless or not len(run.data.val):
        return None
    size, workers = run.settings.batch_size, run.settings.workers
    return evaluate_images(model, run.data.val, run.preprocess, size, reference=reference, workers=workers)


def _predictions_of_teacher(run: Run) -> Tensor | None:
    """What the teacher says about the validation images: the only measure where there are no labels."""
    if run.fit.labelled or run.fit.headless or not len(run.data.val):
        return None
    size, workers = run.settings.batch_size, run.settings.workers
    return evaluate_images(run.taught.model, run.data.val, run.taught.own, size, workers=workers).predictions


def require_shareable(batch_size: int, processes: int, accumulation: int = 1) -> None:
    """Refuse a batch that several processes, in several passes each, cannot share.

    Raises:
        UserError: their parts would differ in size.
    """
    if batch_size % (processes * accumulation):
        passes = f", in {accumulation} passes each" if accumulation > 1 else ""
        raise UserError(
            f"A batch of {batch_size} images cannot be shared evenly by {processes} processes{passes}.",
            why="Every process takes the same number of images in a step.",
            fix=f"Choose a multiple of {processes * accumulation} as `batch_size`, or start another number of "
            "processes.",
        )


def _require_finite(values: Tensor, settings: DistillSettings, epoch: int, step: int) -> None:
    if not values.isfinite().all():
        raise UserError(
            f"Training diverged: the loss or the weights are not finite (epoch {epoch + 1}, by step {step}).",
            why="The last checkpoint was kept.",
            fix=f"Lower lr (now {settings.lr:g}), or set clip_grad=1; check the student's accuracy before training.",
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder}.", why=str(error), fix="Choose a folder that you may write."
        ) from error
