"""Time and memory of scoring, planning and cutting large networks, each step in a process of its own.

    python -m benchmarks.large_networks
    python -m benchmarks.large_networks --networks deit_b --stages cut --images 128
    python -m benchmarks.large_networks --networks vit_l --blocks 6

CPU seconds and peak resident memory are those that the system counts for the whole process, what importing takes
included. A step that grows beyond `--limit-gb`, or takes longer than `--minutes`, is ended, and its row says so. Every
row is written once it is known, and a run that is started again leaves out what it has. Weights are random, images are
those of the embedded set; neither changes what there is to compute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.record import RESULTS, document, write
from upvits import toolchain
from upvits.calib_data import open_data

NETWORKS = {
    "pvt_v2_b0": "pvt_v2_b0",
    "pvt_v2_b2": "pvt_v2_b2",
    "pvt_v2_b5": "pvt_v2_b5",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "dinov2_b_518": "vit_base_patch14_dinov2",
}
STAGES = ("score", "plan", "cut")
IMAGES = {"score": 1024, "plan": 0, "cut": 512}
"""As many as the command line takes."""

RATIO = 0.5
LOOK_SECONDS = 0.5


def network(name: str, blocks: int | None) -> nn.Module:
    """One of `NETWORKS` with random weights, and with fewer blocks if asked."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(NETWORKS[name], **({} if blocks is None else {"depth": blocks}))
    return made.eval()


def work(stage: str, name: str, blocks: int | None, images: int) -> None:
    """One step, in this process."""
    model, data = network(name, blocks), open_data("demo", quiet=True)
    if stage == "score":
        toolchain.score(model, toolchain.calibration_images(model, data, images))
        return
    # of a uniform plan only the widths count here, and no score decides about them
    scores = dataclasses.replace(toolchain.score(model, method="magnitude"), method="fisher")
    plan = toolchain.plan(model, scores, ratio=RATIO)
    if stage == "cut":
        toolchain.prune(model, plan, toolchain.calibration_images(model, data, images))


def measured(command: list[str], limit_gb: float, minutes: float) -> dict[str, Any]:
    """Run a command: how it ended, CPU seconds, seconds, and peak memory in GB."""
    started, why = time.perf_counter(), "done"
    process, peak = subprocess.Popen(command), 0
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, most_memory(process.pid))
        if peak > limit_gb * 1e9:
            why = f"more than {limit_gb:g} GB"
            process.kill()
        elif time.perf_counter() - started > 60 * minutes:
            why = f"more than {minutes:g} minutes"
            process.kill()
        time.sleep(LOOK_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and why == "done":
        why = f"failed with {process.returncode}"
    return {
        "ended": why,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(peak / 1e9, 2),
    }


def most_memory(pid: int) -> int:
    """Bytes that a process had resident at most until now. (What `wait4` says begins with its parent's.)"""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    """Measure what is asked for and not yet in the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, with commas")
    parser.add_argument("--stages", default=",".join(STAGES), help="names, with commas")
    parser.add_argument("--images", type=int, help="number of images; as the command line's by default")
    parser.add_argument("--blocks", type=int, help="a ViT with so many blocks only")
    parser.add_argument("--code", default="", help="a word for the code that is measured, such as a version")
    parser.add_argument("--limit-gb", type=float, default=16.0)
    parser.add_argument("--minutes", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "large_networks.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(**json.loads(asked.worker))
        return
    rows: list[dict[str, Any]] = json.loads(asked.out.read_text())["rows"] if asked.out.is_file() else []
    for name in asked.networks.split(","):
        for stage in asked.stages.split(","):
            images = IMAGES[stage] if asked.images is None else asked.images
            step = {"stage": stage, "name": name, "blocks": asked.blocks, "images": images}
            row = {"code": asked.code, **step}
            if any(row.items() <= other.items() for other in rows):
                continue
            command = [sys.executable, "-m", "benchmarks.large_networks", "--worker", json.dumps(step)]
            row |= measured(command, asked.limit_gb, asked.minutes)
            print(json.dumps(row), flush=True)
            rows.append(row)
            settings = {"ratio": RATIO, "threads": torch.get_num_threads(), "data": "demo"}
            write(asked.out, document(settings, rows))


if __name__ == "__main__":
    main()
