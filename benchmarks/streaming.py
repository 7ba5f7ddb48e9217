"""How a large WebDataset is opened and streamed: time and memory of opening, and of an epoch from first to last batch.

python -m benchmarks.streaming [--samples 100000]      # JSON into --out

The shards are made for it, of small JPEGs, and go away at the end. Memory is the resident memory of the process and of
its workers, each page counted once (PSS), at every twentieth of the epoch; flat means that it does not grow. It is
measured on this machine and through fsspec (`memory://` would hold the shards itself, so `file://` stands for a URL).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.record import RESULTS, document, write

_PROGRAM = """
import gc, json, os, sys, time
import psutil
from upvits.calib_data import Preprocess, open_data
from upvits.calib_data.loading import TrainingBatches
if __name__ == "__main__":
    spec, workers, batch = sys.argv[1], int(sys.argv[2]), 128
    me = psutil.Process()
    def memory():
        return round(sum(process.memory_full_info().pss for process in (me, *me.children())) / 2**20, 1)
    started, used, before = time.perf_counter(), time.process_time(), memory()
    source = open_data(spec)
    opened = {"open_s": round(time.perf_counter() - started, 1), "processor_s": round(time.process_time() - used, 1)}
    gc.collect()
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    training = TrainingBatches(source.train, preprocess, batch, workers=workers)
    steps = len(source.train) // batch
    started, sampled, seen = time.perf_counter(), [], 0
    for step, (images, labels) in enumerate(training.epoch(0)):
        seen += len(images)
        if step % (steps // 20) == 0:
            sampled.append(memory())
    seconds = time.perf_counter() - started
    print(json.dumps({**opened, "samples": len(source.train) + len(source.val), "seen": seen, "digest": source.digest,
                      "mb_before": before, "mb_in_epoch": sampled, "images_per_s": round(seen / seconds, 1)}))
"""


def make_shards(root: Path, samples: int, each: int) -> None:
    """Shards of so many samples: noise of 48 by 48 pixels in 1,000 classes."""
    draw = random.Random(0)
    root.mkdir()
    pictures = []
    for _ in range(500):
        memory = io.BytesIO()
        Image.frombytes("RGB", (48, 48), draw.randbytes(48 * 48 * 3)).save(memory, "JPEG", quality=90)
        pictures.append(memory.getvalue())
    for start in range(0, samples, each):
        with tarfile.open(root / f"train-{start // each:04}.tar", "w") as tar:
            for number in range(start, min(start + each, samples)):
                for name, content in (("jpg", pictures[number % 500]), ("cls", str(number % 1000).encode())):
                    member = tarfile.TarInfo(f"{number:08}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for path in root.iterdir():
        os.utime(path, (1_600_000_000,) * 2)


def streamed(spec: str, cache: Path, workers: int) -> dict[str, Any]:
    """Opened and streamed in a process of its own."""
    environment = {**os.environ, "UPVITS_DEPLOY_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, spec, str(workers)]
    return dict(json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--each", type=int, default=1_000, help="samples of a shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "streaming.json")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "shards", Path(folder) / "cache"
        make_shards(root, asked.samples, asked.each)
        for name, spec in (("first", f"wds:{root}"), ("again", f"wds:{root}"), ("by URL", f"wds:file://{root}")):
            row = {"opening": name, **streamed(spec, cache, asked.workers)}
            row["growth_mb"] = round(row["mb_in_epoch"][-1] - row["mb_in_epoch"][2], 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
    settings = {name: value for name, value in vars(asked).items() if name != "out"}
    write(asked.out, document(settings, rows))


if __name__ == "__main__":
    main()
