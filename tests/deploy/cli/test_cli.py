"""The command line as people use it: every mistake ends with a message, the right exit code, and nothing written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from upvits.deploy.cli import app as cli

COMMANDS = (
    "build", "score", "plan", "prune", "distill", "export", "quantize", "engine", "bench", "report", "package",
    "sweep", "models", "doctor", "recipe", "inspect", "predict",
)  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the entry point."""
    monkeypatch.setattr("sys.argv", ["upvits-deploy", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A labelled image folder with two classes of four pictures."""
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(4):
                colour = (60 * number + 50, 20 * index, 90)
                Image.new("RGB", (40, 40), colour).save(tmp_path / "photos" / split / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0
    assert max(len(line) for line in result.output.splitlines()) <= 80


def test_commands_are_those_of_the_readme() -> None:
    registered = {info.name or info.callback.__name__ for info in cli.app.registered_commands if info.callback}
    assert registered == set(COMMANDS)


PLAN = ("plan", "--model", "pvtv2_b0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--model", "pvtv3_b0", "--ratio", "0.5"), "Did you mean"),
        (("plan", "--model", "resnet50", "--ratio", "0.5"), "not supported"),
        ((*PLAN, "--ratio", "0.5", "--components", ""), "--components is empty"),
        ((*PLAN, "--ratio", "0.5", "--components", "ffn,ffn"), "Cannot prune the components ffn, ffn"),
        ((*PLAN, "--ratio", "0.5", "--refit-images", "3"), "--refit-images 3 is too few"),
        ((*PLAN, "--depth-ratio", "0.01"), "no whole block"),
        (("sweep", "--model", "pvtv2_b0", "--ratios", "0.5,0.50"), "given twice"),
        (("sweep", "--model", "pvtv2_b0", "--ratios", "0.3,0.5,0.5000001"), "nearly the same"),
        (("sweep", "--model", "pvtv2_b0", "--ratios", "0.5,half"), "no numbers"),
        (("plan", "--ratio", "0.5"), "Which model"),
        (PLAN, "How much is to be cut"),
        ((*PLAN, "--ratio", "0.5", "--target-macs", "0.5"), "How much is to be cut"),
        ((*PLAN, "--ratio", "1.0"), "out of range"),
        ((*PLAN, "--ratio", "-0.2"), "out of range"),
        ((*PLAN, "--ratio", "0.5", "--align", "0"), "align 0"),
        ((*PLAN, "--ratio", "0.5", "--align", "512"), "without any channels"),
        ((*PLAN, "--ratio", "0.95"), "Use a ratio of at most"),
        ((*PLAN, "--ratio", "0.5", "--components", "norms"), "components"),
        ((*PLAN, "--ratio", "0.5", "--method", "taylor"), "score.method"),
        ((*PLAN, "--ratio", "0.5", "--epochs", "9" * 19), "100000"),
        (("detect", "train", "--run", "r", "--epochs", "9" * 19), "100000"),
        (("detect", "train", "--run", "r", "--workers", "9" * 19), "1024"),
        (("detect", "compare", "--run", "r", "--lr", "1e29"), "1000000"),
        ((*PLAN, "--ratio", "0.5", "--runtime", "onnxruntim"), "did you mean onnxruntime"),
        ((*PLAN, "--ratio", "0.5", "--precision", "int3"), "int3"),
        ((*PLAN, "--ratio", "0.5", "--batch-profile", "8:1"), "min:opt:max"),
        ((*PLAN, "--ratio", "0.5", "--bench-batches", "1,x"), "Batch sizes"),
        ((*PLAN, "--ratio", "0.5", "--weights", "random", "--data", "imagefoldr:x"), "imagefolder"),
        ((*PLAN, "--ratio", "0.5", "--weights", "random", "--data", "imagefolder:/nowhere/at/all"), "/nowhere/at/all"),
        ((*PLAN, "--ratio", "0.5", "--weights", "/nowhere/w.safetensors"), "no checkpoint file"),
        ((*PLAN, "--ratio", "0.5", "--device", "tpu9"), "Unknown device"),
        ((*PLAN, "--like", "deit_tiny"), "another family"),
        (("plan", "--model", "deit_tiny", "--ratio", "0.5"), "Which weights"),
        (("report", "/nowhere/at/all"), "report.json"),
    ],
)
def test_mistakes_end_with_exit_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_missing_things_end_with_exit_code_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, *PLAN, "--ratio", "0.5", "--weights", "timm")
    assert (code, "--weights FILE" in err) == (3, True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(capsys, monkeypatch, *PLAN, "--ratio", "0.5", "--device", "cuda")
    assert (code, "doctor" in err) == (3, True), err


def test_plan_prints_widths_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, monkeypatch, *PLAN, "--ratio", "0.5")
    assert code == 0
    assert "stages.3.blocks.1.mlp" in out
    assert "8 x 16" in out
    assert "asked: ratio 0.5" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert list(tmp_path.iterdir()) == []


def test_classes_of_weights_and_data_must_agree(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(
        capsys, monkeypatch, "build", "-m", "pvtv2_b0", "-r", "0.5", "--weights", "demo",
        "--data", f"imagefolder:{photos}", "-o", str(photos.parent / "out"),
    )  # fmt: skip
    assert code == 2
    assert "know 12 classes, the data have 2" in err
    assert not (photos.parent / "out").exists()


def test_foreign_output_folders_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = run(capsys, monkeypatch, "score", "-m", "pvtv2_b0", "-r", "0.5", "-o", str(tmp_path))
    assert code == 2
    assert "not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_run_on_own_images_and_own_checkpoint(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two classes, 64 pixels, two blocks, one epoch: from the checkpoint to report.json, then again without work."""
    from upvits import toolchain

    torch.manual_seed(0)
    shallow = {"depth": 2}
    weights = toolchain.create_model("deit_tiny", num_classes=2, image_size=64, model_args=shallow).state_dict()
    save_file(weights, tmp_path / "own.safetensors")
    out = tmp_path / "run"
    arguments = (
        "build", "-m", "deit_tiny", "-r", "0.5", "--weights", str(tmp_path / "own.safetensors"),
        "--model-arg", "depth=2", "--data", f"imagefolder:{photos}", "--image-size", "64",
        "--epochs", "1", "--runtime", "onnxruntime", "--bench-seconds", "0.2", "--bench-batches", "1,2",
        "--max-drop", "100", "--no-compensate", "--allow-weak", "-o", str(out),
    )  # fmt: skip
    code, printed, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == "deit_tiny_patch16_224"
    assert report["ratio"] == 0.5
    assert report["pruned"]["macs"] < 0.35 * report["dense"]["macs"]
    assert set(report["pruned"]["latency_ms"]["onnxruntime"]["fp32"]) == {"b1", "b2"}
    assert report["speedup"]["onnxruntime"]["fp32"]["b2"] > 0
    assert all(gate["passed"] for gate in report["parity"])
    assert {engine["path"] for engine in report["engines"]} == {
        f"5-engine/onnxruntime-{precision}/{name}/model.onnx"
        for precision in ("fp32", "int8") for name in ("dense", "pruned")
    }  # fmt: skip
    assert all((out / engine["path"]).stat().st_size == engine["bytes"] for engine in report["engines"])
    assert 0 <= report["pruned"]["top1_after_prune"] <= 100
    assert "at batch 2" in printed
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 80
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    again = json.loads((out / "report.json").read_text())
    assert [stage["skipped"] for stage in again["stages"]] == [True] * len(again["stages"])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == files
    assert {**again, "stages": None} == {**report, "stages": None}
    code, _, err = run(capsys, monkeypatch, *arguments[:4], "0.25", *arguments[5:])
    assert (code, "another run" in err) == (2, True)


def test_the_global_planner_can_cut_in_rounds(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its components hold the depth, which every round has to score."""
    code, out, _ = run(
        capsys, monkeypatch, "plan", "-m", "deit_tiny", "--weights", "random", "--data", f"imagefolder:{photos}",
        "--image-size", "32", "--model-arg", "depth=3", "--target-macs", "0.6", "--planner", "global", "--rounds", "2",
    )  # fmt: skip
    assert code == 0
    assert "rounds 2" in out


@pytest.mark.parametrize("target", ["--target-macs", "--target-params"])
def test_targets_are_searched(target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, *PLAN, target, "0.5")
    assert code == 0
    assert ("(50.0 %), parameters" if target == "--target-macs" else "(50.0 %)\n") in out


def test_like_takes_a_published_shape(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("plan", "-m", "pvtv2_b1", "--weights", "random", "--image-size", "64", "--like")
    code, out, _ = run(capsys, monkeypatch, *arguments, "pvtv2_b0")
    assert (code, "asked: like pvt_v2_b0" in out) == (0, True)
    code, _, err = run(capsys, monkeypatch, *arguments, "pvtv2_b2")
    assert (code, "more blocks" in err) == (2, True)


def test_like_takes_a_published_depth(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(
        capsys, monkeypatch, "plan", "-m", "pvtv2_b2", "--weights", "random", "--model-arg", "depths=[2, 2, 3, 2]",
        "--image-size", "64", "--proxy-images", "4", "--like", "pvtv2_b1",
    )  # fmt: skip
    assert code == 0
    assert "stages.2.blocks keeps 2 blocks" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--speedup", "0.5x"), "factor above 1"),
        (("--target-latency", "fast"), "2.0ms"),
        (("--planner", "latency", "--ratio", "0.5"), "cannot aim at ratio"),
        (("--planner", "global", "--like", "pvtv2_b0"), "chooses widths and depth itself"),
        (("--planner", "globl", "--ratio", "0.5"), "plan.planner"),
        (("--speedup", "2x", "--rounds", "3"), "made in steps"),
        (("--depth-ratio", "1.5"), "out of range"),
        (("--speedup", "2x", "--runtime", "tensorrt-rtx"), "does not run on this machine"),
        (("--ratio", "0.5", "--components", "embed,depth"), "global planner"),
        (("--ratio", "0.5", "--components", "depth", "--planner", "global"), "share of widths"),
        (("--like", "pvtv2_b0", "--components", "ffn"), "whole network"),
        (("--depth-ratio", "0"), "How much is to be cut"),
        (
            ("--target-macs", "0.5", "--planner", "global", "--method", "magnitude", "--no-compensate"),
            "cannot weigh magnitude",
        ),
        (("--ratio", "0.5", "--seed", str(2**64)), "seed"),
        (("--speedup", "2x", "--runtime", "onnxruntime,tensorrt-rtx", "--precision", "fp8"), "does not run"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run(capsys, monkeypatch, *PLAN, *arguments)
    assert code == 2
    assert message in err


def test_other_parts_than_the_published_shape_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(
        capsys, monkeypatch, "plan", "-m", "deit_small_distilled_patch16_224", "--weights", "random",
        "--image-size", "32", "--like", "deit_tiny",
    )  # fmt: skip
    assert code == 2
    assert "dist_token" in err


def test_recipes_come_from_files_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text('model = "pvtv2_b0"\n[plan]\nratio = 0.25\n')
    code, out, _ = run(capsys, monkeypatch, "plan", "--recipe", str(tmp_path / "mine.toml"))
    assert (code, "asked: ratio 0.25" in out) == (0, True)
    (tmp_path / "recipe.toml").write_text('model = "pvtv2_b0"\n[plan]\nratio = 0.75\n')
    code, out, _ = run(capsys, monkeypatch, "plan", "--recipe", str(tmp_path))
    assert (code, "asked: ratio 0.75" in out) == (0, True)
    for content, message in (("plan = 3", "Make it a table"), ("model = [", "cannot read the recipe"), ("x = 1", "x")):
        (tmp_path / "bad.toml").write_text(content)
        code, _, err = run(capsys, monkeypatch, *PLAN, "-r", "0.5", "--recipe", str(tmp_path / "bad.toml"))
        assert (code, message in err) == (2, True)
    (tmp_path / "bad.toml").write_text('model = "pvtv2_b0"\nplan = "half"\n')
    code, _, err = run(
        capsys,
        monkeypatch,
        "sweep",
        "--recipe",
        str(tmp_path / "bad.toml"),
        "--ratios",
        "0.5",
        "-o",
        str(tmp_path / "s"),
    )
    assert (code, "Make it a table" in err) == (2, True)


@pytest.mark.parametrize("batches", ["[]", "[0]", "[1, -2]"])
def test_batches_of_no_images_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, batches: str
) -> None:
    (tmp_path / "bad.toml").write_text(f"[bench]\nbatches = {batches}\n")
    code, _, err = run(capsys, monkeypatch, *PLAN, "-r", "0.5", "--recipe", str(tmp_path / "bad.toml"))
    assert (code, "bench.batches" in err) == (2, True)


def test_image_size_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    macs = {}
    for size in ("64", "128"):
        code, out, _ = run(capsys, monkeypatch, *PLAN, "-r", "0.5", "--image-size", size)
        assert code == 0
        macs[size] = float(out.partition("MACs ")[2].split(" ")[0])
    assert 3.5 < macs["128"] / macs["64"] < 4.5
    code, _, err = run(capsys, monkeypatch, *PLAN, "-r", "0.5", "--image-size", "16")
    assert (code, "cannot take images" in err) == (2, True)


def test_markup_in_messages_is_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "plan", "--model", "[/x]", "--ratio", "0.5")
    assert (code, "[/x]" in err) == (2, True)


@pytest.mark.parametrize("option", [("--device", "meta"), ("--targets", "turing")])
def test_devices_and_targets_are_checked_first(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, monkeypatch, *PLAN, "-r", "0.5", *option)
    assert (code, option[1] in err) == (2, True)


def test_a_resolved_recipe_is_printed_and_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds what the model and the data decide, and says the same once more when it is given back."""
    monkeypatch.chdir(tmp_path)
    code, toml, _ = run(capsys, monkeypatch, "recipe", "-m", "pvtv2_b0", "-r", "0.5", "--precision", "fp32,int8")
    assert code == 0
    assert 'model = "pvt_v2_b0"' in toml
    assert "lr = 0.003" in toml  # of the demo
    assert 'precision = "fp32,int8"' in toml
    (tmp_path / "mine.toml").write_text(toml)
    assert run(capsys, monkeypatch, "recipe", "--recipe", "mine.toml")[:2] == (0, toml)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_tables_are_printed_as_json_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, *PLAN, "-r", "0.5", "--json")
    assert (code, json.loads(out)["plan"]["asked"]["ratio"]) == (0, 0.5)
    code, out, _ = run(capsys, monkeypatch, "models", "pvt_v2_b2_li", "--json")
    listed = {"name": "pvt_v2_b2_li", "family": "pvt_v2", "parameters": 22_553_512}
    cut = ["embed", "attention", "heads", "qk_v", "ffn", "depth"]
    sizes = {"embed_dim": [64, 128, 320, 512], "depth": [3, 4, 6, 3], "components": cut}
    assert (code, json.loads(out)) == (0, [{**listed, **sizes}])


def test_a_name_that_no_architecture_has_is_answered_with_near_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "models", "pvtv2_b0")
    assert (code, out) == (2, "")
    assert "pvt_v2_b0" in err


def test_models_are_listed_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, monkeypatch, "models")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    (row,) = (line.split() for line in out.splitlines() if line.startswith("deit_tiny_patch16_224 "))
    assert row == ["deit_tiny_patch16_224", "vit", "5.7", "M", "192", "12"]


def test_the_log_goes_to_stderr_at_the_level_that_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("upvits.somewhere")

    def say(pattern: str) -> list[object]:
        log.debug("in detail")
        log.info("a stage")
        log.warning("a note")
        return []

    monkeypatch.setattr("upvits.toolchain.networks.catalogue.architectures", say)
    assert run(capsys, monkeypatch, "models", "--json") == (0, "[]\n", "a stage\na note\n")
    monkeypatch.setenv("UPVITS_LOG", "warning")
    assert run(capsys, monkeypatch, "models", "--json")[2] == "a note\n"
    monkeypatch.setenv("UPVITS_LOG", "loud")
    code, _, err = run(capsys, monkeypatch, "models")
    assert (code, "UPVITS_LOG=loud is no level" in err) == (2, True)
    monkeypatch.delenv("UPVITS_LOG")
    for option, shown in (("-v", True), ("-q", False)):
        err = run(capsys, monkeypatch, "plan", option)[2]
        assert ("Traceback" in err, "Which model?" in err) == (shown, True)
