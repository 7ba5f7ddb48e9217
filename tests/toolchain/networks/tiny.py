"""Very small networks of both families, made by timm itself."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

VIT, PVT = "deit_tiny_patch16_224", "pvt_v2_b0"
SIZE = 32
ARGS: dict[str, dict[str, Any]] = {
    VIT: {"embed_dim": 32, "depth": 2, "num_heads": 2},
    PVT: {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
}


def built(name: str, *, classes: int = 5, size: Any = SIZE, **args: Any) -> nn.Module:
    """A network with random weights in which every tensor matters, in eval mode."""
    torch.manual_seed(0)
    sizes = {} if "pvt" in name else {"img_size": size}
    known = ARGS[PVT if "pvt" in name else VIT]
    model: nn.Module = timm.create_model(name, num_classes=classes, **{**known, **sizes, **args})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def outputs(model: nn.Module, size: Any = SIZE, channels: int = 3) -> Tensor:
    """What a network gives for two fixed images."""
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        result: Tensor = model(image)
    return result
