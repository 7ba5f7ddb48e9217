"""The hand-over: a folder with everything that a pruned model needs to run, and nothing of this tool.

It is made of what lies in a finished run: whole artifacts and the report. The folder is put together under a hidden
name beside its place and renamed when it is whole; a folder that this did not make is never touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from upvits.calib_data.documents import parse_json, read_document, read_regular
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.paths import copy_regular, path_inside, write_new
from upvits.calib_data.progress import watched
from upvits.deploy.choices import BatchProfile
from upvits.deploy.graphs.files import load_model
from upvits.deploy.graphs.metadata import labels_said, preprocess_said
from upvits.deploy.handover.document import PACKAGE, PackagedEngine, PackageDocument
from upvits.deploy.handover.placing import draft_of, put_in_place
from upvits.deploy.handover.texts import (
    Subject,
    example_files,
    model_card,
    readme,
    requirements,
    shortened,
    shortened_paths,
)
from upvits.deploy.handover.triton import Port, ports, write_repository
from upvits.deploy.report.document import REPORT, Report, load_report
from upvits.deploy.report.views import html
from upvits.deploy.runtimes.engine_folder import read_engine
from upvits.deploy.runtimes.interface import Engine
from upvits.deploy.store.artifacts import Artifact, file_digest, open_artifact, package_versions
from upvits.deploy.store.disk import disk_errors, unwritable_error
from upvits.deploy.store.run_dir import RECIPE, read_recipe
from upvits.toolchain.networks.config_document import ModelConfig, read_config
from upvits.toolchain.networks.models import load, save

SUMS = "SHA256SUMS"
MODEL_FOLDER, ONNX_FOLDER, ENGINES_FOLDER, DETECTOR_FOLDER = "3-distill", "4-export", "5-engine", "7-detect/pruned"
_MOST_CLASSES = 1_000_000
_BUILD = "Run `upvits-deploy build` again without the folder that this file is in: it is made again."


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a run has to offer for hand-over.

    Attributes:
        report: without absolute paths, as the recipe.
        names: what is written in place of such paths.
        onnx_files: the pruned network in fp32, and the files of its external data.
        network: the files of its model folder.
        config: `config.json` of that.
        engines: the engines to hand over, and by engine the stage that made it.
        detector: ONNX file of a detector on the pruned network, where one was trained.
    """

    report: Report
    recipe: dict[str, Any]
    names: Mapping[str, str]
    onnx_files: tuple[Path, ...]
    network: tuple[Path, ...]
    config: ModelConfig
    image: Port
    answer: Port
    labels: tuple[str, ...] | None
    preprocess: dict[str, Any]
    engines: tuple[tuple[Engine, Artifact], ...]
    detector: Path | None

    @property
    def stock_timm(self) -> bool:
        """Whether timm alone rebuilds the network: timm's arguments can express its widths."""
        return self.config.upvits is None

    @property
    def triton_plan(self) -> Engine | None:
        """The TensorRT engine that Triton can serve: one that takes single images."""
        plans = (engine for engine, _ in self.engines if engine.runtime == "tensorrt" and engine.batch.min == 1)
        return next(plans, None)


def package(run: Path | str, out: Path | str | None = None, *, quiet: bool = True) -> Path:
    """Write the hand-over folder of a finished run.

    Handed over are the pruned network as ONNX and PyTorch (where its weights came as a folder of transformers and its
    widths allow it, in that layout, too), and of its engines the best one of every runtime that was
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
    run = user_path(run).resolve()
    parts = _collect(run)
    out = run.with_name(f"{run.name}-package") if out is None else Path(out).absolute()
    _refuse_foreign(out)
    with disk_errors(out.parent, "package"), draft_of(out) as draft:
        _write(draft, parts)
        _write_sums(draft, quiet=quiet)
        put_in_place(draft, out)
    return out


def _collect(run: Path) -> _Parts:
    """Find and check everything, before anything is written."""
    for name in (RECIPE, REPORT):
        path_inside(run, name)
    recipe, report = read_recipe(run), _without_pictures(load_report(run))
    names = shortened_paths(run, recipe, report)
    exported, tuned = _artifact(run, ONNX_FOLDER), _artifact(run, MODEL_FOLDER)
    onnx_files, network = _files(exported, "pruned"), _files(tuned, "model")
    model_path = exported.folder / "pruned" / "model.onnx"
    if model_path not in onnx_files or tuned.folder / "model" / "config.json" not in network:
        raise _incomplete(run, "the pruned network is missing")
    graph = load_model(model_path)
    image, answer = ports(graph)
    config = read_config(tuned.folder / "model")
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    return _Parts(
        report=Report.model_validate(shortened(report.model_dump(mode="json"), names)),
        recipe=shortened(recipe, names),
        names=names,
        onnx_files=onnx_files,
        network=network,
        config=config,
        image=image,
        answer=answer,
        labels=_labels(run, metadata, config, answer),
        preprocess=_preprocess(run, metadata, image),
        engines=tuple(_engines(run, report)),
        detector=_detector(run, tuned),
    )


def _without_pictures(report: Report) -> Report:
    """The report without images of the validation set: a package goes to others."""
    if report.answers is None:
        return report
    return report.model_copy(update={"answers": report.answers.model_copy(update={"samples": []})})


def _files(artifact: Artifact, folder: str) -> tuple[Path, ...]:
    """Files that the manifest lists in a folder of the artifact; those in folders below are none that this made."""
    paths = (PurePosixPath(path) for path in artifact.manifest.files)
    return tuple(artifact.folder / path for path in paths if path.parent == PurePosixPath(folder))


def _detector(run: Path, tuned: Artifact) -> Path | None:
    """The detector that was trained on this very network."""
    detector = open_artifact(path_inside(run, DETECTOR_FOLDER))
    if detector is None or detector.manifest.inputs.get("backbone") != tuned.digest:
        return None
    return detector.folder / "model.onnx" if "model.onnx" in detector.manifest.files else None


def _artifact(run: Path, name: str) -> Artifact:
    artifact = open_artifact(path_inside(run, name))
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
    engines: dict[tuple[str, str], tuple[Engine, Artifact]] = {}
    for figures in report.engines:
        measured = figures.runtime in report.pruned.latency_ms
        chosen = best.get(figures.runtime) == figures.precision if measured else True
        if figures.model != "pruned" or not chosen:
            continue
        stage = PurePosixPath(figures.path).parent.parent
        if stage.parent != PurePosixPath(ENGINES_FOLDER):
            raise _incomplete(run, f"{REPORT} names an engine that is none of it, {figures.path!r}")
        artifact = _artifact(run, stage.as_posix())
        engine = read_engine(path_inside(run, figures.path).parent)
        pair = (engine.runtime, engine.precision)
        if pair != (figures.runtime, figures.precision) or pair in engines:
            raise _incomplete(run, f"{figures.path} is another engine than {REPORT} says")
        engines[pair] = (engine, artifact)
    return list(engines.values())


def _labels(run: Path, metadata: Mapping[str, str], config: ModelConfig, answer: Port) -> tuple[str, ...] | None:
    """Names of the classes in the order of the outputs, or numbers; None for a network without classifier."""
    if not config.num_classes:
        return None
    classes = answer.dims[-1] if answer.dims else 0
    if not 0 < classes <= _MOST_CLASSES:
        raise _incomplete(run, f"its ONNX file has {classes} classes")
    names = labels_said(metadata, f"the ONNX file of {run}") or config.label_names
    if names is None or len(names) != classes:
        names = tuple(f"class {index}" for index in range(classes))
    return tuple(" ".join(name.split()) for name in names)


def _preprocess(run: Path, metadata: Mapping[str, str], image: Port) -> dict[str, Any]:
    """`preprocess.json`: how a picture becomes the input, with all sizes in pixels; from the ONNX file's metadata."""
    told = preprocess_said(metadata, f"the ONNX file of {run}")
    _, height, width = told.input_size
    if height != width or told.crop_mode not in ("center", "squash") or told.crop_pct > 1:
        raise UserError(
            f"the model takes pictures of {width} x {height} pixels, cropped as {told.crop_mode!r} to "
            f"{told.crop_pct:g}",
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
        "resize": math.floor(height / told.crop_pct),
        "crop_pct": told.crop_pct,
        "crop_mode": told.crop_mode,
        "interpolation": told.interpolation,
        "mean": list(told.mean),
        "std": list(told.std),
    }


def _write(folder: Path, parts: _Parts) -> None:
    for place, files in (("model", parts.onnx_files), ("pytorch", parts.network)):
        for file in files:
            copy_regular(file, folder / place / file.name)
    transformers, inexpressible = _write_transformers(folder, parts)
    if parts.detector is not None:
        copy_regular(parts.detector, folder / "detector" / "model.onnx")
    engines = [_copy_engine(folder, engine, artifact, parts.names) for engine, artifact in parts.engines]
    write_new(folder / "report.html", html(parts.report))  # made anew: the run's file may come from anywhere
    write_new(folder / REPORT, parts.report.model_dump_json(indent=2) + "\n")
    write_new(folder / "preprocess.json", json.dumps(parts.preprocess, indent=2) + "\n")
    if parts.labels is not None:
        write_new(folder / "labels.json", json.dumps(parts.labels, indent=2) + "\n")
    triton = _write_triton(folder / "triton", parts)
    document = PackageDocument(
        made_by=f"upvits-deploy {package_versions().get('upvits-deploy', '')}".strip(),
        model=parts.report.model,
        onnx="model/model.onnx",
        pytorch="pytorch",
        stock_timm=parts.stock_timm,
        transformers=transformers,
        engines=tuple(engines),
        triton=tuple(triton),
    )
    write_new(folder / PACKAGE, document.model_dump_json(indent=2) + "\n")
    subject = Subject(
        report=parts.report,
        recipe=parts.recipe,
        engines=tuple((engine, packed.file) for (engine, _), packed in zip(parts.engines, engines, strict=True)),
        image=parts.image,
        answer=parts.answer,
        labels=parts.labels,
        preprocess=parts.preprocess,
        stock_timm=parts.stock_timm,
        transformers=transformers is not None,
        inexpressible=inexpressible,
        triton=tuple(triton),
        triton_plan=parts.triton_plan is not None,
        detector=parts.detector is not None,
    )
    for name, text in {
        **example_files(subject),
        **requirements(subject),
        "README.md": readme(subject),
        "MODEL_CARD.md": model_card(subject),
    }.items():
        write_new(folder / name, text)


def _write_transformers(folder: Path, parts: _Parts) -> tuple[str | None, str | None]:
    """The network in the layout of transformers, where its weights came in that: where it is, or why it is not."""
    if parts.config.layout != "transformers":
        return None, None
    try:
        save(load(parts.network[0].parent), folder / "transformers", layout="transformers")
    except UserError as error:
        return None, error.what
    return "transformers", None


def _copy_engine(folder: Path, engine: Engine, artifact: Artifact, names: Mapping[str, str]) -> PackagedEngine:
    """Copy an engine folder as its stage listed it; the engine file itself was checked when it was read."""
    place = Path("engines") / f"{engine.runtime}-{engine.precision}"
    inside = engine.folder.relative_to(artifact.folder)
    for path in artifact.manifest.files:
        if not Path(path).is_relative_to(inside):
            continue
        target = folder / place / Path(path).relative_to(inside)
        if target.suffix == ".json":
            values = parse_json(read_regular(artifact.folder / path, fix=_BUILD), path, fix=_BUILD)
            write_new(target, json.dumps(shortened(values, names), indent=2) + "\n")
        else:
            copy_regular(artifact.folder / path, target)
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


def _write_sums(folder: Path, *, quiet: bool) -> None:
    """SHA256SUMS as `sha256sum -c` reads it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [
        f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in watched(files, "package", quiet=quiet)
    ]
    write_new(folder / SUMS, "".join(lines))


def _refuse_foreign(out: Path) -> None:
    """A folder may be replaced when it is empty, or holds a package in which nothing was changed or added."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())) or _is_untouched(out):
            return
    except OSError as error:  # the name is too long, or the folder not ours to read
        raise unwritable_error(out, error) from error
    raise UserError(
        f"{out} exists and is not a package that was left as it was made.",
        why="Writing there could overwrite something of yours.",
        fix="Choose an empty or new folder with -o, or move this one away.",
    )


def _is_untouched(folder: Path) -> bool:
    try:
        read_document(folder / PACKAGE, PackageDocument, fix="")
        lines = read_regular(folder / SUMS, fix="").decode().splitlines()
        sums = {path: digest for digest, path in (line.split("  ", 1) for line in lines)}
    except (UserError, ValueError):
        return False
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not all(path.is_file() and not path.is_symlink() for path in files):
        return False
    present = {path.relative_to(folder).as_posix() for path in files} - {SUMS}
    return present == set(sums) and all(file_digest(folder / path) == digest for path, digest in sums.items())
