"""Names of image sets, shards, and timm's sources with files that a test can write."""

import importlib.util
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import open_data
from upvits.calib_data.errors import MissingDependencyError, UserError


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("imagefoldr:/data", "imagefolder:DIR"),
        ("Demo2", "demo (embedded)"),
        ("dem", "demo (embedded)"),
        ("wsd:/shards", "wds:DIR"),
        ("imagefolder", "imagefolder:DIR"),
        ("imagefolder:", "imagefolder:DIR"),
        ("hfds/", "hfds:NAME"),
        ("", "torch:NAME"),
    ],
)
def test_unknown_form_is_refused_with_the_valid_ones(spec: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        open_data(spec)
    assert hint in caught.value.fix
    assert "hfds:NAME" in caught.value.fix
    assert repr(spec) in caught.value.what


def test_near_names_and_plain_folders_get_a_direct_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Did you mean imagefolder:DIR\?"):
        open_data("imagefoler:/data")
    with pytest.raises(UserError, match=f"write imagefolder:{tmp_path}"):
        open_data(str(tmp_path))
    (tmp_path / "labels.csv").write_text("file,label\n")
    with pytest.raises(UserError, match=f"write csv:{tmp_path}/labels.csv"):
        open_data(str(tmp_path / "labels.csv"))


def encoded(red: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (red, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples_of(count: int, start: int = 0) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for index in range(start, start + count):
        files[f"{index:04d}.cls"] = str(index % 3).encode()
        files[f"{index:04d}.jpg"] = encoded(index)
    return files


@pytest.mark.parametrize("separator", [":", "/"])
def test_shards(tmp_path: Path, separator: str) -> None:
    write_shard(tmp_path / "set-train-0000.tar", samples_of(6))
    write_shard(tmp_path / "set-train-0001.tar", samples_of(4, start=6))
    write_shard(tmp_path / "set-val-0000.tar", samples_of(5, start=100))
    source = open_data(f"wds{separator}{tmp_path}")
    assert source.class_names == ("0", "1", "2")
    assert source.train.labels == tuple(index % 3 for index in range(10))
    assert source.val.labels == tuple(index % 3 for index in range(100, 105))
    image, label = source.train[7]
    assert (image.mode, image.size, label) == ("RGB", (16, 12), 1)
    assert abs(np.asarray(image)[2, 2, 0].item() - 7) <= 3


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # open files
def test_shards_equal_what_timm_streams(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    from timm.data import create_dataset

    write_shard(tmp_path / "train.tar", samples_of(6))
    write_shard(tmp_path / "val.tar", samples_of(6, start=50))
    info = {
        "splits": {
            "train": {"name": "train", "filenames": ["train.tar"], "shard_lengths": [6], "num_samples": 6},
            "validation": {"name": "validation", "filenames": ["val.tar"], "shard_lengths": [6], "num_samples": 6},
        },
        "class_names": ["x", "y", "z"],
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    source = open_data(f"wds:{tmp_path}")
    assert source.class_names == ("x", "y", "z")
    streamed = list(create_dataset("wds/", root=str(tmp_path), split="validation"))
    assert [(image.tobytes(), label) for image, label in streamed] == [
        (image.tobytes(), label) for image, label in source.val
    ]


def test_shards_without_labels_and_with_damage(tmp_path: Path) -> None:
    pictures = {f"{index}.png": encoded(index, "PNG") for index in range(150)}
    write_shard(tmp_path / "val" / "0.tar", dict(list(pictures.items())[:10]))
    pictures["17.png"] = pictures["17.png"][:-30]
    write_shard(tmp_path / "train" / "0.tar", pictures)
    source = open_data(f"wds:{tmp_path}")
    assert source.class_names is None
    assert len(source.train) == 149
    assert source.skipped == (f"{tmp_path / 'train' / '0.tar'}:17.png",)


def test_bad_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No folder of shards"):
        open_data("wds:/nowhere/at/all")
    with pytest.raises(UserError, match="No training shards"):
        open_data(f"wds:{tmp_path}")
    write_shard(tmp_path / "train.tar", samples_of(4))
    (tmp_path / "val.tar").write_bytes(b"no tar file at all")
    with pytest.raises(UserError, match=r"Cannot read the shard .*val\.tar"):
        open_data(f"wds:{tmp_path}")
    write_shard(tmp_path / "val.tar", {"1.jpg": encoded(1)})
    with pytest.raises(UserError, match=r"no \.cls file"):
        open_data(f"wds:{tmp_path}")


def write_mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 10)):
        images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


@pytest.mark.parametrize("prefix", ["torch:mnist:", "torch/mnist:", "torch:MNIST:"])
def test_torchvision_set(tmp_path: Path, prefix: str) -> None:
    write_mnist(tmp_path)
    source = open_data(f"{prefix}{tmp_path}")
    assert source.class_names is not None
    assert (len(source.train), len(source.val), len(source.class_names)) == (20, 10, 10)
    image, label = source.train[13]
    assert (image.mode, image.size, label) == ("RGB", (28, 28), 3)
    assert np.asarray(image)[0, 1].tolist() == [(13 * 784 + 1) % 256] * 3


def test_unknown_torchvision_set() -> None:
    with pytest.raises(UserError, match="cifar11") as caught:
        open_data("torch:cifar11")
    assert "cifar10" in caught.value.fix
    with pytest.raises(UserError, match="imagefolder:/x"):
        open_data("torch/image_folder:/x")


def test_torchvision_set_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(MissingDependencyError, match="could not be downloaded") as caught:
        open_data(f"torch:cifar10:{tmp_path / 'cache'}")
    assert caught.value.exit_code == 3
    assert "torch:cifar10:DIR" in caught.value.fix
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_hugging_face_sets_need_their_package() -> None:
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        open_data("hfds/food101")


def test_hugging_face_set_from_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split, count in (("train", 3), ("validation", 2)):
        for name in ("no", "yes"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("L", (9, 7), index + 10 * len(name)).save(folder / f"{index}.png")
    source = open_data(f"hfds:{tmp_path / 'set'}")
    assert source.class_names == ("no", "yes")
    assert sorted(source.train.labels) == [0, 0, 0, 1, 1, 1]
    assert sorted(source.val.labels) == [0, 0, 1, 1]
    for image, label in source.train:
        assert (image.mode, image.size) == ("RGB", (9, 7))
        assert np.asarray(image)[0, 0, 0] // 10 == (2, 3)[label]
