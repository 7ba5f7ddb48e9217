"""Model names: timm's own, and the spellings that people use for them."""

from __future__ import annotations

import difflib
from functools import cache

import timm

from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.catalogue import MODULES


@cache
def candidates() -> tuple[str, ...]:
    """Names of all timm models in the modules of the supported families."""
    return tuple(name for modules in MODULES.values() for module in modules for name in timm.list_models(module=module))


def canonical_name(name: str) -> str:
    """timm's name for a model: `pvtv2_b0` is `pvt_v2_b0`, `deit_tiny` is `deit_tiny_patch16_224`.

    A weights tag (`vit_small_patch14_dinov2.lvd142m`) is kept.

    Raises:
        UserError: no supported timm model has that name; near ones are named.
    """
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
