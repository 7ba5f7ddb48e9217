"""The settings of fine-tuning, and those that suit a network and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from upvits.calib_data import DataSource
from upvits.calib_data.errors import UserError
from upvits.calib_data.loading import Augmentation
from upvits.toolchain.choices import Amp, Optimizer
from upvits.toolchain.families import FAMILIES, family_of

SMALL = 20_000
"""Training images below which batches are small and steps large: the network sees few of them."""

_WITHOUT_EFFECT = ("workers", "eval_every", "checkpoint_minutes")


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How a network is fine-tuned; `epochs` is the dial. The defaults are the paper's.

    Example:
        >>> import upvits
        >>> upvits.DistillSettings(epochs=30, batch_size=64).weights
        (1.0, 6.4, 0.0, 0.0, 0.0)
    """

    epochs: int = 200
    batch_size: int = 256  # global: several processes, and the passes of `accumulation`, share it
    accumulation: int = 1  # passes that make one step, each with a part of the batch: less memory
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3  # peak at a global batch of 256, scaled linearly with `batch_size`
    layer_decay: float = 1.0  # factor of the rate from each layer to the one before it; 1: all alike
    weight_decay: float = 1e-3  # none on biases, norms, tokens and position embedding
    warmup_epochs: float = 2.0  # linear; at most half of the training
    drop_path: float | None = 0.1  # stochastic depth of the last block, growing linearly; None: what the model has
    cutmix: float = 0.5  # lambda ~ Beta(cutmix, cutmix); 0: none
    mixup: float = 0.0  # lambda ~ Beta(mixup, mixup); 0: none; beside CutMix, each has half of the batches
    mix_prob: float = 1.0  # share of the batches that are mixed
    label_smoothing: float = 0.0
    min_crop: float = 0.5  # smallest share of a picture in a crop; 0.08 is for training from scratch
    auto_augment: str = "none"  # in timm's words: rand-m9-mstd0.5-inc1, 3a (3-Augment), augmix-m5, ...
    color_jitter: float = 0.0  # largest change of brightness, contrast and saturation
    random_erasing: float = 0.0  # share of the images in which a box is replaced by noise
    repeated_augmentation: int = 1  # views of an image in an epoch, which then has fewer images
    label_weight: float = 1.0
    logit_weight: float = 6.4
    temperature: float = 1.0  # of the logits' loss; its gradients are scaled back by the square
    hard_weight: float = 0.0  # of the teacher's first class as a label
    feature_weight: float = 0.0  # of the features before the head
    map_weight: float = 0.0  # of the last tokens, or the map of the last stage
    teacher_views: int = 0  # the teacher's logits are kept for so many views of every image; 0: for none
    ema_decay: float = 0.9999  # reached gradually, so that the average also follows a short training; 0: none
    clip_grad: float = 0.0  # largest norm of all gradients together; 0: no limit
    amp: Amp = "auto"  # auto: on CUDA bf16, fp16 where the GPU lacks it; the CPU computes in fp32
    compile: bool = False  # by torch.compile
    channels_last: bool = False  # memory layout of images and convolutions
    eval_every: int = 1  # epochs; the last one always is
    seed: int = 0
    workers: int = 0  # processes that read and augment images; does not change the result
    checkpoint_minutes: float = 10.0  # between checkpoints within an epoch; does not change the result

    def __post_init__(self) -> None:
        for wrong, words in _LIMITS:
            if wrong(self):
                raise UserError(f"These settings of a fine-tuning cannot be: {words}.", fix="Correct them.")
        _ = self.augmentation  # checks its values

    @property
    def augmentation(self) -> Augmentation:
        """What is changed at random in a training image."""
        return Augmentation(self.min_crop, self.auto_augment, self.color_jitter, self.repeated_augmentation)

    @property
    def decisive(self) -> dict[str, Any]:
        """Settings that change the result, by name."""
        return {name: value for name, value in asdict(self).items() if name not in _WITHOUT_EFFECT}

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the losses, in the order of `objective.LOSSES`."""
        return (self.label_weight, self.logit_weight, self.hard_weight, self.feature_weight, self.map_weight)


_LIMITS: tuple[tuple[Callable[[DistillSettings], bool], str], ...] = (
    (lambda s: min(s.epochs, s.workers, s.checkpoint_minutes) < 0, "epochs, workers or checkpoint_minutes below 0"),
    (lambda s: min(s.batch_size, s.eval_every, s.accumulation) < 1, "batch_size, eval_every or accumulation below 1"),
    (lambda s: s.lr <= 0 or min(s.weight_decay, s.warmup_epochs, s.clip_grad) < 0, "lr of 0, or a rate below 0"),
    (lambda s: min(s.cutmix, s.mixup, *s.weights) < 0, "cutmix, mixup or a weight below 0"),
    (lambda s: not 0 <= s.ema_decay < 1 or not 0 <= (s.drop_path or 0) < 1, "ema_decay or drop_path not in [0, 1)"),
    (lambda s: s.epochs > 0 and not any(s.weights), "every weight 0, which leaves nothing to learn from"),
    (lambda s: s.temperature <= 0, "a temperature of 0 or below"),
    (lambda s: s.teacher_views < 0, "teacher_views below 0"),
    (
        lambda s: s.teacher_views > 0 and s.feature_weight + s.map_weight > 0,
        "teacher_views with feature_weight or map_weight: only logits are kept",
    ),
    (lambda s: not 0 <= s.label_smoothing < 1, "label_smoothing not in [0, 1)"),
    (lambda s: not (0 <= s.mix_prob <= 1 and 0 <= s.random_erasing <= 1), "mix_prob or random_erasing not in [0, 1]"),
    (lambda s: not 0 < s.layer_decay <= 1, "layer_decay not in (0, 1]"),
    (lambda s: s.batch_size % s.accumulation != 0, "a batch_size that is no multiple of accumulation"),
    (
        lambda s: s.label_smoothing > 0 and s.label_weight == 0,
        "label_smoothing without label_weight",
    ),
)
"""What is wrong, and how it is said."""


def settings_for(model: nn.Module, data: DataSource, *, compensated: bool = True) -> DistillSettings:
    """The settings of the command line for a dense network and its data.

    PVTv2 learns from the dense parent's penultimate features too (weight 20), a ViT from its logits alone. Small data
    sets get small batches and larger steps, since they see few of them. The demo ends within minutes.

    Args:
        model: the teacher.
        data: what is trained on.
        compensated: whether the student was refitted after its cut (`prune` does it); it then needs less.
    """
    images = len(data.train)
    demo, small = data.spec == "demo", images < SMALL
    features = family_of(model) is FAMILIES["pvt_v2"] or model.num_classes == 0
    # measured on the demo at ratio 0.5: compensated, 2 epochs at 3e-3 give 98.75 % (12e-3: 98.6 %); after plain
    # deletion, 3 epochs at 12e-3 give 98.1 %
    return DistillSettings(
        epochs=(2 if compensated else 3) if demo else 30,
        warmup_epochs=0.3 if demo else 2.0,
        batch_size=min(images, 32 if small else 256),
        lr=(3e-3 if compensated else 12e-3) if demo else 4e-3 if small else 1e-3,
        # measured on the demo at 3 epochs: 98.1 % without CutMix, 96.7 % with it; long trainings want it
        cutmix=0.0 if demo else 0.5,
        drop_path=0.0 if small else 0.1,
        feature_weight=20.0 if features else 0.0,
    )
