"""Whether CUDA computes what the CPU does, and what it costs: scores, plan, cut, refit and fine-tuning.

Steps of `python -m benchmarks.gpu`, in the order of their worth. Each is a name, the seconds that it may need on a
data centre GPU, and a function that returns plain figures.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from upvits import toolchain
from upvits.calib_data import DataSource
from upvits.calib_data.demo import demo_images, demo_source
from upvits.calib_data.loading import proxy_images
from upvits.calib_data.prepared import tensor_of
from upvits.toolchain import DistillSettings
from upvits.toolchain.training import distillation

Figures = dict[str, float | int | bool | str]


class Step(NamedTuple):
    """A measurement: its name, the seconds that it may need, and what makes it."""

    name: str
    seconds: float
    run: Callable[[], Figures]


@dataclass
class Evidence:
    """The demo's network and images on the CPU and on a device, and what steps leave for later ones.

    Attributes:
        device: such as "cuda"; "cpu" tries the steps out.
        quick: few images and one epoch.
    """

    device: str
    quick: bool = False
    scores: dict[str, toolchain.Scores] = field(default_factory=dict)
    cut: nn.Module | None = None

    def __post_init__(self) -> None:
        train, val, self.proxies = (96, 48, 24) if self.quick else (1200, 600, 512)
        self.data: DataSource = replace(demo_source(), train=demo_images("train", train), val=demo_images("val", val))
        self.dense = toolchain.create_model("pvt_v2_b0", weights="demo").eval()
        self.preprocess = toolchain.preprocess_of(self.dense)
        self.images: Tensor = tensor_of(proxy_images(self.data, self.preprocess, self.proxies, 0))
        self.there = copy.deepcopy(self.dense).to(self.device)

    def right(self) -> Iterator[Step]:
        """Is it right: what CUDA changes in every part of the work."""
        yield Step("outputs", 10, self.outputs)
        yield Step("scores", 30, self.score)
        yield Step("plan", 5, self.plan)
        yield Step("cut and refit", 60, self.refit)
        yield Step("fine-tuning", 60, self.fine_tuning)
        yield Step("killed and continued", 60, self.continued)

    def cost(self) -> Iterator[Step]:
        """What it costs: scores, cut and training of large networks with random weights."""
        for name in ("test_vit",) if self.quick else ("deit_base_patch16_224", "vit_large_patch16_224"):
            yield Step(f"cost of {name}", 60, lambda name=name: self.cost_of(name))  # type: ignore[misc]

    def outputs(self) -> Figures:
        """Largest differences of logits, in fp32 with and without TF32, and in half precision."""
        images = self.images[:16]
        with torch.inference_mode():
            reference = self.dense(images)
            found: Figures = {}
            for name, precision in (("fp32", "ieee"), ("fp32 with TF32", "tf32")):
                with _precision(precision):
                    found[name] = _relative(reference, self.there(images.to(self.device)))
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast(self.device, dtype):
                    found[f"AMP {str(dtype).removeprefix('torch.')}"] = _relative(
                        reference, self.there(images.to(self.device))
                    )
        return found

    def score(self) -> Figures:
        """Fisher scores of CPU and device: their least rank correlation over groups, and the seconds of each."""
        seconds = {}
        for name, model in (("cpu", self.dense), (self.device, self.there)):
            started = time.perf_counter()
            self.scores[name] = toolchain.score(model, self.images, method="fisher", batch_size=8)
            seconds[name] = time.perf_counter() - started
        one, other = self.scores["cpu"].values, self.scores[self.device].values
        return {
            "least rank correlation": min(_rank_correlation(one[name], other[name]) for name in one),
            **{f"seconds on {name}": round(took, 2) for name, took in seconds.items()},
        }

    def plan(self) -> Figures:
        """Share of the kept units that plans of both scores have in common."""
        plans = {name: toolchain.plan(self.dense, scores, ratio=0.5) for name, scores in self.scores.items()}
        kept = [{(group, unit) for group, units in plan.keep.items() for unit in units} for plan in plans.values()]
        return {"kept units in common": len(kept[0] & kept[-1]) / len(kept[0])}

    def refit(self) -> Figures:
        """Top-1 of the cut and refitted network, and seconds, on CPU and device."""
        plan, found = toolchain.plan(self.dense, self.scores["cpu"], ratio=0.5), Figures()
        for name, model in (("cpu", self.dense), (self.device, self.there)):
            started = time.perf_counter()
            compressed = toolchain.compress(model, plan, self.images)
            _wait(self.device)
            found[f"seconds on {name}"] = round(time.perf_counter() - started, 2)
            found[f"top-1 on {name}"] = self._top1(compressed.model)
            self.cut = compressed.model.cpu()
        return found

    def fine_tuning(self) -> Figures:
        """Top-1 and images/s of a short fine-tuning with and without AMP, and whether it is the same twice."""
        (first, found), (plain, without) = self._tune(), self._tune(amp="off")
        second, _ = self._tune()
        return {
            **found,
            **{f"{name} without AMP": value for name, value in without.items()},
            "AMP changes weights by": _largest_change(first, plain),
            **_same("again", first, second),
        }

    def continued(self) -> Figures:
        """Whether a training that was killed after its first epoch ends with the weights of one that was not."""
        whole, _ = self._tune(epochs=2)
        module: Any = distillation
        save = module.save_state

        def killed(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        with tempfile.TemporaryDirectory() as folder:
            module.save_state = killed
            try:
                self._tune(Path(folder), epochs=2)
            except KeyboardInterrupt:
                pass
            finally:
                module.save_state = save
            continued, _ = self._tune(Path(folder), epochs=2)
        return _same("continued", whole, continued)

    def cost_of(self, name: str) -> Figures:
        """Seconds and peak memory of scores, cut and refit, and training, of a network with random weights."""
        few, batch = (12, 4) if self.quick else (128, 64)
        model = toolchain.create_model(name, weights="random").to(self.device).eval()
        preprocess = toolchain.preprocess_of(model)
        images = torch.randn(few, *preprocess.input_size, generator=torch.Generator().manual_seed(0))
        found = Figures()
        scores: toolchain.Scores = self._timed(
            found, "scores", lambda: toolchain.score(model, images, method="fisher", batch_size=8)
        )
        plan = toolchain.plan(model, scores, ratio=0.5)
        small = self._timed(found, "cut and refit", lambda: toolchain.compress(model, plan, images)).model
        data = replace(self.data, train=demo_images("train", 4 * batch), val=demo_images("val", batch))
        networks: tuple[Any, Any] = (model, small)
        for network in networks:
            network.reset_classifier(len(data.class_names or ()))
        settings = DistillSettings(epochs=1, batch_size=batch, ema_decay=0.0)
        teacher, student = model.cpu(), small.cpu()
        trained = self._timed(
            found,
            f"training on {4 * batch} images",
            lambda: distillation.distill(student, teacher, data, preprocess, settings, device=self.device),
        )
        found["images per second of training"] = trained.history[-1].images_per_s
        return found

    def _timed(self, found: Figures, name: str, work: Callable[[], Any]) -> Any:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = work()
        _wait(self.device)
        found[f"seconds of {name}"] = round(time.perf_counter() - started, 2)
        if self.device == "cuda":
            found[f"peak GiB of {name}"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return result

    def _tune(self, folder: Path | None = None, **more: Any) -> tuple[Mapping[str, Tensor], Figures]:
        if self.cut is None:
            raise RuntimeError("there is no cut network, since that step failed")
        settings = DistillSettings(
            epochs=1, batch_size=24 if self.quick else 64, lr=3e-3, warmup_epochs=0.3, cutmix=0.0, feature_weight=20.0
        )
        result = distillation.distill(
            copy.deepcopy(self.cut), self.dense, self.data, self.preprocess, replace(settings, **more), folder,
            device=self.device,
        )  # fmt: skip
        last = result.history[-1]
        return result.model.cpu().state_dict(), {"top-1": last.top1 or 0.0, "images per second": last.images_per_s}

    def _top1(self, model: nn.Module) -> float:
        return float(toolchain.accuracy(model, self.data).top1 or 0.0)


class _precision:  # noqa: N801  (a context)
    """What fp32 products and convolutions compute in."""

    def __init__(self, name: str) -> None:
        self._name, self._backends = name, torch.backends

    def __enter__(self) -> None:
        backends: Any = torch.backends
        self._before = backends.fp32_precision
        backends.fp32_precision = self._name

    def __exit__(self, *_: object) -> None:
        backends: Any = torch.backends
        backends.fp32_precision = self._before


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _relative(reference: Tensor, found: Tensor) -> float:
    return float((reference - found.float().cpu()).abs().max() / reference.abs().max())


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    ranks = [values.cpu().flatten().argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1]) if len(ranks[0]) > 1 else 1.0


def _largest_change(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def _same(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Figures:
    identical = all(torch.equal(one[key], other[key]) for key in one)
    return {f"{name}: bit-identical": identical, f"{name}: largest change": _largest_change(one, other)}
