"""`package.json`: what is in a package."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from upvits.calib_data.documents import Name
from upvits.calib_data.paths import RelativePath

PACKAGE = "package.json"


class PackagedEngine(BaseModel):
    """One engine of the package: `file` is relative to it; `targets` is empty where any device will do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtime: Name
    precision: Name
    targets: tuple[Name, ...]
    library: Name
    library_version: Name
    file: RelativePath


class PackageDocument(BaseModel):
    """`package.json`: what is in the folder, for programs; README.md says it to people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    made_by: Name
    model: Name
    onnx: RelativePath
    pytorch: RelativePath
    stock_timm: bool
    transformers: RelativePath | None = None
    engines: tuple[PackagedEngine, ...]
    triton: tuple[Name, ...]
