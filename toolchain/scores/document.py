"""Scores of all units of a network, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from upvits.calib_data.documents import Count, Name, Number, read_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import require_regular
from upvits.calib_data.tensors import save_tensors
from upvits.toolchain.choices import Method
from upvits.toolchain.networks.depth import DepthPath
from upvits.toolchain.scores.stability import Stability

_EXPECTED = "Give the folder that `Scores.save` wrote (scores.safetensors and score.json)."


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of every unit; low means that the unit can go.

    Attributes:
        method: how they were measured.
        unit: `nats` (expected KL per image) for kl, refined and fisher; magnitude and random have no unit.
        values: group name -> float64 tensor [size]; NaN where a unit was not measured (sampled kl).
        num_images: images that the scores were measured on (0 for magnitude and random).
        seed: seed of the label probes or of the random scores.
        model_digest: sha256 of the dense network's weights.
        depth: list of blocks -> how it can get shorter; empty when that was not measured.
        data_digest: sha256 of the proxy images; None where none were used.
        stability: group name -> agreement of the scores on two disjoint halves of the proxy set (of the `fisher` scores
            for `refined`), where half of the units stay or as many as the plan at hand keeps; empty where fewer than
            two images were used, without the groups that were not measured as a whole.
        halves: group name -> these scores [2, size] on each half, float64, as sums over its images; empty as above.

    Example:
        >>> import tempfile, upvits
        >>> from pathlib import Path
        >>> scores = upvits.score(upvits.create_model("pvtv2_b0", weights="demo"), method="magnitude")
        >>> folder = Path(tempfile.mkdtemp())
        >>> scores.save(folder)
        >>> upvits.Scores.load(folder).values["stages.0.blocks.0.mlp"].shape
        torch.Size([256])
    """

    method: Method
    unit: str
    values: dict[str, Tensor]
    num_images: int
    seed: int
    model_digest: str
    depth: dict[str, DepthPath] = field(default_factory=dict)
    data_digest: str | None = None
    stability: dict[str, Stability] = field(default_factory=dict)
    halves: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write score.json, scores.safetensors and, where there are any, halves.safetensors into an existing folder."""
        for name, values in (("scores", self.values), ("halves", self.halves)):
            if values:
                save_tensors(
                    {group: tensor.contiguous() for group, tensor in values.items()}, folder / f"{name}.safetensors"
                )
        document = {
            "format": 1,
            "method": self.method,
            "unit": self.unit,
            "num_images": self.num_images,
            "seed": self.seed,
            "model_digest": self.model_digest,
            "data_digest": self.data_digest,
            "depth": {name: asdict(path) for name, path in self.depth.items()},
            "stability": {name: asdict(stability) for name, stability in self.stability.items()},
        }
        (folder / "score.json").write_text(json.dumps(document, indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            UserError: the folder holds no scores.
        """
        if not (folder / "score.json").exists():
            raise UserError(f"{folder} holds no readable scores (there is no score.json).", fix=_EXPECTED)
        document = read_document(folder / "score.json", _ScoreDocument, fix=_EXPECTED)
        return Scores(
            method=document.method,
            unit=document.unit,
            values=_tensors(folder / "scores.safetensors", 1),
            num_images=document.num_images,
            seed=document.seed,
            model_digest=document.model_digest,
            depth={name: DepthPath(path.steps, path.loss) for name, path in document.depth.items()},
            data_digest=document.data_digest,
            stability={name: Stability(s.spearman, s.overlap, s.kept) for name, s in document.stability.items()},
            halves=_tensors(folder / "halves.safetensors", 2) if (folder / "halves.safetensors").exists() else {},
        )


class _Entries(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _PathEntries(_Entries):
    steps: tuple[tuple[tuple[Count, Count], ...], ...]
    loss: tuple[Number, ...]


class _StabilityEntries(_Entries):
    spearman: Number
    overlap: Number
    kept: Count


class _ScoreDocument(_Entries):
    """`score.json`; see `Scores`."""

    format: Literal[1] = 1
    method: Method
    unit: Name
    num_images: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    model_digest: Name
    data_digest: Name | None = None
    depth: dict[Name, _PathEntries] = {}
    stability: dict[Name, _StabilityEntries] = {}


def _tensors(path: Path, dims: int) -> dict[str, Tensor]:
    """Floating-point tensors with so many dims by name."""
    require_regular(path, fix=_EXPECTED)
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} holds no scores ({error}).", fix=_EXPECTED) from error
    for name, tensor in tensors.items():
        if tensor.dim() != dims or not tensor.is_floating_point():
            raise UserError(f"{path} holds no scores ({name} has shape {list(tensor.shape)}).", fix=_EXPECTED)
    return tensors
