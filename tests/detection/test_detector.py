"""A small RetinaNet: its graph gives mmdet's own boxes, its folder gives it back, its AP is COCO's."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision.ops import batched_nms

from tests.detection.conftest import small_retinanet
from upvits import toolchain
from upvits.calib_data import Preprocess
from upvits.calib_data.errors import UserError
from upvits.detection import configs, openmm
from upvits.detection.average_precision import average_precision, run_length
from upvits.detection.coco import CocoData
from upvits.detection.decode import DecodedBoxes, Levels
from upvits.detection.detector import DetectorInfo, load_detector, save_detector
from upvits.detection.pictures import fit, fitted
from upvits.detection.training import train_detector

pytestmark = pytest.mark.usefixtures("mmdet")


@pytest.mark.parametrize("name", ["dense", "global"])
def test_decoded_boxes_are_those_of_mmdet(name: str, folders: dict[str, Path]) -> None:
    detector, _ = small_retinanet(folders[name], 3)
    head: Any = detector.get_submodule("bbox_head")
    head.test_cfg.max_per_img = 2000  # all of more than 1,000 candidates count
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        boxes, scores, labels = DecodedBoxes(detector, (64, 96)).eval()(images)
        predicted = openmm.predict(detector, images)
    for image_boxes, sure, kind, (other, other_scores, other_labels) in zip(
        boxes, scores, labels, predicted, strict=True
    ):
        clear = (sure > 0.05) & (image_boxes[:, 2:] > image_boxes[:, :2]).all(dim=1)
        kept = batched_nms(image_boxes[clear], sure[clear], kind[clear], 0.5)
        assert int(clear.sum()) > 1000
        assert len(kept) == len(other) > 20
        assert torch.allclose(sure[clear][kept], other_scores, atol=1e-6)
        assert torch.allclose(image_boxes[clear][kept], other, atol=1e-3)
        assert torch.equal(kind[clear][kept], other_labels)


def test_images_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    detector, _ = small_retinanet(folders["dense"], 3)
    with pytest.raises(UserError, match="multiples of 32"):
        DecodedBoxes(detector, (64, 100))
    with pytest.raises(UserError, match="Linear cannot be exported"):
        Levels(nn.Linear(1, 1))
    head: Any = detector.get_submodule("bbox_head")
    del head.test_cfg["nms_pre"]
    with pytest.raises(UserError, match="nms_pre"):
        DecodedBoxes(detector, (64, 96))


def test_a_folder_gives_the_detector_back(folders: dict[str, Path], tmp_path: Path) -> None:
    detector, model = small_retinanet(folders["global"], 3)
    info = DetectorInfo(model, ("a", "b", "c"), (1, 5, 9), (96, 64))
    save_detector(detector, info, tmp_path / "detector")
    with pytest.raises(UserError, match="exists already"):
        save_detector(detector, info, tmp_path / "detector")
    document = json.loads((tmp_path / "detector/detector.json").read_text())
    assert document["config"]["backbone"]["model"]["architecture"] == "pvt_v2_b0"  # needs no other folder
    loaded, known = load_detector(tmp_path / "detector")
    assert (known.classes, known.category_ids, known.scale) == (info.classes, info.category_ids, info.scale)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for level, other in zip(Levels(detector)(images), Levels(loaded)(images), strict=True):
            assert torch.equal(level, other)
    document["config"]["bbox_head"]["num_classes"] = 4
    (tmp_path / "detector/detector.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="of another detector"):
        load_detector(tmp_path / "detector")
    with pytest.raises(UserError, match="holds no detector"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("bbox_head", "feat_channels"), 16_384, "of another detector"),  # 9 GiB for each convolution
        (("backbone", "model", "model_args"), {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 16384, 32768]}, "."),
        (("neck", "upsample_cfg"), {"scale_factor": 1000}, "upsample_cfg"),
        (("test_cfg", "nms"), {"type": "nms", "x": 1}, "cannot build or run it"),
        (("neck", "norm_cfg"), {"type": "FPN"}, "cannot build or run it"),
    ],
)
def test_a_folder_that_is_no_detector_is_refused_before_it_takes_memory(
    place: tuple[str, ...], value: object, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    detector, model = small_retinanet(folders["dense"], 3)
    save_detector(detector, DetectorInfo(model, ("a", "b", "c"), (1, 5, 9), (96, 64)), tmp_path / "detector")
    document = json.loads((tmp_path / "detector/detector.json").read_text())
    *above, last = place
    part = document["config"]
    for name in above:
        part = part[name]
    part[last] = value
    (tmp_path / "detector/detector.json").write_text(json.dumps(document))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message):
        load_detector(tmp_path / "detector")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    (tmp_path / "detector/detector.json").write_text(json.dumps({**document, "scale": [16_384, 64]}))
    with pytest.raises(UserError, match="scale"):
        load_detector(tmp_path / "detector")


def test_perfect_detections_have_an_ap_of_one(data: CocoData) -> None:
    truth = json.loads(data.val.annotations.read_text())
    detections = [
        {key: box[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for box in truth["annotations"]
    ]
    perfect = average_precision(data.val.annotations, detections)
    assert perfect.ap == perfect.ap50 == perfect.ap75 == pytest.approx(1.0)
    assert set(perfect.per_class) == set(data.classes)
    half = average_precision(data.val.annotations, detections[::2])
    assert 0.2 < half.ap < 0.8
    assert average_precision(data.val.annotations, []).ap == 0
    with pytest.raises(UserError, match="does not list"):
        average_precision(data.val.annotations, [{**detections[0], "image_id": 12345}])


def test_perfect_masks_have_an_ap_of_one(data: CocoData) -> None:
    truth = json.loads(data.val.annotations.read_text())
    detections = []
    for box in truth["annotations"]:
        runs = box["segmentation"]
        mask = np.repeat(np.arange(len(runs["counts"])) % 2 == 1, runs["counts"]).reshape(runs["size"], order="F")
        known = {key: box[key] for key in ("image_id", "category_id")}
        detections.append({**known, "segmentation": run_length(mask), "score": 0.9})
    assert average_precision(data.val.annotations, detections, kind="segm").ap == pytest.approx(1.0)
    corners = [{**detection, "bbox": [0.0, 0.0, 1.0, 1.0]} for detection in detections]  # wrong boxes with right masks
    masks = average_precision(data.val.annotations, corners, kind="segm")
    assert masks.ap == pytest.approx(1.0)
    assert masks.ap_large == average_precision(data.val.annotations, detections, kind="segm").ap_large
    assert average_precision(data.val.annotations, corners).ap == 0
    empty = run_length(np.zeros((8, 8), np.bool_))
    assert average_precision(data.val.annotations, [{**detections[0], "segmentation": empty}], kind="segm").ap == 0


def test_masks_are_in_pixels_of_the_original(folders: dict[str, Path]) -> None:
    backbone = {"type": "UPPVTv2", "model": str(folders["dense"])}
    model = configs.mask_rcnn(backbone, openmm.channels_of(backbone), 3, fpn_channels=16)
    detector = openmm.build_detector(model)
    image = torch.randn(3, 64, 64)
    with torch.inference_mode():
        boxes, masks, scores, _ = openmm.predict_masks(detector, image, (40, 64), (50, 80), (0.8, 0.8))
    assert boxes.shape == (len(scores), 4)
    assert 64 < float(boxes[:, 2].max()) <= 80
    assert 40 < float(boxes[:, 3].max()) <= 50
    assert masks.shape == (len(scores), 50, 80)
    assert masks.dtype == torch.bool
    assert len(scores) > 5
    covered = masks.any(dim=0)
    assert covered[:, 64:].any()  # beyond the fitted image
    assert covered[40:].any()


def test_boxes_of_fitted_images_come_back(data: CocoData) -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), np.uint8))
    preprocess = Preprocess((3, 64, 64), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0, "border")
    fitted_image = fit(image, 7, preprocess)
    assert fitted_image.inside == (64, 40)
    assert float(fitted_image.pixels[:, 40:].abs().max()) == 0
    assert fitted_image.boxes_back(np.array([[0, 0, 64, 60], [8, 8, 16, 16]], np.float32)).tolist() == [
        [0, 0, 80, 50],
        [10, 10, 20, 20],
    ]
    assert [image.image_id for image in fitted(data.val, preprocess)] == [1, 2, 3, 4]


def test_a_vit_serves_a_detector_that_needs_no_other_folder(tmp_path: Path, data: CocoData) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=5)
    toolchain.save(vit, tmp_path / "vit")
    backbone = {"type": "UPViT", "model": str(tmp_path / "vit"), "out_indices": [1, 2, 3], "out_channels": 32}
    model = configs.retinanet(backbone, (32, 32, 32), 12, fpn_channels=16, stacked_convs=1)
    schedule = configs.Schedule(epochs=1, batch_size=4, lr=1e-3, scale=(64, 64), warmup=1, workers=0)
    trained = train_detector(model, data, schedule, tmp_path / "work")
    trained.detector.zero_grad()
    sum(level.square().sum() for level in Levels(trained.detector)(torch.randn(1, 3, 64, 64))).backward()
    without = [name for name, parameter in trained.detector.named_parameters() if parameter.grad is None]
    assert without == []  # DistributedDataParallel refuses such
    save_detector(
        trained.detector, DetectorInfo(trained.config, data.classes, data.category_ids, (64, 64)), tmp_path / "d"
    )
    shutil.rmtree(tmp_path / "vit")
    (tmp_path / "d").rename(tmp_path / "moved")
    loaded, _ = load_detector(tmp_path / "moved")
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        boxes, expected = (DecodedBoxes(network, (64, 96)).eval()(images) for network in (loaded, trained.detector))
    assert all(torch.equal(a, b) for a, b in zip(boxes, expected, strict=True))
