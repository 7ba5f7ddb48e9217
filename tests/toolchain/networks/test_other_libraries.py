"""Checkpoints made by libraries that the tests do not install: run where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.toolchain.networks.tiny import ARGS, PVT, SIZE, VIT, built, outputs
from upvits import toolchain
from upvits.toolchain.networks.found import found_in

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", [VIT, PVT])
@pytest.mark.parametrize("weights_only", [False, True])
def test_lightning(tmp_path: Path, name: str, weights_only: bool) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, classes: int = 5) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = built(name)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(classes))

        def training_step(self, batch: Any, _: int) -> Any:
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, SIZE, SIZE), torch.arange(4))
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    model = module.model.eval()
    read = toolchain.create_model(
        name, weights=str(tmp_path / "last.ckpt"), image_size=SIZE, model_args=ARGS[name]
    )  # fmt: skip
    assert torch.allclose(outputs(read), outputs(model), rtol=1e-5, atol=1e-5)
    assert "loss.weight" in " ".join(found_in(read).notes)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip(tmp_path: Path, activation: str) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    clip = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=activation == "quick_gelu").eval()
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "act_layer": activation}
    read = toolchain.create_model(
        "vit_base_patch32_clip_224", weights=str(tmp_path / "open_clip_pytorch_model.bin"), model_args=args
    )
    with torch.inference_mode():
        image = torch.randn(2, 3, 64, 64)
        assert torch.allclose(read(image), clip.encode_image(image), rtol=1e-5, atol=1e-5)
