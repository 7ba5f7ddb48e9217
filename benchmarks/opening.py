"""How long an image folder takes to open: for the first time, again, and after a change.

python -m benchmarks.opening [--images 100000]      # JSON into --out

The folder is made for it, of small JPEGs in 1,000 classes, and goes away at the end. Every opening is a process of its
own with a cache of its own, whose `open_data` is timed, on the wall and by its processor time; each is measured
`--rounds` times, the first opening with an empty cache each time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import PIL
from PIL import Image

from benchmarks.record import RESULTS, document, write

_PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
from upvits.calib_data import open_data
imported, used = time.perf_counter(), time.process_time()
source = open_data(sys.argv[1])
done, used = time.perf_counter(), time.process_time() - used
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
times = {"import_s": imported - started, "open_s": done - imported, "processor_s": used}
print(json.dumps({**times, "peak_mb": peak, "digest": source.digest}))
"""


def make_folder(root: Path, images: int) -> None:
    """Small JPEGs, each with bytes and a time of its own."""
    draw = random.Random(0)
    for number in range(images):
        folder = root / f"class{number % 1000:04}"
        folder.mkdir(parents=True, exist_ok=True)
        memory = io.BytesIO()
        colour = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (64, 64), colour).save(memory, "JPEG")
        file = folder / f"{number}.jpg"
        file.write_bytes(memory.getvalue())
        os.utime(file, (1_600_000_000 + number,) * 2)


def opened(root: Path, cache: Path) -> dict[str, Any]:
    """One opening, in a process of its own."""
    environment = {**os.environ, "UPVITS_DEPLOY_CACHE": str(cache)}
    command = [sys.executable, "-c", _PROGRAM, f"imagefolder:{root}"]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(found))


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of several openings."""
    return {
        "opening": name,
        "open_s": round(median(run["open_s"] for run in runs), 2),
        "open_s_of_each": [round(run["open_s"], 2) for run in runs],
        "processor_s": round(median(run["processor_s"] for run in runs), 2),
        "processor_s_of_each": [round(run["processor_s"], 2) for run in runs],
        "import_s": round(median(run["import_s"] for run in runs), 2),
        "peak_mb": round(max(run["peak_mb"] for run in runs)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "opening.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        started = time.perf_counter()
        make_folder(root, asked.images)
        print(f"made {asked.images:,} files in {time.perf_counter() - started:.0f} s", flush=True)
        caches = [Path(folder) / f"cache{number}" for number in range(asked.rounds)]
        first = [opened(root, cache) for cache in caches]
        again = [opened(root, cache) for cache in caches]
        same = len({run["digest"] for run in (*first, *again)}) == 1
        file = root / "class0000" / "0.jpg"
        file.write_bytes(file.read_bytes() + b"\0")
        changed = [opened(root, cache) for cache in caches]
        rows = [row("first", first), row("again", again), row("one file changed", changed)]
        facts = {
            "same_digest_again": same,
            "other_digest_after_the_change": changed[0]["digest"] not in {run["digest"] for run in again},
        }
    print(json.dumps([*rows, facts], indent=1))
    settings = {"images": asked.images, "rounds": asked.rounds}
    write(asked.out, document(settings, rows, pillow=PIL.__version__, **facts))


if __name__ == "__main__":
    main()
