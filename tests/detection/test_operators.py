"""Operators that stand in for compiled ones: against autograd and against brute force."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from upvits.calib_data.errors import MissingDependencyError
from upvits.detection import operators


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.25, 0.5]), st.booleans())
def test_focal_loss_and_its_derivative(seed: int, gamma: float, alpha: float, weighted: bool) -> None:
    torch.manual_seed(seed)
    logits = (4 * torch.randn(6, 3, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 4, (6,))  # 3 is background
    weight = torch.rand(3, dtype=torch.float64) + 0.5 if weighted else torch.empty(0, dtype=torch.float64)
    loss, gradient = torch.empty_like(logits.detach()), torch.empty_like(logits.detach())
    operators.sigmoid_focal_loss_forward(logits.detach(), target, weight, loss, gamma=gamma, alpha=alpha)
    operators.sigmoid_focal_loss_backward(logits.detach(), target, weight, gradient, gamma=gamma, alpha=alpha)
    rows = torch.cat([weight, torch.ones(1)])[target] if weighted else torch.ones(6)
    positive = target[:, None] == torch.arange(3)
    q = torch.where(positive, logits.sigmoid(), 1 - logits.sigmoid())
    expected = -torch.where(positive, alpha, 1 - alpha) * rows[:, None] * (1 - q) ** gamma * q.log()
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(loss, expected.detach(), rtol=1e-6, atol=1e-9)
    assert torch.allclose(gradient, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_the_best_of_what_overlaps(offset: int) -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 10], [20, 20, 29, 29], [0, 0, 9, 4]])
    scores = torch.tensor([0.8, 0.9, 0.3, 0.7])
    kept = operators.nms(boxes, scores, 0.5, offset)
    # (9 x 4) / (9 x 10) = 0.4, with the offset (10 x 5) / (10 x 11) = 0.45
    assert kept.tolist() == [1, 3, 2]
    assert operators.nms(boxes, scores, 0.42, offset).tolist() == ([1, 3, 2] if offset == 0 else [1, 2])


def test_every_other_operator_says_what_to_install() -> None:
    module = operators.stand_in()
    assert module.nms is operators.nms
    assert callable(module.deform_conv_forward)  # mmcv asks for names when it is imported
    with pytest.raises(MissingDependencyError, match="deform_conv_forward") as caught:
        module.deform_conv_forward(1, 2)
    assert "mmcv" in caught.value.fix


def test_cropped_masks_are_those_of_torchvision() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    rois = torch.tensor([[0.0, 4, 4, 12, 12], [0, 0, 0, 8, 8]])
    crops = torch.empty(2, 1, 4, 4)
    how: dict[str, Any] = {
        "aligned_height": 4,
        "aligned_width": 4,
        "spatial_scale": 1.0,
        "sampling_ratio": 0,
        "aligned": True,
    }
    operators.roi_align_forward(mask, rois, crops, torch.empty(0), torch.empty(0), pool_mode=1, **how)
    assert torch.allclose(crops[0], torch.ones(4, 4))
    assert crops[1, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(MissingDependencyError, match="by maximum"):
        operators.roi_align_forward(mask, rois, crops, torch.empty(0), torch.empty(0), pool_mode=0, **how)
