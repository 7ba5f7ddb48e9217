"""What distillation computes for one batch: the mixed image, the outputs of both models, the three losses."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvits.calib_data import DataSource, Preprocess
from upvits.calib_data.errors import UserError


@dataclass(frozen=True, slots=True)
class Fit:
    """What the two models and the data have in common, and so what can be learned."""

    weights: tuple[float, float, float]  # the settings' weights, 0 where there are no labels or no classes
    labelled: bool  # the labels mean the models' classes
    headless: bool
    student_width: int
    teacher_width: int


class Learner(nn.Module):
    """The student and, where its features are narrower than the teacher's, the linear map between them.

    The map is trained along and thrown away: no information about the classes ends up in it, it only lets a narrow
    feature vector be compared with a wide one.
    """

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.projection = projection

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = outputs(self.model, images)
        return logits, self.projection(features)

    def no_weight_decay(self) -> set[str]:
        """The model's own list, under the names that its parameters have here (timm's optimizer asks for it)."""
        excluded = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in excluded()}


def cutmix(images: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Pastes one box of the reversed batch into the batch; the image that keeps the larger part stays underneath.

    timm's `Mixup` draws from NumPy's global state, takes even batches only and lets the smaller part stay: a training
    that resumes exactly needs its own generator, and the paper keeps the larger part.

    Args:
        images: [B, 3, H, W], left as they are.

    Returns:
        Mixed images [B, 3, H, W] and the share of each image's own pixels (exact, after clipping at the border).
    """
    if alpha == 0:
        return images, 1.0
    share = rng.beta(alpha, alpha)
    side = np.sqrt(1 - max(share, 1 - share))
    height, width = images.shape[-2:]
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    rows = slice(max(y - half_y, 0), min(y + half_y, height))
    columns = slice(max(x - half_x, 0), min(x + half_x, width))
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] and penultimate features [B, width] of a timm model, from one pass."""
    network: Any = model  # nn.Module does not know timm's methods
    maps = network.forward_features(images)
    return network.forward_head(maps), network.forward_head(maps, pre_logits=True)


def losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels: Tensor,
    share: float,
    weights: tuple[float, float, float],
) -> Tensor:
    """Label, logit and feature loss [3], each a mean over the batch in float32, unweighted; weight 0 is not computed.

    Args:
        student, teacher: (logits, features) of the same mixed images.
        labels: [B] of the unmixed images; the other label of a mixed image is that of the reversed batch.
        share: the part of an image that shows its own label.
    """
    (logits, features), (teacher_logits, teacher_features) = student, teacher
    none = torch.zeros((), device=features.device)
    label_loss = logit_loss = feature_loss = none
    if weights[0] > 0:
        first_loss = F.cross_entropy(logits.float(), labels)
        label_loss = share * first_loss + (1 - share) * F.cross_entropy(logits.float(), labels.flip(0))
    if weights[1] > 0:
        log_student, log_teacher = logits.float().log_softmax(1), teacher_logits.float().log_softmax(1)
        logit_loss = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    if weights[2] > 0:
        feature_loss = F.mse_loss(features.float(), teacher_features.float())
    return torch.stack([label_loss, logit_loss, feature_loss])


def compare(
    student: nn.Module,
    teacher: nn.Module,
    data: DataSource,
    preprocess: Preprocess,
    weights: tuple[float, float, float],
) -> Fit:
    """Says what can be learned; one blank image through both models tells their classes and feature widths.

    Raises:
        UserError: the classes of student, teacher and data differ, or no part of the loss is left.
    """
    label_weight, logit_weight, feature_weight = weights
    blank = torch.zeros(1, *preprocess.input_size, device=next(student.parameters()).device)
    with torch.no_grad():
        logits, features = outputs(student.eval(), blank)
        teacher_logits, teacher_features = outputs(teacher, blank)
    headless = 0 in (getattr(student, "num_classes", None), getattr(teacher, "num_classes", None))
    classes = logits.shape[1]
    if not headless and classes != teacher_logits.shape[1]:
        raise UserError(
            f"The student has {classes} classes, the teacher {teacher_logits.shape[1]}.",
            why="The student learns to give the teacher's answers, class by class.",
            fix="Take the dense parent of the student as teacher.",
        )
    labelled = data.class_names is not None and len(data.class_names) == classes and not headless
    if data.class_names is not None and label_weight > 0 and not labelled and not headless:
        raise UserError(
            f"The models have {classes} classes, the data {data.spec!r} has {len(data.class_names)}.",
            why="The labels of these data say nothing about the models' classes.",
            fix="Take weights that were trained on these classes, or label_weight 0 to learn from the teacher alone.",
        )
    weights = (label_weight if labelled else 0.0, 0.0 if headless else logit_weight, feature_weight)
    if not any(weights):
        raise UserError(
            "There is nothing to learn from: every part of the loss has weight 0.",
            why="Labels need labelled data and a head; logits need a head."
            if headless or not labelled
            else "label_weight, logit_weight and feature_weight are 0.",
            fix="Set feature_weight (20 is a good start), or logit_weight where the models have a head.",
        )
    return Fit(weights, labelled, headless, features.shape[1], teacher_features.shape[1])
