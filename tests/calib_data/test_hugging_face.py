"""Data sets of Hugging Face as their library writes them."""

import io
import json
import os
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


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a folder of the same name for one that it has seen."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the Ghostscript on the PATH makes."""
    program, witness = tmp_path / "bin" / "gs", tmp_path / "ran"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {witness}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return witness


def test_columns_that_are_neither_pictures_nor_labels_are_not_opened(tmp_path: Path, witness: Path) -> None:
    label = ([0, 1], datasets.ClassLabel(names=["no", "yes"]))
    script = ([{"bytes": EPS, "path": "x.eps"}], datasets.Image())
    spec = saved(tmp_path, train=rows(10, label=label, mask=script))
    assert np.asarray(open_data(spec, image_column="img").train[5][0]).shape == (8, 8, 3)
    with pytest.raises(UserError, match="holds Image, and no labels"):
        open_data(spec, image_column="img", label_column="mask")
    with pytest.raises(UserError, match="Cannot read the image 0"):
        open_data(spec, image_column="mask")
    assert not witness.exists()


@pytest.mark.parametrize("value", ["../../x.arrow", "/dev/zero", "", None, 3])
def test_a_saved_set_that_names_files_elsewhere_is_refused(tmp_path: Path, value: object) -> None:
    spec = saved(tmp_path, train=rows(4, label=([0, 1], datasets.Value("int64"))))
    state = tmp_path / "set/train/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": value}]}))
    with pytest.raises(UserError, match=r"state\.json is not valid"):
        open_data(spec)


@pytest.mark.parametrize("entry", [{"names_file": "/dev/zero"}, {"num_classes": 10**12}])
def test_classes_that_are_counted_or_lie_in_another_file_are_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    spec = saved(tmp_path, train=rows(4, label=([0, 1], datasets.Value("int64"))))
    info = tmp_path / "set/train/dataset_info.json"
    document = json.loads(info.read_text())
    document["features"]["label"] = {"_type": "ClassLabel", **entry}
    info.write_text(json.dumps(document))
    with pytest.raises(UserError, match="describes classes by"):
        open_data(spec)
    document["features"]["label"] = {"_type": "Value", "dtype": "int64"}
    (info.parent / "state.json").unlink()
    os.mkfifo(info.parent / "state.json")
    with pytest.raises(UserError, match="no regular file"):
        open_data(spec)


def test_labels_that_number_more_classes_than_there_are_are_refused(tmp_path: Path) -> None:
    for place, values in (("a", [0, 10**12]), ("b", [0, 100_000])):
        spec = saved(tmp_path / place, train=rows(4, label=(values, datasets.Value("int64"))))
        with pytest.raises(UserError, match="with the label 1"):
            open_data(spec)


@pytest.mark.parametrize(
    "places",
    ["http://localhost:1/x.parquet", "hf://datasets/a/b/c.parquet", "../x/*.png", "/etc/*", "zip://a::http://b/c"],
)
def test_a_card_that_names_files_elsewhere_is_refused(tmp_path: Path, places: str) -> None:
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '{places}'\n---\n")
    with pytest.raises(UserError, match="names files outside of its folder"):
        open_data(f"hfds:{tmp_path}")


def test_a_folder_of_pictures_with_a_card_is_read(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "data/train" / name / f"{index}.png")
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train/**\n---\n# Pets\n"
    )
    assert open_data(f"hfds:{tmp_path}").class_names == ("cat", "dog")
    (tmp_path / "README.md").write_text("---\na: &a [*a]\n---\n")
    with pytest.raises(UserError, match=r"The card .* is not valid"):
        open_data(f"hfds:{tmp_path}")


def test_damaged_tables_and_readers_for_other_things_are_refused(tmp_path: Path) -> None:
    for name, content in {
        "a.parquet": b"PAR1",
        "a.arrow": b"x",
        "a.tar": bytes(1024),
        "a.json": b"[" * 100_000,
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises((UserError, MissingDependencyError), match=r"no table|would be read as|Cannot load"):
            open_data(f"hfds:{folder}")


def test_a_table_that_describes_its_own_columns_is_checked(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    table = pyarrow.table({"image": [{"bytes": picture.getvalue(), "path": "a.png"}] * 4, "label": [0, 1, 0, 1]})
    label = {"_type": "ClassLabel", "names_file": "/dev/zero"}
    said = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="describes classes by names_file"):
        open_data(f"hfds:{tmp_path}")
    label.update(names=["no", "yes"])  # type: ignore[call-overload]
    del label["names_file"]
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(said)}), tmp_path / "train.parquet")
    assert open_data(f"hfds:{tmp_path}").class_names == ("no", "yes")
