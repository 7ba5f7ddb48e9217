"""Model names: timm's own, and the spellings that people use for them."""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path

import timm

from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.catalogue import MODULES

_ON_THE_HUB = re.compile(r"^(hf[-_]hub:)?timm/")


@cache
def candidates() -> tuple[str, ...]:
    """Names of all timm models in the modules of the supported families."""
    return tuple(name for modules in MODULES.values() for module in modules for name in timm.list_models(module=module))


def canonical_name(name: str) -> str:
    """timm's name for a model: `pvtv2_b0` is `pvt_v2_b0`, `deit_tiny` is `deit_tiny_patch16_224`.

    A weights tag (`vit_small_patch14_dinov2.lvd142m`) is kept; the hub's `timm/NAME` and `hf_hub:timm/NAME` are names,
    too.

    Raises:
        UserError: no supported timm model has that name; near ones are named.
    """
    name = _ON_THE_HUB.sub("", name)
    base, dot, tag = name.partition(".")
    spelled = base.lower().replace("-", "_").replace("pvtv2", "pvt_v2").replace("deit_3", "deit3")
    for guess in (spelled, f"{spelled}_patch16_224", f"{spelled}_patch14_224"):
        if guess in candidates():
            return guess + dot + tag
    near = difflib.get_close_matches(spelled, candidates(), n=5, cutoff=0.5)
    if timm.is_model(spelled):
        raise UserError(
            f"{name} is a timm model, but of a family that is not supported.",
            fix="Supported are timm's VisionTransformer and PVTv2; `upvits-deploy models` lists them.",
        )
    raise UserError(
        f"Unknown model {name!r}.",
        fix=(f"Did you mean {', '.join(near)}? " if near else "") + "`upvits-deploy models` lists the supported ones.",
    )


def asked_weights(name: str, weights: str) -> tuple[str, str]:
    """timm's name of a model, and its weights as `create_model` takes them, both as people spell them.

    Args:
        name: of the model; gets the tag of weights that are named as the hub does (`timm/NAME.TAG`).
        weights: `demo`, `timm`, `random`, a path, `local-dir:PATH`, `timm/NAME` or `hf_hub:timm/NAME`.

    Raises:
        UserError: the weights are of another model, or of a repository on the hub that is not timm's.
    """
    architecture = canonical_name(name)
    if weights.startswith("local-dir:"):
        return architecture, weights.removeprefix("local-dir:")
    if _ON_THE_HUB.match(weights) and not Path(weights).exists():
        held = canonical_name(weights)
        if held.partition(".")[0] != architecture.partition(".")[0]:
            raise UserError(f"{weights} are weights of {held}, not of {architecture}.", fix=f'Give `name="{held}"`.')
        return held, "timm"
    if re.match(r"hf[-_]hub:", weights):
        repository = weights.partition(":")[2]
        raise UserError(
            f"{weights} is not read from the hub.",
            why="Only the repositories of timm are.",
            fix=f"Download {repository} with Hugging Face's `hf download`, and give the folder.",
        )
    return architecture, weights
