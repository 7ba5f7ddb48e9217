"""What is in a WebDataset shard: the samples of a tar file, their labels and where their pictures lie."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import RootModel

from upvits.calib_data.columns import is_number, label_text, only_label
from upvits.calib_data.datasets import MAX_CLASSES
from upvits.calib_data.decoding import EXTENSIONS, LARGEST_PICTURE
from upvits.calib_data.documents import parse_document
from upvits.calib_data.errors import UserError
from upvits.calib_data.shard_files import Shard

_LABEL_BYTES = 256
_JSON_BYTES = 1 << 20


class _Json(RootModel[dict[str, Any]]):
    """What lies beside a picture."""


class Sample(NamedTuple):
    """A picture inside a shard, and its label as it stands there: a number or a name."""

    shard: Shard
    member: str
    offset: int
    size: int
    label: str | None

    def __str__(self) -> str:
        return f"{self.shard.place}:{self.member}"


class ShortShardError(ValueError):
    """A shard that is shorter than it says."""


@dataclass(slots=True)
class _Files:
    """The files of one sample in a shard: pictures by what follows the first dot of their names, and its label."""

    pictures: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    label: str | None = None
    document: bytes | None = None


def samples_in(shard: Shard, image_key: str | None, label_column: str | None) -> list[Sample]:
    """The samples of a shard in their order, without reading pictures.

    Raises:
        ShortShardError: the file is shorter than it says, or lacks the end of a tar file.
        UserError: it is no tar file, or a label in it is none.
    """
    found: dict[str, _Files] = {}
    size = shard.size()
    try:
        with shard.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if member.offset_data + max(member.size, 0) > size and member.isreg():
                    raise ShortShardError(
                        f"{shard} has {size:,} bytes and ends within {member.name}, after {_count(found)}"
                    )
                if not member.isfile() or not stem:
                    continue
                files = found.setdefault(f"{folder}/{stem}", _Files())
                if Path(name).suffix.lower() in EXTENSIONS:
                    files.pictures[extension] = _picture(member)
                elif extension == "cls" and label_column is None:
                    files.label = _text_label(_content(tar, member, _LABEL_BYTES))
                elif extension == "json" and label_column != "none":
                    files.document = _content(tar, member, _JSON_BYTES)
            _require_end(shard, file.seek(tar.offset), file.read(tarfile.BLOCKSIZE), found)
        for key, files in found.items():
            if files.document is not None and files.label is None:
                files.label = _json_label(files.document, f"{shard}:{key.removeprefix('/')}.json", label_column)
    except ShortShardError:
        raise
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"Cannot read the shard {shard}: {error}.",
            fix="Give whole, uncompressed tar files whose .cls files hold a number or the name of a class.",
        ) from None
    samples = []
    for key, files in found.items():
        if files.pictures:
            picture = _chosen(files.pictures, image_key, f"{shard}:{key.removeprefix('/')}")
            samples.append(Sample(shard, picture.name, picture.offset_data, picture.size, files.label))
    return samples


def _require_end(shard: Shard, at: int, block: bytes, found: dict[str, _Files]) -> None:
    """Refuse what tarfile takes for the end of an archive, other than the block of zeros that is one."""
    if len(block) < tarfile.BLOCKSIZE:
        raise ShortShardError(f"{shard} ends at byte {at + len(block):,}, after {_count(found)}")
    if block.strip(b"\0"):
        raise ValueError(f"at byte {at:,}, after {_count(found)}, there is neither a file nor the end")


def _count(found: dict[str, _Files]) -> str:
    return f"{len(found):,} sample{'' if len(found) == 1 else 's'}"


def _chosen(pictures: dict[str, tarfile.TarInfo], image_key: str | None, sample: str) -> tarfile.TarInfo:
    """The picture of a sample. Names with one suffix go before others, as in timm: x.jpg before x.mask.png."""
    names = ", ".join(sorted(pictures))
    if image_key is not None:
        if image_key not in pictures:
            raise UserError(
                f"The sample {sample} has no picture {image_key}.", why=f"It has {names}.", fix="Correct `image_key=`."
            )
        return pictures[image_key]
    plain = [picture for extension, picture in pictures.items() if "." not in extension]
    fitting = plain or list(pictures.values())
    if len(fitting) > 1:
        raise UserError(
            f"The sample {sample} has several pictures: {names}.",
            why="One of them is the image, and the others may be masks or depth.",
            fix=f'Say which: `image_key="{sorted(pictures)[0]}"`.',
        )
    return fitting[0]


def _picture(member: tarfile.TarInfo) -> tarfile.TarInfo:
    if member.size < 0:  # as an extended header can say
        raise ValueError(f"the image {member.name} has {member.size} bytes")
    if member.size > LARGEST_PICTURE:
        raise ValueError(f"the image {member.name} has {member.size >> 20:,} MiB")
    return member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, largest: int) -> bytes:
    content = tar.extractfile(member)
    if not 0 <= member.size <= largest or content is None:
        raise ValueError(f"{'a .cls file' if largest == _LABEL_BYTES else 'a .json file'} has {member.size} bytes")
    return content.read(largest)


def _text_label(content: bytes) -> str:
    """The label in a .cls file: a number from 0 on, or a name. Raises ValueError for anything else."""
    text = content.decode(errors="replace").strip()
    if not text or not text.isprintable() or "\ufffd" in text or (is_number(text) and not text.isdecimal()):
        raise ValueError(f"a .cls file holds {content[:20]!r} instead of a number from 0 on or a name")
    return _bounded(text)


def _bounded(text: str) -> str:
    """The label, a number without zeros before it. Raises ValueError for a number that is too large."""
    if not is_number(text):
        return text
    if len(text) > 9 or int(text) >= MAX_CLASSES:
        raise ValueError(f"a .cls file or .json label holds {text[:20]!r} instead of a number to {MAX_CLASSES - 1}")
    return str(int(text))


def _json_label(content: bytes, name: str, label_column: str | None) -> str:
    """The label in a .json file: of one entry that is called like a label. Raises ValueError for a wrong value."""
    entries = parse_document(content, name, _Json, fix="Correct the file.").root
    key = only_label(entries, name, label_column)
    return _bounded(label_text(entries[key], f"{name}: {key}"))
