"""From the artifacts of a run to its report: everything in it is read from files that the stages wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifacts import Artifact
from deploy.report import Bench, ModelFigures, Parity, PlanFigures, PrunedFigures, Report, Width, engine_figures
from deploy.runtimes import runtime_named
from deploy.stages import MODELS, Job, engine_of, runs_here
from toolchain.planning import PruningPlan
from toolchain.scores import Scores


@dataclass(frozen=True, slots=True)
class Artifacts:
    """What the stages of a run made, as far as it went."""

    scored: Artifact
    pruned: Artifact | None = None
    tuned: Artifact | None = None
    exported: Artifact | None = None
    engines: tuple[Artifact, ...] = ()
    benched: Artifact | None = None

    @property
    def all(self) -> list[Artifact]:
        """In the order of the stages."""
        found = (self.scored, self.pruned, self.tuned, self.exported, *self.engines, self.benched)
        return [artifact for artifact in found if artifact is not None]


_PARITY_KEYS = ("reference", "candidate", "images", "max_abs", "min_cosine", "top1_agreement", "passed")


def summarise(job: Job, done: Artifacts) -> Report:
    """The report of a whole run."""
    assert done.pruned is not None
    assert done.tuned is not None
    assert done.benched is not None
    plan = PruningPlan.load(done.pruned.folder / "plan.json")
    before = _read(done.pruned.folder / "accuracy.json")
    after = _read(done.tuned.folder / "accuracy.json")["after_distill"]
    latency = Bench.model_validate_json((done.benched.folder / "latency.json").read_bytes())
    return Report(
        model=job.recipe.model,
        ratio=job.recipe.plan.ratio,
        data=job.recipe.data,
        weights=str(job.recipe.weights),
        dense=ModelFigures(
            params=plan.before.params, macs=plan.before.macs, top1=before["dense"]["top1"], latency_ms=latency.dense
        ),
        pruned=PrunedFigures(
            params=plan.after.params,
            macs=plan.after.macs,
            top1=after["top1"],
            latency_ms=latency.pruned,
            top1_after_prune=before["after_prune"]["top1"],
            agreement=after["agreement"],
        ),
        speedup=latency.speedup,
        speedup_low=latency.speedup_low,
        speedup_high=latency.speedup_high,
        parity=_parities(done),
        engines=[engine_figures(name, engine_of(a, name), job.folder) for a in done.engines for name in MODELS],
        stages=[artifact.record for artifact in done.all],
        plan=_plan_figures(plan),
        measurement=_measurement(
            job, Scores.load(done.scored.folder), done.benched, after["top1"] is not None, after["images"]
        ),
        environment=_environment(_read(done.benched.folder / "environment.json")),
        notes=[*_skipped_images(job), *_left_out(job, done.engines)],
    )


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def _parities(done: Artifacts) -> list[Parity]:
    folders = [done.exported.folder if done.exported else None, *(artifact.folder for artifact in done.engines)]
    return [
        Parity(model=name, **{key: values[key] for key in _PARITY_KEYS})
        for folder in folders
        if folder is not None
        for name, values in _read(folder / "parity.json").items()
    ]


def _plan_figures(plan: PruningPlan) -> PlanFigures:
    after = plan.widths
    return PlanFigures(
        asked=dict(plan.asked),
        got={
            "macs_share": round(plan.after.macs / plan.before.macs, 4),
            "params_share": round(plan.after.params / plan.before.params, 4),
        },
        widths=[
            Width(group=name, before=size, after=after.channels[name])
            for name, size in plan.dense_widths.channels.items()
        ],
    )


def _measurement(job: Job, score: Scores, benched: Artifact, labelled: bool, images: int) -> dict[str, Any]:
    recipe = job.recipe
    return {
        "accuracy": f"{'top-1' if labelled else 'agreement with the dense model'} on {images} validation images, "
        "by PyTorch in fp32",
        "scores": f"{score.method} on {score.num_images} training images" if score.num_images else score.method,
        "fine-tuning": f"{recipe.distill.epochs} epochs of {len(job.source.train)} images, "
        f"batch {recipe.distill.batch_size}",
        "latency": f"dense and pruned in turns, {recipe.bench.rounds} rounds, warm-up {recipe.bench.warmup} calls, "
        f"about {recipe.bench.seconds:g} s per batch size; wall time with inputs and outputs on the host",
        "threads": f"of CPU sessions: as many as are 70 % efficient at the middle batch of {recipe.engine.batch}",
        "sessions": _read(benched.folder / "sessions.json"),
    }


def _environment(values: dict[str, Any]) -> dict[str, Any]:
    gpus = ", ".join(gpu["name"] for gpu in values.get("gpus", ()))
    return {**values, **({"gpu": gpus} if gpus else {})}


def _skipped_images(job: Job) -> list[str]:
    skipped = job.source.skipped
    return [f"{len(skipped)} unreadable images were skipped: {', '.join(skipped[:5])}"] if skipped else []


def _left_out(job: Job, engines: Sequence[Artifact]) -> list[str]:
    notes = [f"{one.name} was left out: {one.why} {one.fix}" for one in job.runtimes.left_out]
    for engine in (engine_of(artifact, "pruned") for artifact in engines):
        missing = runtime_named(engine.runtime).missing_to_run()
        if missing is not None:
            notes.append(f"{engine.runtime} engines were built but not run here: {missing.why} {missing.fix}")
        elif not runs_here(engine):
            targets = ", ".join(engine.targets)
            notes.append(f"{engine.runtime} engines were built for {targets}, and not run here: this GPU is another.")
    return notes
