"""Images: the embedded demo set, readers of a user's own, and batches of them."""

from calib_data.datasets import DataSource, Images
from calib_data.demo import demo_weights
from calib_data.loading import Preprocess, batches, proxy_images
from calib_data.sources import open_source
from calib_data.writing import write_coco, write_imagefolder

__all__ = [
    "DataSource",
    "Images",
    "Preprocess",
    "batches",
    "demo_weights",
    "open_source",
    "proxy_images",
    "write_coco",
    "write_imagefolder",
]
