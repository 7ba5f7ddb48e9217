"""Whether a detector's configuration is only data.

mmengine builds whatever `type` names: a class of its registry or, where there is a dot in it, any importable function.
A detector's folder may come from a stranger, so its configuration may name the parts that this package itself writes,
and nothing that opens another file; every number is bounded, so that no layer is too large to build.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upvits.calib_data.errors import UserError

PARTS = frozenset(
    {
        "AnchorGenerator", "BN", "CrossEntropyLoss", "DeltaXYWHBBoxCoder", "DetDataPreprocessor", "FCNMaskHead", "FPN",
        "FocalLoss", "GN", "L1Loss", "LN", "MaskRCNN", "MaxIoUAssigner", "PseudoSampler", "PyramidVisionTransformerV2",
        "RPNHead", "RandomSampler", "RetinaHead", "RetinaNet", "RoIAlign", "Shared2FCBBoxHead", "SingleRoIExtractor",
        "SmoothL1Loss", "StandardRoIHead", "UPPVTv2", "UPViT", "nms",
    }
)  # fmt: skip
"""What `type` may name in a detector's configuration."""

_OPENS_FILES = frozenset({"init_cfg", "pretrained", "checkpoint", "load_from", "_base_", "_scope_", "custom_imports"})
_MOST = {"stacked_convs": 64, "num_convs": 64, "num_outs": 16, "max_per_img": 100_000, "nms_pre": 1_000_000}
_UPSAMPLING = ({"mode": "nearest"}, {"mode": "bilinear"})
_NUMBERS = {"mean": 3, "std": 3, "target_means": 4, "target_stds": 4}
_LARGEST = 100_000
_DEEPEST, _LONGEST = 12, 1_000


def check_detector_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a configuration that is more than a description of one of our detectors.

    Args:
        config: of a detector, plain values.
        name: of the file that it was read from.

    Raises:
        UserError: names the entry.
    """
    if config.get("type") not in ("RetinaNet", "MaskRCNN"):
        raise _refused(name, "config.type", f"{config.get('type')!r} is no detector of this tool")
    backbone = config.get("backbone")
    if not isinstance(backbone, Mapping) or ("model" in backbone and not isinstance(backbone["model"], Mapping)):
        raise _refused(name, "config.backbone", "it has to hold the structure of the network")
    # the network's structure is a document of its own, checked where it is built
    checked = {**config, "backbone": {key: value for key, value in backbone.items() if key != "model"}}
    _check(checked, name, "config", 0)


def check_names(config: Any, name: str) -> None:
    """Refuse registry names that are import paths: mmengine would import and call them.

    Raises:
        UserError: names the entry.
    """
    for key, value in config.items() if isinstance(config, Mapping) else enumerate(config):
        if key == "type" and isinstance(value, str) and not value.isidentifier():
            raise _refused(name, "type", f"{value!r} is not the name of a part of mmdet")
        if isinstance(value, (Mapping, list, tuple)):
            check_names(value, name)


def _check(value: Any, name: str, place: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise _refused(name, place, "it is nested too deep")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _OPENS_FILES and inner is not None:
                raise _refused(name, f"{place}.{key}", "a detector's folder names no other file")
            if key == "type" and not (isinstance(inner, str) and inner in PARTS):
                raise _refused(name, f"{place}.type", f"{inner!r} is none of the parts that detectors are made of")
            if key in _MOST and isinstance(inner, (int, float)) and inner > _MOST[key]:
                raise _refused(name, f"{place}.{key}", f"{inner} is more than {_MOST[key]}")
            if key == "upsample_cfg" and inner not in _UPSAMPLING:  # factors and sizes fill memory
                raise _refused(name, f"{place}.{key}", "it has to be a mode, nearest or bilinear, and nothing else")
            if key in _NUMBERS and not _are_numbers(inner, _NUMBERS[key]):
                raise _refused(name, f"{place}.{key}", f"it has to be {_NUMBERS[key]} numbers")
            _check(inner, name, f"{place}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        if len(value) > _LONGEST:
            raise _refused(name, place, f"it has {len(value)} entries")
        for index, inner in enumerate(value):
            _check(inner, name, f"{place}.{index}", depth + 1)
    elif isinstance(value, (int, float)) and not abs(value) <= _LARGEST:  # NaN is not below either
        raise _refused(name, place, f"{value} is out of range")


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, (list, tuple)) and len(value) == count and all(type(item) in (int, float) for item in value)
    )


def _refused(name: str, place: str, why: str) -> UserError:
    return UserError(
        f"{name} is not the configuration of a detector.",
        why=f"{place[:200]}: {why[:200]}.",
        fix="Use a detector's folder as `upvits-deploy detect train` writes it.",
    )
