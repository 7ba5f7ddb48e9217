"""The teacher's logits on disk: where every image has a few fixed views, later epochs cost the student only.

The views of an epoch repeat after so many epochs, mixing and erasing included, so a step sees the very images that its
logits were computed for (consistent teaching, arXiv 2106.05237; kept on disk as in FKD, arXiv 2112.01528).
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from upvits.calib_data.errors import UserError


class KeptLogits:
    """Logits in half precision, by view and step: one file for each process. A row counts once its checksum is there.

    Args:
        folder: of the training; the file is made in it, and removed by `clear`.
        key: of the training; another one has another file.
        views, steps, images, classes: how much there is to keep.
        share: (rank, processes); the images of a step are this process's.
    """

    def __init__(
        self, folder: Path, key: str, views: int, steps: int, images: int, classes: int, share: tuple[int, int]
    ) -> None:
        name = hashlib.sha256(f"{key} {views} {steps} {images} {classes} {share}".encode()).hexdigest()[:16]
        path = folder / f"teacher-{name}.logits"
        row = np.dtype([("check", "<u4"), ("logits", "<f2", (images, classes))])
        size = row.itemsize * views * steps
        try:
            with path.open("ab") as file:
                file.truncate(size)  # a file of zeros takes no room before it is filled
        except OSError as error:
            raise UserError(
                f"The teacher's logits cannot be kept in {folder}.",
                why=f"{error.strerror}; they take up to {size / 1e9:.3g} GB.",
                fix="Free some disk space, or set teacher_views = 0.",
            ) from error
        self._rows = np.memmap(path, dtype=row, mode="r+", shape=(views, steps))

    def get(self, view: int, step: int) -> Tensor | None:
        """[images, classes] in float32; None where they were not kept yet, or not written whole."""
        row = self._rows[view, step]
        logits = np.array(row["logits"])
        return torch.from_numpy(logits).float() if int(row["check"]) == _check(logits) else None

    def put(self, view: int, step: int, logits: Tensor) -> None:
        """Keep them."""
        kept = logits.detach().to("cpu", torch.float16).numpy()
        row = self._rows[view, step]
        row["logits"] = kept
        row["check"] = _check(kept)


def _check(logits: np.ndarray[tuple[int, ...], np.dtype[np.float16]]) -> int:
    """Never 0, which means that nothing was written."""
    return zlib.crc32(logits.tobytes()) | 1


def clear(folder: Path) -> None:
    """Remove what was kept in a folder."""
    for path in folder.glob("teacher-*.logits"):
        path.unlink(missing_ok=True)
