"""Scores, plan, cut and refit of both families on a GPU that is pretended: nothing is left on the CPU, or meets it."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.toolchain.pretended_gpu import OnGpu, pretended_gpu
from upvits import toolchain

FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1), "num_classes": 7}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, int, int]]:
    size, arguments = FAMILIES[request.param]
    torch.manual_seed(0)
    return timm.create_model(request.param, **arguments).eval(), (3, size, size)


def test_the_pretended_gpu_refuses_what_a_real_one_refuses() -> None:
    with pretended_gpu():
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert there.is_cuda
        assert not here.is_cuda
        assert (there + 1).device == torch.device("cuda", 0)
        assert (there * torch.tensor(2.0)).is_cuda  # a single number may be anywhere
        for forgotten in (
            lambda: there + here,
            lambda: nn.Linear(3, 2)(there),
            lambda: nn.Linear(3, 2).to("cuda")(here),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                forgotten()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert there.cpu().numpy().sum() == 6
        layer = copy.deepcopy(nn.Linear(3, 2).to("cuda"))
        layer(there).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.is_cuda
        assert isinstance(layer.weight, nn.Parameter)
        assert not layer.cpu().weight.is_cuda
    assert type(torch.ones(1)) is torch.Tensor


def test_a_network_on_a_gpu_is_scored_and_cut_as_on_the_cpu(dense: tuple[nn.Module, tuple[int, int, int]]) -> None:
    model, size = dense
    images = torch.randn(20, *size, generator=torch.Generator().manual_seed(1))
    wanted = toolchain.score(model, images, method="fisher", batch_size=4)
    plan = toolchain.plan(model, wanted, ratio=0.5, input_size=size)
    cut = toolchain.compress(model, plan, images, batch_size=4).model
    with pretended_gpu():
        there = copy.deepcopy(model).to("cuda")
        for method in ("fisher", "kl") if hasattr(model, "blocks") else ("fisher",):  # of PVTv2, kl takes 25 s
            few = images if method == "fisher" else images[:2]
            scores = toolchain.score(there, few, method=method, batch_size=4)
            assert not any(isinstance(values, OnGpu) for values in scores.values.values())
            if method == "fisher":
                for name, values in wanted.values.items():
                    torch.testing.assert_close(scores.values[name], values)
        assert toolchain.plan(there, wanted, ratio=0.5, input_size=size).keep == plan.keep
        for small in (toolchain.delete_units(there, plan), toolchain.compress(there, plan, images, batch_size=4).model):
            assert all(tensor.is_cuda for tensor in (*small.parameters(), *small.buffers()))
        found = {name: tensor.detach().cpu() for name, tensor in small.state_dict().items()}
    for name, tensor in cut.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
