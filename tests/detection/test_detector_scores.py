"""Scores of a detector's units are the second-order form of what happens when they leave; cuts are refitted."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.detection.conftest import small_retinanet
from upvits import toolchain
from upvits.detection.detector import DetectorInfo
from upvits.detection.detector_scores import Maps, conv_groups, score_detector
from upvits.detection.detector_surgery import cut_detector, kept_channels
from upvits.toolchain.families import groups_of
from upvits.toolchain.scores.masks import masked

pytestmark = pytest.mark.usefixtures("mmdet")


@pytest.fixture
def detector(folders: dict[str, Path]) -> tuple[nn.Module, DetectorInfo]:
    detector, model = small_retinanet(folders["dense"], 3)
    return detector, DetectorInfo(model, ("a", "b", "c"), (1, 2, 3), (64, 64))


def images(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_maps_hold_every_anchor(detector: tuple[nn.Module, DetectorInfo]) -> None:
    maps = Maps(detector[0]).eval()
    with torch.inference_mode():
        dense = maps(images(2))
        logits, deltas = maps.parts(dense)
        assert logits.shape == (2, 9 * (64 + 16 + 4 + 1 + 1), 3)
        assert deltas.shape[1:] == (logits.shape[1], 4)
        first = maps.levels(images(2))[0]  # [B, 9 * 3, 8, 8]: anchors of a place stand together
        assert torch.equal(logits[:, :9], first[:, :, 0, 0].view(2, 9, 3))
        assert maps.divergence(dense, dense).abs().max() == 0


def test_probes_are_the_second_derivative(detector: tuple[nn.Module, DetectorInfo]) -> None:
    maps = Maps(detector[0]).eval()
    with torch.inference_mode():
        dense = maps(images(1)).double()
    step = 1e-3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(2)).double()
    exact = float(maps.divergence(dense, dense + step))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [sum(((g * step).sum() ** 2 / 2 for g in maps.probes(dense, generator)), torch.zeros(())) for _ in range(300)]
    )
    assert float(draws.mean()) == pytest.approx(exact, rel=0.1)


def test_scores_order_units_as_removing_them_does(detector: tuple[nn.Module, DetectorInfo]) -> None:
    network = detector[0]
    net, maps = network.get_submodule("backbone.net"), Maps(network).eval()
    scores = score_detector(network, images()).backbone
    groups = {group.name: group for group in groups_of(net)}
    name = "stages.2.blocks.0.mlp"
    order = scores.values[name].argsort()
    chosen = [*order[:6].tolist(), *order[-6:].tolist()]
    exact = []
    with torch.inference_mode():
        dense = maps(images())
        for unit in chosen:
            mask = torch.ones(len(dense), groups[name].size)
            mask[:, unit] = 0
            with masked(net, [groups[name]], {name: mask}):
                exact.append(float(maps.divergence(dense, maps(images())).mean()))
    assert max(exact[:6]) < min(exact[6:])


def test_channels_of_the_head_are_scored(detector: tuple[nn.Module, DetectorInfo]) -> None:
    network = detector[0]
    with torch.no_grad():  # nobody reads this channel
        network.get_parameter("bbox_head.retina_cls.weight")[:, 3] = 0
    scores = score_detector(network, images())
    assert scores.neck_and_head.keys() == {group.name for group in conv_groups(network)}
    assert float(scores.neck_and_head["bbox_head.cls_convs.0"][3]) == 0
    assert int((scores.neck_and_head["bbox_head.cls_convs.0"] == 0).sum()) >= 1
    assert 3 not in kept_channels(network, scores, 0.5, align=4)["bbox_head.cls_convs.0"]


@pytest.mark.parametrize("compensate", [True, False])
def test_nothing_cut_is_nothing_changed(detector: tuple[nn.Module, DetectorInfo], compensate: bool) -> None:
    network, info = detector
    scores = score_detector(network, images())
    plan = toolchain.plan(network.get_submodule("backbone.net"), scores.backbone, ratio=0.01, align=1)
    plan_of_everything = type(plan)(**{**{n: getattr(plan, n) for n in plan.__dataclass_fields__}, "keep": {}})
    same = cut_detector(
        network, info, plan_of_everything, kept_channels(network, scores, 0.0), images(), compensate=compensate
    )
    with torch.inference_mode():
        before, after = Maps(network).eval()(images()), Maps(same.detector).eval()(images())
    assert torch.allclose(after, before, atol=1e-4)
    assert same.divergence < 1e-6


def test_a_cut_detector_is_refitted(detector: tuple[nn.Module, DetectorInfo]) -> None:
    network, info = detector
    scores = score_detector(network, images(40))
    plan = toolchain.plan(network.get_submodule("backbone.net"), scores.backbone, ratio=0.5, align=4)
    kept = kept_channels(network, scores, 0.25, align=4)
    refitted = cut_detector(network, info, plan, kept, images(40))
    copied = cut_detector(network, info, plan, kept, images(40), compensate=False)
    assert refitted.refitted > 0
    assert refitted.divergence < min(
        0.85 * copied.divergence, refitted.divergence_cut
    )  # random weights: little to gain
    assert refitted.info.config["neck"]["out_channels"] == refitted.info.config["bbox_head"]["feat_channels"] == 12
    widths = [
        group.size for group in groups_of(refitted.detector.get_submodule("backbone.net")) if group.kind == "embed"
    ]
    assert widths == [8, 16, 24, 32]
