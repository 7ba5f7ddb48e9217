"""What people read and run in a package: examples, requirements, README and model card.

All of it is rendered from the report, the recipe and the records of the engines; no figure is typed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, FunctionLoader, StrictUndefined

from upvits.deploy.handover.triton import Port
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import AGAINST, comparisons, precision_remarks, verdict
from upvits.deploy.runtimes.interface import Engine

_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_CPU, _TENSORRT = "CPUExecutionProvider", "TensorrtExecutionProvider"
# By provider, the package that has it, with the extras that bring the CUDA libraries that it loads.
_PROVIDERS = {
    _CPU: "onnxruntime",
    "CUDAExecutionProvider": "onnxruntime-gpu[cuda,cudnn]",
    _TENSORRT: "onnxruntime-gpu[cuda,cudnn]",
}
_NOT_OPTIONS = ("provider", "intra_op_threads")  # settings of an engine that are no options of its provider
_DOCUMENTS = ("README", "MODEL_CARD")
_MARKUP = re.compile(r"[\\`<>\[\]|]")
_RELEASE = re.compile(r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.?post[0-9]+)?(\.?dev[0-9]+)?")
_ABSOLUTE = re.compile(r"(?:(?<=[\s:'\"(=,])|^)(?:~?(?:/[^\s:'\"),/<>]+){2,}|[A-Za-z]:\\[^\s'\"),<>]+)")


@dataclass(frozen=True, slots=True)
class Subject:
    """What the texts are about.

    Attributes:
        engines: the engines in the package, each with its file relative to the package.
        labels: names of the classes; None for a network without classifier.
        stock_timm: timm alone loads the PyTorch folder.
        triton: names of the models in the Triton repository.
        triton_plan: one of them is a TensorRT engine.
        detector: a detector on this network is in the package.
        transformers: the network is in the layout of transformers, too.
        inexpressible: why it is not, although its weights came in that.
    """

    report: Report
    recipe: dict[str, Any]
    engines: tuple[tuple[Engine, str], ...]
    image: Port
    answer: Port
    labels: tuple[str, ...] | None
    preprocess: dict[str, Any]
    stock_timm: bool
    triton: tuple[str, ...]
    triton_plan: bool
    detector: bool = False
    transformers: bool = False
    inexpressible: str | None = None


@dataclass(frozen=True, slots=True)
class _Example:
    """An example, named after what runs the model: what it is rendered from, and what it needs."""

    name: str
    template: str
    values: dict[str, str | bool]
    requires: tuple[str, ...]

    @property
    def file(self) -> str:
        """The script."""
        return f"run_{self.name}.py"

    @property
    def requirements(self) -> str:
        """The file with the packages that the script needs."""
        return f"requirements/{self.name}.txt"


def example_files(subject: Subject) -> dict[str, str]:
    """A script for each runtime, by file name, and always one for ONNX Runtime, with the fp32 ONNX file if need be."""
    common = {
        "input_name": subject.image.name,
        "output": _Verbatim("features" if subject.labels is None else "logits"),
        "output_name": subject.answer.name,
        "output_dtype": subject.answer.dtype,
        "pixels": subject.image.dtype == "uint8",
        "squash": subject.preprocess["crop_mode"] == "squash",
        "labelled": subject.labels is not None,
    }
    scripts = {
        example.file: _render(example.template, **common, **example.values, file=_Verbatim(example.file))
        for example in _examples(subject)
    }
    return scripts | ({"run_detector.py": _render("run_detector")} if subject.detector else {})


def requirements(subject: Subject) -> dict[str, str]:
    """What each example needs, with the versions that it was made with, by file name."""
    return {example.requirements: "".join(f"{line}\n" for line in example.requires) for example in _examples(subject)}


def readme(subject: Subject) -> str:
    """README.md."""
    return _render("README", subject=subject, examples=_examples(subject), left_out=_triton_left_out(subject))


def model_card(subject: Subject) -> str:
    """MODEL_CARD.md."""
    report = subject.report
    return _render(
        "MODEL_CARD",
        subject=subject,
        report=report,
        verdict=verdict(report),
        against=AGAINST,
        remarks=precision_remarks(report),
        comparisons=comparisons(report),
        recipe=_Verbatim(tomli_w.dumps(subject.recipe)),  # TOML has no line that could end the block of code
        gates_passed=sum(gate.passed for gate in report.parity),
    )


def shortened_paths(run: Path, recipe: Mapping[str, Any], report: Report) -> dict[str, str]:
    """Absolute paths in a run's documents, and the last component of each to show instead."""
    values = [*_strings(recipe), *_strings(report.model_dump(mode="json"))]
    paths = {match.group() for value in values for match in _ABSOLUTE.finditer(value)}
    # a specification such as imagefolder:/data/my photos may hold spaces, which the pattern cannot follow
    whole = [part for value in _strings(recipe) for part in (value, value.partition(":")[2])]
    paths |= {part for part in whole if Path(part).is_absolute()}
    names = {path.rstrip("/\\"): re.split(r"[/\\]", path.rstrip("/\\"))[-1] for path in {*paths, str(run)}}
    return {path: name for path, name in names.items() if name}


def shortened(value: Any, names: Mapping[str, str]) -> Any:
    """JSON values with names in place of paths, in whole parts of paths only: `/d` is none of `/data` and `a/d`."""
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.~</\\-])(?:{longest_first})(?![\w~-]|\.\w)")

    def shorten(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: names[match.group()], value)
        if isinstance(value, Mapping):
            return {key: shorten(item) for key, item in value.items()}
        return [shorten(item) for item in value] if isinstance(value, (list, tuple)) else value

    return shorten(value)


def _examples(subject: Subject) -> list[_Example]:
    drafts = [_example(engine, file) for engine, file in subject.engines]
    examples = [example for example in drafts if example is not None]
    if not any(example.name == "onnxruntime" for example in examples):
        provider: dict[str, str | bool] = {
            "engine": "model/model.onnx",
            "provider": _CPU,
            "on_gpu": False,
            "tensorrt": False,
        }
        needs = _pinned("onnxruntime", _version("onnxruntime") or _version("onnxruntime-gpu"))
        examples.insert(0, _Example("onnxruntime", "onnxruntime", provider, _with_basics(needs)))
    if subject.stock_timm:
        packages = ("torch", "torchvision", "timm", "safetensors", "pillow")
        examples.append(_Example("timm", "timm", {}, tuple(_pinned(name, _version(name)) for name in packages)))
    # several precisions of a runtime that could not be measured: the script is for the first, README says so
    return list({example.name: example for example in reversed(examples)}.values())[::-1]


def _example(engine: Engine, file: str) -> _Example | None:
    """The script for an engine; None for a runtime that is not known here."""
    name = engine.runtime.replace("-", "_")
    if engine.library == "onnxruntime":
        provider = str(engine.settings.get("provider"))
        if provider not in _PROVIDERS:  # a plugin that has to be registered first: no script for that
            return None
        options = {key: str(value) for key, value in engine.settings.items() if key not in _NOT_OPTIONS}
        values: dict[str, str | bool] = {"engine": file, "provider": provider, "options": _python(options)}
        values |= {"on_gpu": provider != _CPU, "tensorrt": provider == _TENSORRT}
        needs = _with_basics(_pinned(_PROVIDERS[provider], engine.library_version))
        if provider == _TENSORRT:  # the version that compiled what is in the cache
            needs = (*needs, _pinned("tensorrt", _version("tensorrt")))
        return _Example(name, "onnxruntime", values, needs)
    if engine.library == "openvino":
        needs = _with_basics(_pinned("openvino", _version("openvino") or engine.library_version.split("-")[0]))
        settings = engine.settings
        if not {"device", "inference_precision"} <= settings.keys():
            return None
        values = {"engine": file, "device": str(settings["device"]), "precision": str(settings["inference_precision"])}
        return _Example(name, "openvino", values, needs)
    if engine.library in _TITLES:
        values = {
            "engine": file,
            "title": _Verbatim(_TITLES[engine.library]),
            "module": _Verbatim(engine.library.replace("-", "_")),
            "refusal": f"This engine is for {', '.join(engine.targets)} and {engine.library} {engine.library_version}.",
        }
        cuda = _pinned("cuda-bindings", _version("cuda-bindings"))
        return _Example(name, "tensorrt", values, _with_basics(_pinned(engine.library, engine.library_version), cuda))
    return None


def _with_basics(*needs: str) -> tuple[str, ...]:
    return (*needs, *(_pinned(name, _version(name)) for name in ("numpy", "pillow")))


def _pinned(package: str, release: str | None) -> str:
    """A line of requirements. Local builds such as +cu130 are in no index; what is no version is left out."""
    public = (release or "").partition("+")[0]
    return f"{package}=={public}" if _RELEASE.fullmatch(public) else package


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _triton_left_out(subject: Subject) -> str | None:
    """Why the Triton repository has no TensorRT model; None when it has one."""
    if subject.triton_plan:
        return None
    libraries = {engine.library for engine, _ in subject.engines}
    if "tensorrt" in libraries:
        return "The TensorRT engine takes no single images, which a server has to be able to send."
    if "tensorrt-rtx" in libraries:
        return "Triton's TensorRT backend runs plans of TensorRT itself; it cannot run those of TensorRT-RTX."
    return "There was no engine of TensorRT, which builds only on the GPU that it builds for."


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, (list, tuple)) else []


class _Verbatim(str):
    """Text that goes into a file as it stands; all other text is quoted for the language of the file."""

    __slots__ = ()


def _python(value: object) -> _Verbatim:
    """Text, or text by name, as a literal of Python; JSON writes both alike."""
    return value if isinstance(value, _Verbatim) else _Verbatim(json.dumps(value, ensure_ascii=False))


def _markdown(value: object) -> object:
    """Text on one line, in which nothing is a link, a cell of a table, code or HTML."""
    if isinstance(value, (_Verbatim, int, float)):
        return value
    return _MARKUP.sub(r"\\\g<0>", "".join(letter if letter.isprintable() else " " for letter in str(value)))


def _render(name: str, **values: object) -> str:
    """A text from its template; every value is quoted for the language of the text."""

    def read(name: str) -> str:
        return files("upvits.deploy").joinpath("templates", "package", name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(read),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_markdown if name in _DOCUMENTS else _python,
    )
    environment.filters["number"] = lambda value: f"{value:,}".replace(",", " ")
    return environment.get_template(f"{name}.jinja").render(**values)
