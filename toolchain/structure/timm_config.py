"""What timm keeps on a model about itself: architecture name, preprocessing, labels."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def config_of(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a model."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def update_config(model: nn.Module, **changes: Any) -> None:
    """Replace entries of a model's `pretrained_cfg`; the dictionary of other models is not touched."""
    model.pretrained_cfg = {**config_of(model), **changes}  # type: ignore[assignment]


def architecture_of(model: nn.Module) -> str:
    """timm's name of the architecture."""
    return cast(str, config_of(model)["architecture"])


def num_classes_of(model: nn.Module) -> int:
    """Classes of the head; 0 when there is none."""
    return cast(int, model.num_classes)
