"""The report says what was measured, in the agreed names, and its sentences follow from its figures."""

import json
import re
import time
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from calib_data.errors import UserError
from deploy.bench import BenchSettings, interleave
from deploy.report import Report, bench_figures, comparisons, engine_figures, headline, load_report, shortfall, verdict
from deploy.report_views import html, markdown, save_report, terminal
from deploy.runtimes.interface import Arrays, BatchProfile, Engine


def latency(median: float, batch: int = 1, cv: float = 0.01) -> dict[str, Any]:
    return {
        "min": 0.9 * median,
        "median": median,
        "mean": 1.02 * median,
        "p90": 1.1 * median,
        "p99": 1.3 * median,
        "cv": cv,
        "images_per_s": 1000 * batch / median,
        "n": 300,
    }


def document(**changes: Any) -> dict[str, Any]:
    """A made-up run: 4x fewer MACs, 1.4x faster at batch 1 and 3.2x at batch 8."""
    dense = {"onnxruntime": {"fp32": {"b1": latency(7.0), "b8": latency(48.0, 8)}}}
    pruned = {"onnxruntime": {"fp32": {"b1": latency(5.0), "b8": latency(15.0, 8)}}}
    return {
        "model": "pvt_v2_b0",
        "ratio": 0.5,
        "data": "demo",
        "weights": "demo",
        "dense": {"params": 3_400_000, "macs": 400_000_000, "top1": 97.5, "latency_ms": dense},
        "pruned": {
            "params": 850_000,
            "macs": 100_000_000,
            "top1": 96.25,
            "top1_after_prune": 41.0,
            "agreement": 96.75,
            "latency_ms": pruned,
        },
        "speedup": {"onnxruntime": {"fp32": {"b1": 1.4, "b8": 3.2}}},
        "speedup_low": {"onnxruntime": {"fp32": {"b1": 1.3, "b8": 3.1}}},
        "speedup_high": {"onnxruntime": {"fp32": {"b1": 1.5, "b8": 3.3}}},
        "parity": [
            {
                "model": "pruned",
                "reference": "pytorch fp32",
                "candidate": "onnxruntime fp32",
                "images": 64,
                "max_abs": 3.1e-6,
                "min_cosine": 0.9999999,
                "top1_agreement": 100.0,
                "passed": True,
            }
        ],
        "engines": [
            {
                "model": "pruned",
                "runtime": "tensorrt-rtx",
                "precision": "fp32",
                "target": "sm86, sm89, sm120",
                "path": "5-engine/tensorrt-rtx-fp32-pruned/engine.plan",
                "bytes": 14_500_000,
                "seconds": 3.7,
            }
        ],
        "stages": [
            {"name": "1-score", "seconds": 12.0, "peak_rss_mb": 1234.5, "skipped": True},
            {"name": "5-engine/tensorrt-rtx-fp32-pruned", "seconds": 3.7, "peak_rss_mb": 900.0, "skipped": False},
        ],
        "plan": {
            "asked": {"ratio": 0.5},
            "got": {"macs": 0.25, "params": 0.25},
            "widths": [{"group": "stages.0.blocks.0.mlp.hidden", "before": 256, "after": 128}],
        },
        "measurement": {"warmup": 20, "interleaved": True, "threads": 2},
        "environment": {"cpu": "Imaginary CPU 9000", "gpus": [], "versions": {"torch": "2.15.0"}},
        "notes": ["tensorrt: left out, the package is not installed"],
        **changes,
    }


def report(**changes: Any) -> Report:
    return Report.model_validate(document(**changes))


def printed(made: Report, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(terminal(made))
    text = console.export_text()
    console.file.close()
    return text


def changed(part: str, **values: Any) -> dict[str, Any]:
    """One part of the document with some of its values replaced."""
    return {part: {**document()[part], **values}}


def test_the_names_in_the_json_are_the_agreed_ones(tmp_path: Path) -> None:
    save_report(tmp_path, report())
    written = json.loads((tmp_path / "report.json").read_text())
    for name in ("model", "ratio", "data", "weights", "speedup", "parity", "engines", "stages", "environment"):
        assert written[name] == {"format_version": 1, **document()}[name]
    for model in ("dense", "pruned"):
        assert {"params", "macs", "top1", "latency_ms"} <= set(written[model])
        assert {"median", "p90", "p99", "cv"} <= set(written[model]["latency_ms"]["onnxruntime"]["fp32"]["b8"])
    assert written["pruned"]["top1_after_prune"] == 41.0
    assert written["pruned"]["agreement"] == 96.75


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    save_report(tmp_path, report())
    assert load_report(tmp_path) == report()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_a_missing_or_damaged_report_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no report\.json"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="cannot read"):
        load_report(tmp_path)


def test_verdict_names_speed_accuracy_size_and_device() -> None:
    assert verdict(report()) == (
        "3.20x faster on onnxruntime fp32 at batch 8, 1.25 points of top-1 lost (97.50 to 96.25 %), "
        "75 % fewer parameters, measured on Imaginary CPU 9000."
    )


def test_verdict_without_labels_speaks_of_agreement() -> None:
    unlabelled = report(**changed("dense", top1=None), **changed("pruned", top1=None, top1_after_prune=None))
    assert "the same top-1 as the dense model on 96.8 % of the unlabelled images" in verdict(unlabelled)
    assert "points" not in verdict(unlabelled)
    assert "None" not in markdown(unlabelled) + html(unlabelled) + printed(unlabelled)


def test_verdict_does_not_call_a_slower_model_faster() -> None:
    slower = report(speedup={"onnxruntime": {"fp32": {"b1": 0.7, "b8": 0.8}}})
    assert verdict(slower).startswith("Not faster: 0.80x the dense speed on onnxruntime fp32 at batch 8")


def test_verdict_without_a_measurement_says_so() -> None:
    nothing = report(speedup={}, **changed("dense", latency_ms={}), **changed("pruned", latency_ms={}))
    assert verdict(nothing).startswith("Latency was not measured, ")
    assert "## Latency" not in markdown(nothing)


def test_a_gain_in_accuracy_is_a_gain() -> None:
    assert "1.50 points of top-1 gained (97.50 to 99.00 %)" in verdict(report(**changed("pruned", top1=99.0)))


BENCH = BenchSettings(seconds=0.05, warmup=1, rounds=2, min_iterations=4)


class Sleeper:
    """A session that takes a known time."""

    input_names, output_names = ("images",), ("logits",)
    settings: Mapping[str, str | int | bool] = MappingProxyType({"device": "none"})

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        time.sleep(self.seconds * len(feeds["images"]))
        return {}

    def close(self) -> None: ...

    def __enter__(self) -> "Sleeper":
        return self

    def __exit__(self, *_: object) -> None: ...


def test_measurements_arrive_in_the_report_under_their_names() -> None:
    feeds = {batch: {"images": np.zeros((batch, 1))} for batch in (1, 4)}
    measured = {
        ("a", "fp32"): interleave({"dense": Sleeper(0.004), "pruned": Sleeper(0.001)}, feeds, BENCH),
        ("a", "fp16"): interleave({"dense": Sleeper(0.002), "pruned": Sleeper(0.002)}, feeds, BENCH),
    }
    bench = bench_figures(measured)
    assert bench.dense["a"]["fp32"]["b4"].median == pytest.approx(16, rel=0.5)
    assert bench.pruned["a"]["fp32"]["b1"].n >= 4
    assert bench.pruned["a"]["fp32"]["b4"].images_per_s == pytest.approx(1000, rel=0.5)
    for batch in ("b1", "b4"):
        low, speedup, high = (
            table["a"]["fp32"][batch] for table in (bench.speedup_low, bench.speedup, bench.speedup_high)
        )
        assert low <= speedup <= high
        assert speedup > 1.5 * bench.speedup["a"]["fp16"][batch]
    made = report(
        speedup=bench.speedup,
        speedup_low=bench.speedup_low,
        speedup_high=bench.speedup_high,
        **changed("dense", latency_ms=bench.dense),
        **changed("pruned", latency_ms=bench.pruned),
    )
    assert [(c.precision, c.batch) for c in comparisons(made)] == [("fp32", 1), ("fp32", 4), ("fp16", 1), ("fp16", 4)]
    best = headline(made)
    assert best is not None
    assert (best.precision, best.batch) == ("fp32", 4)  # the largest batch, where the pruned model is fastest


def test_an_engine_is_described_by_its_place_in_the_run(tmp_path: Path) -> None:
    engine = Engine(
        runtime="tensorrt-rtx",
        precision="fp16",
        targets=("sm86", "sm89"),
        path=tmp_path / "5-engine/x/engine.plan",
        bytes=10,
        seconds=1.5,
        sha256="0",
        library="tensorrt_rtx",
        library_version="1.7",
        onnx_sha256="0",
        batch=BatchProfile(),
        settings={},
    )
    figures = engine_figures("dense", engine, tmp_path)
    assert (figures.target, figures.path, figures.bytes) == ("sm86, sm89", "5-engine/x/engine.plan", 10)


def test_a_gpu_runtime_is_measured_on_the_gpu() -> None:
    renamed = {
        part: {**document()[part], "latency_ms": {"tensorrt": document()[part]["latency_ms"]["onnxruntime"]}}
        for part in ("dense", "pruned")
    }
    gpus = [{"name": "Imaginary GPU", "memory_gib": 24.0}]
    made = report(
        speedup={"tensorrt": document()["speedup"]["onnxruntime"]},
        environment={"cpu": "Imaginary CPU 9000", "gpus": gpus},
        **renamed,
    )
    assert verdict(made).endswith("measured on Imaginary GPU.")


TREES = st.dictionaries(
    st.sampled_from(["onnxruntime", "tensorrt-rtx"]),
    st.dictionaries(
        st.sampled_from(["fp32", "fp16"]),
        st.dictionaries(st.sampled_from(["b1", "b8", "b16"]), st.floats(0.01, 100), min_size=1),
        min_size=1,
    ),
)


@given(TREES)
def test_every_view_shows_every_comparison(speedup: dict[str, Any]) -> None:
    measured = {r: {p: {b: latency(5.0) for b in speedup[r][p]} for p in speedup[r]} for r in speedup}
    made = report(speedup=speedup, **changed("dense", latency_ms=measured), **changed("pruned", latency_ms=measured))
    expected = sum(len(by_batch) for by_precision in speedup.values() for by_batch in by_precision.values())
    assert len(comparisons(made)) == expected
    for text in (markdown(made), html(made)):
        assert text.count(" / ") == 3 * expected  # p90, p99 and CV of dense and pruned, once a comparison
    for c in comparisons(made):
        assert f"| {c.runtime} {c.precision} | {c.batch} | 5.00 | 5.00 | {c.speedup:.2f}x |" in markdown(made)


def test_a_latency_gain_far_below_the_macs_gain_is_explained() -> None:
    text = shortfall(report())
    assert text is not None
    assert "MACs fell 4.0x" in text
    assert "1.40x on onnxruntime fp32 at batch 1" in text
    assert "at batch 8" not in text  # 3.2x is more than half of the way from 1x to 4x
    assert "fixed cost per layer" in text
    assert text in markdown(report())


def test_a_latency_gain_near_the_macs_gain_needs_no_excuse() -> None:
    assert shortfall(report(speedup={"onnxruntime": {"fp32": {"b1": 2.6, "b8": 3.2}}})) is None


def test_an_unstable_measurement_is_called_unstable() -> None:
    pruned = {"onnxruntime": {"fp32": {"b1": latency(5.0, cv=0.4), "b8": latency(15.0, 8)}}}
    text = markdown(report(**changed("pruned", latency_ms=pruned)))
    assert "Unstable (spread above 2.5 %), something else was running: onnxruntime fp32 at batch 1." in text
    assert "Unstable" not in markdown(report())


def test_markdown_starts_with_the_verdict_and_its_tables_are_whole() -> None:
    lines = markdown(report()).splitlines()
    assert lines[2] == f"**{verdict(report())}**"
    tables = [line for line in lines if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables if "MACs" in line or "parameters" in line}
    assert widths == {5}
    assert "| onnxruntime fp32 | 8 | 48.0 | 15.0 | 3.20x |" in markdown(report())
    assert "tensorrt: left out, the package is not installed" in markdown(report())


def test_the_terminal_report_fits_80_columns_and_loses_no_figure() -> None:
    text = printed(report())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    flat = re.sub(r"\s+", " ", text)
    for figure in ("3,400,000", "850,000", "97.50", "41.00", "96.25", "-1.25", "48.0", "15.0", "3.20x", "1,234"):
        assert figure in flat
    assert verdict(report()) in flat


class Page(HTMLParser):
    """Collects what an HTML page contains and checks that its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_self_contained_and_escapes_what_others_wrote() -> None:
    text = html(report(notes=["<script>alert(1)</script> & more"], data="imagefolder:<b>"))
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.addresses == []
    assert "<script" not in text
    assert "<script>alert(1)</script> & more" in "".join(page.text)
    assert verdict(report()) in "".join(page.text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
