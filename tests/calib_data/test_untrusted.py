"""Pictures, shards and places from strangers: nothing is started, nothing hangs, nothing fills memory."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from upvits.calib_data import Images, open_data
from upvits.calib_data.decoding import depth_in, load_rgb
from upvits.calib_data.documents import read_regular
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.printable import printable, printable_json

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"


def encoded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def two_classes(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(3):
            (folder / name / f"{index}.png").write_bytes(encoded("PNG"))
    return folder


def test_a_picture_that_pillow_would_give_to_another_program_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript, witness = tmp_path / "bin" / "gs", tmp_path / "ran"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {witness}\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:{os.environ['PATH']}")
    folder = two_classes(tmp_path / "set")
    for picture in folder.rglob("*.png"):
        picture.write_bytes(EPS)
    with pytest.raises(UserError, match="cannot be read"):
        open_data(f"imagefolder:{folder}")
    assert not witness.exists()


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM"])
def test_known_formats_are_read_whatever_their_name_says(kind: str, tmp_path: Path) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    more = {"save_all": True, "append_images": [Image.new("RGB", (20, 24))]} if kind == "MPO" else {}
    (tmp_path / "photo.jpg").write_bytes(encoded(kind, **more))
    assert load_rgb(tmp_path / "photo.jpg").size == (20, 24)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "JPEG2000", "PDF"])
def test_other_formats_are_no_pictures(kind: str) -> None:
    assert depth_in(encoded(kind)) is None


@pytest.mark.parametrize("what", ["pipe", "device", "loop", "dangling", "folder"])
def test_what_is_no_regular_file_is_not_opened(what: str, tmp_path: Path) -> None:
    folder = two_classes(tmp_path)
    strange = folder / "cat" / "x.jpg"
    if what == "pipe":
        os.mkfifo(strange)
    elif what == "folder":
        strange.mkdir()
    else:
        strange.symlink_to({"device": "/dev/zero", "loop": "x.jpg", "dangling": "nothing"}[what])
    if what == "folder":
        assert len(open_data(f"imagefolder:{folder}").train) > 0
        return
    with pytest.raises(UserError, match="1 of 7 images"):
        open_data(f"imagefolder:{folder}")
    with pytest.raises(UserError, match=r"no regular file|cannot be read"):
        read_regular(strange, fix="")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(1 << 40)  # without contents
    with pytest.raises(UserError, match="MiB"):
        load_rgb(tmp_path / "x.jpg")


def shards(folder: Path, label: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for name, content in (("a.png", encoded("PNG")), ("a.cls", b"0"), ("b.png", encoded("PNG")),
                                  ("b.cls", label)):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize(
    "label", [b"-5", b"-1", b"100000000", b"1_0", b"\xc2\xb2", b"9" * 5000, b"", b"1.5"], ids=lambda label: label[:9]
)
def test_labels_of_shards_are_bounded_before_anything_is_made_of_them(label: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.cls file"):
        open_data(f"wds:{shards(tmp_path, label)}")


def test_a_label_may_end_in_a_line_feed(tmp_path: Path) -> None:
    folder = shards(tmp_path, b" 1\n")
    assert open_data(f"wds:{folder}").train.labels == (0, 1)


@pytest.mark.parametrize("label", [-2, 100_000])
def test_labels_of_any_source_are_bounded(label: int) -> None:
    with pytest.raises(UserError, match="label"):
        Images([0, label], lambda index: Image.new("RGB", (1, 1)))


def test_a_shard_that_is_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(shards(tmp_path, b"1") / "train-2.tar")
    with pytest.raises(UserError, match="no regular file"):
        open_data(f"wds:{tmp_path}")


@pytest.mark.parametrize("spec", ["imagefolder:", "wds:", "torch:cifar10:"])
@pytest.mark.parametrize("place", ["~nosuchuser/x", "a" * 300, "a\0b"], ids=["user", "long", "null"])
def test_places_that_cannot_be(spec: str, place: str) -> None:
    with pytest.raises(UserError):
        open_data(spec + place)


def test_a_circle_of_links_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match="cannot be read"):
        user_path(tmp_path / "a")
    with pytest.raises(UserError, match="empty"):
        user_path("")
    assert user_path(tmp_path / "new" / "place") == tmp_path / "new" / "place"


def test_control_characters_become_question_marks() -> None:
    assert printable("\x1b[31mred\u202e\x9b\udce9\r\tça va\n") == "?[31mred?????ça va\n"
    assert printable("abcdefghij", 3) == "ab...j"
    assert printable_json('{"a": "\x9b\u202e\u00e9"}') == '{"a": "\\u009b\\u202eé"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("long.csv", f"file,label\n{'a' * 300}.jpg,a\n0.jpg,b\n"),
        ("ending.csv", f"file,label\n{'a' * 253},a\n0.jpg,b\n"),
        ("digits.csv", "file,label\n" + "".join(f"{n}.jpg,{'1' * 5000}{n}\n" for n in range(3))),
        ("label.json", f'[{{"file": "0.jpg", "label": {"1" * 4500}}}, {{"file": "1.jpg", "label": 1}}]'),
        ("file.json", f'[{{"file": {"1" * 4500}, "label": 0}}, {{"file": "1.jpg", "label": 1}}]'),
    ],
)
def test_rows_of_a_table_that_no_file_system_and_no_number_can_hold_are_refused(
    tmp_path: Path, name: str, text: str
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError):
        open_data(f"csv:{tmp_path / name}")


@pytest.mark.parametrize(
    ("name", "row"), [("a.csv", "a,b\n"), ("a.jsonl", "{}\n"), ("a.txt", "a b\n"), ("a.csv", ",\n")]
)
def test_a_table_of_separators_is_refused_before_it_fills_memory(name: str, row: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(row * 3_000_000)
    with pytest.raises(UserError, match="is not valid"):
        open_data(f"csv:{tmp_path / name}")


@pytest.mark.parametrize("name", ["1.png", "1.cls", "1.json"])
def test_a_shard_that_says_a_size_below_zero_is_refused(name: str, tmp_path: Path) -> None:
    said = b"11 size=-5\n"
    header, member = tarfile.TarInfo("x"), tarfile.TarInfo(name)
    header.type, header.size, member.size = tarfile.XHDTYPE, len(said), 10
    blocks = [header.tobuf(tarfile.USTAR_FORMAT), said.ljust(512, b"\0"), member.tobuf(tarfile.USTAR_FORMAT)]
    (tmp_path / "train.tar").write_bytes(b"".join(blocks) + b"x".ljust(512, b"\0") + bytes(1024))
    with pytest.raises(UserError, match=r"Cannot read the shard|No images"):
        open_data(f"wds:{tmp_path}")


def test_files_of_a_torchvision_set_that_are_none_are_one_message(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (tmp_path / "MNIST/processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(Harmful(), tmp_path / "MNIST/processed" / name)
    with pytest.raises(MissingDependencyError, match="is not whole"):
        open_data(f"torch:mnist:{tmp_path}")
    assert not (tmp_path / "ran").exists()
