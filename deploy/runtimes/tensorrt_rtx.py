"""TensorRT for RTX: engines built ahead of time, without a GPU, for several GPU generations at once."""

import difflib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upvits.calib_data.errors import UserError
from upvits.calib_data.installation import install_line
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.machine.gpu import compute_capability
from upvits.deploy.runtimes.cuda import missing_to_run_on_gpu
from upvits.deploy.runtimes.engine_folder import check_request, runnable_engine
from upvits.deploy.runtimes.interface import DEFAULT_RUN, BuildOptions, Engine, Missing, RunOptions
from upvits.deploy.runtimes.nvinfer import (
    build_engine,
    check_targets,
    check_version,
    device_here,
    has_precision,
    refuse_operators,
)
from upvits.deploy.runtimes.nvinfer_session import NvinferSession
from upvits.deploy.runtimes.plan_text import read_plan
from upvits.deploy.runtimes.rtx_kernels import RUNTIME_CACHE
from upvits.deploy.runtimes.threads import random_feeds
from upvits.deploy.store.artifacts import atomic_write

DEFAULT_TARGETS = ("sm86", "sm89", "sm120")
# The parser takes these, the builder does not (1.7).
_NOT_BUILT = {
    "NonMaxSuppression": "TensorRT-RTX has no kernel for it; export boxes and scores, and suppress outside the engine"
}


@dataclass(frozen=True, slots=True)
class TensorRtRtx:
    """Builds on any machine; runs on a GPU that is among the targets."""

    name: str = "tensorrt-rtx"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
    base_precision: str = "fp16"
    on_cpu: bool = False
    on_nvidia: bool = True
    has_targets: bool = True
    has_batch_profile: bool = True
    libraries: tuple[str, ...] = ("tensorrt-rtx",)

    def missing_to_build(self) -> Missing | None:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return Missing("The package tensorrt-rtx is not installed.", install_line("tensorrt-rtx"))
        try:
            import tensorrt_rtx  # noqa: F401
        except (ImportError, OSError) as error:
            return Missing(f"tensorrt-rtx is installed but does not load: {error}", "Reinstall tensorrt-rtx.")
        return None

    def missing_to_run(self) -> Missing | None:
        # Asked before the library is: on a machine without a driver it could only return an empty engine.
        return self.missing_to_build() or missing_to_run_on_gpu()

    def targets_for(self, precision: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        import tensorrt_rtx as trt

        names = tuple(target.lower() for target in targets)
        for target in names:
            _capability(trt, target)
        check_targets(self.name, (precision,), names)
        return names or tuple(t for t in _default_targets(trt) if has_precision(t, precision))

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        model = check_request(self, onnx_path, folder, options)
        import tensorrt_rtx as trt

        targets = self.targets_for(options.precision, options.targets)
        capabilities = [_capability(trt, target) for target in targets]
        facts = GraphFacts(model)
        check_targets(self.name, facts.gemms(), targets)
        _refuse_turing(facts, targets)
        refuse_operators(self, model, onnx_path, _NOT_BUILT)

        def for_targets(config: Any) -> None:
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(capability, index)

        engine = build_engine(
            trt,
            self,
            model,
            onnx_path,
            folder,
            # the timing cache exists in name only: nothing is timed ahead of time
            replace(options, timing_cache=None),
            targets=targets,
            facts=facts,
            read=read_plan,
            configure=for_targets,
        )
        feeds = random_feeds(model, options.batch.opt)
        if feeds is not None and self.missing_to_run() is None and device_here() in targets:
            with self.open(folder) as session:  # compiles the kernels of this batch, for this machine's GPU
                session.run(feeds)
                atomic_write(folder / RUNTIME_CACHE, session.runtime_cache())
        return engine

    def open(self, folder: Path, options: RunOptions = DEFAULT_RUN) -> NvinferSession:
        engine = runnable_engine(self, folder)
        import tensorrt_rtx as trt

        check_version(engine, trt.__version__)
        return NvinferSession(trt, engine, options)


def _default_targets(trt: Any) -> tuple[str, ...]:
    """The usual ones, and this machine's GPU when the library can build for it."""
    capability = compute_capability()
    target = f"sm{capability[0]}{capability[1]}" if capability else ""
    known = bool(target) and hasattr(trt.ComputeCapability, target.upper())
    return (*DEFAULT_TARGETS, target) if known and target not in DEFAULT_TARGETS else DEFAULT_TARGETS


def _capability(trt: Any, target: str) -> Any:
    known = [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    if target.lower() not in known:
        near = difflib.get_close_matches(target.lower(), known, n=1, cutoff=0.5)
        raise UserError(
            f"TensorRT-RTX has no target {target!r}" + (f"; did you mean {near[0]}?" if near else ""),
            why="It builds for GeForce and RTX workstation GPUs, not for data centre GPUs such as the H100 (sm90).",
            fix=f"Targets: {', '.join(known)}.",
        )
    return getattr(trt.ComputeCapability, target.upper())


def _refuse_turing(facts: GraphFacts, targets: tuple[str, ...]) -> None:
    """TensorRT-RTX has no fp32 matrix products for Turing."""
    if "sm75" in targets and "fp32" in facts.gemms():
        raise UserError(
            "tensorrt-rtx cannot build fp32 for sm75",
            why="It has no fp32 matrix products and convolutions for Turing GPUs.",
            fix="Use --precision fp16 or int8, or leave out sm75.",
        )


TENSORRT_RTX = TensorRtRtx()
