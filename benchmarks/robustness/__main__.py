"""The robustness campaign: hostile and broken inputs, and kills, against the command line.

    python -m benchmarks.robustness --seed 1                        # all of it: about half an hour on one core
    python -m benchmarks.robustness --only options,images           # some parts
    python -m benchmarks.robustness --share 0.03 --kills 2          # a sample of every part, for the tests
    python -m benchmarks.robustness --only options --match 'ratio'  # cases whose names fit

Each case is one command, in a folder of its own. It has to end in the right result or in one message with a documented
exit code: without a traceback, a hang, 3.5 GB or 60 s of CPU; nothing of the input may run, nothing outside of the
folder may change, nothing may be left behind. What went wrong is printed as it happens; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # before torch is imported

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.robustness import (
    detection,
    documents,
    graphs,
    hugging_face,
    models,
    opened,
    options,
    payloads,
    pictures,
    surroundings,
    tables,
)
from benchmarks.robustness.case import Case, Ground, Outcome, prepare
from benchmarks.robustness.driver import import_everything, judged, outcome_of
from benchmarks.robustness.kills import kills

PARTS: dict[str, Callable[[Ground, Random], Iterator[Case]]] = {
    "options": options.cases,
    "recipes": documents.recipes,
    "reports": documents.reports,
    "documents of runs": documents.cases,
    "model folders": models.cases,
    "safetensors": models.safetensors,
    "pickles": models.pickles,
    "graphs": graphs.cases,
    "pictures": pictures.cases,
    "shards": pictures.shards,
    "opened data": opened.cases,
    "hugging face": hugging_face.cases,
    "tables": tables.cases,
    "detection": detection.cases,
    "payloads": payloads.cases,
    "surroundings": surroundings.cases,
}
KILLS = "kills"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.robustness", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0, help="decides which cases are drawn")
    parser.add_argument("--only", default="", help=f"parts, from: {', '.join([*PARTS, KILLS])}")
    parser.add_argument("--match", default="", help="only cases whose name fits this regular expression")
    parser.add_argument("--share", type=float, default=1.0, help="share of the cases of every part")
    parser.add_argument("--kills", type=int, default=60, help="of a run; package, report and sweep get a third of it")
    parser.add_argument("--work", type=Path, help="folder to work in; by default one for temporary files")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "robustness.json")
    given = parser.parse_args()
    if given.work is None:
        with tempfile.TemporaryDirectory(prefix="robustness-") as folder:
            rows = _campaign(given, Ground(Path(folder)))
    else:
        rows = _campaign(given, Ground(given.work.absolute()))
    settings = {
        "seed": given.seed,
        "share": given.share,
        "kills": given.kills,
        "detection": find_spec("mmdet") is not None,
    }
    record.write(given.out, record.document(settings, rows))
    sys.exit(int(any(row["wrong"] for row in rows)))


def _campaign(given: argparse.Namespace, ground: Ground) -> list[dict[str, Any]]:
    import_everything()
    prepare(ground)
    if not (ground.run / "report.json").exists():
        _run_of(ground)
    chosen = [name for name in PARTS if not given.only or name in given.only.split(",")]
    rows = []
    for name in chosen:
        random = Random(f"{given.seed} {name}")
        cases = [case for case in PARTS[name](ground, random) if re.search(given.match, case.name)]
        if given.share < 1:
            cases = random.sample(cases, min(len(cases), max(1, round(given.share * len(cases)))))
        rows.append(_part(name, cases, ground))
    if given.kills and (not given.only or KILLS in given.only.split(",")):
        rows.append(_kills(ground, Random(f"{given.seed} {KILLS}"), given.kills))
    _show(rows)
    return rows


def _part(name: str, cases: list[Case], ground: Ground) -> dict[str, Any]:
    started, wrong = time.monotonic(), []
    for case in cases:
        outcome = outcome_of(case, ground)
        if found := judged(case, outcome, ground):
            wrong.append(_noted(name, case.name, found, outcome))
    return _row(name, len(cases), wrong, started)


def _kills(ground: Ground, random: Random, number: int) -> dict[str, Any]:
    started, wrong, tried = time.monotonic(), [], 0
    for name, killed, found, outcome in kills(ground, random, number):
        tried += killed
        if found:
            wrong.append(_noted(KILLS, name, found, outcome))
    return _row(KILLS, tried, wrong, started)


def _noted(part: str, name: str, found: list[str], outcome: Outcome) -> dict[str, Any]:
    print(f"WRONG {part}: {name}: {'; '.join(found)}\n    {outcome.code}: {_end_of(outcome)}", flush=True)
    return {"case": name, "wrong": found}


def _row(part: str, tried: int, wrong: list[dict[str, Any]], started: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - started)
    print(f"{part}: {tried} tried, {len(wrong)} wrong, {seconds} s", flush=True)
    return {"part": part, "tried": tried, "wrong": len(wrong), "seconds": seconds, "cases": wrong}


def _run_of(ground: Ground) -> None:
    """Make the finished run that many cases start from."""
    case = Case("the run", lambda here: ["build", *ground.job, "-o", here / "run", "--quiet"], "done")
    outcome = outcome_of(case, ground)
    if found := judged(case, outcome, ground):
        sys.exit(f"The run that cases start from cannot be made: {found}\n{outcome.errors}")
    (ground.case / "run").rename(ground.run)


def _end_of(outcome: Outcome) -> str:
    lines = (outcome.report or outcome.errors or outcome.output).strip().splitlines()
    return " / ".join(line.strip() for line in lines[-3:])[-400:]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("part", "tried", "wrong", "seconds", title="Robustness")
    for row in rows:
        table.add_row(row["part"], *(f"{row[name]:,}" for name in ("tried", "wrong", "seconds")))
    Console().print(table)
    print(f"{sum(row['tried'] for row in rows):,} tried, {sum(row['wrong'] for row in rows):,} wrong")


if __name__ == "__main__":
    main()
