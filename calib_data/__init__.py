"""Images: the embedded demo set, readers of a user's own, and batches of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upvits.calib_data.lazy import lazy_names

if TYPE_CHECKING:
    from upvits.calib_data.datasets import DataSource, Images
    from upvits.calib_data.demo import demo_weights
    from upvits.calib_data.loading import Preprocess, batches, proxy_images, proxy_set
    from upvits.calib_data.prepared import PreparedImages
    from upvits.calib_data.sources import open_data
    from upvits.calib_data.writing import write_coco, write_imagefolder

__all__ = [
    "DataSource",
    "Images",
    "PreparedImages",
    "Preprocess",
    "batches",
    "demo_weights",
    "open_data",
    "proxy_images",
    "proxy_set",
    "write_coco",
    "write_imagefolder",
]

if not TYPE_CHECKING:  # a type checker then knows which names there are
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "datasets": ("DataSource", "Images"),
            "demo": ("demo_weights",),
            "prepared": ("PreparedImages",),
            "loading": ("Preprocess", "batches", "proxy_images", "proxy_set"),
            "sources": ("open_data",),
            "writing": ("write_coco", "write_imagefolder"),
        },
    )
