"""Shards as streams: read here or at a URL, by place, in an order that any number of workers and processes keeps."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from tests.calib_data.test_remembered import age, cache, same  # noqa: F401  # a cache of its own for every test
from upvits.calib_data import DataSource, Preprocess, batches, open_data, shard_files, shards
from upvits.calib_data import datasets as datasets_module
from upvits.calib_data import loading as loading_module
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.loading import TrainingBatches, epoch_order

PREPROCESS = Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")


def png(colour: int) -> bytes:
    memory = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(memory, "PNG")
    return memory.getvalue()


def tar_of(first: int, count: int) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for number in range(first, first + count):
            for name, content in ((f"{number:03}.png", png(number)), (f"{number:03}.cls", str(number % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return memory.getvalue()


CONTENTS = {f"train-{number:02}.tar": tar_of(10 * number, 10) for number in range(6)} | {"val-00.tar": tar_of(100, 8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for name, content in CONTENTS.items():
        (root / name).write_bytes(content)
    age(*root.iterdir())
    return root


@pytest.fixture
def url() -> Iterator[str]:
    """The same files in fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    for name, content in CONTENTS.items():
        system.pipe_file(f"/bucket/{name}", content)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def colours(source: DataSource) -> list[int]:
    return [image.getpixel((0, 0))[0] for image, _ in source.train]  # type: ignore[index]


def test_folder_patterns_and_urls_are_the_same_images(folder: Path, url: str) -> None:
    both = "{train-{00..05},val-00}.tar"
    with pytest.raises(UserError, match="no pattern"):  # braces within braces
        open_data(f"wds:{folder}/{both}")
    local = open_data(f"wds:{folder}")
    assert colours(local) == list(range(60))
    assert len(local.val) == 8
    for spec in (f"wds:{url}", f"wds:file://{folder}"):
        assert colours(open_data(spec)) == colours(local)
    for start in (folder, url):
        training = open_data(f"wds:{start}/train-{{00..02}}.tar")  # validation is taken from it
        assert sorted(colours(training) + [i.getpixel((0, 0))[0] for i, _ in training.val]) == list(range(30))  # type: ignore[index]
        listed = open_data(f"wds:{start}/{{train-00,train-03,val-00}}.tar")
        assert (len(listed.train), len(listed.val)) == (20, 8)


def test_info_file_at_a_url(url: str) -> None:
    text = '{"splits": {"train": {"filenames": ["train-01.tar"]}, "val": {"filenames": ["train-02.tar"]}}}'
    fsspec.filesystem("memory").pipe_file("/bucket/_info.json", text.encode())
    source = open_data(f"wds:{url}")
    assert colours(source) == list(range(10, 20))
    fsspec.filesystem("memory").pipe_file("/bucket/_info.json", text.replace("train-01", "../x/train-01").encode())
    with pytest.raises(UserError, match=r"_info\.json is not valid"):
        open_data(f"wds:{url}")


def test_second_opening_reads_no_shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data(f"wds:{folder}")

    def never(*_: object) -> None:
        raise AssertionError("a shard was opened")

    with monkeypatch.context() as patched:
        patched.setattr(shard_files.Shard, "open", never)
        patched.setattr(shards, "depth_in", never)
        again = open_data(f"wds:{folder}")
    assert same(again, first)
    assert same(open_data(f"wds:{folder}", recheck=True), first)
    (folder / "train-05.tar").write_bytes(tar_of(70, 12))
    changed = open_data(f"wds:{folder}")
    assert changed.digest != first.digest
    assert colours(changed) == [*range(50), *range(70, 82)]


def test_changed_shard_at_a_url_is_noticed(url: str) -> None:
    first = open_data(f"wds:{url}")
    assert same(open_data(f"wds:{url}"), first)
    fsspec.filesystem("memory").pipe_file("/bucket/train-05.tar", tar_of(70, 10))
    changed = open_data(f"wds:{url}")
    assert changed.digest != first.digest
    assert colours(changed)[-10:] == list(range(70, 80))


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (lambda whole: whole.index(b"004.png") + 512 + 20, "ends within 004.png, after 4 samples"),
        (lambda whole: whole.index(b"004.png"), "after 4 samples"),  # between two files: tar takes it for the end
        (lambda whole: whole.index(b"004.cls") + 100, "after 5 samples"),
    ],
)
@pytest.mark.parametrize("at_url", [False, True])
def test_shards_that_end_early_are_counted_before_anything(
    folder: Path, url: str, length: object, said: str, at_url: bool
) -> None:
    whole = CONTENTS["train-00.tar"]
    short = whole[: length(whole)]  # type: ignore[operator]
    for name in ("train-00.tar", "val-00.tar"):
        (folder / name).write_bytes(short)
        fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", short)
    with pytest.raises(UserError, match="2 of 7 shards end early") as caught:
        open_data(f"wds:{url if at_url else folder}")
    assert "train-00.tar" in caught.value.what
    assert said in caught.value.what
    for name in ("train-00.tar", "val-00.tar"):  # what the message says helps
        (folder / name).write_bytes(CONTENTS[name])
        fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", CONTENTS[name])
    assert colours(open_data(f"wds:{url if at_url else folder}")) == list(range(60))


def test_damage_within_a_shard_is_no_end_of_it(folder: Path) -> None:
    whole = bytearray(CONTENTS["train-00.tar"])
    start = whole.index(b"004.png")
    whole[start : start + 512] = b"\7" * 512
    (folder / "train-00.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"after 4 samples, there is neither a file nor the end"):
        open_data(f"wds:{folder}")


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_shard_that_is_cut_while_training_is_named(folder: Path) -> None:
    training = TrainingBatches(open_data(f"wds:{folder}").train, PREPROCESS, 10, workers=2)
    list(training.epoch(0))
    for name in CONTENTS:
        (folder / name).write_bytes(CONTENTS[name][:3000])
    with pytest.raises(UserError, match=r"Cannot read the image .*train-0.\.tar.*the shard ends after") as caught:
        list(training.epoch(1))
    assert "same command" in caught.value.fix


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("memory://nowhere", "No training shards"),
        ("memory://nowhere/a-{0..3}.tar", "cannot be read"),
        ("nope://bucket", "is no place of shards"),
        ("/nowhere/a-{0..2}.tar", "cannot be read"),
        ("/nowhere", "No folder of shards"),
        ("memory://a-{3..1}.tar", "has no shards"),
        ("memory://a-{0..999999999}.tar", "has no shards, or too many"),
        ("memory://a-{0..9999}{0..9999}.tar", "more than 100,000"),
        ("memory://a-{}.tar", "is no pattern"),
        ("memory://a-{0..2.tar", "is no pattern"),
        ("memory://a-0..2}.tar", "is no pattern"),
        ("memory://a-{train}.tar", "neither a range"),
    ],
)
def test_places_that_are_none(place: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        open_data(f"wds:{place}")
    assert said in str(caught.value)
    assert caught.value.fix


def test_url_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingDependencyError, match=r"s3://bucket.* cannot be read here") as caught:
        open_data("wds:s3://bucket/train-{0..3}.tar")
    assert "s3fs" in caught.value.why


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(loading_module, "SHUFFLE_BUFFER", 15)
    monkeypatch.setattr(shards, "SHUFFLE_BUFFER", 15)
    assert datasets_module.SHUFFLE_BUFFER > 15
    return 15


def test_order_of_a_stream(small_buffer: int) -> None:
    runs = [10] * 30
    order = epoch_order(300, runs, torch.Generator().manual_seed(3))
    assert sorted(order.tolist()) == list(range(300))
    shards_in_order = list(dict.fromkeys((order // 10).tolist()))
    assert shards_in_order != sorted(shards_in_order)
    for start in range(285):  # never more than a few files at once
        assert len({*(order[start : start + 15] // 10).tolist()}) <= 5
    within = [index % 10 for index in order.tolist() if index // 10 == 7]
    assert within != sorted(within)
    assert not torch.equal(order, epoch_order(300, runs, torch.Generator().manual_seed(4)))
    whole = epoch_order(300, (), torch.Generator().manual_seed(3))
    assert torch.equal(whole, torch.randperm(300, generator=torch.Generator().manual_seed(3)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("at_url", [False, True])
def test_stream_is_the_same_for_any_workers_and_processes(
    folder: Path, url: str, small_buffer: int, at_url: bool
) -> None:
    train = open_data(f"wds:{url if at_url else folder}").train
    assert train.runs == (10,) * 6

    def seen(rank: int, processes: int, workers: int, skip: int = 0) -> list[torch.Tensor]:
        loader = TrainingBatches(train, PREPROCESS, 12, workers=workers, share=(rank, processes))
        return [images for images, _ in loader.epoch(2, skip)]

    whole = seen(0, 1, 0)
    assert len(whole) == 5
    assert torch.equal(torch.stack(whole), torch.stack(seen(0, 1, 2)))
    assert torch.equal(torch.stack(whole[3:]), torch.stack(seen(0, 1, 2, skip=3)))
    halves = [seen(rank, 2, 0) for rank in range(2)]
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(whole, zip(*halves, strict=True), strict=True))


def test_remote_shards_come_whole_once_several_samples_are_wanted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = shard_files._ask

    def counted(place: str, method: str, *arguments: object, **named: object) -> object:
        asked.append(method)
        return ask(place, method, *arguments, **named)

    monkeypatch.setattr(shard_files, "_ask", counted)
    train = open_data(f"wds:{url}").train
    for _ in range(2):
        assert len(list(batches(train, PREPROCESS, 16))) == 4
    assert (asked.count("cat_file"), asked.count("get_file")) == (7 * 4, 7)


def test_fetched_shards_are_few(url: str) -> None:
    places = [f"{url}/train-{number:02}.tar" for number in range(6)]
    reader = shard_files.ShardReader(places, most_kept=2)
    for shard in range(6):
        for _ in range(6):
            assert reader.read(shard, 0, 7) == f"{10 * shard:03}.png".encode()
    assert len(list(Path(reader._scratch).glob("*.tar"))) == 2
    assert reader.read(0, 0, 7) == b"000.png"
