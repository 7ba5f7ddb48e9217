"""Recipes of fine-tuning that others have published, as settings by name. What a recipe does not name follows from the
network and the data (`settings_for`)."""

from __future__ import annotations

from typing import Any

UP: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 256,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-3,
    "warmup_epochs": 2.0,
    "drop_path": 0.1,
    "cutmix": 0.5,
    "mixup": 0.0,
    "mix_prob": 1.0,
    "label_smoothing": 0.0,
    "min_crop": 0.08,
    "label_weight": 1.0,
    "logit_weight": 6.4,
}
"""UP-ViTs (arXiv 2111.15127): constants of the paper and of its code. Its 0.2 * sum of the KL over the 32 images of one
GPU is 6.4 * mean."""

MODERN: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 1024,
    "optimizer": "adamw",
    "lr": 2.5e-4,
    "weight_decay": 0.05,
    "warmup_epochs": 5.0,
    "drop_path": 0.1,
    "cutmix": 1.0,
    "mixup": 0.8,
    "mix_prob": 1.0,
    "label_smoothing": 0.1,
    "min_crop": 0.08,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "repeated_augmentation": 3,
    "ema_decay": 0.9999,
    "clip_grad": 1.0,
    "label_weight": 1.0,
    "logit_weight": 6.4,
}
"""DeiT's training (arXiv 2012.12877, table 9; 5e-4 at a batch of 512), which Isomorphic Pruning (arXiv 2407.04616)
fine-tunes with; the limit of gradients is DeiT-III's (arXiv 2204.07118). Rates do not fall from layer to layer: in a
pruned network the first layers have changed, too."""

RECIPES: dict[str, dict[str, Any]] = {"up": UP, "modern": MODERN, "short": {}}
