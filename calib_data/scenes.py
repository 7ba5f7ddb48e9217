"""The embedded data set for detection: drawn scenes with boxes, written once into the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from upvits.calib_data.drawing import DRAWING_VERSION
from upvits.calib_data.writing import write_coco

SIZE = 128
COUNTS = {"train": 600, "val": 200}


def demo_scenes(cache: Path, *, quiet: bool = True) -> Path:
    """Folder of the scenes: `train/` and `val/`, each with images and annotations.json in COCO's format.

    Args:
        cache: where they are kept; made once, whole or not at all.
        quiet: no progress bar.
    """
    folder = cache / f"scenes-masks-{DRAWING_VERSION}-{SIZE}-{'-'.join(map(str, COUNTS.values()))}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        for split, count in COUNTS.items():
            write_coco(draft, split, count, SIZE, quiet=quiet)
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # another process was faster
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
