"""Pictures beyond the usual: phones' formats, more than 8 bits, very large ones, formats that are not read."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from upvits.calib_data import open_data
from upvits.calib_data.decoding import is_readable, load_rgb
from upvits.calib_data.errors import UserError


def two_classes(folder: Path, count: int = 60) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    folder = two_classes(tmp_path, 3)
    (folder / "fox").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (200, 100, 50)).save(folder / "fox" / f"{index}.avif")
    source = open_data(f"imagefolder:{folder}")
    assert source.class_names == ("cat", "dog", "fox")
    assert source.train.labels.count(2) + source.val.labels.count(2) == 3


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="pillow-heif is not installed")
def test_heic_is_read_with_pillow_heif(tmp_path: Path) -> None:
    import pillow_heif

    folder = two_classes(tmp_path, 3)
    (folder / "fox").mkdir()
    for index in range(3):
        heif = pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 100, 50)))
        heif.save(folder / "fox" / f"{index}.HEIC")
    source = open_data(f"imagefolder:{folder}")
    assert source.class_names == ("cat", "dog", "fox")
    assert source.train.labels.count(2) + source.val.labels.count(2) == 3
    assert np.abs(np.asarray(load_rgb(folder / "fox" / "0.HEIC"))[9, 9].astype(int) - (200, 100, 50)).max() < 8


def test_formats_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    folder = two_classes(tmp_path)
    (folder / "cat" / "a.jxl").write_bytes(b"\xff\x0a")
    source = open_data(f"imagefolder:{folder}")
    assert source.skipped == (str(folder / "cat" / "a.jxl"),)
    assert len(source.train) + len(source.val) == 120
    (folder / "cat" / "b.jxl").write_bytes(b"\xff\x0a")
    with pytest.raises(UserError, match="2 of 122 images") as caught:
        open_data(f"imagefolder:{folder}")
    assert "2 files .jxl to PNG" in caught.value.fix


def test_heic_without_its_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upvits.calib_data.decoding._formats", lambda: ("PNG", "JPEG"))
    folder = two_classes(tmp_path)
    for index in range(2):
        (folder / "dog" / f"{index}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(UserError, match="2 of 122") as caught:
        open_data(f"imagefolder:{folder}")
    assert "2 files .heic: pip install -U pillow-heif" in caught.value.fix


def test_a_class_does_not_vanish(tmp_path: Path) -> None:
    folder = two_classes(tmp_path)
    (folder / "fox").mkdir()
    (folder / "fox" / "only.jxl").write_bytes(b"\xff\x0a")
    with pytest.raises(UserError, match="No image of fox") as caught:
        open_data(f"imagefolder:{folder}")
    assert ".jxl" in caught.value.fix


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("PNG", np.array([[0, 2048, 4095]], np.uint16), [0, 127, 255]),
        ("TIFF", np.array([[0, 2048, 4095]], np.uint16), [0, 127, 255]),
        ("PNG", np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        ("TIFF", np.array([[0, 100, 200]], np.uint16), [0, 100, 200]),
        ("TIFF", np.array([[0, 2048, 4095]], np.int32), [0, 127, 255]),
        ("TIFF", np.array([[0, 0.5, 1]], np.float32), [0, 127, 255]),
        ("TIFF", np.array([[0, 100, 250]], np.float32), [0, 100, 250]),
    ],
)
def test_more_than_eight_bits_are_scaled_by_their_range(
    tmp_path: Path, kind: str, content: np.ndarray[tuple[int, int], np.dtype[np.float32]], expected: list[int]
) -> None:
    Image.fromarray(content).save(tmp_path / "x", kind)
    assert np.asarray(load_rgb(tmp_path / "x"))[0, :, 1].tolist() == expected


@pytest.mark.parametrize("values", [[0, 70_000], [-5, 3]])
def test_values_of_no_range_are_unreadable(values: list[int]) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.array([values], np.int32)).save(stream, "TIFF")
    assert not is_readable(stream.getvalue())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_one_very_large_picture_is_read_at_reduced_size(tmp_path: Path, extension: str) -> None:
    folder = two_classes(tmp_path, 3)
    Image.new("L", (15_000, 12_000), 77).save(folder / "cat" / f"large.{extension}", compress_level=1)
    source = open_data(f"imagefolder:{folder}")
    assert source.skipped == ()
    assert len(source.train) + len(source.val) == 7
    large = load_rgb(folder / "cat" / f"large.{extension}")
    assert (large.mode, large.getpixel((3, 3))) == ("RGB", (77, 77, 77))
    assert 3000 < large.height < large.width < 6000


def test_a_picture_of_many_gibibytes_is_unreadable() -> None:
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "BMP")
    content = bytearray(stream.getvalue())
    content[18:26] = (60_000).to_bytes(4, "little") + (60_000).to_bytes(4, "little")
    assert not is_readable(bytes(content))
