"""Images that are read batch by batch, and the file that keeps tensors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from upvits.calib_data import Images
from upvits.calib_data.errors import UserError
from upvits.calib_data.prepared import PreparedImages, in_batches, tensor_of
from upvits.calib_data.scratch import Scratch


def _counted(count: int) -> tuple[PreparedImages, list[int]]:
    """Images [count, 3, 2, 2] whose pixels are their number, and a list of what was opened."""
    opened: list[int] = []

    def read(index: int) -> Image.Image:
        opened.append(index)
        return Image.new("RGB", (1, 1), (index, 0, 0))

    def transform(picture: Image.Image) -> Tensor:
        pixel = picture.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        return torch.full((3, 2, 2), float(pixel[0]))

    return PreparedImages(Images([-1] * count, read), transform, (3, 2, 2)), opened


def test_only_what_is_asked_for_is_opened_and_only_once() -> None:
    images, opened = _counted(10)
    assert (len(images), images.shape) == (10, (10, 3, 2, 2))
    batches = in_batches(images, 4)
    assert (len(batches), opened) == (3, [])
    assert batches[2][:, 0, 0, 0].tolist() == [8, 9]
    assert opened == [8, 9]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert tensor_of(images)[:, 1, 1, 1].tolist() == list(range(10))
    assert sorted(opened) == list(range(10))


def test_a_choice_of_images_is_that_of_a_tensor() -> None:
    images, _ = _counted(10)
    whole = images.read()
    for which in (slice(2, 7), slice(1, None, 2), torch.arange(10) % 3 == 1, torch.tensor([4, 4, 0]), slice(3, 3)):
        assert torch.equal(images[which].read(), whole[which])
        assert images[which].shape == whole[which].shape
    assert torch.equal(images[1::2][torch.tensor([2, 0])].read(), whole[[5, 1]])


def test_what_is_kept_comes_back_whatever_order_and_size() -> None:
    kept = Scratch()
    tensors = {number: torch.randn(3, 5) for number in (7, 0, 3)}
    for number, tensor in tensors.items():
        kept[number] = tensor.T.contiguous().T  # not contiguous
    assert all(torch.equal(kept[number], tensor) for number, tensor in tensors.items())


def test_the_file_has_no_name_and_lies_where_tmpdir_says(tmp_path: Path) -> None:
    code = "import torch, os; from upvits.calib_data.scratch import Scratch; s = Scratch(); s[0] = torch.ones(9); "
    code += "print(os.readlink(f'/proc/self/fd/{s._file}')); os.kill(os.getpid(), 9)"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert ended.returncode == -9
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="no room left") as caught:
        Scratch()[0] = torch.ones(2)
    assert "TMPDIR" in caught.value.fix
