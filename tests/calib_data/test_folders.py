"""Image folders: every layout, every kind of picture file, every kind of damage."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import open_data, write_imagefolder
from upvits.calib_data.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def picture(path: Path, colour: tuple[int, int, int] = (200, 40, 90)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), colour).save(path)
    return path


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    """Two classes, five training and two validation pictures of each."""
    for split, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                picture(tmp_path / "set" / split / name / f"{index}.png", (index, len(name), len(split)))
    return tmp_path / "set"


def refusal(spec: object) -> UserError:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        open_data(f"imagefolder:{spec}")
    assert time.monotonic() - start < 10
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return caught.value


def test_split_folder(split_folder: Path) -> None:
    source = open_data(f"imagefolder:{split_folder}")
    assert source.class_names == ("cat", "dog")
    assert source.train.labels == (0,) * 5 + (1,) * 5
    assert source.val.labels == (0, 0, 1, 1)
    image, label = source.val[3]
    assert (image.mode, image.size, label) == ("RGB", (24, 20), 1)
    assert image.getpixel((3, 3)) == (1, 3, 3)


@pytest.mark.parametrize("name", ["validation", "valid", "test", "Val"])
def test_other_names_of_the_validation_folder(split_folder: Path, name: str) -> None:
    expected = open_data(f"imagefolder:{split_folder}").val.labels
    (split_folder / "val").rename(split_folder / name)
    assert open_data(f"imagefolder:{split_folder}").val.labels == expected


def test_classes_alone_are_split_the_same_way_every_time(tmp_path: Path) -> None:
    for name, count in (("a", 50), ("b", 20), ("single", 1)):
        for index in range(count):
            picture(tmp_path / name / f"{index}.png", (index, 0, 0))
    first, second = (open_data(f"imagefolder:{tmp_path}") for _ in range(2))
    assert first.digest == second.digest
    assert [first.val.labels.count(label) for label in range(3)] == [10, 4, 0]
    assert [first.train.labels.count(label) for label in range(3)] == [40, 16, 1]
    reds = [
        {split[i][0].getpixel((0, 0)) for i in range(len(split)) if split.labels[i] == 0}
        for split in (first.train, first.val)
    ]
    assert not reds[0] & reds[1]
    assert len(reds[0] | reds[1]) == 50
    # A picture more moves no other one of another class.
    picture(tmp_path / "b" / "new.png")
    third = open_data(f"imagefolder:{tmp_path}")
    assert {third.val[i][0].getpixel((0, 0)) for i, label in enumerate(third.val.labels) if label == 0} == reds[1]


def test_unlabelled_folder(tmp_path: Path) -> None:
    for index in range(10):
        picture(tmp_path / f"{index}.jpg")
    source = open_data(f"imagefolder:{tmp_path}")
    assert source.class_names is None
    assert (len(source.train), len(source.val)) == (8, 2)
    assert set(source.train.labels) == {-1}
    assert source.train[0][1] == -1


def test_classes_in_timm_order_with_nested_and_hidden_files(tmp_path: Path) -> None:
    for name in ("10", "9", "B", "a"):
        picture(tmp_path / name / "deep" / "er" / "x.PNG")
        picture(tmp_path / name / "y.JPeG")
        (tmp_path / name / "._y.jpg").write_bytes(b"what macOS leaves behind")
        (tmp_path / name / "notes.txt").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    source = open_data(f"imagefolder:{tmp_path}")
    assert source.class_names == ("9", "10", "a", "B")
    assert len(source.train) + len(source.val) == 8
    assert source.skipped == ()


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / name / "1.png")
        picture(tmp_path / name / "2.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    source = open_data(f"imagefolder:{tmp_path}")
    assert len(source.train) + len(source.val) == 4


ODD = {
    "grey.png": lambda: Image.new("L", (8, 8), 100),
    "grey_alpha.png": lambda: Image.new("LA", (8, 8), (100, 7)),
    "rgba.png": lambda: Image.new("RGBA", (8, 8), (100, 100, 100, 7)),
    "palette.png": lambda: Image.new("RGB", (8, 8), (100, 100, 100)).quantize(4),
    "palette.gif": lambda: Image.new("RGB", (8, 8), (100, 100, 100)).quantize(4),
    "cmyk.jpg": lambda: Image.new("CMYK", (8, 8), (155, 155, 155, 0)),
    "sixteen.png": lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
    "sixteen.tiff": lambda: Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)),
    "bilevel.bmp": lambda: Image.new("1", (8, 8), 1),
}


@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, name: str) -> None:
    ODD[name]().save(tmp_path / name)
    image, _ = open_data(f"imagefolder:{tmp_path}").train[0]
    assert image.mode == "RGB"
    expected = 255 if name.startswith("bilevel") else 100
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2


def test_palette_with_transparent_colours(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (100, 100, 100)).quantize(4)
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    loaded, _ = open_data(f"imagefolder:{tmp_path}").train[0]
    assert loaded.getpixel((0, 0)) == (100, 100, 100)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(tmp_path / "x.jpg", exif=exif)
    loaded, _ = open_data(f"imagefolder:{tmp_path}").train[0]
    assert loaded.size == (10, 30)


def test_digest_tells_content_label_and_split_and_not_the_place(split_folder: Path, tmp_path: Path) -> None:
    original = open_data(f"imagefolder:{split_folder}").digest
    moved = tmp_path / "elsewhere"
    shutil.copytree(split_folder, moved)
    assert open_data(f"imagefolder:{moved}").digest == original
    first = moved / "train" / "cat" / "0.png"
    picture(first, (9, 9, 9))
    changed = open_data(f"imagefolder:{moved}").digest
    assert changed != original
    first.rename(moved / "train" / "dog" / "0b.png")
    assert open_data(f"imagefolder:{moved}").digest not in (original, changed)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def damage_text(path: Path) -> None:
    path.write_text("<html>404</html>")


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_middle(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage", [damage_truncate, damage_text, damage_empty, damage_middle])
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_one_damaged_image_among_good_ones_is_left_out(
    tmp_path: Path, damage: Callable[[Path], object], extension: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for index in range(120):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "ab"[index % 2] / f"{index}.{extension}")
    bad = tmp_path / "a" / f"6.{extension}"
    damage(bad)
    source = open_data(f"imagefolder:{tmp_path}")
    assert source.skipped == (str(bad),)
    assert len(source.train) + len(source.val) == 119
    damage(tmp_path / "b" / f"7.{extension}")
    error = refusal(tmp_path)
    assert "2 of 120" in error.what
    assert str(bad) in str(error)


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere").what
    assert "is a file" in refusal(picture(tmp_path / "x.png")).what


def test_empty_folder(tmp_path: Path) -> None:
    assert "No images" in refusal(tmp_path).what
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "readme.txt").write_text("x")
    assert "No images" in refusal(tmp_path).what


def test_empty_validation_folder(split_folder: Path) -> None:
    shutil.rmtree(split_folder / "val")
    (split_folder / "val").mkdir()
    assert str(split_folder / "val") in refusal(split_folder).what


def test_class_lists_differ(split_folder: Path) -> None:
    picture(split_folder / "val" / "horse" / "1.png")
    shutil.rmtree(split_folder / "val" / "cat")
    error = refusal(split_folder)
    assert "only in training: cat" in error.what
    assert "only in validation: horse" in error.what


def test_single_class(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "val" / "cat" / "1.png")
    assert "Only one class" in refusal(tmp_path).what


def test_loose_images_beside_classes(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "loose.png")
    assert "loose.png" in refusal(tmp_path).what


def test_unreadable_folder(split_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = split_folder / "train" / "cat"
    locked.chmod(0)
    if os.access(locked, os.R_OK):  # root reads everything: let the system call fail as it does for others
        listing = os.scandir

        def scandir(path: str) -> Any:
            if path == str(locked):
                raise PermissionError(13, "Permission denied")
            return listing(path)

        monkeypatch.setattr(os, "scandir", scandir)
    try:
        error = refusal(split_folder)
    finally:
        locked.chmod(0o755)
    assert str(locked) in error.what
    assert "Permission denied" in error.what


def test_an_image_that_breaks_after_opening_is_named(split_folder: Path) -> None:
    source = open_data(f"imagefolder:{split_folder}")
    damage_text(split_folder / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"cat/0\.png"):
        source.train[0]


def test_drawn_folder_is_read_back_exactly(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "drawn", "train", 24, 64)
    write_imagefolder(tmp_path / "drawn", "val", 12, 64)
    source, demo = open_data(f"imagefolder:{tmp_path / 'drawn'}"), open_data("demo")
    assert (len(source.train), len(source.val)) == (24, 12)
    assert source.class_names is not None
    assert demo.class_names is not None
    assert sorted(source.class_names) == sorted(demo.class_names)
    pixels = {(demo.class_names[label], image.tobytes()) for image, label in (demo.train[i] for i in range(24))}
    assert {(source.class_names[label], image.tobytes()) for image, label in source.train} == pixels


@pytest.mark.skipif(not (SHARED / "clothing").is_dir(), reason="needs the photographs in ../shared/data/clothing")
def test_real_photographs() -> None:
    source = open_data(f"imagefolder:{SHARED / 'clothing'}")
    assert source.class_names is not None
    assert (len(source.train), len(source.val), len(source.class_names)) == (1817, 341, 10)
    assert source.skipped == ()
    image, label = source.val[0]
    assert min(image.size) >= 224
    assert source.class_names[label] == "dress"
