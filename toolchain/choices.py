"""What may be chosen by name. Importing this is quick: command line and recipe read it before torch is loaded."""

from __future__ import annotations

from typing import Literal, get_args

Method = Literal["fisher", "refined", "kl", "magnitude", "random"]
"""How units are scored."""

METHODS: tuple[Method, ...] = get_args(Method)

Component = Literal["embed", "attention", "heads", "qk_v", "ffn", "depth"]
"""What may be cut. Of attention one of: `attention` (dims of every head; q, k and v lose the same ones), `heads` (whole
heads), `qk_v` (dims of every head; q·k and v choose their own). `depth` (whole and shifted blocks) is for the global
planner, which weighs it against the others."""

DEFAULT_COMPONENTS: tuple[Component, ...] = ("embed", "attention", "ffn")

Planner = Literal["uniform", "global"]
"""How widths are chosen: equal shares of every dimension, or one budget over all groups."""

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
"""How images are resized, by timm's names."""

Optimizer = Literal["adamw", "lamb", "sgd"]
"""What changes the weights in training, by timm's names."""

Amp = Literal["auto", "bf16", "fp16", "off"]
"""Type of matrix products in training. `auto`: on CUDA bf16, or fp16 where the GPU lacks it; fp32 on the CPU."""
