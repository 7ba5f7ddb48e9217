"""Creating, saving and loading networks.

A model folder holds `model.safetensors` and `config.json` in the layout of timm's `local-dir:` source. When all widths
are such that stock timm can build them, the folder loads with timm alone; otherwise `config.json` also names the width
of every group under `upvits`, and `toolchain.load` rebuilds the network from timm's dense architecture.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from upvits.calib_data import Preprocess, demo_weights
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.paths import share
from upvits.calib_data.tensors import save_tensors
from upvits.toolchain.families import family_of, groups_of
from upvits.toolchain.networks.building import build, hollow
from upvits.toolchain.networks.checkpoints import Candidate, choose, network_from_file
from upvits.toolchain.networks.config_document import has_config, read_config
from upvits.toolchain.networks.edited import as_timm_builds
from upvits.toolchain.networks.found import Found, add_sources, found_in, set_found
from upvits.toolchain.networks.names import asked_weights
from upvits.toolchain.networks.readings import fitted, readings
from upvits.toolchain.networks.said import Said
from upvits.toolchain.networks.settle import (
    OPTIONS,
    Size,
    Wanted,
    checked_arguments,
    checked_preprocess,
    prepare,
)
from upvits.toolchain.networks.transformers_config import is_transformers
from upvits.toolchain.networks.transformers_writing import preprocessor_config, transformers_config, transformers_state
from upvits.toolchain.networks.weight_files import as_fp32, read_weights
from upvits.toolchain.structure.groups import widths_of
from upvits.toolchain.structure.layers import adopt_parameters
from upvits.toolchain.structure.meta import on_meta
from upvits.toolchain.structure.timm_config import architecture_of, config_of, update_config

FORMAT = 1
_PREPROCESS_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def create_model(
    name: str,
    *,
    weights: str = "random",
    num_classes: int | None = None,
    image_size: int | Size | None = None,
    model_args: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm network of a supported family, in eval mode.

    Args:
        name: timm's name or a common spelling (`pvtv2_b0`, `deit_tiny`, `timm/vit_tiny_patch16_224.augreg_in21k`).
        weights: `demo` (ships with this package), `timm` (pretrained, from the hub), `random`, a checkpoint file, an
            index of shards, or a model folder of timm, transformers or this package.
        num_classes: classes of the head; read from the checkpoint, or the architecture's default.
        image_size: side, or height and width, in pixels; read from the checkpoint, or the architecture's default.
        model_args: timm arguments that the network was built with, where the checkpoint does not say them, such as
            `{"global_pool": "avg"}`.
        preprocess: of `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode`, those that differ from what the
            checkpoint says.

    Raises:
        UserError: unknown name, unsupported model, or weights that don't fit.
        MissingDependencyError: the hub cannot be reached.

    Example:
        >>> import upvits
        >>> model = upvits.create_model("deit_tiny", num_classes=5, image_size=64)
        >>> model.embed_dim, model.num_classes
        (192, 5)
    """
    architecture, weights = asked_weights(name, weights)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    wanted = Wanted(num_classes, size, checked_arguments(architecture, model_args or {}), dict(preprocess or {}))
    with on_meta():
        family_of(build(architecture))  # refuses what cannot be pruned before it fills memory
    if weights in ("demo", "random", "timm"):
        model = _create_known(architecture, weights, wanted)
    elif (place := user_path(weights)).is_dir() and has_config(place):
        model = _at_size(load(place), size, weights)
        _check_folder(model, architecture, weights, wanted)
    else:
        model = network_from_file(architecture, place, wanted)
    family_of(model)
    _note_preprocess(model, architecture, wanted)
    return model.eval()


def _note_preprocess(model: nn.Module, architecture: str, wanted: Wanted) -> None:
    """Set what the user said about the preprocessing, and name sources where none are named yet."""
    if not found_in(model).sources:
        sources = prepare(model, architecture, Said(), wanted, "")
        add_sources(model, {**sources, "input_size": OPTIONS if wanted.image_size else sources["mean"]})


def _create_known(architecture: str, weights: str, wanted: Wanted) -> nn.Module:
    if weights == "demo":
        folder = demo_weights(architecture)
        if folder is None:
            raise UserError(
                f"There are no demo weights for {architecture}.",
                why="Pruning needs a trained network.",
                fix='Give your own with `weights="FILE"`, or `weights="timm"` for pretrained ones from the hub '
                '(`weights="random"` only to look at sizes and speed). The demo covers pvtv2_b0.',
            )
        return _at_size(load(folder), wanted.image_size, "The demo checkpoint")
    sizes: dict[str, Any] = {"num_classes": wanted.num_classes, "image_size": wanted.image_size}
    if weights == "random":
        return build(architecture, **sizes, **wanted.model_args)
    try:
        return build(architecture, **sizes, **wanted.model_args, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingDependencyError(
            f"The pretrained weights of {architecture} cannot be had here ({str(error).splitlines()[0][:200]}).",
            why="timm downloads them from the Hugging Face hub, which this machine does not reach or does not cache.",
            fix="On a machine with network: `timm.create_model(NAME, pretrained=True)`, save its state_dict with "
            'safetensors, copy the file here and give it as `weights="FILE"`.',
        ) from error


def _at_size(model: nn.Module, size: Size | None, source: str) -> nn.Module:
    """A loaded network at another image size, which only networks without position embedding take as they are."""
    if size is None or preprocess_of(model).input_size[1:] == size:
        return model
    if getattr(model.get_submodule("patch_embed"), "img_size", None) is not None:
        height, width = preprocess_of(model).input_size[1:]
        raise UserError(
            f"{source} holds a network for images of {height} x {width} pixels, not {size[0]} x {size[1]}.",
            why="Its position embedding belongs to that size.",
            fix="Leave `image_size=` out, or give the weights as a checkpoint file: that is resampled.",
        )
    update_config(model, input_size=(preprocess_of(model).input_size[0], *size))
    add_sources(model, {"input_size": OPTIONS})
    return model


def _check_folder(model: nn.Module, architecture: str, weights: str, wanted: Wanted) -> None:
    held = architecture_of(model)
    if is_transformers(user_path(weights)):
        _check_same_kind(model, architecture, weights)
    elif held != architecture.partition(".")[0]:
        raise UserError(f"{weights} holds a {held}, not a {architecture}.", fix=f'Give `name="{held}"`.')
    if wanted.model_args:
        raise UserError(
            f"`model_args=` does not go with {weights}.",
            why="The folder's config.json says how the network is built.",
            fix="Leave it out, or give the file with the weights alone.",
        )
    if wanted.preprocess:
        entries = checked_preprocess(wanted.preprocess, preprocess_of(model).input_size[0])
        update_config(model, **entries)
        add_sources(model, dict.fromkeys(entries, OPTIONS))


def _check_same_kind(model: nn.Module, architecture: str, weights: str) -> None:
    """A folder of transformers names no architecture of timm: family, widths and depths have to be the same."""
    with on_meta():
        named = build(architecture)
    family = family_of(model)
    if family is not family_of(named) or _dimensions(model) != _dimensions(named):
        raise UserError(
            f"{weights} holds another network than {architecture}.",
            why=f"It has {_dimensions(model)}; {architecture} has {_dimensions(named)}.",
            fix=f'Give the name of its size, or load it in Python: upvits.load("{weights}").',
        )


def _dimensions(model: nn.Module) -> str:
    widths = ", ".join(str(group.size) for group in groups_of(model) if group.kind == "embed")
    return f"width {widths} and depth {', '.join(map(str, family_of(model).block_lists(model).values()))}"


def preprocess_of(model: nn.Module) -> Preprocess:
    """How images are prepared for this network: timm's data configuration, at the size that it was built for.

    Raises:
        UserError: it takes pictures of other than three channels.
    """
    config = _data_config(model)
    channels = (config["input_size"][0], len(config["mean"]), len(config["std"]))
    if channels != (3, 3, 3):
        raise UserError(
            "The network takes no RGB pictures.",
            why="Its configuration has input_size[0], mean and std for {}, {} and {} channels.".format(*channels),
            fix="Take a network for RGB, or put `pretrained_cfg` of its config.json right.",
        )
    return Preprocess(**config)


def _data_config(model: nn.Module) -> dict[str, Any]:
    """The same by name, for any number of channels."""
    config: dict[str, Any] = resolve_model_data_config(model)
    built_for = getattr(model.get_submodule("patch_embed"), "img_size", None)
    if built_for is not None and not getattr(model, "dynamic_img_size", False):
        config["input_size"] = (config["input_size"][0], *built_for)
    fields = {key: config[key] for key in _PREPROCESS_KEYS}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def label_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """Class names that came with the weights, in the order of the logits."""
    names = config_of(model).get("label_names")
    return None if names is None else tuple(names)


def structure_of(model: nn.Module, model_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """The structure document from which `hollow` builds the network again: timm's arguments, or widths of every group.

    Args:
        model: a timm network of a supported family, pruned or not.
        model_args: timm arguments that it was built with, beyond image size, pooling and widths.
    """
    family = family_of(model)
    uniform = family.uniform_args(model)
    given = family.constructor_args(model)
    with on_meta():
        stock = build(architecture_of(model), **given)  # what is usual depends on them: fc_norm on the pooling
        usual = family.variant_args(stock)
    unusual = {name: value for name, value in family.variant_args(model).items() if value != usual.get(name)}
    args = {**given, **unusual, **(model_args or {}), **(uniform or {})}
    if uniform is None and not _holds(architecture_of(model), args, model):
        args |= family.wide_args(model)
    config = _config(model, args)
    if _norm_eps(model) != _norm_eps(stock) and len(_norm_eps(model)) == 1:
        (config["norm_eps"],) = _norm_eps(model)
    if uniform is None:
        config["upvits"] = {"format": FORMAT, "widths": asdict(widths_of(groups_of(model)))}
    return config


def _holds(architecture: str, args: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether a network of timm is in every group at least as wide as this one, so that this one can be cut from it."""
    with on_meta():
        sizes = {group.name: group.size for group in groups_of(build(architecture, **args))}
    return all(group.size <= sizes.get(group.name, 0) for group in groups_of(model))


def _norm_eps(model: nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    model_args: dict[str, Any] | None = None,
    layout: Literal["timm", "transformers"] = "timm",
) -> None:
    """Write a network as a model folder, and prove that it loads: it is read back and must give the same output.

    Args:
        model: a timm network of a supported family, pruned or not, from `timm.create_model` or its class; its head may
            have been replaced by another linear layer, dropout before it included, or by none.
        folder: is created; must not exist yet.
        model_args: timm arguments that the model was built with, beyond image size, pooling and widths.
        layout: of files and names; that of transformers is for `from_pretrained`, and takes networks whose blocks have
            the same widths.

    Raises:
        UserError: the folder exists, the model was built with timm arguments that are not recorded, or transformers
            has no form for it.

    Example:
        >>> import tempfile, upvits
        >>> folder = tempfile.mkdtemp() + "/small"
        >>> upvits.save(upvits.create_model("pvtv2_b0", weights="demo"), folder)
        >>> upvits.load(folder).num_classes
        12
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already.", fix="Give a new folder; nothing is overwritten.")
    model = as_timm_builds(model)
    files = _transformers_files(model) if layout == "transformers" else _timm_files(model, model_args)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        share(draft)
        save_tensors(files.state, draft / "model.safetensors", {"format": "pt"})  # transformers asks for it
        for name, document in files.documents.items():
            (draft / name).write_text(json.dumps(document, indent=2) + "\n")
        _check_same_output(model, load(draft))
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Files:
    """What a model folder is written from: tensors, what the file with them says, JSON documents by name."""

    state: dict[str, Tensor]
    documents: Mapping[str, dict[str, Any]]


def _timm_files(model: nn.Module, model_args: dict[str, Any] | None) -> _Files:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return _Files(state, {"config.json": structure_of(model, model_args)})


def _transformers_files(model: nn.Module) -> _Files:
    data = _data_config(model)
    documents = {
        "config.json": transformers_config(model, label_names_of(model), data),
        "preprocessor_config.json": preprocessor_config(data),
    }
    return _Files(transformers_state(model), documents)


def _config(model: nn.Module, model_args: dict[str, Any]) -> dict[str, Any]:
    known = config_of(model)
    kept = ("classifier", "first_conv", "fixed_input_size")
    config = {
        "architecture": known["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": model_args,
        "pretrained_cfg": {
            **{key: known[key] for key in kept if known.get(key) is not None},
            **_data_config(model),
            "num_classes": model.num_classes,
        },
    }
    names, layout = label_names_of(model), known.get("layout")
    return {
        **config,
        **({} if names is None else {"label_names": list(names)}),
        **({} if layout is None else {"layout": layout}),
    }


def _check_same_output(model: nn.Module, loaded: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *_data_config(model)["input_size"], generator=generator)
    on_cpu = copy.deepcopy(model).cpu().eval()  # where both round alike
    with torch.inference_mode():
        same = torch.allclose(on_cpu(image), loaded(image), rtol=1e-5, atol=1e-6, equal_nan=True)
    if not same:
        raise UserError(
            "The saved network does not compute what this one does.",
            why="It was built with timm arguments that its architecture name does not imply.",
            fix="Pass them as `model_args`, e.g. save(model, folder, model_args={'act_layer': 'quick_gelu'}).",
        )


def load(folder: Path | str) -> nn.Module:
    """The network in a model folder, in eval mode on the CPU; weights are cast to fp32.

    Raises:
        UserError: the folder is no model folder, or its weights don't fit its structure.

    Example:
        >>> import tempfile, upvits
        >>> dense, folder = upvits.create_model("pvtv2_b0", weights="demo"), tempfile.mkdtemp() + "/small"
        >>> plan = upvits.plan(dense, upvits.score(dense, method="magnitude"), ratio=0.5)
        >>> upvits.save(upvits.prune(dense, plan, compensate=False), folder)
        >>> upvits.count_params(upvits.load(folder)) == plan.after.params
        True
    """
    folder = Path(folder)
    config = read_config(folder)
    model = hollow(config)
    weights = read_weights(folder)
    size: Size = tuple(config_of(model)["input_size"][-2:])
    tried = [
        Candidate(reading, model, fitted(reading, model), config.model_args, size, "config.json")
        for reading in readings(weights.states, model)
    ]
    chosen, notes = choose(config.architecture, weights, tried, Said())
    model = adopt_parameters(model, as_fp32(chosen.fit.state, str(weights.path))).eval()
    said = config.pretrained_cfg.given.keys() | {"input_size"}
    default = f"timm's configuration of {config.architecture}"
    where = "preprocessor_config.json" if is_transformers(folder) else "config.json"
    sources = {key: where if key in said else default for key in _PREPROCESS_KEYS}
    set_found(model, Found(notes, {**sources, "input_size": "config.json"}))
    return model
