"""A sweep: several cuts in one folder, resumable, and honest about runs that failed."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.robustness.case import draw_photos, save_network
from tests.deploy.report.test_run_comparison import run_at
from upvits.calib_data.errors import GateError, UserError
from upvits.deploy import sweep as sweeping
from upvits.deploy.store.run_dir import RECIPE
from upvits.deploy.sweep import PAGE, SWEEP, SweepReport, compare_cuts, sweep, sweep_html, sweep_terminal

REPORTS = {
    "ratio-0.25": run_at(0.25, 1.5, 0.5),
    "ratio-0.5": run_at(0.5, 1.0, 0.0),
    "ratio-0.75": run_at(0.75, 0.62, -2.4),
}
FAILED = {"ratio-0.9": GateError("the pruned network loses 9.00 points", why="Measured on 1000 images.")}


def printed(found: SweepReport) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(sweep_terminal(found))
    text = console.export_text()
    console.file.close()
    return text


def test_points_are_one_dense_and_one_of_every_run_by_runtime_and_precision() -> None:
    found = compare_cuts(REPORTS, {})
    places = {(point.runtime, point.precision) for point in found.points}
    assert len(found.points) == len(places) * (1 + len(REPORTS))
    for runtime, precision in places:
        own = [point for point in found.points if (point.runtime, point.precision) == (runtime, precision)]
        assert [point.run for point in own] == ["dense", *REPORTS]
        assert all(point.ms * point.speedup == pytest.approx(own[0].ms) for point in own)
        assert own[2].accuracy - own[3].accuracy == pytest.approx(2.4)
    assert SweepReport.model_validate_json(found.model_dump_json()) == found


def test_pareto_points_are_those_that_nothing_on_their_runtime_beats() -> None:
    found = compare_cuts(REPORTS, {})
    for point in found.points:
        beaten = any(
            (other.ms <= point.ms and other.accuracy > point.accuracy)
            or (other.ms < point.ms and other.accuracy >= point.accuracy)
            for other in found.points
            if other.runtime == point.runtime
        )
        assert point.on_front != beaten
    text = printed(found)
    assert sum(line.rstrip().endswith("*") for line in text.splitlines()) == sum(p.on_front for p in found.points)
    assert max(map(len, text.splitlines())) <= 80


def test_a_missed_latency_keeps_its_points_and_its_exit_code() -> None:
    first, *others = REPORTS
    target = REPORTS[first].target
    assert target is not None
    missed = REPORTS[first].model_copy(update={"target": target.model_copy(update={"met": False})})
    found = compare_cuts({**REPORTS, first: missed}, {})
    assert {run.name: run.exit_code for run in found.runs} == {first: 6, **dict.fromkeys(others, 0)}
    assert found.points == compare_cuts(REPORTS, {}).points


def test_a_failed_run_is_named_with_its_reason() -> None:
    found = compare_cuts(REPORTS, FAILED)
    (failed,) = [run for run in found.runs if run.failed is not None]
    assert (failed.name, failed.exit_code) == ("ratio-0.9", 4)
    assert "loses 9.00 points" in printed(found)
    assert "Failed: the pruned network loses 9.00 points" in sweep_html(found)


def test_the_page_has_a_chart_for_every_runtime_and_no_address() -> None:
    found = compare_cuts(REPORTS, FAILED)
    page = sweep_html(found)
    runtimes = {point.runtime for point in found.points}
    assert page.count("<figure>") == len(runtimes)
    for runtime in runtimes:
        assert f"Accuracy over latency, {runtime}, batch {found.batch}" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_sweep_goes_on_after_a_failure_and_ends_with_the_first_when_all_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(recipe: object, folder: Path, others: object, *, quiet: bool) -> object:
        if folder.name in FAILED:
            raise FAILED[folder.name]
        return REPORTS[folder.name]

    monkeypatch.setattr(sweeping, "_run", run)
    base = {"model": "pvtv2_b0", "plan": {"target_macs": 0.5, "align": 16}}
    found = sweep(base, [{"ratio": ratio} for ratio in (0.9, 0.5, 0.25)], tmp_path)
    assert [run.name for run in found.runs] == ["ratio-0.9", "ratio-0.5", "ratio-0.25"]
    assert SweepReport.model_validate_json((tmp_path / SWEEP).read_bytes()) == found
    assert (tmp_path / PAGE).read_text().startswith("<!doctype html>")
    with pytest.raises(GateError, match="loses 9"):
        sweep(base, [{"ratio": 0.9}], tmp_path)


def test_recipes_differ_in_the_cut_alone() -> None:
    base = {"model": "pvtv2_b0", "plan": {"ratio": 0.3, "align": 16}}
    found = sweeping._recipes(base, [{"target_macs": 0.5}, {"ratio": 0.5}])
    assert list(found) == ["target_macs-0.5", "ratio-0.5"]
    assert found["target_macs-0.5"].plan.ratio is None
    assert {recipe.plan.align for recipe in found.values()} == {16}


@pytest.mark.parametrize("cuts", [[], [{"ratio": 0.5}, {"ratio": 0.5}], [{}]])
def test_cuts_that_make_no_sweep_are_refused(cuts: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        sweep({"model": "pvtv2_b0"}, cuts, tmp_path)


@pytest.mark.parametrize("name", [SWEEP, PAGE, RECIPE])
def test_nothing_of_the_user_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError):
        sweep({"model": "pvtv2_b0"}, [{"ratio": 0.5}], tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_with_other_things_is_refused_and_one_of_a_killed_sweep_is_not(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and is not a sweep"):
        sweep({"model": "pvtv2_b0"}, [{"ratio": 0.5}], out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "ratio-0.5").mkdir()  # a sweep that was killed before its first run had a recipe
    sweeping._check_place(out, ["ratio-0.5"])


@pytest.mark.slow
def test_runs_share_scores_and_are_not_made_twice(tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos", train=24, val=8)
    save_network(tmp_path / "dense")
    base = {
        "model": "deit_tiny",
        "weights": str(tmp_path / "dense"),
        "data": f"imagefolder:{tmp_path / 'photos'}",
        "allow_weak": True,
        "score": {"method": "magnitude"},
        "compensate": {"enabled": False},
        "distill": {"epochs": 0},
        "export": {"parity_images": 2, "accuracy_images": 16},
        "engine": {"runtime": "onnxruntime", "precision": "fp32", "batch": "1:1:1"},
        "bench": {"seconds": 0.1, "batches": [1], "rounds": 2},
    }
    cuts = [{"ratio": 0.5}, {"ratio": 0.999}, {"ratio": 0.25}]
    out = tmp_path / "sweep"
    found = sweep(base, cuts, out)
    assert [run.exit_code for run in found.runs] == [0, 2, 0]
    assert {point.run for point in found.points} == {"dense", "ratio-0.5", "ratio-0.25"}
    manifests = [out / f"ratio-{ratio}" / "1-score/manifest.json" for ratio in (0.5, 0.25)]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()  # the same, not just as good: it holds the time
    benches = [out / f"ratio-{ratio}" / "6-bench/manifest.json" for ratio in (0.5, 0.25)]
    before = [path.read_bytes() for path in benches]
    assert sweep(base, cuts, out).points == found.points
    assert [path.read_bytes() for path in benches] == before
