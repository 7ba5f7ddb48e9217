"""TensorRT 10.9 to 11.x: engines built on, and for, the GPU of this machine."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from upvits.calib_data.errors import UserError
from upvits.calib_data.installation import install_line
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.runtimes.cuda import missing_gpu
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

_OLDEST = (10, 9)
_TOO_NEW = (12, 0)


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
            return Missing(
                "The package tensorrt is not installed.",
                f"{install_line('tensorrt')}  (its installer downloads from NVIDIA's own package index, "
                "so the network must allow that)",
            )
        # Before the import: without a driver the library can do nothing anyway.
        return missing_gpu() or _unusable_version()

    def missing_to_run(self) -> Missing | None:
        return self.missing_to_build()

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
        return Missing(f"tensorrt is installed but does not load: {error}", "Reinstall tensorrt.")
    version = tuple(int(part) for part in re.findall(r"\d+", tensorrt.__version__)[:2])
    if not _OLDEST <= version < _TOO_NEW:
        return Missing(f"TensorRT {tensorrt.__version__} is not supported.", "pip install 'tensorrt>=10.9,<12'")
    return None


TENSORRT = TensorRt()
