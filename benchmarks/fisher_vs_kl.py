"""How well the fast scores rank units: Spearman of `fisher` against the exact `kl`, group by group.

python -m benchmarks.fisher_vs_kl                      # the demo model, 64 images, 64 units a group
python -m benchmarks.fisher_vs_kl --units 0 --json     # every unit; one JSON object on stdout
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import toolchain
from calib_data import open_source, proxy_images
from deploy.environment import environment
from toolchain.families import groups_of
from toolchain.scores.cuts import Cut
from toolchain.scores.stability import kept_overlap, spearman


def compare(num_images: int, num_units: int, seed: int, quiet: bool) -> dict[str, Any]:
    """Score the demo model both ways; `num_units` 0 takes every unit."""
    model = toolchain.create_model("pvtv2_b0", weights="demo")
    images = proxy_images(open_source("demo"), toolchain.preprocess_of(model), num_images, seed)
    generator = torch.Generator().manual_seed(seed)
    units: dict[str, list[int]] = {}
    for group in groups_of(model):
        shuffled = torch.randperm(group.size, generator=generator)
        units[group.name] = sorted(shuffled[: num_units or group.size].tolist())
    started = time.perf_counter()
    fisher = toolchain.score(model, images, method="fisher", seed=seed, quiet=quiet)
    fisher_seconds = time.perf_counter() - started
    started = time.perf_counter()
    exact = toolchain.score(model, images, method="kl", batch_size=num_images, units=units, quiet=quiet)
    kl_seconds = time.perf_counter() - started
    rows = []
    for group in groups_of(model):
        chosen = units[group.name]
        a, b = fisher.values[group.name][chosen], exact.values[group.name][chosen]
        if len(chosen) > 2:
            rows.append(
                {
                    "group": group.name,
                    "kind": group.kind,
                    "units": len(chosen),
                    "spearman": spearman(a, b),
                    "kept_overlap": kept_overlap(a, b, Cut(1, len(a) // 2)),
                    "ratio": float((a / b.clamp_min(1e-12)).median()),
                }
            )
    return {
        "model": "pvt_v2_b0 (demo)",
        "date": date.today().isoformat(),
        "environment": environment().as_json(),
        "images": num_images,
        "seed": seed,
        "medians": {kind: _median(rows, kind) for kind in ("embed", "attention", "heads", "qk", "v", "ffn")},
        "fisher_seconds_all_units": fisher_seconds,
        "kl_seconds_measured_units": kl_seconds,
        "units_measured": sum(row["units"] for row in rows),
        "rows": rows,
    }


def _median(rows: list[dict[str, Any]], kind: str) -> float | None:
    found = sorted(row["spearman"] for row in rows if row["kind"] == kind)
    return found[len(found) // 2] if found else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--units", type=int, default=64, help="units sampled in each group; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    result = compare(options.images, options.units, options.seed, quiet=options.json)
    if options.json:
        json.dump(result, sys.stdout)
        print()
        return
    table = Table("group", "units", "Spearman", "kept overlap", "fisher / kl")
    for row in result["rows"]:
        figures = (f"{row['spearman']:.3f}", f"{row['kept_overlap']:.2f}", f"{row['ratio']:.2f}")
        table.add_row(row["group"], str(row["units"]), *figures)
    console = Console()
    console.print(table)
    medians = ", ".join(f"{kind} {value:.3f}" for kind, value in result["medians"].items() if value is not None)
    console.print(f"Median Spearman over groups: {medians} ({options.images} images)")
    console.print(
        f"fisher: {result['fisher_seconds_all_units']:.1f} s for all units; "
        f"kl: {result['kl_seconds_measured_units']:.1f} s for {result['units_measured']} units"
    )


if __name__ == "__main__":
    main()
