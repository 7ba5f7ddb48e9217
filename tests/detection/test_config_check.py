"""A detector's folder is data: its configuration builds our detectors and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from upvits.calib_data.errors import UserError
from upvits.detection import configs, openmm
from upvits.detection.config_check import check_detector_config
from upvits.detection.detector import load_detector, read_info

BACKBONE = {"type": "UPPVTv2", "model": {"architecture": "pvt_v2_b0"}, "out_indices": [1, 2, 3]}
RETINANET = configs.retinanet(BACKBONE, [64, 160, 256], 12)


def written(folder: Path, **entries: Any) -> Path:
    document = {"format": 1, "config": RETINANET, "classes": ["a", "b"], "category_ids": [1, 2], "scale": [128, 128]}
    folder.mkdir(exist_ok=True)
    (folder / "detector.json").write_text(json.dumps({**document, **entries}))
    return folder


@pytest.mark.parametrize("config", [RETINANET, configs.mask_rcnn(BACKBONE, [32, 64, 160, 256], 12)])
def test_what_this_package_writes_is_accepted(config: dict[str, Any], tmp_path: Path) -> None:
    plain = json.loads(json.dumps(config))
    assert read_info(written(tmp_path, config=plain)).config == plain


@pytest.mark.parametrize(
    "change",
    [
        {"type": "subprocess.call", "args": ["touch", "MARKER"]},
        {"type": "os.system"},
        {"neck": {"type": "subprocess.call", "args": ["touch", "MARKER"]}},
        {"neck": {**RETINANET["neck"], "conv_cfg": {"type": "builtins.exec"}}},
        {"bbox_head": {**RETINANET["bbox_head"], "loss_cls": {"type": "torch.load", "f": "payload.pth"}}},
        {"init_cfg": {"type": "Pretrained", "checkpoint": "payload.pth"}},
        {"backbone": {**BACKBONE, "init_cfg": {"type": "Pretrained", "checkpoint": "payload.pth"}}},
        {"backbone": {**BACKBONE, "model": "../another/folder"}},
        {"backbone": None},
        {"_scope_": "os"},
        {"bbox_head": {**RETINANET["bbox_head"], "stacked_convs": 10**9}},
        {"bbox_head": {**RETINANET["bbox_head"], "feat_channels": 10**9}},
        {"test_cfg": {"score_thr": float("nan")}},
        {"test_cfg": {"nms": {"type": ["nms"]}}},
        {"neck": {**RETINANET["neck"], "start_level": [0]}},
        {"unknown": 1},
        {"data_preprocessor": {**RETINANET["data_preprocessor"], "mean": [[0.0], 0.0, 0.0]}},
        {"test_cfg": json.loads("[" * 20 + "]" * 20)},
    ],
    ids=str,
)
def test_anything_else_is_refused_and_nothing_runs(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "detector", config={**RETINANET, **change})
    with pytest.raises(UserError):
        load_detector(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


@pytest.mark.parametrize(
    "entries", [{"scale": [0, 128]}, {"scale": "128x128"}, {"classes": [1]}, {"category_ids": ["1"]}, {"config": []}]
)
def test_values_of_other_types_are_named(entries: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not valid") as caught:
        read_info(written(tmp_path, **entries))
    assert next(iter(entries)) in caught.value.why


@pytest.mark.usefixtures("mmdet")
def test_an_option_cannot_name_code_either() -> None:
    with pytest.raises(UserError, match="not the name of a part"):
        openmm.config_of({"model": dict(RETINANET)}, {"model.neck.type": "subprocess.call"})
    check_detector_config(RETINANET, "detector.json")
