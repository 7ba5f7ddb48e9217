"""Detectors and data sets in COCO's format from strangers; none without mmdet, which commands need to read them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.robustness.case import Arguments, Case, Ground
from benchmarks.robustness.mutations import DAMAGES, MARKUP, mutated, no_documents, replaced, shown, written

_EACH = 60
_TYPES = ("subprocess.call", "os.system", "mmengine.Config.fromfile", "builtins.eval", "Runner", "mmdet.RetinaNet", "")

_TOO_LARGE: dict[tuple[str, ...], Any] = {
    ("config", "bbox_head", "feat_channels"): 16_384, ("config", "neck", "out_channels"): 8_192,
    ("config", "bbox_head", "anchor_generator", "ratios"): [1.0] * 900, ("scale",): [16_384, 16_384],
    ("config", "backbone", "model", "model_args"): {"depths": [1_000] * 4, "embed_dims": [65_536] * 4},
    ("config", "neck", "upsample_cfg"): {"mode": "nearest", "x": 1},
}  # fmt: skip
"""What would fill memory when it is built, or fails when it is run."""


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """detector.json and annotations with one change; registry names that are import paths; files that are damaged."""
    if find_spec("mmdet") is None:
        return
    detector, folder = _detector(ground), scenes(ground)
    document = json.loads((detector / "detector.json").read_text())
    for _ in range(_EACH):
        what, changed = mutated(document, random)
        yield _with_detector(ground, what, written(changed))
    for name in _TYPES:
        for part in ("", "backbone", "neck", "bbox_head", "data_preprocessor", "train_cfg", "test_cfg"):
            config = {**document["config"]}
            config.update({"type": name} if not part else {part: {**(config.get(part) or {}), "type": name}})
            changed = {**document, "config": {**config, "args": ["touch", str(ground.marker)]}}
            yield _with_detector(ground, f"{part} type {shown(name)}", written(changed))
    for at, value in _TOO_LARGE.items():
        changed = replaced(document, at, value)
        yield _with_detector(ground, f"{'.'.join(at)} = {shown(value)}", written(changed))
    for what, raw in no_documents(written(document)).items():
        yield _with_detector(ground, what, raw)
    for damage in DAMAGES:
        for file in ("detector.json", "model.safetensors"):
            yield Case(f"detector: {file} {damage}", functools.partial(_damaged, ground, file, damage))
    annotations = json.loads((folder / "val/annotations.json").read_text())
    annotations = {**annotations, "annotations": annotations["annotations"][:20]}
    for _ in range(_EACH):
        what, changed = mutated(annotations, random)
        yield _with_annotations(ground, what, written(changed))
    for text in ("\x1b[31m" + MARKUP, "$(touch MARKER)", "{{7*7}}", "a\0b", "x" * 5000):
        named = json.loads(json.dumps(annotations))
        named["categories"][0]["name"] = text
        yield _with_annotations(ground, f"a category called {shown(text)}", written(named))
    for what, raw in no_documents(written(annotations)).items():
        yield _with_annotations(ground, what, raw)


def scenes(ground: Ground) -> Path:
    """Eight drawn scenes with boxes, in COCO's format."""
    from upvits.calib_data.writing import write_coco

    folder = ground.work / "given" / "scenes"
    if not folder.exists():
        write_coco(folder, "train", 4, 64)
        write_coco(folder, "val", 4, 64)
    return folder


def _detector(ground: Ground) -> Path:
    """A narrow RetinaNet on the small network, trained on nothing."""
    from upvits.deploy.recipe.detect_data import open_detection_data
    from upvits.detection import configs, openmm
    from upvits.detection.detector import DetectorInfo, save_detector

    folder = ground.work / "given" / "detector"
    if not folder.exists():
        data = open_detection_data(str(scenes(ground)), quiet=True)
        config: dict[str, Any] = configs.retinanet(
            {"type": "UPViT", "model": str(ground.dense), "out_indices": [1, 2, 3], "out_channels": 16},
            (16, 16, 16), len(data.classes), fpn_channels=16, stacked_convs=1,
        )  # fmt: skip
        info = DetectorInfo(config, data.classes, data.category_ids, (64, 64))
        save_detector(openmm.build_detector(config), info, folder)
    return folder


def _evaluated(detector: Path, scenes: Path) -> Arguments:
    return ["detect", "eval", detector, "--coco", scenes, "--images", "2", "--quiet"]


def _with_detector(ground: Ground, what: str, raw: bytes) -> Case:
    def arrange(here: Path) -> Arguments:
        folder = Path(shutil.copytree(_detector(ground), here / "detector"))
        (folder / "detector.json").write_bytes(raw)
        return _evaluated(folder, scenes(ground))

    return Case(f"detector.json: {what}", arrange)


def _damaged(ground: Ground, file: str, damage: str, here: Path) -> Arguments:
    folder = Path(shutil.copytree(_detector(ground), here / "detector"))
    DAMAGES[damage](folder / file)
    return _evaluated(folder, scenes(ground))


def _with_annotations(ground: Ground, what: str, raw: bytes) -> Case:
    def arrange(here: Path) -> Arguments:
        folder = Path(shutil.copytree(scenes(ground), here / "scenes"))
        (folder / "val/annotations.json").write_bytes(raw)
        return _evaluated(_detector(ground), folder)

    return Case(f"annotations: {what}", arrange)
