"""The hand-over: a folder with everything that a pruned model needs to run, and nothing of this tool.

It is made of what lies in a finished run: whole artifacts and the report. The folder is put together under a hidden
name beside its place and renamed when it is whole; a folder that this did not make is never touched.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from upvits.calib_data.errors import UserError
from upvits.calib_data.progress import watched
from upvits.deploy.choices import BatchProfile
from upvits.deploy.handover.texts import (
    Subject,
    example_files,
    model_card,
    readme,
    requirements,
    shorten,
    shortened_paths,
)
from upvits.deploy.handover.triton import Port, ports, write_repository
from upvits.deploy.report.document import REPORT, Report, load_report
from upvits.deploy.runtimes.engine_folder import read_engine
from upvits.deploy.runtimes.interface import Engine
from upvits.deploy.store.artifacts import Artifact, disk_errors, file_digest, open_artifact, package_versions
from upvits.deploy.store.run_dir import read_recipe

PACKAGE = "package.json"
SUMS = "SHA256SUMS"
MODEL_FOLDER, ONNX_FOLDER, DETECTOR_FOLDER = "3-distill", "4-export", "7-detect/pruned"


class PackagedEngine(BaseModel):
    """One engine of the package: `file` is relative to it; `targets` is empty where any device will do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtime: str
    precision: str
    targets: tuple[str, ...]
    library: str
    library_version: str
    file: str


class PackageDocument(BaseModel):
    """`package.json`: what is in the folder, for programs; README.md says it to people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    made_by: str
    model: str
    onnx: str
    pytorch: str
    stock_timm: bool
    engines: tuple[PackagedEngine, ...]
    triton: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a run has to offer for hand-over.

    Attributes:
        onnx_files: the pruned network in fp32, and the files of its external data.
        network: its model folder.
        config: `config.json` of that.
        engines: the engines to hand over, and by engine the stage that made it.
        detector: ONNX file of a detector on the pruned network, where one was trained.
    """

    report: Report
    recipe: dict[str, Any]
    onnx_files: tuple[Path, ...]
    network: Path
    config: dict[str, Any]
    image: Port
    answer: Port
    labels: tuple[str, ...] | None
    preprocess: dict[str, Any]
    engines: tuple[tuple[Engine, Artifact], ...]
    detector: Path | None

    @property
    def stock_timm(self) -> bool:
        """Whether timm alone rebuilds the network: timm's arguments can express its widths."""
        return "upvits" not in self.config

    @property
    def triton_plan(self) -> Engine | None:
        """The TensorRT engine that Triton can serve: one that takes single images."""
        plans = (engine for engine, _ in self.engines if engine.runtime == "tensorrt" and engine.batch.min == 1)
        return next(plans, None)


def package(run: Path | str, out: Path | str | None = None, *, quiet: bool = True) -> Path:
    """Write the hand-over folder of a finished run.

    Handed over are the pruned network as ONNX and PyTorch, and of its engines the best one of every runtime that was
    measured, and all of those for devices that were not at hand.

    Args:
        run: a run directory with its report.
        out: the folder to write; default: beside the run, named `<run>-package`. A package that was made here before
            and not changed since is replaced.
        quiet: no progress bar.

    Returns:
        The folder.

    Raises:
        UserError: the run is not finished or damaged, or the folder holds something else.

    Example:
        >>> import upvits
        >>> try:
        ...     upvits.package("runs/not-finished")  # of a finished run: runs/not-finished-package
        ... except upvits.UserError as error:
        ...     print(error.exit_code)
        2
    """
    run = Path(run).resolve()
    out = run.with_name(f"{run.name}-package") if out is None else Path(out).absolute()
    parts = _collect(run)
    _refuse_foreign(out)
    with disk_errors(out.parent, "package"):
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.work-", dir=out.parent))
        try:
            draft.chmod(0o755)
            _write(draft, run, parts)
            _write_sums(draft, quiet=quiet)
            _put_in_place(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return out


def _collect(run: Path) -> _Parts:
    """Find and check everything, before anything is written."""
    recipe, report = read_recipe(run), load_report(run)
    exported, tuned = _artifact(run, ONNX_FOLDER), _artifact(run, MODEL_FOLDER)
    onnx_files = tuple(
        exported.folder / path for path in exported.manifest.files if Path(path).is_relative_to("pruned")
    )
    model_path = exported.folder / "pruned" / "model.onnx"
    network = tuned.folder / "model"
    if model_path not in onnx_files or "model/config.json" not in tuned.manifest.files:
        raise _incomplete(run, "the pruned network is missing")
    graph = onnx.load(model_path, load_external_data=False)
    image, answer = ports(graph)
    config = json.loads((network / "config.json").read_text(encoding="utf-8"))
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    return _Parts(
        report=report,
        recipe=recipe,
        onnx_files=onnx_files,
        network=network,
        config=config,
        image=image,
        answer=answer,
        labels=_labels(metadata, config, answer),
        preprocess=_preprocess(run, metadata, image),
        engines=tuple(_engines(run, report)),
        detector=_detector(run, tuned),
    )


def _detector(run: Path, tuned: Artifact) -> Path | None:
    """The detector that was trained on this very network."""
    detector = open_artifact(run / DETECTOR_FOLDER)
    if detector is None or detector.manifest.inputs.get("backbone") != tuned.digest:
        return None
    return detector.folder / "model.onnx" if "model.onnx" in detector.manifest.files else None


def _artifact(run: Path, name: str) -> Artifact:
    artifact = open_artifact(run / name)
    if artifact is None:
        raise _incomplete(run, f"{name} is missing, or a file in it was changed")
    return artifact


def _incomplete(run: Path, what: str) -> UserError:
    return UserError(
        f"{run} is not a whole run: {what}.",
        why="A package is made of what a finished run left behind.",
        fix="Run `upvits-deploy build` with this folder as --output: it continues and makes what is missing.",
    )


def _engines(run: Path, report: Report) -> list[tuple[Engine, Artifact]]:
    best = {choice.runtime: choice.precision for choice in report.best}
    engines = []
    for figures in report.engines:
        measured = figures.runtime in report.pruned.latency_ms
        chosen = best.get(figures.runtime) == figures.precision if measured else True
        if figures.model != "pruned" or not chosen:
            continue
        folder = (run / figures.path).parent
        if not folder.resolve().is_relative_to(run):
            raise UserError(f"{REPORT} names an engine outside of the run: {figures.path}.")
        artifact = _artifact(run, folder.parent.relative_to(run).as_posix())
        engines.append((read_engine(folder), artifact))
    return engines


def _labels(metadata: Mapping[str, str], config: Mapping[str, Any], answer: Port) -> tuple[str, ...] | None:
    """Names of the classes in the order of the outputs, or numbers; None for a network without classifier."""
    if not config.get("num_classes"):
        return None
    names = json.loads(metadata["labels"]) if "labels" in metadata else config.get("label_names")
    if names is None or len(names) != answer.dims[-1]:
        names = [f"class {index}" for index in range(answer.dims[-1])]
    return tuple(" ".join(str(name).split()) for name in names)


def _preprocess(run: Path, metadata: Mapping[str, str], image: Port) -> dict[str, Any]:
    """`preprocess.json`: how a picture becomes the input, with all sizes in pixels; from the ONNX file's metadata."""
    try:
        _, height, width = json.loads(metadata["input_size"])
        mean, std, crop_pct = (json.loads(metadata[name]) for name in ("mean", "std", "crop_pct"))
        crop_mode, interpolation = metadata["crop_mode"], metadata["interpolation"]
    except (KeyError, ValueError) as error:
        raise _incomplete(run, f"the ONNX file does not say how pictures are prepared ({error})") from error
    if height != width or crop_mode not in ("center", "squash") or crop_pct > 1:
        raise UserError(
            f"the model takes pictures of {width} x {height} pixels, cropped as {crop_mode!r} to {crop_pct:g}",
            why="The examples of a package know square pictures, cropped as 'center' or 'squash' to 1 at most.",
            fix="Hand over the run's ONNX file and engines, and prepare pictures with timm.",
        )
    raw = image.dtype == "uint8"
    return {
        "input": image.name,
        "dtype": image.dtype,
        "layout": "NHWC" if raw else "NCHW",
        "normalised": "inside the model" if raw else "before the model: (pixel / 255 - mean) / std",
        "size": height,
        "resize": math.floor(height / crop_pct),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }


def _write(folder: Path, run: Path, parts: _Parts) -> None:
    names = shortened_paths(run, parts.recipe, parts.report)
    (folder / "model").mkdir()
    for file in parts.onnx_files:
        shutil.copyfile(file, folder / "model" / file.name)
    shutil.copytree(parts.network, folder / "pytorch")
    if parts.detector is not None:
        (folder / "detector").mkdir()
        shutil.copyfile(parts.detector, folder / "detector" / "model.onnx")
    engines = [_copy_engine(folder, engine, artifact, names) for engine, artifact in parts.engines]
    report = run / "report.html"
    if report.is_file():
        _write_text(folder / "report.html", shorten(report.read_text(encoding="utf-8"), names))
    _write_text(folder / REPORT, shorten((run / REPORT).read_text(encoding="utf-8"), names))
    _write_text(folder / "preprocess.json", json.dumps(parts.preprocess, indent=2) + "\n")
    if parts.labels is not None:
        _write_text(folder / "labels.json", json.dumps(parts.labels, indent=2) + "\n")
    triton = _write_triton(folder / "triton", parts)
    document = PackageDocument(
        made_by=f"upvits-deploy {package_versions().get('upvits-deploy', '')}".strip(),
        model=parts.report.model,
        onnx="model/model.onnx",
        pytorch="pytorch",
        stock_timm=parts.stock_timm,
        engines=tuple(engines),
        triton=tuple(triton),
    )
    _write_text(folder / PACKAGE, document.model_dump_json(indent=2) + "\n")
    subject = Subject(
        report=parts.report,
        recipe=parts.recipe,
        engines=tuple((engine, packed.file) for (engine, _), packed in zip(parts.engines, engines, strict=True)),
        image=parts.image,
        answer=parts.answer,
        labels=parts.labels,
        preprocess=parts.preprocess,
        stock_timm=parts.stock_timm,
        triton=tuple(triton),
        triton_plan=parts.triton_plan is not None,
        has_report=report.is_file(),
        detector=parts.detector is not None,
    )
    for name, text in {
        **example_files(subject),
        **requirements(subject),
        "README.md": readme(subject),
        "MODEL_CARD.md": shorten(model_card(subject), names),
    }.items():
        _write_text(folder / name, text)


def _copy_engine(folder: Path, engine: Engine, artifact: Artifact, names: Mapping[str, str]) -> PackagedEngine:
    """Copy an engine folder as its stage listed it; the engine file itself was checked when it was read."""
    place = Path("engines") / f"{engine.runtime}-{engine.precision}"
    (folder / place).mkdir(parents=True)
    inside = engine.folder.relative_to(artifact.folder)
    for path in artifact.manifest.files:
        if not Path(path).is_relative_to(inside):
            continue
        target = folder / place / Path(path).relative_to(inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".json":
            _write_text(target, shorten((artifact.folder / path).read_text(encoding="utf-8"), names))
        else:
            shutil.copyfile(artifact.folder / path, target)
    return PackagedEngine(
        runtime=engine.runtime,
        precision=engine.precision,
        targets=engine.targets,
        library=engine.library,
        library_version=engine.library_version,
        file=(place / engine.path.name).as_posix(),
    )


def _write_triton(folder: Path, parts: _Parts) -> list[str]:
    batch = parts.engines[0][0].batch if parts.engines else BatchProfile()
    image, answer, labels = parts.image, parts.answer, parts.labels
    int8 = (e for e, _ in parts.engines if (e.runtime, e.precision) == ("onnxruntime", "int8"))
    return write_repository(
        folder,
        parts.report.model,
        parts.onnx_files,
        parts.triton_plan,
        image,
        answer,
        batch,
        labels,
        cpu_int8=next(int8, None),
    )


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_sums(folder: Path, *, quiet: bool) -> None:
    """SHA256SUMS as `sha256sum -c` reads it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [
        f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in watched(files, "package", quiet=quiet)
    ]
    _write_text(folder / SUMS, "".join(lines))


def _refuse_foreign(out: Path) -> None:
    """A folder may be replaced when it is empty, or holds a package in which nothing was changed or added."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or _is_untouched(out):
        return
    raise UserError(
        f"{out} exists and is not a package that was left as it was made.",
        why="Writing there could overwrite something of yours.",
        fix="Choose an empty or new folder with -o, or move this one away.",
    )


def _is_untouched(folder: Path) -> bool:
    try:
        PackageDocument.model_validate_json((folder / PACKAGE).read_bytes())
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError, ValidationError):
        return False
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {SUMS}
    return present == set(sums) and all(file_digest(folder / path) == digest for path, digest in sums.items())


def _put_in_place(draft: Path, out: Path) -> None:
    if not out.exists():
        os.rename(draft, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, old / "package")
    os.rename(draft, out)
    shutil.rmtree(old)
