"""timm networks from names, arguments and `config.json` documents, without weights."""

from __future__ import annotations

from typing import Any, cast

import timm
from torch import nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of, narrow
from upvits.toolchain.networks.config_document import ModelConfig, WidthEntries, arguments_of, family_name
from upvits.toolchain.networks.settle import Size, fitting_channels
from upvits.toolchain.structure.groups import Widths
from upvits.toolchain.structure.meta import on_meta
from upvits.toolchain.structure.timm_config import config_of, update_config


def build(
    architecture: str,
    *,
    num_classes: int | None = None,
    image_size: Size | None = None,
    pretrained: bool = False,
    **args: Any,
) -> nn.Module:
    """A timm network with fresh or timm's pretrained weights; the size of images is noted where timm takes none.

    Raises:
        UserError: timm cannot build it of these arguments.
        Exception: of any kind, where pretrained weights cannot be had.
    """
    if num_classes is not None:
        args["num_classes"] = num_classes
    if image_size is not None and family_name(architecture.partition(".")[0]) == "vit":
        args["img_size"] = image_size
    try:
        model = cast(nn.Module, timm.create_model(architecture, pretrained=pretrained, **args))
    except Exception as error:  # timm checks its arguments with asserts and arithmetic of any kind
        if pretrained:
            raise
        raise UserError(
            f"timm cannot build a {architecture} of these arguments ({str(error).splitlines()[0][:200]}).",
            why="They do not fit each other.",
            fix="Check `model_args=` and `image_size=`, or use the model folder as it was written.",
        ) from error
    channels = int(args.get("in_chans") or 3)
    size = config_of(model)["input_size"][-2:] if image_size is None else image_size
    if image_size is not None or channels != len(config_of(model)["mean"]):
        config = {**config_of(model), "input_size": (channels, *size)}
        update_config(model, **fitting_channels(config, channels))
    return model


def hollow(config: ModelConfig) -> nn.Module:
    """The network of a `config.json` on the meta device, without weights.

    Raises:
        UserError: timm cannot build it.
    """
    arguments = arguments_of(config)
    with on_meta():
        model = build(config.architecture, **arguments)
        try:
            if config.upvits is not None:
                model = _narrowed(model, config.upvits.widths)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The widths of this config.json make no {config.architecture} ({str(error).splitlines()[0][:200]}).",
                fix="Use the folder as it was written.",
            ) from error
    if config.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.norm_eps
    labels = config.label_names or config.pretrained_cfg.label_names
    fitting = {"label_names": labels if labels is not None and len(labels) == model.num_classes else None}
    came_in = {} if config.layout is None else {"layout": config.layout}
    update_config(model, **{**config.pretrained_cfg.given, **fitting, **came_in}, architecture=config.architecture)
    return model


def _narrowed(model: nn.Module, widths: WidthEntries) -> nn.Module:
    sizes = {group.name: group.size for group in groups_of(model)}
    strange = [name for name, width in widths.channels.items() if not width <= sizes.get(name, 0)]
    if strange:
        raise UserError(
            f"config.json: the network has no group {strange[0][:100]!r} that could be cut to this width.",
            why="The widths belong to another architecture, or were changed.",
            fix="Use the folder as it was written.",
        )
    return narrow(model, Widths(**widths.model_dump()))
