"""The settings of fine-tuning, and those that suit a network and its data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from upvits.calib_data import DataSource
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import FAMILIES, family_of

SMALL = 20_000
"""Training images below which batches are small and steps large: the network sees few of them."""

_WITHOUT_EFFECT = ("workers", "eval_every", "checkpoint_minutes")


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """The paper's recipe; `epochs` is the dial.

    Example:
        >>> import upvits
        >>> upvits.DistillSettings(epochs=30, batch_size=64).weights
        (1.0, 6.4, 0.0)
    """

    epochs: int = 200
    batch_size: int = 256  # global: several processes share it
    lr: float = 1e-3  # peak at a global batch of 256, scaled linearly with `batch_size`
    weight_decay: float = 1e-3  # none on biases, norms, tokens and position embedding
    warmup_epochs: float = 2.0  # linear; at most half of the training
    drop_path: float | None = 0.1  # stochastic depth of the last block, growing linearly; None: what the model has
    cutmix: float = 0.5  # lambda ~ Beta(cutmix, cutmix); 0: images are not mixed
    label_weight: float = 1.0
    logit_weight: float = 6.4
    feature_weight: float = 0.0
    ema_decay: float = 0.9999  # reached gradually, so that the average also follows a short training
    clip_grad: float | None = None  # largest norm of all gradients together
    amp: bool = True  # on CUDA: bfloat16, float16 where the GPU lacks it; the CPU computes in float32
    eval_every: int = 1  # epochs; the last one always is
    seed: int = 0
    workers: int = 0  # processes that read and augment images; does not change the result
    checkpoint_minutes: float = 10.0  # between checkpoints within an epoch; does not change the result

    def __post_init__(self) -> None:
        if min(self.epochs, self.workers, self.checkpoint_minutes) < 0 or min(self.batch_size, self.eval_every) < 1:
            raise UserError(
                "Distillation needs epochs, workers and checkpoint_minutes >= 0, batch_size and eval_every >= 1."
            )
        rates = (self.weight_decay, self.warmup_epochs, self.cutmix, *self.weights)
        if self.lr <= 0 or min(rates) < 0 or not 0 <= self.ema_decay < 1 or not 0 <= (self.drop_path or 0) < 1:
            raise UserError(
                "Distillation needs lr > 0, weights, rates and warm-up >= 0, ema_decay and drop_path in [0, 1)."
            )

    @property
    def decisive(self) -> dict[str, Any]:
        """Settings that change the result, by name."""
        return {name: value for name, value in asdict(self).items() if name not in _WITHOUT_EFFECT}

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the label, the logit and the feature loss."""
        return (self.label_weight, self.logit_weight, self.feature_weight)


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
