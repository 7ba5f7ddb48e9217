"""What distillation computes for one batch: the mixed image, the outputs of both models, the losses."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from upvits.calib_data import DataSource, Preprocess
from upvits.calib_data.errors import UserError
from upvits.toolchain.training.settings import DistillSettings

LOSSES = ("label", "logit", "hard", "feature", "map")
"""The parts of the loss, in the order of `DistillSettings.weights`."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What the two models and the data have in common, and so what can be learned."""

    weights: tuple[float, ...]  # the settings' weights, 0 where there are no labels or no classes
    labelled: bool  # the labels mean the models' classes
    headless: bool
    classes: int
    feature_widths: tuple[int, int]  # of the student and of the teacher
    map_widths: tuple[int, int]


class Outputs(NamedTuple):
    """What a network says of a batch.

    Attributes:
        logits: [B, classes].
        taught: [B, classes], of the head that the teacher teaches: the second of two (DeiT's distilled networks, in
            training), otherwise the same.
        features: [B, width], before the head.
        maps: [B, rows, columns, width], the last tokens or the map of the last stage.
    """

    logits: Tensor
    taught: Tensor
    features: Tensor
    maps: Tensor


class Learner(nn.Module):
    """The student and, where it is narrower than the teacher, the linear maps between them.

    They are trained along and thrown away: no information about the classes ends up in them, they only let narrow
    vectors be compared with wide ones (FitNets, arXiv 1412.6550).
    """

    def __init__(self, model: nn.Module, projection: nn.Module, map_projection: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.map_projection = map_projection

    def forward(self, images: Tensor) -> Outputs:
        found = outputs(self.model, images)
        return found._replace(features=self.projection(found.features), maps=self.map_projection(found.maps))

    def no_weight_decay(self) -> set[str]:
        """The model's own list, under the names that its parameters have here (timm's optimizer asks for it)."""
        excluded = getattr(self.model, "no_weight_decay", set)
        return {f"model.{name}" for name in excluded()}

    def layer_groups(self, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
        """Parameters by layer, each with the share of the rate that it gets (BEiT, arXiv 2106.08254)."""
        excluded: set[str] = getattr(self.model, "no_weight_decay", set)()
        groups = param_groups_layer_decay(self.model, weight_decay, excluded, layer_decay=layer_decay)
        for projection in (self.projection, self.map_projection):
            groups += param_groups_weight_decay(projection, weight_decay)
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


def outputs(model: nn.Module, images: Tensor) -> Outputs:
    """From one pass of a timm model."""
    network: Any = model  # nn.Module does not know timm's methods
    maps = network.forward_features(images)
    logits = network.forward_head(maps)
    first, taught = logits if isinstance(logits, tuple) else (logits, logits)
    return Outputs(first, taught, network.forward_head(maps, pre_logits=True), _grid(network, maps, images))


def _grid(network: Any, maps: Tensor, images: Tensor) -> Tensor:
    """[B, rows, columns, width], without class and register tokens."""
    if maps.ndim == 4:
        return maps if maps.shape[-1] == network.num_features else maps.permute(0, 2, 3, 1)
    patches = maps[:, getattr(network, "num_prefix_tokens", 0) :]
    rows, columns = network.patch_embed.dynamic_feat_size(images.shape[-2:])
    if rows * columns != patches.shape[1]:  # sizes that are no multiple of the patch
        rows, columns = patches.shape[1], 1
    return patches.reshape(len(patches), rows, columns, -1)


def losses(
    student: Outputs, teacher: Outputs, targets: Tensor, weights: tuple[float, ...], temperature: float = 1.0
) -> Tensor:
    """The parts of the loss [5], each a mean over the batch in float32, unweighted; weight 0 is not computed.

    - label: cross-entropy against the targets.
    - logit: KL(teacher || student) of softened logits, times temperature squared (Hinton et al., arXiv 1503.02531).
    - hard: cross-entropy against the teacher's first class (DeiT, arXiv 2012.12877).
    - feature: mean squared error before the head (FitNets, arXiv 1412.6550; UP-ViTs for PVTv2).
    - map: the same of the last tokens, each of them normalised (ViTKD, arXiv 2209.02432). Maps of another number of
      rows are resized to the student's.

    Args:
        student, teacher: of the same mixed images.
        targets: the probability of every class [B, classes], see `mixed`.
        weights: in the order of `LOSSES`.
        temperature: of the logit loss.
    """
    parts = torch.zeros(len(LOSSES), device=student.features.device)
    label, logit, hard, feature, maps = (weight > 0 for weight in weights)
    # What teaches alone, labels or the teacher, teaches both heads of a student that has two.
    alone = not (label and (logit or hard))
    first, taught = [(student.logits + student.taught) / 2] * 2 if alone else [student.logits, student.taught]
    if label:
        parts[0] = F.cross_entropy(first.float(), targets)
    if logit:
        log_student = (taught.float() / temperature).log_softmax(1)
        log_teacher = (teacher.logits.float() / temperature).log_softmax(1)
        parts[1] = temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    if hard:
        parts[2] = F.cross_entropy(taught.float(), teacher.logits.argmax(1))
    if feature:
        parts[3] = F.mse_loss(student.features.float(), teacher.features.float())
    if maps:
        parts[4] = F.mse_loss(_normalised(student.maps), _normalised(_resized(teacher.maps, student.maps)))
    return parts


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    if maps.shape[1:3] == like.shape[1:3]:
        return maps
    channels_first = maps.float().permute(0, 3, 1, 2)
    size = like.shape[1:3]
    return F.interpolate(channels_first, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _normalised(maps: Tensor) -> Tensor:
    return F.layer_norm(maps.float(), maps.shape[-1:])


def compare(
    student: nn.Module,
    teacher: nn.Module,
    data: DataSource,
    preprocess: Preprocess,
    weights: tuple[float, ...],
) -> Fit:
    """Says what can be learned; one blank image through both models tells their classes and widths.

    Args:
        teacher: gives `Outputs`.

    Raises:
        UserError: the classes of student, teacher and data differ, or no part of the loss is left.
    """
    label_weight = weights[0]
    blank = torch.zeros(1, *preprocess.input_size, device=next(student.parameters()).device)
    with torch.no_grad():
        found, taught = outputs(student.eval(), blank), teacher(blank)
    logits, teacher_logits = found.logits, taught.logits
    headless = 0 in (getattr(network, "num_classes", None) for network in (student, *teacher.children()))
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
    kept = (labelled, not headless, not headless, True, True)
    weights = tuple(weight if keep else 0.0 for weight, keep in zip(weights, kept, strict=True))
    if not any(weights):
        raise UserError(
            "There is nothing to learn from: every part of the loss has weight 0.",
            why="Labels need labelled data and a head; logits need a head."
            if headless or not labelled
            else "label_weight, logit_weight and feature_weight are 0.",
            fix="Set feature_weight (20 is a good start), or logit_weight where the models have a head.",
        )
    widths = ((a.shape[-1], b.shape[-1]) for a, b in ((found.features, taught.features), (found.maps, taught.maps)))
    return Fit(weights, labelled, headless, classes, *widths)
