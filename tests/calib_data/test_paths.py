"""What a document names stays below its folder, and written files never follow a link."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upvits.calib_data.errors import UserError
from upvits.calib_data.paths import copy_regular, path_inside, relative_path, write_new
from upvits.calib_data.shards import open_shards
from upvits.calib_data.tensors import save_tensors

OUTSIDE = ["", ".", "..", "/etc/passwd", "../x", "a/../../x", "a/..", "a\\b", "a\nb", "a\0b", "\x1b[2J", "x" * 2000]


@pytest.mark.parametrize("text", OUTSIDE)
def test_paths_that_lead_outside_or_have_no_known_shape_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"outside of the folder|no path of a file"):
        relative_path(text)
    with pytest.raises(UserError, match="cannot be in it"):
        path_inside(tmp_path, text)


@given(st.text(alphabet=st.sampled_from("ab./\\\0\n é"), max_size=12))
def test_whatever_passes_stays_below_its_folder(text: str) -> None:
    try:
        path = relative_path(text)
    except ValueError:
        return
    assert os.path.normpath(f"/folder/{path}") == f"/folder/{path}"
    assert relative_path(path) == path


def test_ordinary_paths_pass() -> None:
    assert relative_path("pruned/model.onnx") == "pruned/model.onnx"
    assert relative_path("./train//Größe 1, (a).jpg") == "train/Größe 1, (a).jpg"


def test_links_may_stay_inside_and_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "inner").symlink_to("deep")
    (folder / "outer").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    (tmp_path / "alias").symlink_to(folder)
    assert path_inside(folder, "inner/x") == folder / "inner/x"
    assert path_inside(tmp_path / "alias", "deep/x") == tmp_path / "alias/deep/x"
    with pytest.raises(UserError, match="is outside of"):
        path_inside(folder, "outer/secret")


def test_copies_are_of_regular_files_and_never_through_a_link(tmp_path: Path) -> None:
    victim, source = tmp_path / "victim", tmp_path / "source"
    victim.write_text("mine")
    source.write_text("payload")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError):
        copy_regular(source, tmp_path / "link")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "link", "payload")
    with pytest.raises(UserError, match="no regular file"):
        copy_regular(tmp_path / "pipe", tmp_path / "new")
    assert victim.read_text() == "mine"
    copy_regular(source, tmp_path / "deep/new")
    assert (tmp_path / "deep/new").read_text() == "payload"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_tensors_are_readable_like_other_files(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "plain")}
    assert modes == {mode}


@pytest.mark.parametrize("name", ["../shard.tar", "/shard.tar", "a/../../shard.tar", "", 7, None])
def test_shards_that_an_info_file_names_elsewhere_are_refused(name: object, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    (tmp_path / "shard.tar").write_bytes(bytes(1024))
    splits = {split: {"filenames": [name]} for split in ("train", "validation")}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match=r"_info.json is not valid"):
        open_shards(f"wds:{root}", root)


@pytest.mark.parametrize("text", ["", "[]", "7", '{"splits": []}', '{"class_names": [1, 2]}', "[" * 100_000])
def test_info_files_that_say_something_else_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "_info.json").write_text(text)
    with pytest.raises(UserError, match=r"_info.json is not valid"):
        open_shards(f"wds:{tmp_path}", tmp_path)
