"""From the artifacts of a run to its report: everything in it is read from files that the stages wrote."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from upvits.calib_data.documents import Facts
from upvits.calib_data.installation import version_line
from upvits.deploy.choices import MODELS
from upvits.deploy.measure.document import Bench, Environment
from upvits.deploy.measure.figures import EnginePair
from upvits.deploy.precision.half import HALVES
from upvits.deploy.recipe.document import PlanRecipe
from upvits.deploy.recipe.request import Job
from upvits.deploy.report.detection import DetectionReport
from upvits.deploy.report.document import (
    AccuracyFigures,
    Compensation,
    ModelFigures,
    PairedImages,
    Parity,
    PlanFigures,
    PrunedFigures,
    Report,
    Stability,
    Target,
    Timing,
    Width,
    engine_figures,
)
from upvits.deploy.runtimes import Engine, runtime_named
from upvits.deploy.speed.search import ALLOWED, LatencyRecord
from upvits.deploy.stages.answers import answers, learning
from upvits.deploy.stages.documents import (
    CompensationRecord,
    EngineAccuracies,
    NetworkAccuracy,
    Parities,
    PrecisionRecord,
    PrunedAccuracies,
    Sessions,
    TunedAccuracy,
)
from upvits.deploy.stages.engines import Engines, engine_of, runs_here
from upvits.deploy.stages.precision import graph_name, left_out, read_precisions
from upvits.deploy.stages.steadiness import unsteady
from upvits.deploy.store.artifacts import Artifact, package_versions
from upvits.deploy.store.documents import load_document
from upvits.toolchain.compensation import CompressionReport
from upvits.toolchain.networks.found import how_read
from upvits.toolchain.planning import PruningPlan
from upvits.toolchain.scores import Scores
from upvits.toolchain.scores import Stability as Agreement


@dataclass(frozen=True, slots=True)
class Artifacts:
    """What the stages of a run made, as far as it went."""

    judged: Artifact
    scored: Artifact | None = None
    pruned: Artifact | None = None
    tuned: Artifact | None = None
    exported: Artifact | None = None
    graphs: Mapping[str, Artifact] = field(default_factory=dict)
    engines: Engines = field(default_factory=Engines)
    benched: Artifact | None = None
    detected: Artifact | None = None

    @property
    def all(self) -> list[Artifact]:
        """In the order of the stages."""
        artifacts = (
            self.judged,
            self.scored,
            self.pruned,
            self.tuned,
            self.exported,
            *self.graphs.values(),
            *self.engines.artifacts,
            self.benched,
            self.detected,
        )
        return [artifact for artifact in artifacts if artifact is not None]


def summarise(job: Job, done: Artifacts, detection: DetectionReport | None) -> Report:
    """The report of a whole run, with what is known of detectors on its networks."""
    assert done.scored is not None
    assert done.pruned is not None
    assert done.tuned is not None
    assert done.exported is not None
    assert done.benched is not None
    plan = PruningPlan.load(done.pruned.folder / "plan.json")
    scores = Scores.load(done.scored.folder)
    before = load_document(done.pruned.folder / "accuracy.json", PrunedAccuracies)
    after = load_document(done.tuned.folder / "accuracy.json", TunedAccuracy).after_distill
    latency = load_document(done.benched.folder / "latency.json", Bench)
    compensated = _compensation_record(done.pruned)
    return Report(
        model=job.recipe.model,
        ratio=job.recipe.plan.ratio,
        data=job.recipe.data,
        weights=str(job.recipe.weights),
        dense=ModelFigures(
            params=plan.before.params, macs=plan.before.macs, top1=before.dense.top1, latency_ms=latency.dense
        ),
        pruned=PrunedFigures(
            params=plan.after.params,
            macs=plan.after.macs,
            top1=after.top1,
            latency_ms=latency.pruned,
            top1_after_prune=before.after_prune.top1,
            top1_after_deletion=before.after_deletion.top1 if before.after_deletion is not None else None,
            agreement=after.agreement,
            paired=_paired(after, job.source.val.labels),
        ),
        speedup=latency.speedup,
        speedup_low=latency.speedup_low,
        speedup_high=latency.speedup_high,
        parity=_parities(done),
        accuracy=_accuracies(done),
        throughput=latency.throughput,
        best=latency.best,
        layer_times=latency.layer_times,
        findings=latency.findings,
        gpu=latency.gpu,
        engines=[
            engine_figures(name, engine_of(a, name), job.folder) for a in done.engines.artifacts for name in MODELS
        ],
        stages=[artifact.record for artifact in done.all],
        plan=_plan_figures(plan, unsteady(plan, scores, job.dense, compensated.rotated)),
        compensation=_compensation(compensated.report),
        target=_target(job.recipe.plan, done.pruned, latency),
        detection=detection,
        answers=answers(job, done.exported),
        learning=learning(done.tuned),
        measurement=_measurement(job, scores, done.benched, after.top1 is not None, after.images),
        environment=_environment(load_document(done.benched.folder / "environment.json", Environment)),
        reproduce=_reproduce(job),
        notes=[
            *job.notes,
            *how_read(job.dense),
            *_skipped_images(job),
            *([] if compensated.left_out is None else [f"Compensation was left out: {compensated.left_out}"]),
            *left_out(job, done.graphs),
            *done.engines.left_out,
            *_left_out(job, done.engines.artifacts),
        ],
    )


def _paired(accuracy: NetworkAccuracy, labels: Sequence[int]) -> PairedImages | None:
    if not accuracy.labelled or accuracy.lost is None or accuracy.won is None:
        return None
    (_, largest), *_ = Counter(label for label in labels if label >= 0).most_common(1)
    return PairedImages(images=accuracy.labelled, lost=accuracy.lost, won=accuracy.won, largest_class=largest)


def _parities(done: Artifacts) -> list[Parity]:
    folders = [
        done.exported.folder if done.exported else None,
        *(artifact.folder for artifact in done.engines.artifacts),
    ]
    return [
        Parity(
            model=name,
            reference=parity.reference,
            candidate=parity.candidate,
            images=parity.images,
            max_abs=parity.max_abs,
            min_cosine=parity.min_cosine,
            top1_agreement=parity.top1_agreement,
            passed=parity.passed,
        )
        for folder in folders
        if folder is not None
        for name, parity in load_document(folder / "parity.json", Parities).by_model.items()
    ]


def _accuracies(done: Artifacts) -> list[AccuracyFigures]:
    """Accuracy of every engine: its own where it runs here, otherwise that of the graph that it was built from."""
    assert done.benched is not None
    benched = load_document(done.benched.folder / "accuracy.json", EngineAccuracies, strict=False)
    measured = {(a.model, EnginePair(a.runtime, a.precision)): a.accuracy for a in benched.engines}
    records = {name: read_precisions(artifact).by_model for name, artifact in done.graphs.items()}
    figures = []
    for artifact in done.engines.artifacts:
        engine = engine_of(artifact, "pruned")
        pair = EnginePair(engine.runtime, engine.precision)
        by_model = records.get(graph_name(runtime_named(pair.runtime), pair.precision), {})
        for model in MODELS:
            record, of_engine = by_model.get(model), measured.get((model, pair))
            accuracy = of_engine or (record.accuracy if record is not None else None)
            if accuracy is None:
                continue
            figures.append(
                AccuracyFigures(
                    model=model,
                    runtime=pair.runtime,
                    precision=pair.precision,
                    measured_on="the engine" if of_engine is not None else "its graph on ONNX Runtime (CPU)",
                    **({} if record is None else _precision_figures(record, engine_of(artifact, model))),
                    **asdict(accuracy),
                )
            )
    return figures


def _precision_figures(record: PrecisionRecord, engine: Engine) -> dict[str, Any]:
    """How the graph was made. Layers are named where the runtime took the graph as it is."""
    figures: dict[str, Any] = {
        "rest": record.base_precision,
        "kept": list(record.kept),
        "drop_without_search": record.drop_without_search,
        "graphs_tried": record.graphs_tried,
        "in_fp32": list(record.in_fp32) if record.base_precision in HALVES else [],
    }
    if record.calibration is not None:
        figures |= {
            "calibration_images": record.calibration.images,
            "calibration_digest": record.calibration.digest,
            "calibration_method": record.calibration.method,
        }
    listed = len(record.quantized)
    built = listed if engine.built is None else engine.built.planned.get(engine.precision, 0)
    if listed:
        figures["quantized"] = built
    if built == listed or not listed:
        figures |= {"worst_layer": record.worst_layer, "worst_layer_sqnr_db": record.worst_layer_sqnr_db}
    return figures


def _reproduce(job: Job) -> list[str]:
    """Commands that give this result again."""
    version = package_versions().get("upvits-deploy", "")
    # a folder named like an option stays a folder
    run = f"./{job.folder.name}" if job.folder.name.startswith("-") else job.folder.name
    return [
        version_line(version),
        shlex.join(["upvits-deploy", "build", "--recipe", f"{run}/recipe.toml", "--output", f"{run}-again"]),
    ]


def _compensation_record(pruned: Artifact) -> CompensationRecord:
    """What compensation did; an empty record of runs that are older than it."""
    path = pruned.folder / "compensation.json"
    return load_document(path, CompensationRecord, strict=False) if path.exists() else CompensationRecord()


def _compensation(report: CompressionReport | None) -> Compensation | None:
    if report is None:
        return None
    return Compensation(
        images=report.images,
        held_out=report.held_out,
        kl_deleted=report.kl_deleted,
        kl_cut=report.kl_cut,
        kl=report.kl,
        accepted=report.accepted,
        seconds=report.seconds,
        warnings=list(report.warnings),
        layers=len(report.layers),
        refitted=sum(layer.action in ("refit", "bias") for layer in report.layers),
    )


def _target(plan: PlanRecipe, pruned: Artifact, bench: Bench) -> Target | None:
    """The target and how the finished engine meets it in the last measurement: at most 5 % above."""
    if plan.latency is None:
        return None
    record = load_document(pruned.folder / "target.json", LatencyRecord)
    place = (record.runtime, record.precision, record.batch)
    over, searched, measured = record.chosen.over_target, record.chosen, None
    if (pruned_call := _at(bench.pruned, *place)) is not None and (dense_call := _at(bench.dense, *place)) is not None:
        speedup, low, high = (_at(v, *place) for v in (bench.speedup, bench.speedup_low, bench.speedup_high))
        measured = Timing(dense_ms=dense_call.median, ms=pruned_call.median, speedup=speedup, low=low, high=high)
        asked = plan.latency.speedup
        over = pruned_call.median / record.target_ms if asked is None else asked / speedup
    return Target(
        asked=record.asked,
        runtime=record.runtime,
        precision=record.precision,
        batch=record.batch,
        searched=Timing(
            dense_ms=searched.dense_ms,
            ms=searched.measured_ms,
            speedup=searched.speedup,
            low=searched.low,
            high=searched.high,
        ),
        measured=measured,
        met=over <= ALLOWED,
    )


def _at(values: Mapping[str, Mapping[str, Mapping[int, Any]]], runtime: str, precision: str, batch: int) -> Any:
    return values.get(runtime, {}).get(precision, {}).get(batch)


def _plan_figures(plan: PruningPlan, shaky: Mapping[str, Agreement]) -> PlanFigures:
    return PlanFigures(
        asked=plan.requested,
        got={
            "macs_share": round(plan.after.macs / plan.before.macs, 4),
            "params_share": round(plan.after.params / plan.before.params, 4),
        },
        widths=[Width(group=change.group, before=change.before, after=change.after) for change in plan.changes],
        planner=plan.planner,
        blocks={name: list(pairs) for name, pairs in plan.blocks.items()},
        unstable=[
            Stability(group=name, spearman=halves.spearman, overlap=halves.overlap) for name, halves in shaky.items()
        ],
    )


def _measurement(job: Job, score: Scores, benched: Artifact, labelled: bool, images: int) -> Facts:
    recipe = job.recipe
    return {
        "accuracy": f"{'top-1' if labelled else 'agreement with the dense model'} on {images} validation images, "
        "by PyTorch in fp32",
        "scores": f"{score.method} on {score.num_images} training images" if score.num_images else score.method,
        "fine-tuning": f"elsewhere, {recipe.distill.finetuned}"
        if recipe.distill.finetuned
        else f"{recipe.distill.epochs} epochs of {len(job.source.train)} images, batch {recipe.distill.batch_size}",
        "latency": f"all engines in turns, {recipe.bench.rounds} rounds, warm-up {recipe.bench.warmup} calls, "
        f"about {recipe.bench.seconds:g} s per batch size and pair of engines; wall time, host to host",
        "precisions": f"accuracy on at most {recipe.export.accuracy_images} validation images against the fp32 graphs, "
        f"which were held against PyTorch; at most {recipe.precision.max_drop:g} points may be lost",
        "threads": f"of CPU sessions: as many as are 70 % efficient at the middle batch of {recipe.engine.batch.text}",
        "sessions": load_document(benched.folder / "sessions.json", Sessions),
    }


def _environment(read: Environment) -> Environment:
    return read.model_copy(update={"gpu": ", ".join(gpu.name for gpu in read.gpus) or None})


def _skipped_images(job: Job) -> list[str]:
    skipped = job.source.skipped
    return [f"{len(skipped)} unreadable images were skipped: {', '.join(skipped[:5])}"] if skipped else []


def _left_out(job: Job, engines: Sequence[Artifact]) -> list[str]:
    notes = [f"{runtime.name} was left out: {runtime.why} {runtime.fix}" for runtime in job.runtimes.left_out]
    for engine in (engine_of(artifact, "pruned") for artifact in engines):
        missing = runtime_named(engine.runtime).missing_to_run()
        if missing is not None:
            notes.append(f"{engine.runtime} engines were built but not run here: {missing.why} {missing.fix}")
        elif not runs_here(engine):
            targets = ", ".join(engine.targets)
            notes.append(f"{engine.runtime} engines were built for {targets}, and not run here: this GPU is another.")
    return list(dict.fromkeys(notes))
