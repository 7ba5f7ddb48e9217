"""Images: the embedded demo set, readers of a user's own, and batches of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upvits.calib_data.datasets import DataSource, Images
    from upvits.calib_data.demo import demo_weights
    from upvits.calib_data.loading import Preprocess, batches, proxy_images, proxy_set
    from upvits.calib_data.sources import open_source
    from upvits.calib_data.writing import write_coco, write_imagefolder

__all__ = [
    "DataSource",
    "Images",
    "Preprocess",
    "batches",
    "demo_weights",
    "open_source",
    "proxy_images",
    "proxy_set",
    "write_coco",
    "write_imagefolder",
]

_HOME = {
    "DataSource": "datasets",
    "Images": "datasets",
    "Preprocess": "loading",
    "batches": "loading",
    "demo_weights": "demo",
    "open_source": "sources",
    "proxy_images": "loading",
    "proxy_set": "loading",
    "write_coco": "writing",
    "write_imagefolder": "writing",
}


def __getattr__(name: str) -> object:
    # torch and timm take seconds to import; `calib_data.errors` is imported by everything, `--help` and doctor too
    if name in _HOME:
        return getattr(import_module(f"upvits.calib_data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'upvits.calib_data' has no attribute {name!r}")
