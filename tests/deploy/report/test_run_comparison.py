"""Several runs side by side, and never more comparable than they were measured."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.deploy.report.sample_report import sample_document, sample_report
from upvits.calib_data.errors import UserError
from upvits.deploy.cli import app as cli
from upvits.deploy.report.document import Report
from upvits.deploy.report.runs import (
    RunComparison,
    compare_runs,
    drawn,
)
from upvits.deploy.report.verdict import verdict
from upvits.deploy.report.views import save_report
from upvits.deploy.report.views.runs import comparison_html, comparison_sections, comparison_terminal, save_comparison

UNMEASURED: dict[str, object] = {"speedup": {}, "speedup_low": {}, "speedup_high": {}}


def run_at(ratio: float, slower: float, top1: float) -> Report:
    """The sample run at another ratio: latency and size times `slower`, top-1 changed by `top1` points."""
    document = sample_document()
    pruned = document["pruned"]
    pruned |= {"params": int(slower * pruned["params"]), "macs": int(slower * pruned["macs"])}
    pruned["top1"] += top1
    for by_precision in pruned["latency_ms"].values():
        for by_batch in by_precision.values():
            for latency in by_batch.values():
                latency["median"] *= slower
    for figures in document["accuracy"]:
        figures["top1"] += top1 if figures["model"] == "pruned" else 0
    for best in document["best"]:
        best["pruned_ms"] *= slower
        best["speedup"] = best["dense_ms"] / best["pruned_ms"]
    for width in document["plan"]["widths"]:
        width["after"] = int(width["before"] * (1 - ratio))
    return Report.model_validate({**document, "ratio": ratio})


def three_runs() -> dict[str, Report]:
    return {
        "pvt_v2_b0-r0.25": run_at(0.25, 1.5, 0.5),
        "pvt_v2_b0-r0.50": sample_report(),
        "pvt_v2_b0-r0.75": run_at(0.75, 0.62, -2.4),
    }


def printed(document: RunComparison) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(comparison_terminal(document))
    text = console.export_text()
    console.file.close()
    return text


def test_every_run_has_its_verdict_and_its_figures() -> None:
    reports = three_runs()
    document = compare_runs(reports)
    assert [line.run for line in document.runs] == list(reports)
    for line, report in zip(document.runs, reports.values(), strict=True):
        assert line.verdict == verdict(report)
        assert (line.params, line.macs, line.top1) == (report.pruned.params, report.pruned.macs, report.pruned.top1)
        assert (line.ms, line.speedup) == (report.best[1].pruned_ms, report.best[1].speedup)
    assert document.runs[2].bytes == 1092253
    assert RunComparison.model_validate_json(document.model_dump_json()) == document


def test_the_front_runs_through_all_runs_and_has_the_dense_model_once() -> None:
    document = compare_runs(three_runs())
    assert document.not_comparable == []
    front = sorted((c for c in document.choices if c.on_front), key=lambda c: c.ms)
    assert [c.accuracy for c in front] == sorted(c.accuracy for c in front)
    assert {c.run for c in front if c.model == "pruned"} == set(three_runs())
    assert {c.run for c in front if c.model == "dense"} == {"pvt_v2_b0-r0.25"}
    for one in front:
        assert not any(o.ms < one.ms and o.accuracy > one.accuracy for o in document.choices)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"environment": {"cpu": "Imaginary CPU 9000", "cores_usable": 2, "gpus": []}}, "differ in cpu"),
        (
            {"environment": {"cpu": "Intel(R) Xeon(R) Processor", "cores_usable": 8, "gpus": []}},
            "differ in cores usable",
        ),
        ({"data": "imagefolder:photos"}, "Accuracy was measured on different data"),
        ({"best": []}, "Nothing was chosen to deploy in other"),
        ({**UNMEASURED, "best": []}, "Latency was not measured in other"),
        ({"best": [{**sample_document()["best"][1], "batch": 1}]}, "The batch sizes differ"),
    ],
)
def test_what_cannot_be_compared_is_not(changes: dict[str, object], reason: str) -> None:
    reports = {"run": sample_report(), "other": sample_report(**changes)}
    document = compare_runs(reports)
    assert any(reason in text for text in document.not_comparable)
    assert not any(choice.on_front for choice in document.choices)
    assert "front" not in {section.key for section in comparison_sections(document)}
    for text in (comparison_html(document), printed(document)):
        assert reason in " ".join(text.split())
        assert "not comparable" in text
    assert "Pareto" not in comparison_html(document)


def on_another_day(report: Report, slower: float) -> Report:
    """The same run on a machine that takes `slower` times as long for everything."""
    document = report.model_dump()
    for model in ("dense", "pruned"):
        for by_precision in document[model]["latency_ms"].values():
            for by_batch in by_precision.values():
                for latency in by_batch.values():
                    latency["median"] *= slower
    for best in document["best"]:
        best["dense_ms"] *= slower
        best["pruned_ms"] *= slower
    return Report.model_validate(document)


def test_a_machine_that_changed_between_runs_ends_the_verdict() -> None:
    """The smaller network is the faster one, but was measured when everything took three times as long."""
    document = compare_runs({"half": on_another_day(run_at(0.5, 1.0, 0.0), 3.2), "quarter": run_at(0.25, 1.5, 0.5)})
    (reason,) = document.not_comparable
    assert "The machine changed between the runs" in reason
    assert "220 % apart" in reason
    assert not any(choice.on_front for choice in document.choices)
    for text in (comparison_html(document), printed(document)):
        assert "upvits-deploy bench" in " ".join(text.split())
        assert "Pareto" not in text
    assert [round(found.percent) for found in document.drift] == [220] * len(document.drift)


def test_a_small_drift_is_taken_out_by_the_dense_network() -> None:
    """1.5 % faster, but measured on a machine that was 8 % slower: it still belongs to the front."""
    plain, smaller = run_at(0.5, 1.0, 0.0), run_at(0.5, 0.985, 0.0)
    document = compare_runs({"plain": plain, "smaller": on_another_day(smaller, 1.08)})
    same_day = compare_runs({"plain": plain, "smaller": smaller})
    assert document.not_comparable == []
    assert [round(found.percent, 6) for found in document.drift] == [8.0] * len(document.drift)
    for one, other in zip(document.choices, same_day.choices, strict=True):
        assert one.ms == pytest.approx(other.ms)
        assert one.on_front == other.on_front or one.model == "dense"  # of equal ones, any
        assert one.measured_ms == pytest.approx(other.ms * (1.08 if one.run == "smaller" else 1.0))
    assert {choice.run for choice in document.choices if choice.on_front and choice.model == "pruned"} == {"smaller"}
    assert "took up to 8.0 % longer" in " ".join(printed(document).split())


def test_every_run_draws_its_dense_network() -> None:
    document = compare_runs(three_runs())
    assert {choice.name.split()[0] for choice in drawn(document) if choice.model == "dense"} == set(three_runs())


def test_networks_without_a_common_dense_one_are_compared_with_a_warning() -> None:
    document = compare_runs({"run": sample_report(), "other": sample_report(model="deit_tiny_patch16_224")})
    assert document.drift == []
    assert "a change of the machine would not show" in " ".join(printed(document).split())


def test_widths_stand_side_by_side_for_runs_of_one_model_only() -> None:
    document = compare_runs(three_runs())
    first = document.widths[0]
    assert (first.group, first.before, list(first.after.values())) == ("stages.0", 32, [24, 16, 8])
    other = {"a": sample_report(), "b": sample_report(model="deit_tiny_patch16_224")}
    assert compare_runs(other).widths == []


def test_the_terminal_fits_80_columns_and_names_every_run_whole() -> None:
    text = printed(compare_runs(three_runs()))
    assert max(map(len, text.splitlines())) <= 80
    for name, ms in (("pvt_v2_b0-r0.25", "4.53"), ("pvt_v2_b0-r0.50", "3.02"), ("pvt_v2_b0-r0.75", "1.87")):
        assert any(name in line and ms in line for line in text.splitlines())


def test_one_run_is_not_a_comparison() -> None:
    with pytest.raises(UserError, match="cannot be compared"):
        compare_runs({"run": sample_report()})


def test_a_comparison_is_written_as_a_page_and_as_json(tmp_path: Path) -> None:
    document = compare_runs(three_runs())
    save_comparison(tmp_path / "all.html", document)
    assert RunComparison.model_validate_json((tmp_path / "all.json").read_text()) == document
    page = (tmp_path / "all.html").read_text()
    assert page.count("<h1") == 1
    save_comparison(tmp_path / "all.html", compare_runs({"a": sample_report(), "b": sample_report()}))
    assert (tmp_path / "all.html").read_text() != page  # one of ours may be replaced


def run_folder(folder: Path) -> Path:
    """A run directory with its report."""
    folder.mkdir()
    (folder / "recipe.toml").write_text("model = 'pvt_v2_b0'")
    save_report(folder, sample_report())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a/report.html", "lies in the run"),
        ("a/all.html", "lies in the run"),
        ("a/6-bench/all.html", "lies in the run"),
        ("link/all.html", "lies in the run"),
        ("notes.html", "notes.html exists and is no comparison"),
        ("figures.html", "figures.json exists and is no comparison"),
        ("folder.html", "folder.html exists and is no comparison"),
        ("dangling.html", "dangling.html exists and is no comparison"),
        ("all.json", "cannot hold a comparison"),
        ("new/all.html", "There is no folder"),
    ],
)
def test_a_comparison_overwrites_nothing_else(
    tmp_path: Path, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    (tmp_path / "a/6-bench").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    (tmp_path / "figures.json").write_text('{"mine": 1}')
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "dangling.html").symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        save_comparison(tmp_path / output, compare_runs(three_runs()))
    # the command finds out before it computes anything
    monkeypatch.setattr("upvits.deploy.report.runs.compare_runs", None)
    with pytest.raises(UserError, match=message):
        cli.report(runs, output=tmp_path / output)
    assert contents(tmp_path) == before


def test_a_comparison_may_lie_beside_a_recipe_and_beside_runs(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("model = 'pvt_v2_b0'")  # what people give to --recipe
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    reports = [contents(run) for run in runs]
    cli.report(runs, output=tmp_path / "all.html")
    assert {path.name for path in tmp_path.glob("all.*")} == {"all.html", "all.json"}
    assert [contents(run) for run in runs] == reports


def test_output_is_for_several_runs(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a")
    with pytest.raises(UserError, match="comparisons of several runs"):
        cli.report([run], output=tmp_path / "x.html")
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
