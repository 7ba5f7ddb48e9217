"""The tools that users would pick instead, as baselines: Torch-Pruning 1.6.1 and Isomorphic Pruning's grouping.

They need an older timm, so they live in an environment of their own, made once:

    uv venv runs/peers --python 3.11
    VIRTUAL_ENV=runs/peers uv pip install torch-pruning==1.6.1 timm==1.0.15 torch torchvision safetensors numpy

Each run is one process there (`peers_worker.py`), since defaults of Torch-Pruning's constructors are shared by all
pruners of a process. What it chooses comes back as a list of units and is cut by this project's surgery and counted by
its counter, so that methods differ in their choice only. Two faults of theirs are mended on the way, in their favour:
narrower heads keep the dense network's softmax scale, and the Hessian criterion sums over all images, not the last one.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data.errors import BuildError, UserError
from upvits.toolchain import PruningPlan, Widths
from upvits.toolchain.families import groups_of
from upvits.toolchain.networks.checkpoints import weights_digest
from upvits.toolchain.planning.document import sizer
from upvits.toolchain.structure.groups import ChannelGroup, partition, widths_of

WORKER = Path(__file__).with_name("peers_worker.py")
DEFAULT_PYTHON = Path("runs/peers/bin/python")
OFFSETS = (-0.006, 0.0, 0.006, 0.012, 0.018)  # ratios tried around the one that reaches the MACs
TOLERANCE = 1.002  # a network this much above the asked MACs still counts as reaching them


@dataclass(frozen=True, slots=True)
class Peer:
    """A criterion, and whether all layers of the same kind compete for the budget (Isomorphic Pruning)."""

    criterion: str
    isomorphic: bool = False


PEERS = {
    "Torch-Pruning, magnitude": Peer("magnitude"),
    "Torch-Pruning, Taylor": Peer("taylor"),
    "Torch-Pruning, Hessian": Peer("hessian"),
    "Isomorphic Pruning, Taylor": Peer("taylor", isomorphic=True),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a peer would remove: group name -> units; groups that are not named stay whole."""

    ratio: float
    removed: dict[str, list[int]]


def choices(
    python: Path, model: nn.Module, images: Tensor, labels: Tensor, peer: Peer, shares: Sequence[float], seed: int
) -> tuple[list[Choice], float]:
    """What the peer removes at ratios around those that reach `shares` of the MACs, and the seconds that it took.

    Args:
        python: interpreter of the peers' environment.
        model: a dense network; images [N, 3, H, W] as it expects them, labels [N].

    Raises:
        UserError: the environment is not there.
        BuildError: the peer fails on this network; holds its message.
    """
    if not python.exists():
        raise UserError(f"There is no environment of the peers at {python}.", fix=f"Make it as {__name__} says.")
    ratios = sorted({round(ratio_for(model, share) + offset, 4) for share in shares for offset in OFFSETS})
    job = {"criterion": peer.criterion, "isomorphic": peer.isomorphic, "seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toolchain.save(model, folder / "model")
        save_file({"images": images, "labels": labels}, folder / "images.safetensors")
        (folder / "job.json").write_text(json.dumps({**job, "ratios": [r for r in ratios if 0 < r < 1]}))
        done = subprocess.run([python, WORKER, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"The peer failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
        found = json.loads((folder / "kept.json").read_text())
    return [Choice(entry["ratio"], entry["removed"]) for entry in found["grid"]], float(found["seconds"])


def ratio_for(model: nn.Module, share: float) -> float:
    """The pruning ratio at which Torch-Pruning's rounding leaves `share` of the MACs, to 1/1024."""
    groups, size = groups_of(model), sizer(model, None)
    wanted = share * size(widths_of(groups)).macs
    low, high = 0, 1023
    while low < high:
        middle = (low + high) // 2
        fits = size(_widths(groups, middle / 1024)).macs <= wanted
        low, high = (low, middle) if fits else (middle + 1, high)
    return low / 1024


def _widths(groups: Sequence[ChannelGroup], ratio: float) -> Widths:
    """Equal shares of everything, rounded as Torch-Pruning does; at least one unit stays."""
    channels = {}
    for group in partition(groups):
        if group.kind == "attention":
            channels[group.name] = max(1, int(group.head_dim * (1 - ratio))) * group.num_heads
        else:
            channels[group.name] = max(1, int(group.size * (1 - ratio)))
    return Widths(channels, widths_of(groups).num_heads)


def as_plan(model: nn.Module, removed: Mapping[str, Sequence[int]], peer: str) -> PruningPlan:
    """A peer's choice as a plan of this project.

    Raises:
        UserError: it names a group that the network does not have, or would leave one empty.
    """
    groups, size = groups_of(model), sizer(model, None)
    own = {group.name: group for group in partition(groups)}
    keep: dict[str, tuple[int, ...]] = {}
    for name, units in removed.items():
        if name not in own or not set(units) < set(range(own[name].size)):
            raise UserError(f"{peer} removes {len(units)} units of {name}, which this network cannot lose.")
        keep[name] = tuple(unit for unit in range(own[name].size) if unit not in set(units))
    dense = widths_of(groups)
    return PruningPlan(
        keep=keep,
        num_heads=dict(dense.num_heads),
        architecture=None,
        asked={"peer": peer},
        before=size(dense),
        after=size(_without(dense, removed)),
        dense_widths=dense,
        method=peer,
        model_digest=weights_digest(model),
    )


def _without(dense: Widths, removed: Mapping[str, Sequence[int]]) -> Widths:
    left = {name: dense.channels[name] - len(units) for name, units in removed.items() if name in dense.channels}
    return Widths({**dense.channels, **left}, dense.num_heads)


def nearest(model: nn.Module, grid: Sequence[Choice], share: float) -> Choice:
    """The choice with the largest network that does not exceed `share` of the MACs; without one, the smallest."""
    dense, size = widths_of(groups_of(model)), sizer(model, None)
    most = TOLERANCE * share * size(dense).macs
    sizes = sorted(((size(_without(dense, c.removed)).macs, c) for c in grid), key=lambda pair: pair[0])
    fitting = [choice for macs, choice in sizes if macs <= most]
    return fitting[-1] if fitting else sizes[0][1]


def plans(
    python: Path, model: nn.Module, images: Tensor, labels: Tensor, name: str, shares: Sequence[float], seed: int
) -> tuple[dict[float, PruningPlan], float]:
    """One peer's plan for every share of the MACs, and the seconds that its choice took."""
    grid, seconds = choices(python, model, images, labels, PEERS[name], shares, seed)
    return {share: as_plan(model, nearest(model, grid, share).removed, name) for share in shares}, seconds


def versions(python: Path) -> dict[str, str]:
    """Of the libraries in the peers' environment; empty when it is not there."""
    if not python.exists():
        return {}
    names = ("torch", "timm", "torch-pruning")
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return {name: str(version) for name, version in found.items()}
