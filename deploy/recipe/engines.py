"""Which engines a recipe asks for, and where a latency is measured."""

from __future__ import annotations

from collections.abc import Sequence

from upvits.calib_data.errors import UserError
from upvits.deploy.choices import PRECISIONS
from upvits.deploy.recipe.document import Recipe
from upvits.deploy.runtimes import Runtime
from upvits.deploy.speed.deployment import Deployment, check_deployment


def precisions_for(runtime: Runtime, asked: Sequence[str]) -> tuple[str, ...]:
    """Precisions to build: those asked for; by default fp32, bf16 and int8 on CPUs, fp16 and int8 elsewhere."""
    usual = ("fp32", "bf16", "int8") if runtime.on_cpu else ("fp16", "int8")
    names = dict.fromkeys(p for name in asked for p in (usual if name == "auto" else (name,)))
    return tuple(name for name in names if name in runtime.precisions)


def engines_of(recipe: Recipe, runtimes: Sequence[Runtime]) -> tuple[tuple[Runtime, str], ...]:
    """Runtime and precision of every engine that a recipe asks for.

    Raises:
        UserError: the profile leaves out a batch that is to be timed, or no runtime has a precision or a target.
    """
    engine, profile = recipe.engine, recipe.engine.batch
    outside = [batch for batch in recipe.bench.batches if not profile.min <= batch <= profile.max]
    if outside and any(runtime.has_batch_profile for runtime in runtimes):
        raise UserError(
            f"Batch {outside[0]} is to be timed, but engines are built for {profile.min} to {profile.max}.",
            fix="Widen --batch-profile, or time other batches with --bench-batches.",
        )
    _check_precisions(engine.precision, runtimes)
    if engine.targets and not any(runtime.has_targets for runtime in runtimes):
        raise UserError(
            "--targets means nothing to the chosen runtimes.",
            why=f"{', '.join(runtime.name for runtime in runtimes)} build for the machine that they run on.",
            fix="Leave the targets out, or add tensorrt-rtx to --runtime.",
        )
    engines = tuple((runtime, name) for runtime in runtimes for name in precisions_for(runtime, engine.precision))
    for runtime, precision in engines:
        runtime.targets_for(precision, engine.targets if runtime.has_targets else ())
    return engines


def _check_precisions(precisions: Sequence[str], runtimes: Sequence[Runtime]) -> None:
    for name in precisions:
        if not any(precisions_for(runtime, (name,)) for runtime in runtimes):
            available = {p for runtime in runtimes for p in runtime.precisions}
            raise UserError(
                f"No chosen runtime has {name}.",
                why=f"The runtimes are {', '.join(runtime.name for runtime in runtimes)}.",
                fix=f"Choose from {', '.join(p for p in PRECISIONS if p in available)}, or another --runtime.",
            )


def deployment_of(recipe: Recipe, engines: Sequence[tuple[Runtime, str]]) -> Deployment:
    """Where a latency target is measured: by the first engine whose runtime works here, at the first batch size that is
    timed.

    Raises:
        UserError: none of the runtimes works here.
    """
    working = [(r, p) for r, p in engines if r.missing_to_build() is None and r.missing_to_run() is None]
    runtime, precision = (working or engines)[0]
    deployment = Deployment(
        runtime=runtime,
        precision=precision,
        batch=recipe.bench.batches[0],
        profile=recipe.engine.batch,
        opset=recipe.export.opset,
        uint8_input=recipe.export.uint8_input,
        cuda_graph=recipe.bench.cuda_graph,
    )
    check_deployment(deployment)
    return deployment
