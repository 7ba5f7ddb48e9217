"""What tests of several processes run in them: a small network, functions for `together`, and ways to die."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests import forked
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.compensation import compensated_curves, compress
from upvits.toolchain.processes.crew import crew, gathered, join_processes
from upvits.toolchain.processes.process import shared


def network(family: str, classes: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = (
        VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=classes)
        if family == "vit"
        else PyramidVisionTransformerV2(
            depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 32), num_heads=(1, 1, 2, 2),
            mlp_ratios=(2,) * 4, num_classes=classes,
        )
    )  # fmt: skip
    return model.eval()


def pictures(family: str, count: int = 27) -> Tensor:
    side = 16 if family == "vit" else 32
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def scored(family: str, method: Any, classes: int) -> dict[str, Tensor]:
    """Scores, their halves and the losses of depth, by name."""
    scores = toolchain.score(
        network(family, classes), pictures(family), method=method, batch_size=5, depth=method == "fisher"
    )
    depth = {f"depth of {name}": torch.tensor(path.loss) for name, path in scores.depth.items()}
    return {**scores.values, **{f"halves of {name}": half for name, half in scores.halves.items()}, **depth}


def cut(family: str, classes: int) -> dict[str, Tensor]:
    """Outputs after rotation and refit, and the curves that a plan is made from, by name.

    Weights are not compared: rounding decides the signs of a rotated basis.
    """
    model, images = network(family, classes), pictures(family, 60)
    curves = compensated_curves(model, images, batch_size=7)
    scores = toolchain.score(model, method="random")
    plan = toolchain.plan(model, scores, ratio=0.5)
    compressed = compress(model, plan, images, batch_size=7)
    layers = {f"error of {layer.layer}": torch.tensor(layer.error_after) for layer in compressed.report.layers}
    finite = {f"curve of {name}": curve.loss[curve.loss.isfinite()] for name, curve in curves.items()}
    with torch.inference_mode():
        return {"outputs": compressed.model(images).clone(), **layers, **finite}


def refused(few: int) -> None:
    raise UserError(f"{few} are too few.")


def refused_here(rank: int) -> None:
    if shared().rank == rank:
        raise UserError("The disk of this machine is full.", fix="Make room.")
    shared().sum(torch.zeros(1))


def broken_here(rank: int) -> None:
    if shared().rank == rank:
        raise KeyError("a fault of ours")
    shared().sum(torch.zeros(1))


def killed_here(rank: int) -> None:
    if shared().rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    shared().sum(torch.zeros(1))


def idle() -> float:
    """Processor seconds of the second process so far."""
    return shared().all_of({shared().rank: time.process_time()})[1]


def run(rank: int, environment: dict[str, str], folder: Path, lead: Callable[[Path], None]) -> None:
    """One process of a crew; the first one leads. What it prints goes to `folder/RANK.txt`."""
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    with (folder / f"{rank}.txt").open("w", buffering=1) as sys.stderr:
        torch.set_num_threads(1)
        try:
            with gathered() as gang:
                if gang.is_leader:
                    lead(folder)
                else:
                    gang.follow()
            code = 0
        except UserError as error:
            if rank == 0:
                print(f"Error: {error}", file=sys.stderr)
            code = error.exit_code
        except Exception:
            traceback.print_exc()
            code = 1
    os._exit(code)


def meet_twice(rank: int, environment: dict[str, str], folder: Path) -> None:
    """A process without a crew that takes part in two groups, one after the other."""
    os.environ.update({**environment, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)})
    first = _summed(rank)
    time.sleep(2 * (1 - rank))  # the second process looks for the first one before that is there again
    (folder / f"sums-{rank}").write_text(f"{first} {_summed(rank)}")


def _summed(rank: int) -> float:
    """Nothing holds the group afterwards."""
    with join_processes() as process:
        value = torch.tensor([rank + 1.0])
        process.sum(value)
    return value.item()


def start(
    lead: Callable[[Path], None], folder: Path, processes: int = 2, more: Mapping[str, str] | None = None
) -> list[BaseProcess]:
    """Processes that are forked from one server, so that torch is imported once for all of them.

    Args:
        more: environment variables, of torchrun for example.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(more or {})}
    return [forked.start(run, rank, environment, folder, lead) for rank in range(processes)]


# --- what the first process does ---------------------------------------------------------------------------------


def score_and_cut(folder: Path) -> None:
    gang = crew()
    found = {
        "fisher": gang.together(scored, "vit", "fisher", 20),
        "refined": gang.together(scored, "vit", "refined", 4),
        "kl": gang.together(scored, "pvt", "kl", 4),
        "vit": gang.together(cut, "vit", 4),
        "pvt": gang.together(cut, "pvt", 20),
    }
    torch.save(found, folder / "found.pt")


def fail_alike_and_go_on(folder: Path) -> None:
    gang = crew()
    with suppress(UserError):
        gang.together(refused, 3)
    time.sleep(1)
    before = gang.together(idle)
    time.sleep(4)
    (folder / "idle").write_text(str(gang.together(idle) - before))


def be_refused(folder: Path) -> None:
    raise UserError("No such network.")


def refuse_second(folder: Path) -> None:
    crew().together(refused_here, 1)


def break_second(folder: Path) -> None:
    crew().together(broken_here, 1)


def kill_second(folder: Path) -> None:
    crew().together(killed_here, 1)


def kill_first(folder: Path) -> None:
    crew().together(killed_here, 0)
