"""`upvits-deploy inspect`: what weights are, in which ways they can be read, and the command that prunes them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import timm
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from upvits.calib_data import DataSource, Preprocess, batches, open_data
from upvits.calib_data.choices import Order
from upvits.calib_data.classes import is_ambiguous, with_order
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.loading import NORMALISATIONS, SIZES
from upvits.calib_data.printable import printable
from upvits.deploy.handover.document import PACKAGE
from upvits.deploy.store.run_dir import RECIPE
from upvits.toolchain.families import family_of, groups_of
from upvits.toolchain.networks.catalogue import architectures
from upvits.toolchain.networks.config_document import has_config
from upvits.toolchain.networks.explain import described, first_reading, looks_like, nearest, of_another_kind
from upvits.toolchain.networks.found import Found, found_in
from upvits.toolchain.networks.models import create_model, label_names_of, load, preprocess_of
from upvits.toolchain.networks.said import said_in
from upvits.toolchain.networks.transformers_config import is_transformers
from upvits.toolchain.networks.weight_files import read_weights, some
from upvits.toolchain.structure.macs import count_params
from upvits.toolchain.structure.timm_config import architecture_of, num_classes_of
from upvits.toolchain.training.evaluate import evaluate

_IMAGES = 64
_Change = tuple[str, tuple[str, ...], dict[str, Any]]
"""Its name, the options of `build` for it, and what changes: entries of the preprocessing, or arguments."""

_CLEAR = 15.0
"""So many points below the best reading is about as good: few images are judged, and what weights say counts more."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReadingFigure(_Document):
    """The accuracy of the network in one reading: percent of `images` labelled images.

    Attributes:
        reading: what differs from the weights as they were read; "as found" for nothing.
        options: what `build` has to be told for it.
    """

    reading: str
    options: tuple[str, ...]
    top1: float
    images: int


class Inspection(_Document):
    """What was found.

    Attributes:
        architecture: timm's name; `alike` are others with the same tensors.
        parameters: how many.
        classes: of the head; `class_names` whether the weights name them.
        image: height and width in pixels; None where the weights do not tell.
        preprocess: mean, std, interpolation and crop, by name.
        sources: where the entries of `image` and `preprocess` come from.
        notes: how the weights were read: prefixes, heads, tensors that are left out.
        recorded_top1: percent, as the checkpoint says.
        readings: accuracy on some images, the best first; empty without labelled data.
        remarks: what could not be told.
        command: to prune it; empty where no name of timm's fits, which a remark says.
    """

    format_version: Literal[1] = 1
    weights: str
    architecture: str
    family: str
    alike: tuple[str, ...]
    parameters: int
    classes: int
    class_names: bool
    image: tuple[int, int] | None
    preprocess: dict[str, str | float | tuple[float, ...]]
    sources: dict[str, str]
    notes: tuple[str, ...]
    recorded_top1: float | None
    readings: tuple[ReadingFigure, ...]
    remarks: tuple[str, ...]
    command: str


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A network; `build` makes it with other arguments. `size_is_a_guess` where nothing tells the size of images.
    `name` is what `build` calls it, where that is not its architecture; empty where timm has no network of its size.
    """

    model: nn.Module
    build: Callable[..., nn.Module]
    alike: tuple[str, ...] = ()
    size_is_a_guess: bool = False
    name: str | None = None


def inspect(weights: str, data: str | None = None, *, quiet: bool = True) -> Inspection:
    """Say what weights are; nothing is written.

    Args:
        weights: a checkpoint file, an index of shards, or a model folder.
        data: labelled images to tell readings apart with, as `open_data` takes them.

    Raises:
        UserError: it holds no network that can be pruned; says what it looks like and what stands in the way.
    """
    path = user_path(weights.removeprefix("local-dir:"))
    _refuse_others(weights, path)
    loaded = _from_folder(path) if path.is_dir() and has_config(path) else _from_file(path)
    model, found = loaded.model, found_in(loaded.model)
    preprocess = preprocess_of(model)
    remarks = []
    if loaded.size_is_a_guess:
        size = preprocess.input_size[1]
        remarks.append(f"Nothing tells the size of its images. {size} is timm's; give the real one as --image-size.")
    if loaded.name == "":
        remarks.append(f'timm has no network of its size: load it in Python, upvits.load("{weights}"), and save it.')
    figures: tuple[ReadingFigure, ...] = ()
    if data is not None:
        source = open_data(data, class_names=label_names_of(model), quiet=quiet)
        why = _not_comparable(source, num_classes_of(model))
        remarks += [why] if why else []
        figures = () if why else _figures(loaded, source, preprocess)
    family = family_of(model).__name__.rpartition(".")[2]
    return Inspection(
        weights=weights,
        architecture=architecture_of(model),
        family=family,
        alike=loaded.alike,
        parameters=count_params(model),
        classes=num_classes_of(model),
        class_names=label_names_of(model) is not None,
        image=None if loaded.size_is_a_guess else preprocess.input_size[1:],
        preprocess={
            "mean": preprocess.mean, "std": preprocess.std, "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct, "crop_mode": preprocess.crop_mode,
        },
        sources=dict(found.sources),
        notes=found.notes,
        recorded_top1=found.accuracy,
        readings=figures,
        remarks=tuple(remarks),
        command=_command(loaded, weights, data, figures),
    )  # fmt: skip


_OTHERS = {
    RECIPE: ("a run", "`upvits-deploy report` shows it, and `upvits-deploy predict` what its networks see."),
    PACKAGE: ("a package", "`upvits-deploy predict` shows what its network sees; its README says what is in it."),
    "detector.json": ("a detector's folder", "`upvits-deploy detect eval` judges it."),
}
"""What folders of this tool hold, by the file that tells them."""


def _refuse_others(weights: str, path: Path) -> None:
    """Raises UserError for what is no weights on this machine, with the command that takes it."""
    if re.match(r"[a-z0-9]+://", weights):
        raise UserError(
            f"{weights} is an address.",
            why="Nothing is fetched from the network.",
            fix="Download the file, and give its path.",
        )
    hub = re.match(r"(?:hf[-_]hub:)?timm/([\w.-]+)$", weights)
    if hub and not path.exists():
        raise UserError(
            f"{weights} is not on this machine.",
            why="It is a name on the hub, and what is there is read from files.",
            fix=f"`upvits-deploy build --model {hub[1]} --weights timm` fetches it.",
        )
    for name, (what, fix) in _OTHERS.items():
        if path.is_dir() and (path / name).is_file() and not has_config(path):
            raise UserError(f"{path} is {what}, not the weights of a network.", fix=fix)


def _from_folder(folder: Path) -> _Loaded:
    model = load(folder)
    family_of(model)
    if is_transformers(folder):
        alike = _of_the_same_size(model)
        return _Loaded(model, partial(load, folder), alike[1:], name=alike[0] if alike else "")
    return _Loaded(model, partial(create_model, architecture_of(model), weights=str(folder)))


def _of_the_same_size(model: nn.Module) -> tuple[str, ...]:
    """The architectures that `build` takes a folder of transformers for: those with its family, widths and depths."""
    family = family_of(model)
    widths = [group.size for group in groups_of(model) if group.kind == "embed"]
    size = widths, [*family.block_lists(model).values()]
    patch = getattr(model.get_submodule("patch_embed"), "patch_size", (0,))[0]
    found = [
        one.name
        for one in architectures()
        if one.family == family.__name__.rpartition(".")[2]
        and size == tuple([v] if isinstance(v, int) else [*v] for v in (one.embed_dim, one.depth))
    ]
    return tuple(sorted(found, key=lambda name: f"patch{patch}" not in name))


def _from_file(path: Path) -> _Loaded:
    weights = read_weights(path)
    other = of_another_kind(weights)
    if other is not None:
        raise other
    reading = first_reading(weights)
    if reading is None:
        names = [name for state in weights.states.values() for name in state]
        kind = looks_like(names)
        raise UserError(
            f"{path} holds no network that can be pruned.",
            why=f"It looks like {kind}." if kind else f"Its tensors are of no layout that is known: {some(names)}.",
            fix="Give weights of a ViT or PVTv2; `upvits-deploy models` lists what can be pruned.",
        )
    said = said_in(weights.beside).architecture
    exact = [name for name, fit in nearest(reading, most=8) if fit.exact]
    names = list(dict.fromkeys([*([said] if said else []), *exact]))
    if not names:
        near = nearest(reading, most=1)
        if near:
            create_model(near[0][0], weights=str(path))  # says what differs
        raise UserError(
            f"{path} fits none of timm's architectures.",
            why=f"It holds {described(reading.state)}.",
            fix="Build it in Python and save it with `upvits.save`.",
        )
    base = names[0].partition(".")[0]
    alike = tuple(name for name in exact if name != base)
    build = partial(create_model, names[0], weights=str(path))
    try:
        return _Loaded(build(), build, alike)
    except UserError as error:
        size = int(timm.get_pretrained_cfg(names[0]).input_size[-1])
        with suppress(UserError):
            return _Loaded(build(image_size=size), build, alike, size_is_a_guess=True)
        raise error from None


def _not_comparable(source: DataSource, classes: int) -> str:
    """Why no accuracy can be given; empty where one can."""
    if source.class_names is None:
        return f"{source.spec} has no labels, so that accuracy cannot be measured."
    if len(source.class_names) != classes:
        return f"{source.spec} has {len(source.class_names)} classes, the network {classes}: they do not fit."
    return ""


def _figures(loaded: _Loaded, source: DataSource, preprocess: Preprocess) -> tuple[ReadingFigure, ...]:
    """Order of classes, what the weights leave open of the network, size where nothing tells it, normalisation: each
    beside the best of what came before.

    The first figure of the result is the best one; among equals, the one that needs the fewest options.
    """
    orders = {order: with_order(source, order) for order in get_args(Order)} if is_ambiguous(source) else {}
    start = f"{preprocess.input_size[1]} pixels" if loaded.size_is_a_guess else "as found"
    read = [
        _figure(loaded.model, one, preprocess, f"classes in {order} order", ("--class-order", order))
        for order, one in orders.items()
    ] or [_figure(loaded.model, source, preprocess, start, ())]
    best = max(read, key=lambda figure: figure.top1)
    source = next((one for order, one in orders.items() if order in best.options), source)
    model, size = loaded.model, preprocess.input_size[1:]
    kept: dict[str, Any] = {"image_size": size, "model_args": {}}
    for name, options, change in _untold(found_in(loaded.model)):
        asked = {**kept, **change, "model_args": kept["model_args"] | change.get("model_args", {})}
        network = loaded.build(**asked)
        resized = replace(preprocess, input_size=preprocess_of(network).input_size)
        read.append(_figure(network, source, resized, name, (*best.options, *options)))
        if read[-1].top1 > best.top1:
            best, model, preprocess, kept = read[-1], network, resized, asked
    for others in (_sizes(preprocess) if loaded.size_is_a_guess else [], _normalisations(preprocess)):
        before = best
        for name, options, change in others:
            other = replace(preprocess, **change)
            read.append(_figure(model, source, other, name, (*before.options, *options)))
            if read[-1].top1 > best.top1:
                best, chosen = read[-1], other
        preprocess = preprocess if best is before else chosen
    return tuple(sorted(read, key=lambda figure: (-figure.top1, len(figure.options))))


def _untold(found: Found) -> Iterator[_Change]:
    """What the weights leave open of the network, as arguments of `create_model`."""
    for name, values in found.untold.items():
        for value in values[1:]:
            yield f"{name}={value}", ("--model-arg", f"{name}={value}"), {"model_args": {name: value}}
    for height, width in found.other_sizes:
        text = f"{height}x{width}"
        yield f"{height} x {width} pixels", ("--image-size", text), {"image_size": (height, width)}


def _sizes(preprocess: Preprocess) -> Iterator[_Change]:
    channels, height, width = preprocess.input_size
    for size in SIZES:
        if (size, size) != (height, width):
            yield f"{size} pixels", ("--image-size", str(size)), {"input_size": (channels, size, size)}


def _normalisations(preprocess: Preprocess) -> Iterator[_Change]:
    for name, (mean, std) in NORMALISATIONS.items() if preprocess.input_size[0] == 3 else ():
        if (mean, std) != (preprocess.mean, preprocess.std):
            options = ("--mean", ",".join(map(str, mean)), "--std", ",".join(map(str, std)))
            yield name, options, {"mean": mean, "std": std}


def _figure(
    model: nn.Module, source: DataSource, preprocess: Preprocess, name: str, options: Sequence[str]
) -> ReadingFigure:
    images = source.val.spread(_IMAGES)
    judged = evaluate(model, batches(images, preprocess, _IMAGES))
    return ReadingFigure(reading=name, options=tuple(options), top1=judged.top1 or 0.0, images=judged.images)


def _command(loaded: _Loaded, weights: str, data: str | None, figures: Sequence[ReadingFigure]) -> str:
    """The command, with the options of the simplest among the readings that are about as good as the best one."""
    name = architecture_of(loaded.model) if loaded.name is None else loaded.name
    if not name:
        return ""
    parts = ["upvits-deploy", "build", "--model", name, "--weights", weights]
    parts += ["--data", data or "imagefolder:FOLDER", "--ratio", "0.5"]
    options: tuple[str, ...] = ()
    if figures:
        good = [one for one in figures if one.top1 >= figures[0].top1 - _CLEAR]
        best = min(good, key=lambda one: (len(one.options), -one.top1))
        options = best.options
    if loaded.size_is_a_guess and "--image-size" not in options:
        options = (*options, "--image-size", str(preprocess_of(loaded.model).input_size[1]))
    return shlex.join([*parts, *options])


def inspection_terminal(found: Inspection) -> Group:
    """It for a terminal of 80 columns; the command is apart, to be copied."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _facts(found):
        table.add_row(name, Text(printable(value)))
    parts: list[RenderableType] = [table]
    if found.readings:
        figures = Table.grid(padding=(0, 2, 0, 0))
        figures.add_column(justify="right")
        figures.add_column(overflow="fold")
        for one in found.readings:
            figures.add_row(f"{one.top1:.1f} %", Text(one.reading))
        parts += ["", Text(f"Top-1 on {found.readings[0].images} validation images, read in several ways:"), figures]
    return Group(*parts, "", *([Text("To prune it:")] if found.command else []))


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    alike = f" (the same tensors: {', '.join(found.alike[:4])})" if found.alike else ""
    yield "architecture", found.architecture + alike
    yield "can be pruned", f"yes, family {found.family}"
    yield "parameters", f"{found.parameters:,}"
    yield "classes", f"{found.classes}, {'named' if found.class_names else 'not named'} in the weights"
    size = "not known" if found.image is None else " x ".join(map(str, found.image))
    yield "image size", size + _from(found, "input_size")
    for name, value in found.preprocess.items():
        shown = ", ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value}"
        yield name.replace("_", " "), shown + _from(found, name)
    if found.recorded_top1 is not None:
        yield "recorded top-1", f"{found.recorded_top1:.2f} %"
    for note in found.notes:
        yield "note", note
    for remark in found.remarks:
        yield "!", remark


def _from(found: Inspection, name: str) -> str:
    source = found.sources.get(name)
    return f" (from {source})" if source and (name != "input_size" or found.image is not None) else ""
