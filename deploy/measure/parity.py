"""Does a converted model still compute the same? Compared output by output on real images."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from upvits.calib_data.errors import GateError
from upvits.deploy.runtimes.interface import Session

Outputs: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a candidate may be off.

    Attributes:
        relative: largest absolute difference, as a share of the largest absolute reference output.
        cosine: smallest cosine similarity of any image.
        agreement: least share of images, in percent, with the reference's top-1. A top-1 that changes only between
            outputs which lie closer together than a fifth of `relative` is a tie and counts as agreement.
    """

    relative: float
    cosine: float
    agreement: float


FP32 = Tolerance(relative=1e-4, cosine=0.99999, agreement=100.0)
FP16 = Tolerance(relative=2e-2, cosine=0.999, agreement=99.0)
BF16 = Tolerance(relative=5e-2, cosine=0.998, agreement=97.0)
# What is left of 30 dB: an engine that computes something else is far below; another gate checks the loss of accuracy.
QUANTIZED = Tolerance(relative=2e-1, cosine=0.99, agreement=95.0)
TOLERANCES = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": QUANTIZED, "fp8": QUANTIZED}


@dataclass(frozen=True, slots=True)
class Parity:
    """How close two sets of outputs are.

    Attributes:
        max_abs: largest absolute difference of any output of any image.
        max_relative: the same over the largest absolute reference output.
        min_cosine: smallest cosine similarity of any image.
        top1_agreement: share of images, in percent, with the same top-1, ties counted as differing.
        flipped: images whose top-1 differs beyond a tie.
        worst_image: index of the image with the largest absolute difference.
    """

    reference: str
    candidate: str
    images: int
    max_abs: float
    max_relative: float
    min_cosine: float
    top1_agreement: float
    flipped: int
    worst_image: int
    tolerance: Tolerance
    passed: bool


def model_outputs(model: nn.Module, batches: Iterable[torch.Tensor]) -> Outputs:
    """Outputs of a PyTorch model in eval mode, on the device of its parameters.

    Args:
        model: returns [B, K]; put back into the mode it was in.
        batches: images [B, C, H, W], float32.

    Returns:
        Outputs [N, K], float32.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode():
            return np.concatenate([model(images.to(device)).float().cpu().numpy() for images in batches])
    finally:
        model.train(training)


def session_outputs(session: Session, batches: Iterable[torch.Tensor | Outputs]) -> Outputs:
    """The first output of a session for batches of its first input, float32 [N, K]."""
    (name, output) = (session.input_names[0], session.output_names[0])
    results = [session.run({name: np.asarray(images)})[output] for images in batches]
    return np.concatenate(results).astype(np.float32)


def measure_parity(
    reference: Outputs,
    candidate: Outputs,
    *,
    tolerance: Tolerance = FP32,
    reference_name: str = "PyTorch",
    candidate_name: str = "ONNX Runtime",
    inputs: Outputs | torch.Tensor | None = None,
) -> Parity:
    """Compare outputs [N, K] without a verdict other than `passed`.

    Args:
        reference: what is right.
        candidate: what is checked.
        tolerance: what is allowed.
        reference_name: for messages and the report.
        candidate_name: likewise.
        inputs: the images [N, ...]; looked at only to say where numbers that are not finite come from.

    Raises:
        GateError: NaN or infinity in the images, the reference or the candidate (the first of them is named), or
            the shapes differ: then nothing can be compared.
    """
    if inputs is not None:
        _refuse_non_finite("the input images", np.asarray(inputs), "Check the preprocessing and the image files.")
    _refuse_non_finite(f"the outputs of {reference_name}", reference, "Check the model's weights; it was not exported.")
    _refuse_non_finite(
        f"the outputs of {candidate_name}", candidate, f"{reference_name} is finite: choose a wider precision."
    )
    if reference.shape != candidate.shape or reference.ndim != 2 or not reference.size:
        raise GateError(
            f"{candidate_name} cannot be compared with {reference_name}",
            why=f"Their outputs have shapes {candidate.shape} and {reference.shape}; both must be [images, outputs].",
        )
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    difference = np.abs(expected - actual).max(axis=1)
    scale = float(np.abs(expected).max())
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(actual, axis=1)
    cosine = np.divide((expected * actual).sum(axis=1), norms, out=np.ones_like(norms), where=norms > 0)
    top1, predicted = expected.argmax(axis=1), actual.argmax(axis=1)
    rows = np.arange(len(expected))
    lost = expected[rows, top1] - expected[rows, predicted]
    # within a tenth of the tolerance two classes are as good as equal, and rounding may pick either
    flipped = int((lost > 0.2 * tolerance.relative * scale).sum())
    relative = float(difference.max()) / scale if scale > 0 else float(difference.max())
    return Parity(
        reference=reference_name,
        candidate=candidate_name,
        images=len(expected),
        max_abs=float(difference.max()),
        max_relative=relative,
        min_cosine=float(cosine.min()),
        top1_agreement=100.0 * float((top1 == predicted).mean()),
        flipped=flipped,
        worst_image=int(difference.argmax()),
        tolerance=tolerance,
        passed=(
            relative <= tolerance.relative
            and float(cosine.min()) >= tolerance.cosine
            and 100.0 * (1 - flipped / len(expected)) >= tolerance.agreement
        ),
    )


def require_parity(parity: Parity) -> Parity:
    """The gate: returns what it was given.

    Raises:
        GateError: it did not pass; says by how much and on which image.
    """
    if parity.passed:
        return parity
    limit = parity.tolerance
    raise GateError(
        f"{parity.candidate} does not compute what {parity.reference} computes",
        why=(
            f"Over {parity.images} images: largest difference {parity.max_abs:.3g} (image {parity.worst_image}), "
            f"{parity.max_relative:.2g} of the largest output (allowed {limit.relative:g}); smallest cosine "
            f"{parity.min_cosine:.6f} (allowed {limit.cosine:g}); top-1 changed on {parity.flipped} "
            f"(at least {limit.agreement:g} % must agree)."
        ),
        fix="Use a wider precision or another runtime; if fp32 on ONNX Runtime fails too, the export is wrong.",
    )


def check_parity(
    reference: Outputs,
    candidate: Outputs,
    *,
    tolerance: Tolerance = FP32,
    reference_name: str = "PyTorch",
    candidate_name: str = "ONNX Runtime",
    inputs: Outputs | torch.Tensor | None = None,
) -> Parity:
    """`measure_parity`, then `require_parity`: raises GateError (exit code 4) unless the candidate is close enough.

    Example:
        >>> import numpy as np
        >>> logits = np.array([[1.0, 2.0], [3.0, 0.5]])
        >>> check_parity(logits, logits + 1e-6).top1_agreement
        100.0
    """
    return require_parity(
        measure_parity(
            reference,
            candidate,
            tolerance=tolerance,
            reference_name=reference_name,
            candidate_name=candidate_name,
            inputs=inputs,
        )
    )


def _refuse_non_finite(what: str, values: Outputs, fix: str) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    bad = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
    raise GateError(
        f"{what} hold NaN or infinity",
        why=f"{len(bad)} of {len(values)} images are affected, the first is image {bad[0]}.",
        fix=fix,
    )
