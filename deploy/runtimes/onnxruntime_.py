"""ONNX Runtime on the CPU, and on NVIDIA GPUs through its CUDA, TensorRT and TensorRT-RTX providers.

The sessions are in `onnxruntime_session.py`. (The trailing underscore keeps the module apart from the library.)
"""

import functools
import importlib.util
import logging
import platform
import re
import shutil
import time
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, TensorProto, helper

from upvits.calib_data.cache import cache_folder
from upvits.calib_data.errors import BuildError, MissingDependencyError, UserError
from upvits.deploy.graphs.files import fits_one_file, keeps_weights_apart, load_model, openable
from upvits.deploy.machine.environment import usable_cores
from upvits.deploy.runtimes import onnxruntime_providers as providers
from upvits.deploy.runtimes.cuda import missing_gpu, missing_to_run_on_gpu
from upvits.deploy.runtimes.engine_folder import (
    build_failed,
    check_built,
    check_request,
    no_targets,
    require,
    runnable_engine,
    save_engine,
)
from upvits.deploy.runtimes.interface import BUILD_RECORD, DEFAULT_RUN, BuildOptions, Built, Engine, Missing, RunOptions
from upvits.deploy.runtimes.onnxruntime_facts import biases_apart, built_of, unsigned_activations
from upvits.deploy.runtimes.onnxruntime_session import (
    LESS_MEMORY,
    OnnxRuntimeSession,
    available_providers,
    library_folder,
    library_version,
    load_errors,
    memory_ran_out,
    missing_libraries,
    optimised_graph,
    reason,
)
from upvits.deploy.runtimes.threads import random_feeds, worthwhile_threads
from upvits.deploy.store.disk import disk_full_error, is_disk_full
from upvits.deploy.store.drafts import scratch_folder

_MODEL = "model.onnx"
_CACHE = "cache"  # folder in an engine folder with what a provider compiled
_LOG = logging.getLogger(__name__)
_SMALLER_BUILD = "Build for a smaller largest batch (--batch 1:8:16), or free memory of the device."
_NOT_OF_PROVIDER = ("provider", "intra_op_threads")


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime with an execution provider. The engine is the ONNX file, and what the provider compiled of it."""

    name: str
    provider: str
    precisions: tuple[str, ...]
    base_precision: str
    has_targets: bool = False

    @property
    def on_cpu(self) -> bool:
        return self.provider == providers.CPU

    @property
    def on_nvidia(self) -> bool:
        return not self.on_cpu

    @property
    def has_batch_profile(self) -> bool:
        return self.provider in (providers.TENSORRT, providers.TENSORRT_RTX)

    @property
    def libraries(self) -> tuple[str, ...]:
        of_provider = {providers.TENSORRT: ("tensorrt",), providers.TENSORRT_RTX: ("tensorrt-rtx",)}
        return ("onnxruntime", "onnxruntime-gpu", *of_provider.get(self.provider, ()))

    def missing_to_build(self) -> Missing | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return Missing("onnxruntime is not installed.", "pip install onnxruntime-gpu")
        return None if self.on_cpu else _missing_provider(self.provider)

    def missing_to_run(self) -> Missing | None:
        return self.missing_to_build() or (None if self.on_cpu else missing_to_run_on_gpu())

    def targets_for(self, precision: str, targets: tuple[str, ...]) -> tuple[str, ...]:
        return no_targets(self, targets)

    def build(self, onnx_path: Path, folder: Path, options: BuildOptions) -> Engine:
        model = check_request(self, onnx_path, folder, options)
        no_targets(self, options.targets)
        started = time.perf_counter()
        with (
            scratch_folder() as work,
            scratch_folder() as weights,
        ):
            source = openable(self._ready(model), weights, apart=keeps_weights_apart(onnx_path))
            opened = self._as_it_will_be_opened(source, weights)
            settings, built = self._compile(onnx_path, model, opened, options, work)
            check_built(built, options, self)
            self._save_cache(work, folder)
            return save_engine(
                self,
                folder,
                _MODEL,
                source,
                options=options,
                targets=(),
                seconds=time.perf_counter() - started,
                library="onnxruntime",
                library_version=library_version(),
                onnx_path=onnx_path,
                settings=settings,
                built=built,
            )

    def _as_it_will_be_opened(self, source: bytes | Path, folder: Path) -> bytes | Path:
        """A file of the engine file's name for providers that keep what they compiled: they find it by that name.

        Source: `TRTGenerateId` of ONNX Runtime, which hashes the file name, or without one the names in the graph.
        """
        if isinstance(source, Path) or not self.has_batch_profile:
            return source
        (folder / _MODEL).write_bytes(source)
        return folder / _MODEL

    def _save_cache(self, work: Path, folder: Path) -> None:
        """Put what the provider compiled into an engine folder, which is none until its record is written."""
        try:
            (folder / BUILD_RECORD).unlink(missing_ok=True)
            shutil.rmtree(folder / _CACHE, ignore_errors=True)
            if any(work.iterdir()):
                shutil.copytree(work, folder / _CACHE)
        except (OSError, shutil.Error) as error:
            if is_disk_full(error):
                raise disk_full_error(folder, f"the {self.name} engine could not be saved") from error
            raise UserError(f"cannot write to {folder}", why=str(error), fix="Choose another folder.") from error

    def _ready(self, model: ModelProto) -> ModelProto:
        """The graph in the form that the provider runs best."""
        if not self.on_cpu:
            return model
        ready = biases_apart(model)
        return unsigned_activations(ready) if platform.machine().lower() in ("x86_64", "amd64") else ready

    def _compile(
        self, onnx_path: Path, model: ModelProto, source: bytes | Path, options: BuildOptions, cache: Path
    ) -> tuple[dict[str, str | int | bool], Built | None]:
        """The engine's settings and what was built of `source`; everything that the provider compiles is in `cache`.

        Raises:
            BuildError: ONNX Runtime refused the model, or left layers to another provider.
        """
        chosen = providers.build_settings(self.provider, model, options)
        settings: dict[str, str | int | bool] = {"provider": self.provider, **chosen}
        try:
            session = OnnxRuntimeSession(
                source,
                self.provider,
                provider_options=chosen | providers.run_settings(self.provider, cache, cuda_graph=False),
            )
            left = session.left_to_cpu()
            if self.provider == providers.TENSORRT_RTX and (feeds := random_feeds(model, options.batch.opt)):
                session.run(feeds)  # compiles the kernels of this batch, for this machine's GPU
            session.close()
            if left:
                why = f"These stay on the CPU: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}."
                raise BuildError(f"{self.name} does not take the whole of {onnx_path.name}", why=why)
            built = built_of(optimised_graph(source, self.provider, chosen), model) if _shows_graph(self) else None
            if self.on_cpu:
                feeds = random_feeds(model, options.batch.opt)
                settings["intra_op_threads"] = worthwhile_threads(
                    lambda count: OnnxRuntimeSession(source, threads=count), feeds, usable_cores()
                )
        except load_errors() as error:
            if memory_ran_out(why := reason(error)):
                what = f"{self.name} ran out of memory while building {onnx_path.name}"
                raise BuildError(what, why=why, fix=_SMALLER_BUILD) from error
            raise build_failed(self, onnx_path, model, why) from error
        return settings, built

    def open(self, folder: Path, options: RunOptions = DEFAULT_RUN) -> "OnnxRuntimeSession":
        engine = runnable_engine(self, folder)
        tuned = engine.threads("intra_op_threads") or None
        stored = {name: str(value) for name, value in engine.settings.items() if name not in _NOT_OF_PROVIDER}
        graph = options.cuda_graph and not self.on_cpu
        cache = self._kept(engine)
        before = providers.compiled_engines(cache)
        try:
            session = OnnxRuntimeSession(
                engine.path,
                self.provider,
                threads=options.threads or tuned,
                provider_options=stored | providers.run_settings(self.provider, cache, cuda_graph=graph),
                cuda_graph=graph,
            )
        except load_errors() as error:
            fix = LESS_MEMORY if memory_ran_out(why := reason(error)) else ""
            raise UserError(f"{self.name} cannot open {engine.path}", why=why, fix=fix) from error
        if before and (anew := providers.compiled_engines(cache) - before):
            _LOG.warning("%s was compiled again instead of being opened: %s", engine.path, ", ".join(sorted(anew)))
        return session

    def _kept(self, engine: Engine) -> Path:
        """Where the provider finds what it compiled, and keeps what it compiles on the way.

        TensorRT's is in the engine folder and complete. Kernels of TensorRT-RTX depend on machine and batch, and
        gather in the user's cache folder, which starts from what the engine folder has.
        """
        built = engine.folder / _CACHE
        if self.provider != providers.TENSORRT_RTX:
            return built
        try:
            kept = cache_folder() / "rtx" / engine.sha256
            if built.is_dir():
                shutil.copytree(built, kept, dirs_exist_ok=True, copy_function=_copy_missing)
            kept.mkdir(parents=True, exist_ok=True)
        except (OSError, shutil.Error, UserError):  # nothing can be written there
            return built
        return kept


def _copy_missing(source: str, target: str) -> None:
    if not Path(target).exists():
        shutil.copyfile(source, target)


def open_onnx(path: Path, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Run any ONNX file on the CPU, as parity checks do.

    Args:
        path: the file.
        threads: threads inside operators; default: the cores that this process may use.

    Raises:
        UserError: ONNX Runtime cannot load the file.
        MissingDependencyError: onnxruntime is not installed.
    """
    model = load_model(path)
    if fits_one_file(model):
        return open_model(model, threads=threads, name=str(path))
    del model  # too large for a buffer: ONNX Runtime reads the checked files itself
    return _open_on_cpu(path, threads, str(path))


def open_model(model: ModelProto, *, threads: int | None = None, name: str = "the model") -> OnnxRuntimeSession:
    """Run a model in memory on the CPU; otherwise as `open_onnx`. `name` is for messages.

    A model above 2 GiB is on the disk, in the folder for temporary files, until the session is closed.

    Raises:
        UserError: also when that disk is full.
    """
    return _open_on_cpu(model.SerializeToString() if fits_one_file(model) else model, threads, name)


def where_judged() -> OnnxRuntime:
    """What computes the graphs that are calibrated and judged: an NVIDIA GPU where there is one, else the CPU."""
    return CPU if CUDA.missing_to_run() is not None else CUDA


def open_judged(model: ModelProto) -> OnnxRuntimeSession:
    """Run a model in memory where `where_judged` says; fp32 is fp32 there, without TF32. Otherwise as `open_model`."""
    runtime = where_judged()
    if not runtime.on_cpu:
        try:
            return _open(model.SerializeToString() if fits_one_file(model) else model, runtime.provider, None)
        except load_errors() as error:  # no reason to stop: the CPU gives the same answers later
            _LOG.info("The GPU does not take this graph (%s); it is judged on the CPU.", reason(error))
    return open_model(model)


class _SessionFromDisk(OnnxRuntimeSession):
    """A session on a model that is too large for a buffer: its files stay until the session is closed."""

    def __init__(self, model: ModelProto, provider: str, threads: int | None, options: dict[str, str]) -> None:
        files = ExitStack()
        self._remove_files = weakref.finalize(self, files.close)
        source = openable(model, files.enter_context(scratch_folder()))
        super().__init__(source, provider, threads=threads, provider_options=options)

    def close(self) -> None:
        super().close()
        self._remove_files()


def _open_on_cpu(model: bytes | Path | ModelProto, threads: int | None, name: str) -> OnnxRuntimeSession:
    require(CPU.missing_to_run(), "ONNX files cannot be run here")
    try:
        return _open(model, providers.CPU, threads)
    except load_errors() as error:
        raise UserError(f"ONNX Runtime cannot load {name}", why=reason(error)) from error


def _open(model: bytes | Path | ModelProto, provider: str, threads: int | None) -> OnnxRuntimeSession:
    options = providers.exact_settings(provider)
    if isinstance(model, ModelProto):
        return _SessionFromDisk(model, provider, threads, options)
    return OnnxRuntimeSession(model, provider, threads=threads, provider_options=options)


# What else the CPU provider takes it does not compute in: on x86 every fp16 operator but LayerNormalization runs
# between casts in fp32 (onnxruntime 1.31), and bf16 and fp8 products are refused.
CPU = OnnxRuntime("onnxruntime", providers.CPU, ("fp32", "int8"), "fp32")
# Its int8 layers would be computed in floating point.
CUDA = OnnxRuntime("onnxruntime-cuda", providers.CUDA, ("fp32", "fp16", "bf16"), "fp16")
TENSORRT = OnnxRuntime("onnxruntime-tensorrt", providers.TENSORRT, ("fp32", "fp16", "bf16", "int8"), "fp16")
TENSORRT_RTX = OnnxRuntime(
    "onnxruntime-tensorrt-rtx", providers.TENSORRT_RTX, ("fp32", "fp16", "bf16", "int8", "fp8"), "fp16"
)


def _shows_graph(runtime: OnnxRuntime) -> bool:
    """Whether the optimised graph can be read: what TensorRT compiled has no ONNX form."""
    return runtime.provider in (providers.CPU, providers.CUDA)


@functools.cache
def _missing_provider(provider: str) -> Missing | None:
    """What a GPU provider lacks. `get_available_providers` lists some on machines without a GPU too, so try it."""
    plugin = provider == providers.TENSORRT_RTX and importlib.util.find_spec(providers.RTX_PLUGIN) is not None
    if provider not in available_providers() and not plugin:
        return _another_package(provider)
    if (missing := missing_gpu()) is not None:
        return missing
    if not plugin and (lacking := missing_libraries()) is not None:
        return Missing(*lacking)
    if provider == providers.TENSORRT:
        library = library_folder() / "capi" / "libonnxruntime_providers_tensorrt.so"
        if (missing := providers.missing_tensorrt(library)) is not None:
            return missing
    shape = [1]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    probe = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        OnnxRuntimeSession(probe.SerializeToString(), provider).close()
    except MissingDependencyError as error:
        return Missing(error.why, error.fix)
    except load_errors() as error:
        return _of_driver(why := reason(error)) or Missing(
            f"The provider does not load: {why}", "See `upvits-deploy doctor`."
        )
    return None


def _of_driver(why: str) -> Missing | None:
    """What is missing when a message is about the driver or the GPU and not about a library; None for other ones."""
    failure = re.search(r"(?:CUDA|CUDNN|CUBLAS) failure (\d+): ([^;]+?) ?;", why)
    if failure is None:
        return None
    said = f"CUDA error {failure[1]}: {failure[2]}."
    return Missing(f"The provider's libraries load, but the driver refuses. {said}", "See what `nvidia-smi` says.")


def _another_package(provider: str) -> Missing:
    """The package of onnxruntime that has a provider."""
    if provider == providers.TENSORRT_RTX:
        return Missing(
            "This onnxruntime has no TensorRT-RTX provider; it comes as a plugin for the package onnxruntime.",
            "pip uninstall onnxruntime-gpu; pip install 'onnxruntime>=1.24' onnxruntime-ep-nv-tensorrt-rtx",
        )
    kind = "TensorRT" if provider == providers.TENSORRT else "CUDA"
    fix = "pip uninstall onnxruntime; pip install onnxruntime-gpu"
    return Missing(f"This build of onnxruntime has no {kind} provider.", fix)
