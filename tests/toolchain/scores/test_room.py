"""Passes that follow the memory there is: by segments, in parts, and halved where memory runs out."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from tests.contracts.variants import VARIANTS, Variant, make, pictures
from upvits.calib_data.errors import UserError
from upvits.toolchain import scores
from upvits.toolchain.compensation import curves
from upvits.toolchain.families import groups_of
from upvits.toolchain.scores import fisher as fisher_file
from upvits.toolchain.scores import room
from upvits.toolchain.scores.backward import frozen, gradients_by_segment, signs_of
from upvits.toolchain.scores.fisher import probes_of
from upvits.toolchain.scores.masks import masked
from upvits.toolchain.scores.room import images_at_once, with_room


@pytest.mark.parametrize("variant", [VARIANTS[0], next(v for v in VARIANTS if "pvt" in str(v))], ids=str)
def test_gradients_by_segment_are_those_of_the_whole_network(variant: Variant) -> None:
    model, images = frozen(make(variant)), pictures(variant, 3)
    groups = groups_of(model)
    masks = {g.name: torch.ones(len(images), g.size, requires_grad=True) for g in groups}
    found: dict[str, Tensor] = {}
    with masked(model, groups, masks):
        outputs = model(images)
        directions = probes_of(outputs.detach(), None, signs_of(0, range(3)))
        for part in gradients_by_segment(model, images, lambda _: directions, masks):
            for name, gradient in part.items():
                found[name] = found.get(name, torch.zeros(())) + gradient
        wanted = [torch.autograd.grad(outputs, list(masks.values()), one, retain_graph=True) for one in directions]
    for name, gradients in zip(masks, zip(*wanted, strict=True), strict=True):
        whole = torch.stack(gradients)
        torch.testing.assert_close(found[name], whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_a_frozen_network_shares_its_weights_and_leaves_the_flags_of_the_other_alone() -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        copy = frozen(model)
    weight = copy.get_parameter("weight")
    assert weight.data_ptr() == model.weight.data_ptr()
    assert (weight.requires_grad, model.weight.requires_grad) == (False, True)


@pytest.mark.parametrize("variant", [VARIANTS[0], next(v for v in VARIANTS if "pvt" in str(v))], ids=str)
def test_the_number_of_images_at_once_changes_rounding_only(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make(variant), pictures(variant, 12)
    readers = {g.module: f"{g.module}.fc2" for g in groups_of(model) if g.kind == "ffn"}
    found: dict[int, dict[str, Tensor]] = {}
    for size in (1, 3, 8):
        monkeypatch.setattr(fisher_file, "images_at_once", lambda *_, size=size: size)
        monkeypatch.setattr("upvits.toolchain.compensation.gradients.images_at_once", lambda *_, size=size: size)
        layers, _ = curves._statistics(model, list(readers.values()), {}, images, 8, 0, True)
        moments = {f"{name} {part}": getattr(layers[name], part) for name in layers for part in ("second", "fisher")}
        found[size] = dict(scores.score(model, images, batch_size=8).halves) | moments
    for name, values in found[8].items():
        allowed = 1e-6 if values.dtype == torch.float64 else 1e-5  # moments of layers are summed in fp32
        for other in (found[1], found[3]):
            assert float((other[name] - values).abs().max()) <= allowed * float(values.abs().max()), name


def test_memory_that_runs_out_halves_the_images_and_starts_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("upvits"), "propagate", True)
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 2:
            errors = (
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
                RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
                MemoryError(),
            )
            raise errors[len(tried) % 3]
        return "done"

    with caplog.at_level(logging.WARNING, logger="upvits"):
        assert with_room(work, 16) == "done"
    assert tried == [16, 8, 4, 2]
    assert "with 8 images" in caplog.text


def test_no_memory_for_a_single_image_is_one_message() -> None:
    def work(_: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    with pytest.raises(UserError, match="single image at a time") as caught:
        with_room(work, 2)
    assert "8 bytes" in caught.value.why


def test_other_errors_pass() -> None:
    def work(_: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        with_room(work, 2)


def test_fewer_images_where_less_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = VARIANTS[0]
    model, image = make(variant), pictures(variant, 1)
    assert images_at_once(model, image, 16) == 16
    one = room._kept_bytes(model, image) * room.TIMES
    for free, wanted in ((9 * one, 4), (one // 2, 1)):
        monkeypatch.setattr(room, "free_bytes", lambda _, free=free: free)
        assert images_at_once(model, image, 16) == wanted


def test_what_is_kept_grows_with_the_image_and_not_with_the_blocks() -> None:
    import timm

    def kept(depth: int, pixels: int) -> int:
        model = timm.create_model("deit_tiny_patch16_224", img_size=pixels, depth=depth, num_classes=5).eval()
        return room._kept_bytes(model, torch.zeros(1, 3, pixels, pixels))

    assert kept(8, 64) < 1.5 * kept(1, 64)
    assert kept(1, 128) > 3 * kept(1, 64)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room._free_in_container(tmp_path) > 1 << 60  # no control group
    for name, text in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 400\ninactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert room._free_in_container(tmp_path) == 400
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert room.free_bytes(torch.device("cpu")) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_bytes(torch.device("cpu")) == 900


def test_a_gpu_counts_what_torch_holds_back(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 20}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert room.free_bytes(torch.device("cuda", 0)) == 130
