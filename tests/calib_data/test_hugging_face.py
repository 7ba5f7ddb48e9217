"""Data sets of Hugging Face as their library writes them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import open_data
from upvits.calib_data.errors import MissingDependencyError, UserError

datasets = pytest.importorskip("datasets", reason="the Python package datasets is not installed")


def rows(count: int, **labels: Any) -> Any:
    """Pictures whose red is their place, in the column `img`, and columns of labels."""
    features = {"img": datasets.Image()}
    columns: dict[str, list[Any]] = {"img": [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(count)]}
    for name, (values, kind) in labels.items():
        columns[name], features[name] = [values[index % len(values)] for index in range(count)], kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(folder: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(folder / "set"))
    return f"hfds:{folder / 'set'}"


def test_columns_are_found_by_type(tmp_path: Path) -> None:
    label = ([0, 1], datasets.ClassLabel(names=["no", "yes"]))
    source = open_data(saved(tmp_path, train=rows(10, label=label), test=rows(4, label=label)))
    assert source.class_names == ("no", "yes")
    assert (Counter(source.train.labels), Counter(source.val.labels)) == ({0: 5, 1: 5}, {0: 2, 1: 2})
    assert np.asarray(source.train[7][0])[0, 0, 0] == 7
    assert not source.numbered_by_name


def test_several_columns_of_labels_are_named(tmp_path: Path) -> None:
    fine = ([0, 1], datasets.ClassLabel(names=["cat", "dog"]))
    coarse = ([0], datasets.ClassLabel(names=["pet", "wild"]))
    spec = saved(tmp_path, train=rows(10, fine=fine, coarse=coarse))
    with pytest.raises(UserError, match="holds the labels") as caught:
        open_data(spec)
    assert "fine, coarse may be" in caught.value.why
    assert "label_column" in caught.value.fix
    assert open_data(spec, label_column="fine").class_names == ("cat", "dog")
    assert open_data(spec, label_column="none").class_names is None
    with pytest.raises(UserError, match="no column x"):
        open_data(spec, label_column="x")
    with pytest.raises(UserError, match="no images in fine"):
        open_data(spec, image_column="fine", label_column="fine")


def test_a_training_split_alone_and_unlabelled_tests(tmp_path: Path) -> None:
    label = ([0, 1], datasets.ClassLabel(names=["no", "yes"]))
    none = ([-1], datasets.ClassLabel(names=["no", "yes"]))
    source = open_data(saved(tmp_path, train=rows(10, label=label), test=rows(3, label=none)))
    assert (Counter(source.train.labels), Counter(source.val.labels)) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    assert source.notes == ("test: its 3 images have no labels and were left out.",)


def test_labels_as_text_and_as_plain_numbers(tmp_path: Path) -> None:
    text = (["10", "2", "cat"], datasets.Value("string"))
    source = open_data(saved(tmp_path / "a", train=rows(30, label=text)))
    assert source.class_names == ("2", "10", "cat")
    assert Counter(source.train.labels + source.val.labels) == {0: 10, 1: 10, 2: 10}
    assert source.numbered_by_name
    numbers = ([0, 1, 2], datasets.Value("int64"))
    source = open_data(saved(tmp_path / "b", train=rows(30, label=numbers)))
    assert source.class_names == ("0", "1", "2")
    assert Counter(source.train.labels + source.val.labels) == {0: 10, 1: 10, 2: 10}


def test_pictures_of_more_than_eight_bits_have_one_range(tmp_path: Path) -> None:
    """Five dark ones are in the training split alone, and the bright one is in the other."""
    made = [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (4000, 4000, 4000, 4000, 50_000, 65_535)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    splits = [
        datasets.Dataset.from_dict({"image": part, "label": [0, 1] * (len(part) // 2)}, features=features)
        for part in (made[:4], made[4:])
    ]
    source = open_data(saved(tmp_path, train=splits[0], test=splits[1]))
    assert [np.asarray(image)[0, 0].tolist() for image, _ in source.train] == [[15] * 3] * 4
    assert np.asarray(source.val[1][0])[0, 0].tolist() == [255] * 3
    assert "65535" in source.notes[0]


def test_versions_that_run_programs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(MissingDependencyError, match=r"newer package datasets than 3\.6\.0"):
        open_data(f"hfds:{tmp_path}")
