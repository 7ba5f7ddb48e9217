"""Weights that come back from a training elsewhere fit the pruned network, or are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.networks.retrained import with_weights


def small(ratio: float) -> torch.nn.Module:
    torch.manual_seed(0)
    dense = toolchain.create_model("deit_tiny", weights="random", num_classes=3, image_size=32)
    plan = toolchain.plan(dense, toolchain.score(dense, method="magnitude"), ratio=ratio)
    return toolchain.delete_units(dense, plan).eval()


@pytest.mark.parametrize("kind", ["folder", "file", "wrapped"])
def test_weights_of_the_same_widths_are_taken(kind: str, tmp_path: Path) -> None:
    pruned, path = small(0.5), tmp_path / "trained"
    trained = small(0.5)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1)
    state = trained.state_dict()
    if kind == "folder":
        toolchain.save(trained, path)
    elif kind == "file":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 7}, path)
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    found = with_weights(pruned, path)
    assert all(torch.equal(found.state_dict()[name], state[name]) for name in state)
    assert all(torch.equal(pruned.state_dict()[name], before[name]) for name in before)


def test_other_widths_and_broken_weights_are_refused(tmp_path: Path) -> None:
    pruned = small(0.5)
    save_file(small(0.25).state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match=r"holds another network than the pruned one: mis-shaped: blocks\.0"):
        with_weights(pruned, tmp_path / "other")
    save_file({"weight": torch.ones(3)}, tmp_path / "strange")
    with pytest.raises(UserError, match="no tensor is called as those of this network"):
        with_weights(pruned, tmp_path / "strange")
    broken = {name: value * float("nan") for name, value in pruned.state_dict().items()}
    save_file(broken, tmp_path / "broken")
    with pytest.raises(UserError, match="NaN"):
        with_weights(pruned, tmp_path / "broken")
