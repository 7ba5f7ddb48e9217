"""Numbers of classes: class maps, orders of names, names that a network brings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import DataSource, open_data
from upvits.calib_data.classes import is_ambiguous, read_class_map, with_outputs
from upvits.calib_data.errors import UserError

NAMES = [str(number) for number in range(1, 13)]
NATURAL = tuple(NAMES)
TEXT = ("1", "10", "11", "12", "2", "3", "4", "5", "6", "7", "8", "9")


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """Classes 1 to 12, each with two training pictures and one validation picture, grey as the class."""
    for name in NAMES:
        for split, count in (("train", 2), ("val", 1)):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (int(name),) * 3).save(folder / f"{index}.png")
    return tmp_path / "set"


def seen(source: DataSource) -> dict[int, int]:
    """Grey level by label, of the validation images."""
    return {label: np.asarray(image)[0, 0, 0].item() for image, label in source.val}


def map_file(folder: Path, content: str, name: str = "map.txt") -> Path:
    (folder / name).write_text(content)
    return folder / name


def test_the_two_orders_number_the_same_images_differently(numbers: Path) -> None:
    natural = open_data(f"imagefolder:{numbers}")
    assert natural.class_names == NATURAL
    assert is_ambiguous(natural)
    assert seen(natural) == {index: index + 1 for index in range(12)}
    text = open_data(f"imagefolder:{numbers}", class_order="text")
    assert text.class_names == TEXT
    assert not is_ambiguous(text)
    assert seen(text) == {index: int(name) for index, name in enumerate(TEXT)}
    assert text.train.labels.count(1) == 2
    assert text.digest != natural.digest
    settled = open_data(f"imagefolder:{numbers}", class_order="natural")
    assert (settled.class_names, settled.digest, is_ambiguous(settled)) == (NATURAL, natural.digest, False)


def test_names_of_one_order_are_not_ambiguous(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    assert not is_ambiguous(open_data(f"imagefolder:{tmp_path}"))
    assert not is_ambiguous(open_data("demo"))


@pytest.mark.parametrize("kind", ["text", "json list", "name to number", "number to name"])
def test_class_maps(numbers: Path, tmp_path: Path, kind: str) -> None:
    order = list(reversed(NAMES))
    content = {
        "text": "\n".join(order) + "\n\n",
        "json list": json.dumps(order),
        "name to number": json.dumps({name: number for number, name in enumerate(order)}),
        "number to name": json.dumps(dict(enumerate(order))),
    }[kind]
    source = open_data(f"imagefolder:{numbers}", class_map=map_file(tmp_path, content))
    assert source.class_names == tuple(order)
    assert seen(source) == {index: 12 - index for index in range(12)}
    assert not is_ambiguous(source)


def test_a_class_map_must_fit(numbers: Path, tmp_path: Path) -> None:
    wrong = map_file(tmp_path, "\n".join([*NAMES[2:], "cat"]))
    with pytest.raises(UserError, match=r"misses 1, 2 and names cat") as caught:
        open_data(f"imagefolder:{numbers}", class_map=wrong)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="names cat"):
        open_data(f"imagefolder:{numbers}", class_map=map_file(tmp_path, "\n".join([*NAMES, "cat"])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na\n", "'a' twice"),
        ("a\n\nb\n", "without a name"),
        ("", "no classes"),
        ('{"a": 0, "b": 0}', "number 0 twice"),
        ('{"a": -1, "b": 0}', "number -1"),
        ('{"a": 100000000}', "number 100000000"),
        ('{"a": "b"}', "'a' where a number is"),
        ('{"a": [1]}', "not valid"),
        ('{"a": 0', "not valid"),
    ],
)
def test_class_maps_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_class_map(map_file(tmp_path, content))
    assert "one a line" in caught.value.fix or "a line" in caught.value.fix


def test_a_class_map_is_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no regular file"):
        read_class_map(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text"):
        read_class_map(tmp_path / "x")


def test_data_with_some_of_the_classes_of_a_network(numbers: Path, tmp_path: Path) -> None:
    sparse = map_file(tmp_path, json.dumps({name: 10 * int(name) for name in NAMES}))
    source = open_data(f"imagefolder:{numbers}", class_map=sparse)
    assert sorted(set(source.val.labels)) == list(range(10, 121, 10))
    assert source.class_names is not None
    assert (len(source.class_names), source.class_names[10:12]) == (121, ("1", "class 11"))
    whole = with_outputs(source, 1000)
    assert whole.class_names is not None
    assert (len(whole.class_names), whole.class_names[-1], whole.val.labels) == (1000, "class 999", source.val.labels)


def test_validation_with_a_subset_of_the_classes(numbers: Path, tmp_path: Path) -> None:
    for name in NAMES[3:]:
        for file in (numbers / "val" / name).iterdir():
            file.unlink()
    with pytest.raises(UserError, match="only in training: 10, 11, 12") as caught:
        open_data(f"imagefolder:{numbers}")
    assert "class_map" in caught.value.fix
    for source in (
        open_data(f"imagefolder:{numbers}", class_map=map_file(tmp_path, "\n".join(TEXT))),
        open_data(f"imagefolder:{numbers}", class_names=TEXT),
    ):
        assert source.class_names == TEXT
        assert source.val.labels == (0, 4, 5)
        assert len(source.train) == 24


def test_names_of_the_network_decide_where_they_cover_all_folders(numbers: Path) -> None:
    shuffled = (*NAMES[6:], "other", *NAMES[:6])
    source = open_data(f"imagefolder:{numbers}", class_names=shuffled)
    assert source.class_names == shuffled
    assert not is_ambiguous(source)
    assert seen(source)[7] == 1
    assert open_data(f"imagefolder:{numbers}", class_names=NAMES[:11]).class_names == NATURAL


def test_a_class_map_needs_labels(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match="no labels"):
        open_data(f"imagefolder:{tmp_path}", class_map=map_file(tmp_path, "a\nb\n", "map"))
