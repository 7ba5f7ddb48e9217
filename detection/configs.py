"""Configurations of mmdet's detectors as plain values, as mmdet's files have them, made by a few functions.

RetinaNet and Mask R-CNN on a pyramid, with the 1x schedule of PVTv2 (Wang et al., arXiv 2106.13797, section 4.2): AdamW
at 1e-4 with weight decay 1e-4, 12 epochs, 16 images a step, shorter side 800. The short schedule is for small data sets
and small pictures, so that it ends within minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

if TYPE_CHECKING:  # the recipe reads this file, and --help the recipe
    from upvits.detection.coco import CocoData, Split

Config = dict[str, Any]

Detector = Literal["retinanet", "mask-rcnn"]

LARGEST_SIDE = 4_096
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
"""Pixels of an image as a detector gets it; what a network makes of more fills any memory."""

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of 0 to 255
SILENT = "CRITICAL"
"""Level of mmengine's log, which repeats our progress bar and warns about deprecations in other projects."""

MAX_BOXES = 100
"""Detections per image, as COCO's AP counts them."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a detector is trained.

    Attributes:
        epochs: passes over the training images; the rate falls tenfold after 2/3 and 11/12 of them.
        batch_size: images per step and process.
        lr: peak learning rate for 16 images per step; scaled to what a step has.
        scale: images are scaled to fit (long side, short side) in pixels.
        warmup: steps with a rising rate, a quarter of all at most.
        tensorboard: write curves for it, in the folder of the training.
    """

    epochs: int = 12
    batch_size: int = 2
    lr: float = 1e-4
    weight_decay: float = 1e-4
    scale: tuple[int, int] = (1333, 800)
    warmup: int = 500
    workers: int = 2
    amp: bool = False
    grad_clip: float | None = None
    tensorboard: bool = False


def retinanet(
    backbone: Config,
    channels: Sequence[int],
    num_classes: int,
    *,
    fpn_channels: int = 256,
    stacked_convs: int = 4,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
) -> Config:
    """RetinaNet (Lin et al., arXiv 1708.02002) on a feature pyramid that leaves the finest level out.

    Args:
        backbone: its configuration.
        channels: of its levels at strides 4, 8, 16 and 32; the first, which is left out, may be missing.
        num_classes: categories; background is not among them.
        fpn_channels: width of the pyramid and of the head.
        stacked_convs: convolutions of each branch of the head.
        mean, std: of the pixels (0 to 255, RGB) that the backbone was trained with.
    """
    return {
        "type": "RetinaNet",
        "data_preprocessor": _preprocessor(mean, std),
        "backbone": backbone,
        "neck": {
            "type": "FPN", "in_channels": list(channels), "out_channels": fpn_channels,
            "start_level": len(channels) - 3,
            "add_extra_convs": "on_input", "num_outs": 5,
        },
        "bbox_head": {
            "type": "RetinaHead", "num_classes": num_classes, "in_channels": fpn_channels,
            "feat_channels": fpn_channels, "stacked_convs": stacked_convs,
            "anchor_generator": {
                "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0], "strides": [8, 16, 32, 64, 128],
            },
            "bbox_coder": _coder([1.0, 1.0, 1.0, 1.0]),
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "train_cfg": {
            "assigner": _assigner(0.5, 0.4, 0.0), "sampler": {"type": "PseudoSampler"}, "allowed_border": -1,
            "pos_weight": -1, "debug": False,
        },
        "test_cfg": {
            "nms_pre": 1000, "min_bbox_size": 0, "score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": MAX_BOXES,
        },
    }  # fmt: skip


def mask_rcnn(
    backbone: Config,
    channels: Sequence[int],
    num_classes: int,
    *,
    fpn_channels: int = 256,
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
) -> Config:
    """Mask R-CNN (He et al., arXiv 1703.06870) on all four levels; RoIAlign is torchvision's. Args: as `retinanet`."""
    proposals = {"nms_pre": 2000, "max_per_img": 1000, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}

    def extractor(size: int) -> Config:
        return {
            "type": "SingleRoIExtractor", "out_channels": fpn_channels, "featmap_strides": [4, 8, 16, 32],
            "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 2, "use_torchvision": True},
        }  # fmt: skip

    return {
        "type": "MaskRCNN",
        "data_preprocessor": {**_preprocessor(mean, std), "pad_mask": True},
        "backbone": backbone,
        "neck": {"type": "FPN", "in_channels": list(channels), "out_channels": fpn_channels, "num_outs": 5},
        "rpn_head": {
            "type": "RPNHead", "in_channels": fpn_channels, "feat_channels": fpn_channels,
            "anchor_generator": {
                "type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": _coder([1.0, 1.0, 1.0, 1.0]),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": extractor(7),
            "bbox_head": {
                "type": "Shared2FCBBoxHead", "in_channels": fpn_channels, "fc_out_channels": 1024,
                "roi_feat_size": 7, "num_classes": num_classes, "reg_class_agnostic": False,
                "bbox_coder": _coder([0.1, 0.1, 0.2, 0.2]),
                "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
                "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
            },
            "mask_roi_extractor": extractor(14),
            "mask_head": {
                "type": "FCNMaskHead", "num_convs": 4, "in_channels": fpn_channels,
                "conv_out_channels": fpn_channels, "num_classes": num_classes,
                "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
            },
        },
        "train_cfg": {
            "rpn": {
                "assigner": {**_assigner(0.7, 0.3, 0.3), "match_low_quality": True},
                "sampler": _sampler(256, 0.5, add_gt=False), "allowed_border": -1, "pos_weight": -1, "debug": False,
            },
            "rpn_proposal": proposals,
            "rcnn": {
                "assigner": {**_assigner(0.5, 0.5, 0.5), "match_low_quality": True},
                "sampler": _sampler(512, 0.25, add_gt=True), "mask_size": 28, "pos_weight": -1, "debug": False,
            },
        },
        "test_cfg": {
            "rpn": {**proposals, "nms_pre": 1000},
            "rcnn": {
                "score_thr": 0.05, "nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": MAX_BOXES,
                "mask_thr_binary": 0.5,
            },
        },
    }  # fmt: skip


def training(
    model: Config, data: CocoData, schedule: Schedule, *, work_dir: str, seed: int, gpu: bool, processes: int = 1
) -> Config:
    """Everything that mmengine's Runner needs to train and validate a detector.

    Args:
        model: of `retinanet` or `mask_rcnn`.
        data: what it is trained and judged on.
        schedule: how long, how fast, at which size.
        work_dir: for logs and checkpoints.
        seed: of weights, order and flips.
        gpu: whether training runs on GPUs, whose processes communicate by NCCL instead of Gloo.
        processes: that share the steps.
    """
    masks = model["type"] == "MaskRCNN"
    backends = ["LocalVisBackend", *(["TensorboardVisBackend"] if schedule.tensorboard else [])]
    steps = schedule.epochs * -(-data.train.count // (schedule.batch_size * processes))
    warmup = max(2, min(schedule.warmup, steps // 4))  # a warm-up of a single step never leaves its start in mmengine
    ends = [round(schedule.epochs * share) for share in (2 / 3, 11 / 12)]
    optim: Config = {
        "type": "AmpOptimWrapper" if schedule.amp else "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": schedule.lr, "weight_decay": schedule.weight_decay},
    }
    if schedule.grad_clip is not None:
        optim["clip_grad"] = {"max_norm": schedule.grad_clip, "norm_type": 2}
    return {
        "default_scope": "mmdet",
        "work_dir": work_dir,
        "model": model,
        "train_dataloader": {
            **_loader(data.train, data.classes, schedule, _train_pipeline(schedule.scale, masks), schedule.batch_size),
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "batch_sampler": {"type": "AspectRatioBatchSampler"},
        },
        **judging(data, schedule, masks),
        # judged afterwards, as engines are; `--cfg-options train_cfg.val_interval=1` does it between epochs too
        "train_cfg": {
            "type": "EpochBasedTrainLoop", "max_epochs": schedule.epochs, "val_interval": schedule.epochs + 1,
        },
        "optim_wrapper": optim,
        "param_scheduler": [
            {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": warmup},
            {"type": "MultiStepLR", "begin": 0, "end": schedule.epochs, "milestones": ends, "gamma": 0.1},
        ],
        "auto_scale_lr": {"enable": True, "base_batch_size": 16},
        "default_hooks": {
            "timer": {"type": "IterTimerHook"},
            "logger": {"type": "LoggerHook", "interval": 50},
            "param_scheduler": {"type": "ParamSchedulerHook"},
            "checkpoint": {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2},
            "sampler_seed": {"type": "DistSamplerSeedHook"},
        },
        "env_cfg": {
            "cudnn_benchmark": False,
            "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
            "dist_cfg": {"backend": "nccl" if gpu else "gloo"},
        },
        "visualizer": {"type": "DetLocalVisualizer", "vis_backends": [{"type": name} for name in backends]},
        "log_processor": {"type": "LogProcessor", "window_size": 50, "by_epoch": True},
        "randomness": {"seed": seed},
        "log_level": SILENT,
        "load_from": None,
        "resume": False,
    }  # fmt: skip


def judging(data: CocoData, schedule: Schedule, masks: bool) -> Config:
    """The part of a configuration that says how AP is measured."""
    loader = {
        **_loader(data.val, data.classes, schedule, _test_pipeline(schedule.scale, masks), 1),
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "drop_last": False,
    }
    loader["dataset"] = {**loader["dataset"], "test_mode": True}
    evaluator = {
        "type": "CocoMetric", "ann_file": str(data.val.annotations), "classwise": True,
        "metric": ["bbox", "segm"] if masks else "bbox",
    }  # fmt: skip
    return {
        "val_dataloader": loader, "test_dataloader": loader, "val_evaluator": evaluator, "test_evaluator": evaluator,
        "val_cfg": {"type": "ValLoop"}, "test_cfg": {"type": "TestLoop"},
    }  # fmt: skip


def _loader(split: Split, classes: Sequence[str], schedule: Schedule, pipeline: list[Config], batch: int) -> Config:
    return {
        "batch_size": batch,
        "num_workers": schedule.workers,
        "persistent_workers": schedule.workers > 0,
        "dataset": {
            "type": "CocoDataset",
            "ann_file": str(split.annotations),
            "data_prefix": {"img": str(split.images)},
            "metainfo": {"classes": tuple(classes)},
            "filter_cfg": {"filter_empty_gt": True, "min_size": 1},
            "pipeline": pipeline,
        },
    }


_LOAD: Config = {"type": "LoadImageFromFile", "color_type": "color_ignore_orientation"}


def _resize(scale: Sequence[int]) -> Config:
    """By Pillow, as images are judged: OpenCV's bilinear filter gives other pixels where an image shrinks."""
    return {"type": "Resize", "scale": tuple(scale), "keep_ratio": True, "backend": "pillow"}


def _train_pipeline(scale: Sequence[int], masks: bool) -> list[Config]:
    return [
        _LOAD,
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": masks},
        _resize(scale),
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PackDetInputs"},
    ]


def _test_pipeline(scale: Sequence[int], masks: bool) -> list[Config]:
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    return [
        _LOAD,
        _resize(scale),
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": masks},
        {"type": "PackDetInputs", "meta_keys": keys},
    ]


def _preprocessor(mean: Sequence[float], std: Sequence[float]) -> Config:
    return {
        "type": "DetDataPreprocessor", "mean": list(mean), "std": list(std), "bgr_to_rgb": True, "pad_size_divisor": 32,
    }  # fmt: skip


def _coder(stds: Sequence[float]) -> Config:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0], "target_stds": list(stds)}


def _assigner(positive: float, negative: float, least: float) -> Config:
    return {
        "type": "MaxIoUAssigner", "pos_iou_thr": positive, "neg_iou_thr": negative, "min_pos_iou": least,
        "ignore_iof_thr": -1,
    }  # fmt: skip


def _sampler(count: int, share: float, *, add_gt: bool) -> Config:
    return {
        "type": "RandomSampler", "num": count, "pos_fraction": share, "neg_pos_ub": -1, "add_gt_as_proposals": add_gt,
    }  # fmt: skip
