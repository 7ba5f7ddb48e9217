"""The forecast of a fine-tuning as a table."""

from __future__ import annotations

from datetime import timedelta

from rich.table import Table

from upvits.deploy.recipe.request import Job
from upvits.toolchain.training.forecast import Forecast


def forecast_table(job: Job, found: Forecast, whose: str) -> Table:
    """What will be trained, and what that takes here."""
    recipe = job.recipe.distill
    shares = f"{found.processes} x {found.accumulation} x {found.batch_size // found.processes // found.accumulation}"
    table = Table(title="Fine-tuning, without doing it", show_header=False, title_justify="left")
    rows = {
        "recipe": recipe.train_recipe or "short",
        "teacher": recipe.teacher or "the dense network",
        "measured on": whose,
        "epochs": f"{found.epochs}, of {found.steps_per_epoch} steps each",
        "batch": f"{found.batch_size} (processes x passes x images: {shares})",
        "rate": f"{recipe.lr:g} at batch 256, {recipe.optimizer}",
        "a step": f"{found.step_seconds:.3g} s, {found.images_per_s:.0f} images/s (mean of {found.measured_steps})",
        "validation": f"{found.evaluation_seconds:.3g} s, {len(job.source.val)} images",
        "in all": str(timedelta(seconds=round(found.seconds))),
        "memory": f"{found.memory_mb / 1e3:.2f} GB at the peak, {'GPU' if job.device.type == 'cuda' else 'resident'}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
