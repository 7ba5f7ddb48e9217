"""The sections that answer how fast, how accurate, and in what: result, best, latency, accuracy."""

from __future__ import annotations

from collections.abc import Iterator

from upvits.deploy.graphs.names import module_of
from upvits.deploy.measure.document import Best, Latencies, Latency
from upvits.deploy.measure.uncertainty import share_interval
from upvits.deploy.report.document import Report
from upvits.deploy.report.verdict import AGAINST, Comparison, change_range, comparisons, headline, precision_remarks
from upvits.deploy.report.views.section import (
    MINUS,
    Cell,
    Row,
    Section,
    count,
    decibels,
    megabytes,
    ms,
    percent,
    points,
    signed,
    three_digits,
    times,
    words,
)


def result(report: Report) -> Section:
    """Dense against pruned, one fact a row."""
    dense, pruned = report.dense, report.pruned
    rows = [
        _fewer("parameters", dense.params, pruned.params),
        _fewer("MACs per image", dense.macs, pruned.macs),
        *(
            [_accuracy_row("top-1 after plain deletion, %", dense.top1, pruned.top1_after_deletion)]
            if pruned.top1_after_deletion is not None
            else []
        ),
        _accuracy_row("top-1 after pruning, %", dense.top1, pruned.top1_after_prune),
        _accuracy_row("top-1 after fine-tuning, %", dense.top1, pruned.top1),
    ]
    rows += _certainty_rows(report)
    if pruned.agreement is not None:
        rows.append((words("same top-1 as dense, %"), words(""), percent(pruned.agreement), words("")))
    rows = [row for row in rows if row[1].text or row[2].text]
    rows += _headline_rows(report)
    return Section("result", "Dense against pruned", ("", "dense", "pruned", "change"), tuple(rows),
                   terminal=(0, 1, 2, 3))  # fmt: skip


def best(report: Report) -> Section:
    """What to deploy on every runtime, and why not something else."""
    rows = tuple(
        (
            words(b.runtime),
            words(b.precision),
            count(b.batch),
            words(b.dense_precision),
            ms(b.dense_ms),
            ms(b.pruned_ms),
            times(b.speedup),
            words(span(b.low, b.high)),
        )
        for b in report.best
    )
    passed_over = [
        f"{b.runtime} {precision} at batch {b.batch} was passed over: {reason}"
        for b in report.best
        for precision, reason in b.passed_over.items()
    ]
    return Section(
        "best",
        "Best on each runtime",
        ("runtime", "precision", "batch", "dense in", "dense ms", "pruned ms", "faster", "range"),
        rows,
        tuple(passed_over),
        text_columns=(0, 1, 3),
        terminal=(0, 1, 2, 3, 4, 5, 6),
        sortable=True,
    )


def latency(report: Report) -> Section:
    """Every runtime, precision and batch size, dense and pruned in the same precision."""
    pairs = comparisons(report)
    energy = any(c.pruned.joules_per_image is not None for c in pairs)
    ran_with = {latency.threads for c in pairs for latency in (c.dense, c.pruned)}
    threads = len(ran_with) > 1
    remarks = ["Milliseconds per batch. Images per second are those of the pruned network."]
    if not threads and None not in ran_with:
        remarks.append(f"CPU threads: {', '.join(map(str, ran_with))}.")
    header = ["runtime", "precision", "batch", "dense ms", "pruned ms", "faster", "range", "images/s"]
    both = ["p90 ms", "p95 ms", "p99 ms", "CV %", *["threads"] * threads, *["mJ/image"] * energy]
    header += [f"{name}, dense / pruned" for name in both]
    return Section(
        "latency",
        "Latency",
        tuple(header),
        tuple(_latency_row(c, threads, energy) for c in pairs),
        tuple(remarks) if pairs else (),
        text_columns=(0, 1),
        terminal=(0, 1, 2, 3, 4, 5, 7),
        sortable=True,
    )


def latency_parts(report: Report) -> Section:
    """Transfers, computing and enqueuing apart, for runtimes with a device of their own."""
    rows = []
    for name, model in (("dense", report.dense), ("pruned", report.pruned)):
        for runtime, precision, batch, value in measured(model.latency_ms):
            parts = (value.h2d, value.compute, value.d2h, value.enqueue)
            if any(part is not None for part in parts):
                labels = (words(name), words(runtime), words(precision), count(batch))
                rows.append((*labels, *(ms(part) for part in parts), ms(value.median)))
    return Section(
        "parts",
        "Parts of a call, median ms",
        ("model", "runtime", "precision", "batch", "to device", "compute", "from device", "enqueue", "host to host"),
        tuple(rows),
        text_columns=(0, 1, 2),
        sortable=True,
    )


def accuracy(report: Report) -> Section:
    """What each precision costs."""
    images = sorted({a.images for a in report.accuracy})
    differing = len(images) > 1
    rows = tuple(
        (
            words(a.model),
            words(a.runtime),
            words(a.precision),
            percent(a.top1),
            Cell(signed(-a.drop), a.drop),
            percent(a.agreement),
            decibels(a.sqnr_db),
            words(module_of(a.worst_layer or "")),
            decibels(a.worst_layer_sqnr_db),
            count(a.quantized),
            count(None if a.quantized is None else len(a.kept)),
            count(a.images if differing else None),
            words(a.measured_on),
        )
        for a in report.accuracy
    )
    unit = "top-1" if any(a.top1 is not None for a in report.accuracy) else "agreement"
    remark = f"Change of {unit} in points, agreement, and SQNR of the logits are {AGAINST}"
    remark += f", on {images[0]} images." if len(images) == 1 else "."
    whole = report.pruned.paired
    if whole is not None and images and images != [whole.images]:
        fewest = f"{images[0]:,} of the {whole.images:,} images"
        remark += f" Graphs and engines are judged on {fewest} that PyTorch's top-1 above is of: the two differ."
    return Section(
        "accuracy",
        "Accuracy of each precision",
        ("model", "runtime", "precision", "top-1, %", "change", "agrees, %", "SQNR, dB", "worst layer", "worst, dB",
         "quantized", "kept", "images", "measured on"),
        rows,
        (remark, *precision_remarks(report)) if rows else (),
        text_columns=(0, 1, 2, 7, 12),
        terminal=(0, 1, 2, 3, 4, 5, 6),
        sortable=True,
    )  # fmt: skip


def measured(latencies: Latencies) -> Iterator[tuple[str, str, int, Latency]]:
    """Every measurement of a model with its runtime, precision and batch size."""
    for runtime, by_precision in latencies.items():
        for precision, by_batch in by_precision.items():
            for batch in sorted(by_batch):
                yield runtime, precision, batch, by_batch[batch]


def span(low: float | None, high: float | None) -> str:
    """The range of a speed-up over rounds."""
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def engine_bytes(report: Report, model: str, best: Best) -> int | None:
    """Size of the engine of a model that a choice speaks of."""
    key = model, best.runtime, best.precision if model == "pruned" else best.dense_precision
    return next((e.bytes for e in report.engines if (e.model, e.runtime, e.precision) == key), None)


def precisions(best: Best) -> str:
    """What the dense and the pruned model run in, where a choice compares them."""
    same = best.precision == best.dense_precision
    return best.precision if same else f"{best.dense_precision} to {best.precision}"


def _certainty_rows(report: Report) -> list[Row]:
    """How far the accuracies of a network can be trusted: each by itself, and the change on the same images."""
    paired, dense, pruned = report.pruned.paired, report.dense.top1, report.pruned.top1
    if paired is None or dense is None or pruned is None:
        return []
    of_each = (words("{:.1f} to {:.1f}".format(*share_interval(value, paired.images))) for value in (dense, pruned))
    low, high = change_range(paired)
    name = f"95 % interval, {paired.images:,} images"
    return [(words(name), *of_each, words(f"{signed(low)} to {signed(high)}"))]


def _headline_rows(report: Report) -> list[Row]:
    """Latency and size of what the verdict speaks of."""
    head = headline(report)
    if head is None:
        return []
    what = f"{head.runtime} {precisions(head)}"
    speed = f"{head.speedup:.2f}x {'faster' if head.speedup >= 1 else 'the speed'}"
    rows: list[Row] = [
        (
            words(f"ms at batch {head.batch}, {what}"),
            ms(head.dense_ms),
            ms(head.pruned_ms),
            Cell(speed, head.speedup),
        )
    ]
    dense, pruned = engine_bytes(report, "dense", head), engine_bytes(report, "pruned", head)
    if dense is not None and pruned is not None:
        size = f"{dense / pruned:.2f}x smaller" if dense >= pruned else f"{pruned / dense:.2f}x larger"
        rows.append((words(f"engine, MB, {what}"), megabytes(dense), megabytes(pruned), Cell(size, dense / pruned)))
    return rows


def _latency_row(c: Comparison, threads: bool, energy: bool) -> Row:
    cells = [
        words(c.runtime),
        words(c.precision),
        count(c.batch),
        ms(c.dense.median),
        ms(c.pruned.median),
        times(c.speedup),
        words(span(c.low, c.high)),
        Cell(f"{c.pruned.images_per_s:,.0f}", c.pruned.images_per_s),
        *(_both(getattr(c.dense, name), getattr(c.pruned, name)) for name in ("p90", "p95", "p99")),
        Cell(f"{100 * c.dense.cv:.1f} / {100 * c.pruned.cv:.1f}", c.pruned.cv),
    ]
    if threads:
        ran_with = c.dense.threads, c.pruned.threads
        cells.append(words("") if None in ran_with else Cell(f"{ran_with[0]} / {ran_with[1]}", ran_with[1]))
    if energy:
        dense, pruned = c.dense.joules_per_image, c.pruned.joules_per_image
        cells.append(words("") if dense is None or pruned is None else _both(1e3 * dense, 1e3 * pruned))
    return tuple(cells)


def _both(dense: float, pruned: float) -> Cell:
    return Cell(f"{three_digits(dense)} / {three_digits(pruned)}", pruned)


def _fewer(name: str, dense: int, pruned: int) -> Row:
    share = 100 * (pruned / dense - 1)
    change = f"{MINUS if share < 0 else '+'}{abs(share):.1f}\N{NO-BREAK SPACE}%" if round(share, 1) else "none"
    return words(name), count(dense), count(pruned), Cell(change, share)


def _accuracy_row(name: str, dense: float | None, pruned: float | None) -> Row:
    change = None if dense is None or pruned is None else pruned - dense
    return words(name), percent(dense), percent(pruned), points(change)
