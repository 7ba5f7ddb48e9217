"""TensorRT 10 and 11: engines built on, and for, the GPU of this machine.

Not the version is asked for, but whether it has what is called: JetPack 6 has 10.3, and there is no other for it.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upvits.calib_data.errors import UserError
from upvits.calib_data.installation import install_line
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.runtimes.cuda import missing_gpu, missing_to_run_on_gpu
from upvits.deploy.runtimes.engine_folder import check_request, runnable_engine
from upvits.deploy.runtimes.interface import DEFAULT_RUN, BuildOptions, Engine, Missing, RunOptions
from upvits.deploy.runtimes.nvinfer import (
    build_engine,
    check_targets,
    check_version,
    device_here,
    inspect_engine,
)
from upvits.deploy.runtimes.nvinfer_session import NvinferSession

_JETPACK = Path("/etc/nv_tegra_release")
# What came last of what is called, and what older versions had in its place.
_NEEDED = (
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.profiling_verbosity",
    "ICudaEngine.num_io_tensors",
    "ICudaEngine.get_tensor_mode",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "IExecutionContext.execute_async_v3",
)


@dataclass(frozen=True, slots=True)
class TensorRt:
    """Builds and runs on machines with a GPU."""

    name: str = "tensorrt"
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
    base_precision: str = "fp16"
    on_cpu: bool = False
    on_nvidia: bool = True
    has_targets: bool = True
    has_batch_profile: bool = True
    libraries: tuple[str, ...] = ("tensorrt",)

    def missing_to_build(self) -> Missing | None:
        if importlib.util.find_spec("tensorrt") is None:
            return Missing("The package tensorrt is not installed.", _to_install())
        # Before the import: without a driver the library can do nothing anyway.
        return missing_gpu() or _unusable_version()

    def missing_to_run(self) -> Missing | None:
        return self.missing_to_build() or missing_to_run_on_gpu()

    def targets_for(self, precision: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        device = device_here()
        if targets not in ((), (device,)):
            raise UserError(
                f"TensorRT cannot build for {', '.join(targets)} here",
                why=f"It builds for the GPU of this machine, which is {device}.",
                fix="Leave the targets out, or use the runtime tensorrt-rtx, which builds for other GPUs.",
            )
        check_targets(self.name, (precision,), (device,))
        return (device,)

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        model = check_request(self, onnx_path, folder, options)
        import tensorrt as trt

        targets = self.targets_for(options.precision, options.targets)
        facts = GraphFacts(model)
        check_targets(self.name, facts.gemms(), targets)
        return build_engine(
            trt,
            self,
            model,
            onnx_path,
            folder,
            options,
            targets=targets,
            facts=facts,
            read=lambda plan: inspect_engine(trt, plan),
        )

    def open(self, folder: Path, options: RunOptions = DEFAULT_RUN) -> NvinferSession:
        engine = runnable_engine(self, folder)
        import tensorrt as trt

        check_version(engine, trt.__version__)
        return NvinferSession(trt, engine, options)


def _unusable_version() -> Missing | None:
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        return Missing(f"tensorrt is installed but does not load: {error}", f"Install it again: {_to_install()}")
    lacking = [name for name in _NEEDED if not _has(tensorrt, name)]
    if lacking:
        why = f"TensorRT {tensorrt.__version__} does not have {', '.join(lacking)}."
        return Missing(why, _to_install("'tensorrt>=10.9,<12'"))
    return None


def _has(trt: Any, name: str) -> bool:
    kind, member = name.split(".")
    # a library that knows nothing but strongly typed networks needs no flag for them
    gone = member == "STRONGLY_TYPED" and not hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")
    return gone or hasattr(getattr(trt, kind, None), member)


def _to_install(version: str = "") -> str:
    """How to get TensorRT here; on Jetson it comes with the system, for the system's Python alone."""
    if _JETPACK.is_file():
        return (
            "Use the TensorRT of JetPack 6 or later: sudo apt-get install python3-libnvinfer, and an environment of "
            "the system's Python that sees it, made by `python3 -m venv --system-site-packages`"
        )
    line = f"pip install {version}" if version else install_line("tensorrt")
    return f"{line}  (downloads from NVIDIA's own package index, so the network must allow that)"


TENSORRT = TensorRt()
