"""Parity: what counts as the same, and errors that say where it broke."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.deploy.conftest import Exported
from upvits.calib_data.errors import GateError
from upvits.deploy.measure.parity import (
    FP16,
    FP32,
    Tolerance,
    check_parity,
    measure_parity,
    model_outputs,
    session_outputs,
)
from upvits.deploy.runtimes import open_onnx

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(20, 10)).astype(np.float32)


def test_figures_are_those_of_the_definition() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 2.0]])
    candidate = np.array([[3.0, 3.0], [0.5, 2.0]])
    parity = measure_parity(reference, candidate, tolerance=Tolerance(1.0, 0.0, 0.0))
    assert parity.max_abs == pytest.approx(1.0)
    assert parity.max_relative == pytest.approx(0.25)
    assert parity.min_cosine == pytest.approx(2.0 / np.hypot(0.5, 2.0))
    assert parity.worst_image == 0
    assert parity.top1_agreement == 50.0
    assert parity.images == 2
    assert parity.passed


def test_equal_outputs_pass_and_serialise() -> None:
    parity = check_parity(LOGITS, LOGITS.copy())
    assert parity.max_abs == 0.0
    assert parity.min_cosine == pytest.approx(1.0)
    document = json.loads(json.dumps(asdict(parity)))
    assert document["passed"] is True
    assert document["tolerance"]["relative"] == FP32.relative


def test_a_wrong_image_fails_the_gate_and_is_named() -> None:
    candidate = LOGITS.copy()
    candidate[13] += 0.5
    with pytest.raises(GateError, match=r"engine does not compute.*\n.*image 13") as failure:
        check_parity(LOGITS, candidate, candidate_name="engine")
    assert failure.value.exit_code == 4


def test_noise_of_half_precision_passes_only_its_own_tolerance() -> None:
    candidate = LOGITS.astype(np.float16) * np.float32(1.001)
    assert check_parity(LOGITS, candidate, tolerance=FP16).passed
    with pytest.raises(GateError):
        check_parity(LOGITS, candidate, tolerance=FP32)


def test_a_tie_is_no_flip_and_a_flip_is_one() -> None:
    reference = np.array([[1.0, 1.0 + 1e-7, 0.0]] * 4)
    tied = np.array([[1.0 + 1e-7, 1.0, 0.0]] * 4)
    parity = check_parity(reference, tied)
    assert (parity.top1_agreement, parity.flipped) == (0.0, 0)
    loose = Tolerance(relative=1e-3, cosine=0.9, agreement=100.0)
    near = np.array([[1.0, 1.0 - 1.5e-4, 0.0]] * 4)
    assert measure_parity(near, near[:, [1, 0, 2]], tolerance=loose).flipped == 0
    # Close in value and direction, but the answer is another one: within `relative`, and refused.
    wide = np.array([[1.0, 1.0 - 4e-4, 0.0]] * 4)
    swapped = measure_parity(wide, wide[:, [1, 0, 2]], tolerance=loose)
    assert (swapped.max_relative < loose.relative, swapped.flipped, swapped.passed) == (True, 4, False)
    far = np.array([[1.0, 0.9, 0.0]] * 4)
    assert measure_parity(far, far[:, [1, 0, 2]], tolerance=Tolerance(0.01, 0.9, 100.0)).flipped == 4


@pytest.mark.parametrize(
    ("broken", "said"),
    [("inputs", "the input images"), ("reference", "outputs of PyTorch"), ("candidate", "outputs of fp16 engine")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_numbers_are_placed(broken: str, said: str, value: float) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "inputs": RNG.normal(size=(20, 3, 4, 4)),
        "reference": LOGITS.copy(),
        "candidate": LOGITS.copy(),
    }
    arrays[broken][7].flat[0] = value
    with pytest.raises(GateError, match=f"{said} hold NaN or infinity") as failure:
        check_parity(arrays["reference"], arrays["candidate"], inputs=arrays["inputs"], candidate_name="fp16 engine")
    assert "1 of 20 images are affected, the first is image 7" in failure.value.why


def test_other_shapes_cannot_be_compared() -> None:
    with pytest.raises(GateError, match="cannot be compared"):
        check_parity(LOGITS, LOGITS[:, :5])
    with pytest.raises(GateError, match="cannot be compared"):
        check_parity(LOGITS[:0], LOGITS[:0])


def test_model_outputs_puts_the_mode_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    images = torch.randn(6, 4)
    outputs = model_outputs(model, [images[:4], images[4:]])
    assert model.training
    np.testing.assert_allclose(outputs, model[0](images).detach().numpy(), rtol=1e-6)


def test_wrong_preprocessing_is_caught(vit: Exported) -> None:
    reference = model_outputs(vit.model, [vit.images])
    with open_onnx(vit.report.path) as session, pytest.raises(GateError, match="does not compute"):
        check_parity(reference, session_outputs(session, [vit.images.flip(1)]))
