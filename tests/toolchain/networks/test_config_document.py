"""`config.json` of a model folder is data: nothing in it runs code, opens another file, or costs memory."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upvits import toolchain
from upvits.calib_data import demo_weights
from upvits.calib_data.documents import parse_document
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.config_document import ModelConfig, arguments_of

DEMO = demo_weights("pvt_v2_b0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert DEMO is not None
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def change(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


@pytest.mark.parametrize(
    "entries",
    [
        {"model_args": {"checkpoint_path": "payload.pth"}},
        {"model_args": {"pretrained_cfg": {"file": "payload.pth"}}},
        {"model_args": {"pretrained_cfg_overlay": {"file": "payload.pth"}}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"cache_dir": "elsewhere"}},
        {"model_args": {"norm_layer": "torch.hub.load"}},
        {"model_args": {"block_fn": "os.system"}},
        {"architecture": "hf-hub:somebody/model"},
        {"architecture": "local-dir:elsewhere"},
        {"architecture": "resnet50"},
        {"architecture": "../pvt_v2_b0"},
        {"architecture": 5},
        {"model_args": {"depths": [1_000_000, 2, 2, 2]}},
        {"model_args": {"depths": [0, 2, 2, 2]}},
        {"model_args": {"embed_dims": ["32", "64", "160", "256"]}},
        {"model_args": [1]},
        {"num_classes": -1},
        {"num_classes": 10**12},
        {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
        {"pretrained_cfg": {"std": [0.0, 0.1, 0.1]}},
        {"pretrained_cfg": {"interpolation": "sinc"}},
        {"pretrained_cfg": {"interpolation": "random"}},  # timm knows it for training only
        {"pretrained_cfg": {"crop_pct": 1e-9}},
        {"label_names": ["a", 5]},
        {"upvits": {"format": 2, "widths": {"channels": {}}}},
        {"upvits": {"format": 1, "widths": {"channels": {"stages.0": -4}}}},
        {"upvits": {"format": 1, "widths": {"channels": {"no_such_group": 4}}}},
    ],
    ids=str,
)
def test_what_is_no_plain_network_is_refused_in_one_message(folder: Path, entries: dict[str, Any]) -> None:
    change(folder, **entries)
    with pytest.raises(UserError) as caught:
        toolchain.load(folder)
    assert caught.value.fix


@pytest.mark.parametrize("entries", [{"mean": [0.5, 0.5]}, {"std": [0.5]}], ids=str)
def test_a_network_that_takes_no_rgb_is_refused_where_pictures_are_prepared(
    folder: Path, entries: dict[str, Any]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(folder, pretrained_cfg={**config["pretrained_cfg"], **entries})
    with pytest.raises(UserError, match="no RGB pictures"):
        toolchain.preprocess_of(toolchain.load(folder))


@pytest.mark.parametrize("key", ["file", "url", "hf_hub_id", "custom_load", "state_dict"])
def test_entries_of_timm_that_name_other_files_are_not_followed(folder: Path, key: str) -> None:
    change(folder, pretrained_cfg={"input_size": [3, 64, 64], key: "payload.pth"})
    model = toolchain.load(folder)
    assert model.pretrained_cfg.get(key) != "payload.pth"  # type: ignore[union-attr,operator]


def test_json_that_is_none_or_never_ends_is_refused(folder: Path) -> None:
    for text in ("", "[", "[" * 100_000, '{"architecture": ' + "1" * 5_000 + "}", '"pvt_v2_b0"', "\ud800"):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match="is not valid"):
            toolchain.load(folder)


def test_a_pipe_or_a_folder_in_place_of_the_file_is_refused_at_once(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match="no regular file"):
        toolchain.load(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(UserError, match="no regular file"):
        toolchain.load(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from([*ModelConfig.model_fields, "depths", "img_size", "mean", "widths", "channels", "x"])


@settings(max_examples=200)
@given(st.dictionaries(KEYS, JSON | st.just("pvt_v2_b0") | st.dictionaries(KEYS, JSON, max_size=3), max_size=6))
def test_whatever_the_json_it_is_a_valid_configuration_or_one_error(values: dict[str, Any]) -> None:
    with suppress(UserError):
        arguments_of(parse_document(json.dumps(values), "config.json", ModelConfig, fix="Write another."))
