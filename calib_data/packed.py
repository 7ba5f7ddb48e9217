"""Many texts in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from itertools import accumulate


class PackedTexts:
    """Texts without an object for each: touching objects makes every worker copy the memory that they lie in.

    Example:
        >>> texts = PackedTexts(["a.jpg", "b.jpg"])
        >>> texts[1], len(texts)
        ('b.jpg', 2)
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._ends = array("q", accumulate(map(len, encoded), initial=0))
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])
