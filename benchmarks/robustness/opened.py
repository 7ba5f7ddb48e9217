"""Data at their opening: shards that end early, places of shards that are none, memories of images that lie, batches
that are larger than the data."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.robustness.case import CHEAP, CUT, SIDE, Arguments, Case, Ground
from benchmarks.robustness.mutations import TEXTS, mutated, no_documents, shown, written
from benchmarks.robustness.pictures import sample_members, saved, tar
from upvits.calib_data import open_data

_READ = ("score", *CUT, "--weights", "random", "--image-size", str(SIDE), *CHEAP)
_PLACES = (
    "memory://nowhere", "memory://nowhere/a-{0..3}.tar", "nope://bucket", "://", "s3://", "file:///etc/passwd",
    "file:///dev/zero", "a-{0..99999999999}.tar", "{{{{.tar", "}{.tar", "{a,b.tar", "{,}.tar", "a-{3..1}.tar",
    "a-" + "{0..9}" * 12 + ".tar", "{" * 10_000 + ".tar", "reference://x", "zip://a.tar::memory://b.zip",
    "memory://" + "x" * 10_000, "data:text/plain,hello", "github://a:b@c/d.tar", "file://{a,b}/c.tar",
)  # fmt: skip


def cases(ground: Ground, random: Random) -> Iterator[Case]:
    """Cut shards and damage in them; patterns and URLs; damaged memories; batches."""
    whole = tar(sample_members(saved("PNG")))
    for at in sorted({512, *random.sample(range(1, len(whole) - 1024), 24), *range(512, len(whole) - 1024, 1536)}):
        yield Case(f"shard cut at byte {at}", functools.partial(_shards, whole[:at]), "refused")
    for at in random.sample(range(1024, len(whole) - 2048, 512), 6):
        damaged = whole[:at] + random.randbytes(512) + whole[at + 512 :]
        yield Case(f"shard with a random block at byte {at}", functools.partial(_shards, damaged))
    for place in (*_PLACES, *(f"memory://{text}" for text in random.sample(TEXTS, 6))):
        yield Case(f"shards at {shown(place)}", functools.partial(_place, place), "refused")
    cache = {"UPVITS_DEPLOY_CACHE": f"{ground.case}/cache"}
    whole_memory = functools.partial(_remembered, ground, "images", None)
    yield Case("memory of images: whole", whole_memory, "done", environment=cache)
    for kind in ("images", "shards"):
        for what, raw in no_documents(b"{}").items():
            damage = functools.partial(_replaced, raw)
            yield Case(
                f"memory of {kind}: {what}",
                functools.partial(_remembered, ground, kind, damage),
                "done",
                environment=cache,
            )
        for number in range(12):
            damage = functools.partial(_mutated, random.randrange(2**32))
            name = f"memory of {kind}: changed, {number}"
            yield Case(name, functools.partial(_remembered, ground, kind, damage), "done", environment=cache)
    for size in (1_000, 10**6, 2**62):
        yield Case(f"a batch of {size}", functools.partial(_batch, ground, size), "refused")


def _shards(raw: bytes, here: Path) -> Arguments:
    (here / "d").mkdir()
    (here / "d" / "train.tar").write_bytes(raw)
    (here / "d" / "val.tar").write_bytes(tar(sample_members(saved("PNG"))))
    return [*_READ, "--data", f"wds:{here / 'd'}", "-o", here / "run", "--quiet"]


def _place(place: str, here: Path) -> Arguments:
    return [*_READ, "--data", f"wds:{place}", "-o", here / "run", "--quiet"]


def _batch(ground: Ground, size: int, here: Path) -> Arguments:
    data = f"imagefolder:{ground.photos}"
    return [*_READ, "--data", data, "-o", here / "run", "--quiet", "--batch-size", str(size)]


def _replaced(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)


def _mutated(seed: int, path: Path) -> None:
    path.write_bytes(written(mutated(json.loads(path.read_bytes()), Random(seed))[1]))


def _remembered(ground: Ground, kind: str, damage: Callable[[Path], None] | None, here: Path) -> Arguments:
    """A data set that was opened before, and what was remembered of it changed."""
    place = here / "set"
    if kind == "images":
        shutil.copytree(ground.photos, place)
    else:
        place.mkdir()
        for split in ("train", "val"):
            (place / f"{split}.tar").write_bytes(tar(sample_members(saved("PNG"))))
    for path in place.rglob("*"):
        os.utime(path, (1_600_000_000,) * 2)
    spec = f"{'imagefolder' if kind == 'images' else 'wds'}:{place}"
    before = os.environ.get("UPVITS_DEPLOY_CACHE")
    os.environ["UPVITS_DEPLOY_CACHE"] = str(
        here / "cache"
    )  # the case is a fork, or a process that is started from here
    open_data(spec)
    for path in (here / "cache").rglob("*.json"):
        if damage is not None:
            damage(path)
    if before is None:
        del os.environ["UPVITS_DEPLOY_CACHE"]
    else:
        os.environ["UPVITS_DEPLOY_CACHE"] = before
    return [*_READ, "--data", spec, "-o", here / "run", "--quiet"]
