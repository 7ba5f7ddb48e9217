"""What distillation computes for one batch: the mixed image, the outputs of both models, the three losses."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from upvits.calib_data import DataSource, Preprocess
from upvits.calib_data.errors import UserError
from upvits.toolchain.training.settings import DistillSettings


@dataclass(frozen=True, slots=True)
class Fit:
    """What the two models and the data have in common, and so what can be learned."""

    weights: tuple[float, float, float]  # the settings' weights, 0 where there are no labels or no classes
    labelled: bool  # the labels mean the models' classes
    headless: bool
    classes: int
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

    def layer_groups(self, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """Parameters by layer, each with the share of the rate that it gets (BEiT, arXiv 2106.08254)."""
        excluded: set[str] = getattr(self.model, "no_weight_decay", set)()
        groups = param_groups_layer_decay(self.model, weight_decay, excluded, layer_decay=layer_decay)
        groups += param_groups_weight_decay(self.projection, weight_decay)
        return [group for group in groups if group["params"]]


class LargerPartStays(Mixup):  # type: ignore[misc]
    """timm's Mixup and CutMix, but the image that keeps the larger part stays underneath (as in UP-ViTs)."""

    def _params_per_batch(self) -> tuple[float, bool]:
        share, use_cutmix = super()._params_per_batch()
        return max(share, 1 - share), use_cutmix


def mixing_of(settings: DistillSettings, num_classes: int) -> LargerPartStays:
    """What mixes a batch, and turns its labels into targets."""
    return LargerPartStays(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_prob if settings.mixup or settings.cutmix else 0.0,
        label_smoothing=settings.label_smoothing,
        num_classes=num_classes,
    )


def mixed(mixing: LargerPartStays, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mix a batch with its reverse; draws from NumPy's global generator.

    Args:
        mixing: of `mixing_of`.
        images: [B, 3, H, W]; they are changed. timm mixes even numbers, so of an odd one the last stays as it is.
        labels: [B]; -1 where there is none.

    Returns:
        Images [B, 3, H, W] and the probability of every class [B, classes].
    """
    even = len(images) - len(images) % 2
    labels = labels.clamp_min(0)
    _, targets = mixing(images[:even], labels[:even])
    rest = mixup_target(labels[even:], mixing.num_classes, smoothing=mixing.label_smoothing)
    return images, torch.cat([targets, rest])


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] and penultimate features [B, width] of a timm model, from one pass."""
    network: Any = model  # nn.Module does not know timm's methods
    maps = network.forward_features(images)
    return network.forward_head(maps), network.forward_head(maps, pre_logits=True)


def losses(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    targets: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """Label, logit and feature loss [3], each a mean over the batch in float32, unweighted; weight 0 is not computed.

    Args:
        student, teacher: (logits, features) of the same mixed images.
        targets: the probability of every class [B, classes], see `mixed`.
    """
    (logits, features), (teacher_logits, teacher_features) = student, teacher
    none = torch.zeros((), device=features.device)
    label_loss = logit_loss = feature_loss = none
    if weights[0] > 0:
        label_loss = F.cross_entropy(logits.float(), targets)
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
    return Fit(weights, labelled, headless, classes, features.shape[1], teacher_features.shape[1])
