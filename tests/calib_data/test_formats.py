"""Pictures beyond the usual: phones' formats, more than 8 bits, very large ones, formats that are not read."""

import importlib.util
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from upvits.calib_data import DataSource, open_data
from upvits.calib_data.decoding import depth_in, load_rgb
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
    monkeypatch.setattr("upvits.calib_data.decoding.readable_formats", lambda: ("PNG", "JPEG"))
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


def deep(path: Path, *values: float, kind: type[np.generic] = np.uint16) -> Path:
    """A grey picture of these values, as `kind`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values] * 2, kind)).save(path)
    return path


def greys(source: DataSource) -> list[list[int]]:
    """Rows of all pictures, sorted."""
    return sorted(np.asarray(image)[0, :, 0].tolist() for images in (source.train, source.val) for image, _ in images)


@pytest.mark.parametrize(
    ("brightest", "dark", "words"), [(65535, 15, "0..65535 (16 bits)"), (4095, 249, "0..4095 (12 bits)")]
)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_dark_pictures_of_a_set_have_the_range_of_the_set(
    tmp_path: Path, brightest: int, dark: int, words: str, kind: str
) -> None:
    """4000 would be nearly white in 12 bits; beside pictures of 16 bits it is dark."""
    files = {}
    for name in ("cat", "dog"):
        for index in range(3):
            files[f"{name}/{index}.png"] = deep(tmp_path / "set" / name / f"{index}.png", 0, brightest)
        files[f"{name}/3.png"] = deep(tmp_path / "set" / name / "3.png", 0, 4000)
        files[f"{name}/4.png"] = deep(tmp_path / "set" / name / "4.png", 0, 200)  # would be 200 of 255
    if kind == "shards":
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            for number, (name, path) in enumerate(files.items()):
                tar.add(path, f"{number}.png")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(b"0" if name.startswith("cat") else b"1"))
    source = open_data(f"imagefolder:{tmp_path / 'set'}" if kind == "folder" else f"wds:{tmp_path}")
    darkest = 200 * 255 // brightest
    assert greys(source) == [[0, darkest]] * 2 + [[0, dark]] * 2 + [[0, 255]] * 6
    (note,) = source.notes
    assert words in note
    assert "all of the 10 pictures" in note


def test_a_set_of_real_numbers_has_one_range_beside_that_of_whole_ones(tmp_path: Path) -> None:
    for index, name in enumerate(("cat", "dog")):
        deep(tmp_path / name / "0.tiff", 0, 0.5, kind=np.float32)
        deep(tmp_path / name / "1.tiff", 0, 100 + 100 * index, kind=np.float32)
        deep(tmp_path / name / "2.png", 0, 60_000)
        Image.new("RGB", (2, 2), (77, 0, 0)).save(tmp_path / name / "3.png")
    source = open_data(f"imagefolder:{tmp_path}")
    assert greys(source) == [[0, 0]] * 2 + [[0, 100], [0, 200]] + [[0, 233]] * 2 + [[77, 77]] * 2
    assert ["65535" in note for note in source.notes] == [True, False]


def test_a_picture_beyond_the_range_that_was_found_is_not_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upvits.calib_data.labelled.FULL_CHECK_LIMIT", 4)
    for name in ("cat", "dog"):
        for index in range(4):
            deep(tmp_path / name / f"{index}.png", 0, 50_000 if index == 1 else 4000)
    source = open_data(f"imagefolder:{tmp_path}")
    assert "4095" in source.notes[0]
    with pytest.raises(UserError, match=r"1\.png: values up to 50000, in a set whose other pictures go up to 4095"):
        greys(source)


def test_sets_of_eight_bits_say_nothing(tmp_path: Path) -> None:
    assert open_data(f"imagefolder:{two_classes(tmp_path, 3)}").notes == ()


@pytest.mark.parametrize("values", [[0, 70_000], [-5, 3]])
def test_values_of_no_range_are_unreadable(values: list[int]) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.array([values], np.int32)).save(stream, "TIFF")
    assert depth_in(stream.getvalue()) is None


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
    assert depth_in(bytes(content)) is None
