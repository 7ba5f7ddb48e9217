"""Accuracy figures by hand, and what happens to models that compute NaN."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upvits.calib_data.errors import UserError
from upvits.toolchain.training.evaluate import evaluate, require_finite_weights


class Echo(nn.Module):
    """Predicts the class that is written into the image's first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Parameter(torch.eye(5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classes[images[:, 0, 0, 0].long()]
        return logits


def batch(says: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(says).float().reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.tensor(labels)


def tiny_vit(num_classes: int = 4) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes, drop_path_rate=0.5
    )


def test_counts_over_batches_of_different_size() -> None:
    accuracy = evaluate(Echo(), [batch([0, 1, 2], [0, 1, 1]), batch([4], [0])], reference=torch.tensor([0, 2, 2, 4]))
    assert accuracy.top1 == 50.0
    assert accuracy.agreement == 75.0
    assert accuracy.images == 4
    assert (accuracy.labelled, accuracy.lost, accuracy.won) == (4, 0, 1)
    assert accuracy.predictions.tolist() == [0, 1, 2, 4]
    assert accuracy.predictions.dtype == torch.int64


def test_unlabelled_images_count_for_agreement_only() -> None:
    accuracy = evaluate(Echo(), [batch([0, 1, 2, 3], [0, -1, -1, 1])], reference=torch.tensor([0, 1, 2, 2]))
    assert (accuracy.top1, accuracy.agreement) == (50.0, 75.0)
    accuracy = evaluate(Echo(), [batch([0, 1], [-1, -1])])
    assert (accuracy.top1, accuracy.agreement) == (None, None)


def test_reference_of_other_images_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="3 reference predictions for 2 images"):
        evaluate(Echo(), [batch([0, 1], [0, 1])], reference=torch.zeros(3, dtype=torch.int64))


def test_runs_in_eval_mode_and_restores_training() -> None:
    model = tiny_vit().train()  # half of the residual branches would be dropped in training mode
    images = torch.randn(8, 3, 16, 16)
    first = evaluate(model, [(images, torch.zeros(8, dtype=torch.int64))])
    assert model.training
    assert model.blocks[0].training
    with torch.no_grad():
        expected = model.eval()(images).argmax(1)
    assert torch.equal(first.predictions, expected)
    evaluate(model, [(images, torch.zeros(8, dtype=torch.int64))])
    assert not model.training


def test_headless_model_has_no_predictions() -> None:
    accuracy = evaluate(tiny_vit(num_classes=0), [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))])
    assert (accuracy.top1, accuracy.agreement, accuracy.images) == (None, None, 2)
    assert accuracy.predictions.numel() == 0


def test_no_images() -> None:
    with pytest.raises(UserError, match="no images"):
        evaluate(Echo(), [])


def test_nan_names_batch_and_layer() -> None:
    model = tiny_vit().train()
    images, labels = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    model.blocks[1].mlp.fc1.register_forward_hook(
        lambda _layer, inputs, output: output * (float("nan") if inputs[0].shape[0] == 1 else 1.0)
    )
    with pytest.raises(UserError, match=r"batch 1, first in blocks\.1\.mlp\.fc1") as caught:
        evaluate(model, [(images, labels), (images[:1], labels[:1])])
    assert caught.value.fix
    assert model.training  # restored although it failed
    with pytest.raises(UserError, match="batch 0, first in the input images"):
        evaluate(model, [(images * float("inf"), labels)])


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_vit()
    require_finite_weights(model, "student")
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[3, 2] = float("nan")
    with pytest.raises(UserError, match=r"student's weights .*first in blocks\.1\.attn\.qkv\.weight"):
        require_finite_weights(model, "student")
