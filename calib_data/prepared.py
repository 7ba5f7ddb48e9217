"""Images as a network reads them, a batch at a time, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from upvits.calib_data.datasets import Images
from upvits.calib_data.scratch import Scratch


class PreparedImages:
    """Some images [N, 3, H, W] float32, of which none is in memory.

    `images[:256]`, `images[::2]`, `images[mask]` and `images[order]` choose among them; `read` gives a tensor. A
    picture is opened when it is read first; what was made of it is then on disk (`Scratch`) for the next time.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], size: tuple[int, int, int]) -> None:
        """Nothing is read.

        Args:
            images: the pictures.
            transform: makes a float32 tensor of one.
            size: (channels, height, width) of that.
        """
        self._images, self._transform, self._size = images, transform, size
        self._chosen = torch.arange(len(images))
        self._kept = Scratch()

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def shape(self) -> torch.Size:
        """[N, 3, H, W]."""
        return torch.Size((len(self), *self._size))

    def __getitem__(self, which: slice | Tensor) -> PreparedImages:
        part = object.__new__(PreparedImages)
        part.__dict__ |= self.__dict__ | {"_chosen": self._chosen[which]}
        return part

    def read(self) -> Tensor:
        """All of them, [N, 3, H, W]."""
        if not len(self):
            return torch.empty(self.shape)
        return torch.stack([self._read(index) for index in self._chosen.tolist()])

    def _read(self, index: int) -> Tensor:
        if index not in self._kept:
            self._kept[index] = self._transform(self._images[index][0])
        return self._kept[index]


ImageSet: TypeAlias = Tensor | PreparedImages
"""What functions on images take: a tensor [N, 3, H, W], or images that are read when they are needed."""


class _Batches(Sequence[Tensor]):
    def __init__(self, images: PreparedImages, size: int) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)

    def __getitem__(self, number: Any) -> Any:  # by position only, nobody slices
        start = range(0, len(self._images), self._size)[number]  # past the end: IndexError, which ends a loop
        return self._images[start : start + self._size].read()


def in_batches(images: ImageSet, size: int) -> Sequence[Tensor]:
    """Batches [B, 3, H, W] of so many images, the last one smaller; each is read when it is asked for."""
    return torch.split(images, size) if isinstance(images, Tensor) else _Batches(images, size)


def tensor_of(images: ImageSet) -> Tensor:
    """[N, 3, H, W]."""
    return images if isinstance(images, Tensor) else images.read()
