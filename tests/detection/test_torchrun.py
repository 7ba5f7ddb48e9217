"""Two processes train as one does: the same steps, so the same weights up to rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.detection.conftest import small_config

pytestmark = [pytest.mark.usefixtures("mmdet"), pytest.mark.slow]

WORKER = """
import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from upvits.detection.configs import Schedule
from upvits.detection.coco import open_coco
from upvits.toolchain.processes.crew import gathered
from upvits.detection.training import train_detector

model, scenes, out, batch = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
with gathered() as crew:
    if crew.is_leader:
        data = open_coco(scenes, out)
        schedule = Schedule(epochs=2, batch_size=batch, lr=4e-3, scale=(64, 64), warmup=2, workers=0)
        still = {"train_dataloader.dataset.pipeline.3.prob": 0.0}  # flips are each process's own
        trained = train_detector(model, data, schedule, out / "work", options=still)
        save_file(trained.detector.state_dict(), out / "weights.safetensors")
    else:
        crew.follow()
os._exit(0)  # as `python -m upvits` ends, and for its reason
"""


def train(processes: int, folder: Path, scenes: Path, out: Path, repository: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    script = out / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [*command, str(script), json.dumps(small_config(folder, 12)), str(scenes), str(out), str(4 // processes)],
        cwd=repository, env={"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
    return load_file(out / "weights.safetensors")


def test_two_processes_take_the_steps_of_one(
    folders: dict[str, Path], scenes: Path, tmp_path: Path, repository: Path
) -> None:
    alone = train(1, folders["dense"], scenes, tmp_path / "alone", repository)
    together = train(2, folders["dense"], scenes, tmp_path / "together", repository)
    start = {
        f"backbone.net.{name}": weights for name, weights in load_file(folders["dense"] / "model.safetensors").items()
    }
    names = [name for name in alone if name in start]
    moves = [torch.cat([(weights[name] - start[name]).flatten() for name in names]) for weights in (alone, together)]
    alike = torch.nn.functional.cosine_similarity(moves[0], moves[1], dim=0)
    assert moves[0].norm() > 0.1
    assert float(alike) > 0.95  # AdamW makes steps of rounding where a gradient is nearly zero
    assert float(moves[1].norm()) == pytest.approx(float(moves[0].norm()), rel=0.05)
