"""Scores: the definition, its second-order equivalent, and what they are saved as."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts.variants import VARIANTS, make, pictures
from upvits import toolchain
from upvits.calib_data.errors import UserError
from upvits.toolchain.families import groups_of
from upvits.toolchain.scores import Scores, divergence, images_digest
from upvits.toolchain.scores.backward import signs_of
from upvits.toolchain.scores.cuts import cut_of
from upvits.toolchain.scores.fisher import probes_of
from upvits.toolchain.scores.masks import masked
from upvits.toolchain.scores.measure import check_finite

DEIT, PVT = VARIANTS[0], VARIANTS[7]
HEADLESS = next(variant for variant in VARIANTS if variant.args["num_classes"] == 0)


def calm(model: nn.Module) -> nn.Module:
    """Weights at which removing one unit is a small change, as in trained networks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name and "head" not in name:
                parameter.div_(3)
    return model


@pytest.mark.parametrize("classes", [2, 7, 16])
def test_exact_probes_sum_to_the_fisher_matrix(classes: int) -> None:
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
    probes = probes_of(logits, None, signs_of(0, range(3)))
    p = logits.softmax(dim=1)
    wanted = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(torch.einsum("kbi,kbj->bij", probes, probes), wanted, atol=1e-6, rtol=1e-5)


def test_the_strongest_probes_hold_most_of_the_fisher_matrix() -> None:
    logits = 3 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(dim=1)
    matrix = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    for most in (4, 11):
        probes = probes_of(logits, None, signs_of(0, range(3)), most).double()
        assert len(probes) == most
        missing = matrix - torch.einsum("kbi,kbj->bij", probes, probes)
        largest = torch.linalg.eigvalsh(missing)[:, -1]
        torch.testing.assert_close(largest, torch.linalg.eigvalsh(matrix)[:, -1 - most], atol=1e-6, rtol=1e-4)


def test_sampled_probes_are_unbiased() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)).expand(4000, -1)
    probes = probes_of(logits, None, signs_of(1, range(4000)))
    p = logits[0].softmax(dim=0)
    found = torch.einsum("kbi,kbj->ij", probes, probes) / len(logits)
    assert (found - (torch.diag(p) - torch.outer(p, p))).abs().max() < 5e-3


def test_divergence_is_the_kl_of_the_softmax() -> None:
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(divergence(a, b).float(), wanted, atol=1e-5, rtol=1e-4)
    assert divergence(a, a).abs().max() == 0
    assert divergence(a, a + 5).abs().max() < 1e-12


@pytest.mark.parametrize("variant", [DEIT, PVT], ids=str)
def test_kl_is_the_definition(variant: object) -> None:
    """One unit by hand: zero its mask, run, compare."""
    model, images = make(variant), pictures(variant, 5)  # type: ignore[arg-type]
    group = next(group for group in groups_of(model) if group.kind == "ffn")
    scores = toolchain.score(model, images, method="kl", batch_size=2, units={group.name: [3]})
    mask = torch.ones(5, group.size)
    mask[:, 3] = 0
    with torch.inference_mode():
        dense = model(images)
        with masked(model, [group], {group.name: mask}):
            without = model(images)
    assert scores.values[group.name][3] == pytest.approx(divergence(dense, without).mean().item(), rel=1e-4)
    assert scores.values[group.name].isnan().sum() == group.size - 1


@pytest.mark.parametrize("variant", [DEIT, PVT, HEADLESS], ids=str)
def test_fisher_ranks_like_kl(variant: object) -> None:
    model, images = calm(make(variant)), pictures(variant, 12)  # type: ignore[arg-type]
    fisher = toolchain.score(model, images, method="fisher")
    for group in groups_of(model):
        if group.kind in ("ffn", "attention"):
            units = range(0, group.size, max(1, group.size // 16))
            exact = toolchain.score(model, images, method="kl", batch_size=12, units={group.name: units})
            found, wanted = (s.values[group.name][list(units)] for s in (fisher, exact))
            assert spearman(found, wanted) > 0.9, group.name
            assert 0.5 < (found / wanted).median() < 2, group.name


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_scores_do_not_depend_on_the_batch_size() -> None:
    model, images = make(PVT), pictures(PVT, 6)
    one, all_at_once = (toolchain.score(model, images, batch_size=size) for size in (1, 6))
    for name, values in one.values.items():
        torch.testing.assert_close(values, all_at_once.values[name], rtol=1e-3, atol=1e-9)


def test_scoring_changes_nothing_in_the_model() -> None:
    model, images = make(DEIT).train(), pictures(DEIT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    toolchain.score(model, images)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_magnitude_is_the_norm_of_what_a_unit_owns() -> None:
    model = make(DEIT)
    block: Any = model.get_submodule("blocks.0.mlp")
    scores = toolchain.score(model, method="magnitude").values["blocks.0.mlp"]
    owned = torch.cat([block.fc1.weight[7], block.fc1.bias[7:8], block.fc2.weight[:, 7]])
    assert scores[7] == pytest.approx(owned.norm().item(), rel=1e-5)


def test_random_scores_follow_the_seed() -> None:
    model = make(DEIT)
    a, b, c = (toolchain.score(model, method="random", seed=seed).values["embed"] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_saved_scores_are_read_back(tmp_path: Path) -> None:
    model, images = make(DEIT), pictures(DEIT)
    scores = toolchain.score(model, images, seed=3)
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.data_digest == scores.data_digest == images_digest(images)
    assert loaded.data_digest != images_digest(images[:2])
    assert loaded.stability == scores.stability
    assert set(loaded.stability) == set(loaded.values)
    assert (loaded.unit, loaded.num_images, loaded.seed, loaded.model_digest) == ("nats", 3, 3, scores.model_digest)
    assert all(torch.equal(loaded.values[name], values) for name, values in scores.values.items())


def test_unreadable_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable scores"):
        Scores.load(tmp_path)
    (tmp_path / "score.json").write_text("{}")
    (tmp_path / "scores.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"score\.json is not valid"):
        Scores.load(tmp_path)


def test_images_are_needed() -> None:
    with pytest.raises(UserError, match="need images"):
        toolchain.score(make(DEIT))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="Unknown method 'fischer'") as error:
        toolchain.score(make(DEIT), pictures(DEIT), method="fischer")  # type: ignore[arg-type]
    assert "fisher" in error.value.fix


def test_nan_activations_are_refused() -> None:
    model, images = make(DEIT), pictures(DEIT)
    images[1] = math.nan
    with pytest.raises(UserError, match="1 of 3 images"):
        toolchain.score(model, images)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    check_finite({"embed": torch.ones(2)})
    with pytest.raises(UserError, match="scores of embed are not finite"):
        check_finite({"blocks.0.mlp": torch.ones(2), "embed": torch.tensor([1.0, bad])})


def test_depth_comes_with_the_scores(tmp_path: Path) -> None:
    model, images = make(DEIT), pictures(DEIT)
    scores = toolchain.score(model, images, method="random", depth=True)
    assert [len(step) for step in scores.depth["blocks"].steps] == [1]
    assert (scores.unit, scores.num_images) == ("none", 0)
    scores.save(tmp_path)
    assert Scores.load(tmp_path).depth == scores.depth


@pytest.mark.parametrize("variant", [DEIT, PVT], ids=str)
def test_refined_keeps_what_kl_keeps(variant: object) -> None:
    model, images = calm(make(variant)), pictures(variant, 16)  # type: ignore[arg-type]
    refined = toolchain.score(model, images, method="refined", batch_size=8)
    group = next(group for group in groups_of(model) if group.kind == "ffn")
    exact = toolchain.score(model, images, method="kl", units={group.name: range(group.size)})
    kept = cut_of(group, None).kept
    assert (kept(refined.values[group.name]) & kept(exact.values[group.name])).sum() >= 0.98 * group.size // 2
    assert all(torch.isfinite(values).all() for values in refined.values.values())
    assert set(refined.stability) == set(refined.values)
