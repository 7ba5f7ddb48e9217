"""How results of benchmarks are kept: one JSON document with date, machine, versions, settings and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from upvits.deploy.machine.environment import environment
from upvits.deploy.store.artifacts import atomic_write

RESULTS = Path("benchmarks/results")


def document(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """The document; `settings` are those that the numbers depend on."""
    return {
        "date": date.today().isoformat(),
        "environment": environment().as_json(),
        "settings": dict(settings),
        **more,
        "rows": [dict(row) for row in rows],
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file at once, so that a killed run leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean, with the standard deviation where there are several values: `81.3 ± 0.4`.

    >>> spread([80.0, 82.0]), spread([3.25], 2), spread([None])
    ('81.0 ± 1.4', '3.25', '')
    """
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{mean(known):.{digits}f}"
    return f"{middle} ± {stdev(known):.{digits}f}" if len(known) > 1 else middle
