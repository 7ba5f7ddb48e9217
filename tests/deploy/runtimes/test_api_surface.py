"""The adapter against NVIDIA's own Python bindings of TensorRT 10.3 to 11.x and of TensorRT-RTX."""

import ast
import ctypes
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import upvits.deploy.runtimes.nvinfer
import upvits.deploy.runtimes.tensorrt
from tests.deploy.conftest import Exported
from tests.deploy.runtimes.bindings import RTX, VERSIONS
from tests.deploy.runtimes.fake_trt import FLAVOURS, FUTURE, fake_module, names_of
from upvits.calib_data.errors import BuildError, GateError, MissingDependencyError, UserError
from upvits.deploy.graphs.facts import GraphFacts
from upvits.deploy.precision import convert
from upvits.deploy.runtimes import BatchProfile, BuildOptions, RunOptions, read_engine
from upvits.deploy.runtimes.interface import Engine, Missing
from upvits.deploy.runtimes.nvinfer_session import NvinferSession
from upvits.deploy.runtimes.rtx_kernels import RUNTIME_CACHE, has_rtx_kernels
from upvits.deploy.runtimes.tensorrt import TENSORRT

RUNTIMES = Path(upvits.deploy.runtimes.nvinfer.__file__).parent
PROFILE = BatchProfile(1, 2, 4)

# What variables hold in the adapter's files.
HOLDS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "cache": "ITimingCache",
    "library": "Runtime",
    "cuda_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "kernel_cache": "IRuntimeCache",
    "runtime_config": "IRuntimeConfig",
}


def used_names(file: str) -> tuple[set[str], set[str]]:
    """Names of the library that a file needs, and those that it asks for with hasattr or getattr first."""
    needed, probed = set(), set()
    for node in ast.walk(ast.parse((RUNTIMES / file).read_text())):
        if isinstance(node, ast.Attribute) and (name := _in_library(node)):
            needed.add(name)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            target, asked = node.args[0], node.args[1]
            if not isinstance(asked, ast.Constant):  # a target that the user named, looked up in an enum
                continue
            if (name := _in_library(ast.Attribute(target, str(asked.value), ast.Load()))) is not None:
                probed.add(name)
    # the names that lead to a longer one, such as ILogger.Severity to ILogger.Severity.ERROR
    return {name for name in needed if name not in probed}, probed


def _in_library(node: ast.Attribute) -> str | None:
    root, *rest = ast.unparse(node).removeprefix("self.").removeprefix("_").split(".")
    if not all(part.isidentifier() for part in (root, *rest)) or not rest:
        return None
    if root == "trt":
        return ".".join(rest).removesuffix(".__init__") if rest != ["__version__"] else None
    return f"{HOLDS[root]}.{rest[0]}" if root in HOLDS else None


def test_what_the_adapter_uses_is_found_in_its_sources() -> None:
    needed = used_names("nvinfer.py")[0] | used_names("nvinfer_session.py")[0]
    assert {"Builder.create_network", "ProfilingVerbosity.DETAILED", "IBuilderConfig.profiling_verbosity"} <= needed
    assert {"IExecutionContext.execute_async_v3", "ILogger.Severity.ERROR", "nptype"} <= needed
    assert used_names("nvinfer.py")[1] >= {"BuilderFlag.TF32", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"}


@pytest.mark.parametrize("flavour", VERSIONS)
@pytest.mark.parametrize("file", ["nvinfer.py", "nvinfer_session.py", "tensorrt.py"])
def test_every_name_exists_in_every_version_of_tensorrt(file: str, flavour: str) -> None:
    needed, probed = used_names(file)
    conditional = {"BuilderFlag.TF32"}  # behind its own hasattr
    assert needed - names_of(flavour) - conditional == set()
    assert probed <= set().union(*(names_of(known) for known in (*VERSIONS, RTX)))


@pytest.mark.parametrize("file", ["nvinfer.py", "nvinfer_session.py", "rtx_kernels.py", "tensorrt_rtx.py"])
def test_every_name_exists_in_tensorrt_rtx(file: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for name in sorted(used_names(file)[0]):
        found: Any = trt
        for part in name.split("."):
            assert hasattr(found, part), f"{name} is not in TensorRT-RTX {trt.__version__}"
            found = getattr(found, part)
    assert np.dtype(trt.nptype(trt.DataType.FLOAT)) == np.float32


def test_the_surface_knows_what_changed_between_versions() -> None:
    assert "BuilderFlag.FP16" in names_of("10.9") - names_of("11.4")
    assert "NetworkDefinitionCreationFlag.EXPLICIT_BATCH" in names_of("10.16") - names_of("11.4")
    old, new = fake_module("10.9"), fake_module("11.4")
    assert old.BuilderFlag.FP16.name == "FP16"
    assert int(old.BuilderFlag.VERSION_COMPATIBLE) != int(new.BuilderFlag.VERSION_COMPATIBLE)
    with pytest.raises(AttributeError):
        new.BuilderFlag.FP16  # noqa: B018
    with pytest.raises(TypeError):
        new.Builder()
    with pytest.raises(AttributeError, match="no property"):
        new.Builder(None).workspace = 1
    for version in VERSIONS:
        assert not has_rtx_kernels(fake_module(version))
    assert has_rtx_kernels(fake_module(RTX))


# --- building ---


@pytest.fixture(params=FLAVOURS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A fake library that builds and runs y = 2 x, in the place of the real one."""
    monkeypatch.setenv("UPVITS_DEPLOY_CACHE", str(tmp_path / "user's cache"))
    module = fake_module(request.param)
    module.flavour = request.param
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(upvits.deploy.runtimes.tensorrt, "missing_gpu", lambda: None)
    monkeypatch.setattr(upvits.deploy.runtimes.tensorrt, "_unusable_version", lambda: None)
    monkeypatch.setattr(upvits.deploy.runtimes.nvinfer, "compute_capability", lambda: (8, 9))
    module.plan = b"the plan"
    _let_it_build(module)
    _let_it_run(module)
    return module


def _let_it_build(trt: Any) -> None:
    def network(builder: Any, flags: int) -> Any:
        made = trt.INetworkDefinition()
        made.num_inputs = 1
        return made

    def tensor(network: Any, index: int) -> Any:
        made = trt.ITensor()
        made.name, made.shape = "images", (-1, 3, 32, 32)
        return made

    def cache(config: Any, content: bytes) -> Any:
        if content not in (b"", b"timings"):
            raise RuntimeError("bad cache")
        return trt.ITimingCache()

    trt.behaviour |= {
        "Builder.create_network": network,
        "Builder.create_builder_config": lambda builder: trt.IBuilderConfig(),
        "Builder.create_optimization_profile": lambda builder: trt.IOptimizationProfile(),
        "Builder.build_serialized_network": lambda *arguments: trt.plan,
        "INetworkDefinition.get_input": tensor,
        "OnnxParser.parse": lambda parser, model, path=None: True,
        "IBuilderConfig.create_timing_cache": cache,
        "IBuilderConfig.set_timing_cache": lambda config, made, ignore: True,
        "IBuilderConfig.get_timing_cache": lambda config: trt.ITimingCache(),
        "ITimingCache.serialize": lambda cache: b"timings",
    }


def _let_it_run(trt: Any) -> None:
    names = ("images", "logits")
    trt.shapes, trt.addresses = {}, {}

    def engine(library: Any, content: bytes) -> Any:
        made = trt.ICudaEngine()
        made.num_io_tensors = 2
        if "ICudaEngine.device_memory_size_v2" in names_of(trt.flavour):
            made.device_memory_size_v2 = 4096
        return made if bytes(content) == b"the plan" else None

    def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> bool:
        trt.shapes[name] = tuple(shape)
        return 1 <= shape[0] <= 4

    def execute(context: Any, stream: int) -> bool:
        source, target = (ctypes.cast(trt.addresses[name], ctypes.POINTER(ctypes.c_float)) for name in names)
        for index in range(int(np.prod(trt.shapes["images"]))):
            target[index] = 2 * source[index]
        profiler = getattr(context, "profiler", None)
        if profiler is not None:
            profiler.report_layer_time("product_myl0_1", 0.25)
            profiler.report_layer_time("unknown", 0.5)
        return True

    trt.behaviour |= {
        "Runtime.deserialize_cuda_engine": engine,
        "ICudaEngine.create_execution_context": lambda engine, strategy=None: trt.IExecutionContext(),
        "ICudaEngine.create_engine_inspector": lambda engine: trt.EngineInspector(),
        "ICudaEngine.get_tensor_name": lambda engine, index: names[index],
        "ICudaEngine.get_tensor_mode": lambda engine, name: trt.TensorIOMode[("INPUT", "OUTPUT")[names.index(name)]],
        "ICudaEngine.get_tensor_dtype": lambda engine, name: trt.DataType.FLOAT,
        "IExecutionContext.set_input_shape": set_shape,
        "IExecutionContext.get_tensor_shape": lambda context, name: trt.shapes["images"],
        "IExecutionContext.set_tensor_address": lambda context, name, address: trt.addresses.update({name: address}),
        "IExecutionContext.execute_async_v3": execute,
        "EngineInspector.get_engine_information": lambda inspector, form: inspected(trt, {"product": "int8"}),
        "nptype": lambda kind: np.float32,
        "ICudaEngine.create_runtime_config": lambda engine: trt.IRuntimeConfig(),
        "IRuntimeConfig.create_runtime_cache": lambda config: trt.IRuntimeCache(),
        "IRuntimeConfig.set_runtime_cache": lambda config, cache: True,
        "IRuntimeCache.deserialize": lambda cache, blob: blob.startswith(b"kernels"),
        "IRuntimeCache.serialize": lambda cache: b"kernels",
        "IExecutionContext.is_stream_capturable": lambda context, stream: True,
    }


def inspected(trt: Any, products: dict[str, str], attention: tuple[str, ...] = ()) -> str:
    """What this version's inspector says about an engine with these products."""
    said = {"fp32": "Float", "fp16": "Half", "int8": "Int8", "bf16": "BFloat16", "fp8": "FP8"}

    def tensor(precision: str) -> dict[str, object]:
        kinds = (
            {"Format/Datatype": said[precision]}
            if trt.flavour.startswith("10")
            else {"Format": "Row major linear", "DataType": said[precision]}
        )
        return {"Name": "t", "Dimensions": [2, 8], **kinds}

    def layer(name: str, kind: str, precision: str) -> dict[str, object]:
        ends = {"Inputs": [tensor(precision)], "Outputs": [tensor("fp16")]}
        return {"Name": f"{name}_myl0_1", "LayerType": kind, "Metadata": f"[ONNX Layer: {name}]", **ends}

    layers = [layer(name, "gemm", precision) for name, precision in products.items()]
    for name in attention:
        layers.append({**layer(name, "kgen", "fp16"), "Name": "_gemm_mha_v2_myl0_2"})
    io = {"Bindings": ["images"]} if trt.flavour.startswith("10") else {"I/O Tensors": [{"Name": "images"}]}
    return json.dumps({"Layers": layers, **io})


@pytest.fixture(scope="module")
def fp16_vit(vit: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16") / "fp16.onnx"
    onnx.save(convert(onnx.load(vit.report.path), "fp16").model, path)
    return path


def test_building_calls_what_every_version_has(trt: Any, fp16_vit: Path, tmp_path: Path) -> None:
    facts = GraphFacts(onnx.load(fp16_vit))
    trt.behaviour["EngineInspector.get_engine_information"] = lambda inspector, form: inspected(
        trt, facts.gemm_nodes(), facts.attention_nodes()
    )
    cache = tmp_path / "caches" / "timing.cache"
    options = BuildOptions("fp16", PROFILE, workspace_mib=64, timing_cache=cache, require_fused_attention=True)
    engine = TENSORRT.build(fp16_vit, tmp_path / "engine", options)
    assert engine.path.read_bytes() == b"the plan"
    assert engine.targets == ("sm89",)
    assert engine.built is not None
    assert engine.built.source == "engine inspector"
    assert engine.built.gemms == engine.built.planned == {"fp16": 10}
    assert engine.built.attention_fused == engine.built.attention_blocks == 2
    assert engine.built.memory_bytes == (None if trt.flavour == FUTURE else 4096)
    assert cache.read_bytes() == b"timings"

    calls = dict(trt.calls)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    assert calls["Builder.create_network"] == (0 if strongly_typed is None else 1 << int(strongly_typed),)
    assert calls["IBuilderConfig.profiling_verbosity ="] == (trt.ProfilingVerbosity.DETAILED,)
    assert calls["IBuilderConfig.set_memory_pool_limit"] == (trt.MemoryPoolType.WORKSPACE, 64 << 20)
    assert calls["IOptimizationProfile.set_shape"] == ("images", (1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))
    assert ("IBuilderConfig.clear_flag" in calls) == (trt.flavour != FUTURE)
    order = [name for name, _ in trt.calls]
    assert order.index("IBuilderConfig.set_timing_cache") < order.index("Builder.build_serialized_network")
    assert "IBuilderConfig.set_flag" not in calls


def test_a_build_that_did_less_than_planned_is_refused(trt: Any, fp16_vit: Path, tmp_path: Path) -> None:
    planned = GraphFacts(onnx.load(fp16_vit)).gemm_nodes()
    first = next(iter(planned))
    trt.behaviour["EngineInspector.get_engine_information"] = lambda inspector, form: inspected(
        trt, {**planned, first: "fp32"}
    )
    with pytest.raises(GateError, match="built 9 of 10 fp16") as refusal:
        TENSORRT.build(fp16_vit, tmp_path / "engine", BuildOptions("fp16", PROFILE))
    assert "1 in fp32" in refusal.value.why
    assert not (tmp_path / "engine").exists()


def test_layers_that_cannot_be_read_do_not_stop_a_build(trt: Any, fp16_vit: Path, tmp_path: Path) -> None:
    for unreadable in ("", "{}", '{"Layers": ["names", "only"]}', '{"Layers": 3}'):
        trt.behaviour["EngineInspector.get_engine_information"] = lambda inspector, form, said=unreadable: said
        assert TENSORRT.build(fp16_vit, tmp_path / "engine", BuildOptions("fp16", PROFILE)).built is None


@pytest.mark.parametrize("content", [b"broken", b"timings"])
def test_a_timing_cache_is_read_or_ignored(trt: Any, content: bytes, fp16_vit: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(content)
    TENSORRT.build(fp16_vit, tmp_path / "engine", BuildOptions("fp16", PROFILE, timing_cache=cache))
    given = [arguments[0] for name, arguments in trt.calls if name == "IBuilderConfig.create_timing_cache"]
    assert given == ([b"timings"] if content == b"timings" else [b"broken", b""])
    assert cache.read_bytes() == b"timings"


def test_all_refused_nodes_are_named_with_their_reason(trt: Any, fp16_vit: Path, tmp_path: Path) -> None:
    refused = [("one", "Frob", "no plugin"), ("two", "Bernoulli", "false")]

    def parse(parser: Any, model: bytes, path: str | None = None) -> bool:
        parser.num_errors = len(refused)
        return False

    def error(parser: Any, index: int) -> Any:
        name, operator, reason = refused[index]
        trt.behaviour |= {
            "ParserError.node_name": lambda error: name,
            "ParserError.node_operator": lambda error: operator,
            "ParserError.desc": lambda error: reason,
        }
        return trt.ParserError()

    trt.behaviour |= {"OnnxParser.parse": parse, "OnnxParser.get_error": error}
    with pytest.raises(BuildError, match="node one") as failure:
        TENSORRT.build(fp16_vit, tmp_path / "engine", BuildOptions("fp16", PROFILE))
    assert failure.value.exit_code == 5
    assert "two" in failure.value.what
    assert failure.value.why.splitlines()[0].endswith("no plugin")
    assert "does not have it" in failure.value.why.splitlines()[1]


def test_out_of_gpu_memory_says_which_setting_helps(trt: Any, fp16_vit: Path, tmp_path: Path) -> None:
    def build(builder: Any, network: Any, config: Any) -> None:
        upvits.deploy.runtimes.nvinfer.messages(trt).log(trt.ILogger.Severity.ERROR, "Cuda Runtime (out of memory)")

    trt.behaviour["Builder.build_serialized_network"] = build
    with pytest.raises(BuildError, match="out of GPU memory") as failure:
        TENSORRT.build(fp16_vit, tmp_path / "engine", BuildOptions("fp16", PROFILE))
    assert "--workspace" in failure.value.fix
    assert "--batch" in failure.value.fix


@pytest.mark.parametrize(
    "text", ["Skipping tactic 0x01 due to insufficient memory", "Detected layernorm nodes in FP16"]
)
def test_what_the_builder_warns_of_is_kept(
    trt: Any, text: str, fp16_vit: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build(builder: Any, network: Any, config: Any) -> bytes:
        log = upvits.deploy.runtimes.nvinfer.messages(trt)
        for said in (text, text, "x" * 5000, *(f"other {number}" for number in range(200))):
            log.log(trt.ILogger.Severity.WARNING, said)
        log.log(trt.ILogger.Severity.INFO, "only news")
        return b"the plan"

    trt.behaviour["Builder.build_serialized_network"] = build
    trt.behaviour["EngineInspector.get_engine_information"] = lambda inspector, form: ""
    TENSORRT.build(fp16_vit, tmp_path / "engine", BuildOptions("fp16", PROFILE))
    warnings = read_engine(tmp_path / "engine").warnings
    assert warnings[0] == text
    assert (len(warnings), len(set(warnings)), max(map(len, warnings))) == (50, 50, 500)
    assert "only news" not in warnings
    said = "1 kernels were not tried for fp16.onnx" in caplog.text
    assert said == ("tactic" in text)


# --- running ---


class FakeEvent:
    """Time passes by one millisecond with every event."""

    clock = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, later: "FakeEvent") -> float:
        return float(later.at - self.at)


@pytest.fixture
def host_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda on the CPU; records replays and synchronizations."""
    happened: list[str] = []

    class Stream:
        cuda_stream = 77

        def __init__(self, gpu: int) -> None:
            assert gpu == 0

        def synchronize(self) -> None:
            happened.append("synchronize")

    class Graph:
        def replay(self) -> None:
            happened.append("replay")

    @contextmanager
    def inside(*arguments: Any, **named: Any) -> Any:
        yield

    @contextmanager
    def capture(graph: Graph, *, stream: Stream) -> Any:
        happened.append("capture")
        yield

    empty = torch.empty

    def on_host(shape: Any, *, dtype: Any, device: str = "cpu", pin_memory: bool = False) -> torch.Tensor:
        return empty(shape, dtype=dtype)

    for name, value in {
        "Stream": Stream, "stream": inside, "Event": FakeEvent, "CUDAGraph": Graph, "graph": capture,
        "get_device_name": lambda index: "Fake GPU",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", on_host)
    return happened


def engine_in(folder: Path, *targets: str) -> Engine:
    (folder / "engine.plan").write_bytes(b"the plan")
    return Engine(
        folder=folder, runtime="tensorrt", precision="fp16", targets=targets, file="engine.plan", bytes=8, seconds=1.0,
        sha256="", library="tensorrt", library_version="10.9.1", onnx_sha256="", batch=PROFILE, settings={},
    )  # fmt: skip


def images(batch: int) -> dict[str, Any]:
    return {"images": np.random.default_rng(batch).normal(size=(batch, 3, 2, 2)).astype(np.float32)}


def test_running_and_timing_call_what_every_version_has(trt: Any, host_only: list[str], tmp_path: Path) -> None:
    with NvinferSession(trt, engine_in(tmp_path, "sm89")) as session:
        assert (session.input_names, session.output_names) == (("images",), ("logits",))
        assert session.settings == {"device": "Fake GPU", "cuda_graph": False, "first_run_ms": 0}
        for batch in (1, 4, 1):
            np.testing.assert_array_equal(session.run(images(batch))["logits"], 2 * images(batch)["images"])
        bound = [arguments for name, arguments in trt.calls if name == "IExecutionContext.set_tensor_address"]
        session.run(images(1))
        times = session.time(images(1), 5)
        assert bound == [arguments for name, arguments in trt.calls if name == "IExecutionContext.set_tensor_address"]
        assert [arguments for name, arguments in trt.calls if name == "IExecutionContext.execute_async_v3"][-1] == (77,)
    for stage in (times.h2d, times.compute, times.d2h):
        assert stage is not None
        np.testing.assert_allclose(stage, np.full(5, 1e-3))
    assert times.total.shape == (5,)
    assert times.enqueue is not None
    assert (times.total > times.enqueue).all()
    assert (times.enqueue > 0).all()
    with pytest.raises(ValueError, match="closed"):
        session.run(images(1))


def test_a_cuda_graph_is_recorded_once_and_replayed(trt: Any, host_only: list[str], tmp_path: Path) -> None:
    with NvinferSession(trt, engine_in(tmp_path, "sm89"), RunOptions(cuda_graph=True)) as session:
        session.time(images(2), 3)
        session.time(images(2), 3)
        called = [name for name, _ in trt.calls].count("IExecutionContext.execute_async_v3")
        if trt.flavour == RTX:  # records by itself
            assert (called, "capture" in host_only, "replay" in host_only) == (1 + 6, False, False)
            return
        assert host_only.count("capture") == 1
        assert host_only.count("replay") == 6
        assert called == 2  # once to set up, once to record
        session.run(images(3))
    assert host_only.count("capture") == 2  # another shape, another graph


def test_a_plan_of_another_gpu_model_is_opened_and_the_library_s_warning_shown(
    trt: Any, host_only: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "Using an engine plan file across different models of devices is not recommended"

    def engine(library: Any, content: bytes) -> Any:
        upvits.deploy.runtimes.nvinfer.messages(trt).log(trt.ILogger.Severity.WARNING, warning)
        return opened(library, content)

    opened = trt.behaviour["Runtime.deserialize_cuda_engine"]
    trt.behaviour["Runtime.deserialize_cuda_engine"] = engine
    NvinferSession(trt, engine_in(tmp_path, "sm89")).close()
    assert [record.levelname for record in caplog.records if warning in record.getMessage()] == ["WARNING"]


@pytest.fixture
def rtx(trt: Any, host_only: list[str]) -> Any:
    if trt.flavour != RTX:
        pytest.skip("compiles nothing when it runs")
    return trt


def test_rtx_compiles_for_the_shape_before_it_is_timed_and_records_by_itself(rtx: Any, tmp_path: Path) -> None:
    for cuda_graph in (False, True):
        rtx.calls.clear()
        with NvinferSession(rtx, engine_in(tmp_path, "sm89"), RunOptions(cuda_graph=cuda_graph)) as session:
            session.time(images(2), 3)
            assert "first_run_ms" in session.settings
        calls = dict(rtx.calls)
        strategy = calls["IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy ="]
        assert strategy == (rtx.DynamicShapesKernelSpecializationStrategy.EAGER,)
        recorded = calls.get("IRuntimeConfig.cuda_graph_strategy =")
        assert recorded == ((rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,) if cuda_graph else None)
        (context,) = (given for name, given in rtx.calls if name == "ICudaEngine.create_execution_context")
        assert isinstance(context[0], rtx.IRuntimeConfig)


def test_rtx_that_cannot_record_says_so(rtx: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rtx.behaviour["IExecutionContext.is_stream_capturable"] = lambda context, stream: False
    NvinferSession(rtx, engine_in(tmp_path, "sm89")).run(images(1))
    assert "without a CUDA graph" not in caplog.text
    NvinferSession(rtx, engine_in(tmp_path, "sm89"), RunOptions(cuda_graph=True)).run(images(1))
    assert "without a CUDA graph" in caplog.text


def test_kernels_that_rtx_compiled_are_kept_and_found_again(rtx: Any, tmp_path: Path) -> None:
    def asked() -> list[bytes]:
        return [given[0] for name, given in rtx.calls if name == "IRuntimeCache.deserialize"]

    engine = engine_in(tmp_path, "sm89")
    with NvinferSession(rtx, engine) as session:
        session.run(images(1))
        assert session.runtime_cache() == b"kernels"
    (kept,) = (tmp_path / "user's cache").rglob("*.cache")
    assert (kept.read_bytes(), asked()) == (b"kernels", [])
    with NvinferSession(rtx, engine):
        assert asked() == [b"kernels"]
    rtx.calls.clear()
    kept.write_bytes(b"of another driver")  # which the library refuses
    (tmp_path / RUNTIME_CACHE).write_bytes(b"kernels that came with the engine")
    with NvinferSession(rtx, engine):
        assert asked() == [b"of another driver", b"kernels that came with the engine"]
    assert kept.read_bytes() == b"kernels"


def test_layer_times_are_medians_with_what_the_inspector_knows(trt: Any, host_only: list[str], tmp_path: Path) -> None:
    with NvinferSession(trt, engine_in(tmp_path, "sm89")) as session:
        found = session.layer_times(images(2), 3)
        assert np.isfinite(session.time(images(2), 1).total).all()
    if trt.flavour == FUTURE:  # a library without a profiler
        assert found == ()
        return
    product, unknown = found
    assert (product.name, product.op, product.ms, product.precision) == ("product", "MatMul", 0.25, "int8")
    assert product.bytes == 16 * 1 + 16 * 2
    assert (unknown.name, unknown.ms, unknown.bytes) == ("unknown", 0.5, None)


def test_a_batch_outside_the_profile_is_refused(trt: Any, host_only: list[str], tmp_path: Path) -> None:
    session = NvinferSession(trt, engine_in(tmp_path, "sm89"))
    with pytest.raises(UserError, match="does not take images of shape") as refusal:
        session.run(images(5))
    assert "1 to 4" in refusal.value.why


def test_memory_that_runs_out_while_running_says_what_helps(
    trt: Any, host_only: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = NvinferSession(trt, engine_in(tmp_path, "sm89"))

    def full(*arguments: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match="GPU memory ran out") as refusal:
        session.run(images(1))
    assert "fewer streams" in refusal.value.fix


def test_an_engine_that_fails_says_what_the_library_said(trt: Any, host_only: list[str], tmp_path: Path) -> None:
    def fail(context: Any, stream: int) -> bool:
        upvits.deploy.runtimes.nvinfer.messages(trt).log(trt.ILogger.Severity.ERROR, "illegal something")
        return False

    session = NvinferSession(trt, engine_in(tmp_path, "sm89"))
    trt.behaviour["IExecutionContext.execute_async_v3"] = fail
    with pytest.raises(UserError, match="illegal something"):
        session.run(images(1))


def test_an_engine_of_another_gpu_or_version_is_refused(trt: Any, host_only: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"built for sm86\n.*is sm89"):
        NvinferSession(trt, engine_in(tmp_path, "sm86"))
    engine = engine_in(tmp_path, "sm89")
    engine.path.write_bytes(b"another plan")
    with pytest.raises(UserError, match="cannot open"):
        NvinferSession(trt, engine)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Missing | None]:
    """What is said of a module in the place of TensorRT."""

    def ask(module: Any) -> Missing | None:
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(upvits.deploy.runtimes.tensorrt, "missing_gpu", lambda: None)
        return TENSORRT.missing_to_build()

    return ask


@pytest.mark.parametrize("flavour", [*VERSIONS, FUTURE])
def test_every_version_that_has_what_is_called_is_used(flavour: str, probed: Callable[[Any], Missing | None]) -> None:
    assert probed(fake_module(flavour)) is None


def test_a_version_that_lacks_something_is_refused_with_a_way_out(
    probed: Callable[[Any], Missing | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = fake_module("10.3")
    del old.NetworkDefinitionCreationFlag._member_map_["STRONGLY_TYPED"]
    type.__delattr__(old.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    del old.IExecutionContext.execute_async_v3
    missing = probed(old)
    assert missing is not None
    assert "STRONGLY_TYPED, IExecutionContext.execute_async_v3" in missing.why
    assert missing.fix.startswith("pip install 'tensorrt>=10.9,<12'")
    with pytest.raises(MissingDependencyError, match="does not have"):
        TENSORRT.build(Path("model.onnx"), Path("nowhere"), BuildOptions())
    jetson = tmp_path / "nv_tegra_release"
    jetson.write_text("# R36 (release), REVISION: 4.3")
    monkeypatch.setattr(upvits.deploy.runtimes.tensorrt, "_JETPACK", jetson)
    on_jetson = probed(old)
    assert on_jetson is not None
    assert "pip install" not in on_jetson.fix
    assert "python3-libnvinfer" in on_jetson.fix
