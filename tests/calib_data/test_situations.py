"""Data as people have them: every situation with the right numbers of labels, or refused in words."""

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upvits.calib_data import DataSource, open_data
from upvits.calib_data.classes import is_ambiguous
from upvits.calib_data.errors import UserError


def picture(path: Path, red: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path)
    return path


def classes(folder: Path, count: int = 5, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for name in names:
        for index in range(count):
            picture(folder / name / f"{index}.png", index)
    return folder


def counts(source: DataSource) -> tuple[dict[int, int], dict[int, int]]:
    """Images by label in both splits."""
    return dict(Counter(source.train.labels)), dict(Counter(source.val.labels))


def test_class_folders_one_or_two_levels_deeper(tmp_path: Path) -> None:
    classes(tmp_path / "archive" / "photos")
    (tmp_path / "__MACOSX").mkdir()
    source = open_data(f"imagefolder:{tmp_path}")
    assert source.class_names == ("cat", "dog")
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    classes(tmp_path / "b" / "set" / "train" / "images")
    classes(tmp_path / "b" / "set" / "val" / "images", 2)
    assert counts(open_data(f"imagefolder:{tmp_path / 'b'}")) == ({0: 5, 1: 5}, {0: 2, 1: 2})


@pytest.mark.parametrize("test", ["test", "test/test", "test/unknown"])
def test_unlabelled_test_images_are_left_out(tmp_path: Path, test: str) -> None:
    classes(tmp_path / "train")
    for index in range(3):
        picture(tmp_path / test / f"{index}.png")
    source = open_data(f"imagefolder:{tmp_path}")
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    assert source.notes == ("test: its 3 images have no labels and were left out.",)
    classes(tmp_path / "val", 2)
    assert counts(open_data(f"imagefolder:{tmp_path}")) == ({0: 5, 1: 5}, {0: 2, 1: 2})


def table(folder: Path, name: str, content: str) -> Path:
    classes(folder / "pictures")
    (folder / name).write_text(content)
    return folder / name


ROWS = [(f"pictures/{name}/{index}.png", name) for name in ("cat", "dog") for index in range(5)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "file,label\n" + "".join(f"{file},{label}\n" for file, label in ROWS)),
        ("t.csv", "Label;Filename\n" + "".join(f"{label};{file}\n" for file, label in ROWS)),
        ("t.csv", "".join(f'"{file}",{label}\n' for file, label in ROWS)),
        ("t.tsv", "path\tclass\n" + "".join(f"{file}\t{label}\n" for file, label in ROWS)),
        ("t.txt", "".join(f"{file} {label}\n" for file, label in ROWS)),
        ("t.csv", "image_id,label\n" + "".join(f"{f.removeprefix('pictures/')[:-4]},{x}\n" for f, x in ROWS)),
        ("t.jsonl", "".join(json.dumps({"file_name": file, "label": label}) + "\n" for file, label in ROWS)),
        ("t.json", json.dumps([{"image": file, "category": label, "width": 8} for file, label in ROWS])),
    ],
)
def test_tables_of_files_and_labels(tmp_path: Path, name: str, content: str) -> None:
    source = open_data(f"csv:{table(tmp_path, name, content)}")
    assert source.class_names == ("cat", "dog")
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})


def test_tables_with_numbers_and_splits(tmp_path: Path) -> None:
    rows = "".join(
        f"pictures/{name}/{index}.png,{number}.0,{'valid' if index == 0 else 'train'}\n"
        for number, name in enumerate(("dog", "cat")) for index in range(5)
    )  # fmt: skip
    source = open_data(f"csv:{table(tmp_path, 't.csv', 'file,label,split' + chr(10) + rows)}")
    assert source.class_names == ("0", "1")
    assert not is_ambiguous(source)
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    lines = "".join(f"pictures/cat/{n % 5}.png,{n + 1}\n" for n in range(12))
    twelve = open_data(f"csv:{table(tmp_path, 'u.csv', 'file,label' + chr(10) + lines)}")
    assert twelve.class_names == tuple(str(n) for n in range(1, 13))
    assert is_ambiguous(twelve)


def test_tables_in_a_folder_and_columns_by_name(tmp_path: Path) -> None:
    line = "{file},{label},x\n"
    content = "where,what,label\n" + "".join(line.format(file=file, label=label) for file, label in ROWS)
    table(tmp_path, "train.csv", content)
    (tmp_path / "val.csv").write_text("where,what,label\n" + "".join(f"{f},{x},x\n" for f, x in ROWS[::5]))
    with pytest.raises(UserError, match="Which column") as caught:
        open_data(f"csv:{tmp_path}")
    assert "image_column" in caught.value.fix
    source = open_data(f"csv:{tmp_path}", image_column="where", label_column="what")
    assert counts(source) == ({0: 5, 1: 5}, {0: 1, 1: 1})
    bare = open_data(f"csv:{tmp_path / 'train.csv'}", image_column="where", label_column="none")
    assert bare.class_names is None


def absolute(place: str) -> str:
    return "file,label\n" + "".join(f"{place}/{file},{label}\n" for file, label in ROWS)


def test_absolute_paths_below_the_table(tmp_path: Path) -> None:
    source = open_data(f"csv:{table(tmp_path, 't.csv', absolute(str(tmp_path)))}")
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})


def test_the_advice_about_files_elsewhere_works(tmp_path: Path) -> None:
    """The pictures are where the table says, and the table is not."""
    table(tmp_path / "data", "t.csv", "")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "t.csv").write_text(absolute(str(tmp_path / "data")))
    with pytest.raises(UserError, match=f"names files below {tmp_path}/data/pictures") as caught:
        open_data(f"csv:{tmp_path / 'home' / 't.csv'}")
    assert f"Copy the table into {tmp_path}/data/pictures" in caught.value.fix
    shutil.copy(tmp_path / "home" / "t.csv", tmp_path / "data" / "pictures")
    copied = open_data(f"csv:{tmp_path / 'data' / 'pictures' / 't.csv'}")
    assert counts(copied) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    assert np.asarray(copied.val[0][0]).shape == (8, 8, 3)


@pytest.mark.parametrize("start", ["/kaggle/input/pets", "C:\\\\Users\\\\me\\\\pets", "/"])
def test_absolute_paths_of_another_machine(tmp_path: Path, start: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    content = absolute(start.replace("\\\\", "\\").rstrip("/"))
    source = open_data(f"csv:{table(tmp_path, 't.csv', content)}")
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    assert "paths begin with" in caplog.text
    with pytest.raises(UserError, match="not on this machine"):
        open_data(f"csv:{table(tmp_path, 't.csv', content.replace('.png', '.gif'))}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\n/etc/passwd,a\n", "files below /etc"),
        ("file,label\n/etc/passwd,a\n../x.png,b\n", "not below"),
        ("file,label\n/x/pictures/cat/0.png,a\n/x/pictures/../../x.png,b\n", "not below"),
        ("file,label\n../x.png,a\n", "not below"),
        ("file,label\npictures/cat/0.png,a\npictures/cat/99.png,b\n", "1 of 2 files"),
        ("file,label\nnowhere.png,a\n", "not there"),
        ("file,label\npictures/cat/0.png\n", "row 2"),
        ("file,label,class\npictures/cat/0.png,a,b\n", "Which part"),
        ("file,label\npictures/cat/0.png,\npictures/cat/1.png,b\n", "no label"),
        ("file,label\npictures/cat/0.png,-1\n", "is no label"),
        ("file,label\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_data(f"csv:{table(tmp_path, 't.csv', content)}")
    assert caught.value.fix


def encoded(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def shard(path: Path, files: Mapping[str, bytes | str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["number", "name", "cls text", "asked", "beside cls"])
def test_shards_with_labels_in_json_or_text(tmp_path: Path, kind: str) -> None:
    files: dict[str, bytes | str] = {}
    for index in range(10):
        name, number = ("cat", "dog")[index % 2], index % 2
        files[f"{index}.png"] = encoded(index)
        document: dict[str, object] = {"caption": "a pet", "width": 8}
        extra: dict[str, dict[str, object]] = {
            "number": {"label": number}, "name": {"class": name}, "asked": {"kind": name, "label": 7},
        }  # fmt: skip
        document |= extra.get(kind, {})
        if kind != "cls text":
            files[f"{index}.json"] = json.dumps(document)
        if kind in ("cls text", "beside cls"):
            files[f"{index}.cls"] = name + "\n"
    shard(tmp_path / "data-train-0.tar", files)
    shard(tmp_path / "data-val-0.tar", dict(list(files.items())[: len(files) * 2 // 5]))
    source = open_data(f"wds:{tmp_path}", label_column="kind" if kind == "asked" else None)
    assert source.class_names == (("0", "1") if kind == "number" else ("cat", "dog"))
    assert counts(source) == ({0: 5, 1: 5}, {0: 2, 1: 2})


def test_shards_whose_json_has_no_label_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train.tar", {"1.png": encoded(1), "1.json": '{"caption": "a", "url": "b"}'})
    with pytest.raises(UserError, match=r"1\.json is the label") as caught:
        open_data(f"wds:{tmp_path}")
    assert "label_column" in caught.value.fix
    assert open_data(f"wds:{tmp_path}", label_column="none").class_names is None
    shard(tmp_path / "train.tar", {"1.png": encoded(1), "1.json": '{"label": 1, "class": 2}'})
    with pytest.raises(UserError) as caught:
        open_data(f"wds:{tmp_path}")
    assert "label, class" in caught.value.why
    shard(tmp_path / "train.tar", {"1.png": encoded(1), "1.json": '{"label": [0, 1]}'})
    with pytest.raises(UserError, match="is no label"):
        open_data(f"wds:{tmp_path}")


def test_shards_with_two_pictures_a_sample(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for index in range(4):
        files |= {f"{index}.image.png": encoded(10), f"{index}.mask.png": encoded(20), f"{index}.cls": str(index % 2)}
    shard(tmp_path / "train.tar", files)
    shard(tmp_path / "val.tar", files)
    with pytest.raises(UserError, match=r"several pictures: image\.png, mask\.png") as caught:
        open_data(f"wds:{tmp_path}")
    assert 'image_key="image.png"' in caught.value.fix
    for key, red in (("image.png", 10), ("mask.png", 20)):
        source = open_data(f"wds:{tmp_path}", image_key=key)
        assert counts(source) == ({0: 2, 1: 2}, {0: 2, 1: 2})
        assert np.asarray(source.train[0][0])[0, 0, 0] == red
    with pytest.raises(UserError, match="no picture jpg"):
        open_data(f"wds:{tmp_path}", image_key="jpg")
    plain = {name.replace(".image.png", ".png"): content for name, content in files.items()}
    shard(tmp_path / "train.tar", plain)
    shard(tmp_path / "val.tar", plain)
    assert np.asarray(open_data(f"wds:{tmp_path}").train[0][0])[0, 0, 0] == 10


def test_shards_for_training_alone_and_with_unlabelled_tests(tmp_path: Path) -> None:
    labelled: dict[str, bytes | str] = {}
    for index in range(10):
        labelled |= {f"{index}.png": encoded(index), f"{index}.cls": str(index % 2)}
    shard(tmp_path / "train.tar", labelled)
    assert counts(open_data(f"wds:{tmp_path}")) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    shard(tmp_path / "test.tar", {"a.png": encoded(1)})
    source = open_data(f"wds:{tmp_path}")
    assert counts(source) == ({0: 4, 1: 4}, {0: 1, 1: 1})
    assert "1 images in test.tar have no labels" in source.notes[0]
    shard(tmp_path / "val.tar", dict(list(labelled.items())[:8]))
    assert counts(open_data(f"wds:{tmp_path}")) == ({0: 5, 1: 5}, {0: 2, 1: 2})
