"""Data sets of Hugging Face: columns found by name or type, a split of our own where there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from upvits.calib_data.classes import natural_order
from upvits.calib_data.columns import IMAGE_COLUMNS, LABEL_COLUMNS, Columns, label_text
from upvits.calib_data.datasets import MAX_CLASSES, UNLABELLED, DataSource, Images
from upvits.calib_data.decoding import DECODING_ERRORS, depth_in, load_rgb, read_picture
from upvits.calib_data.depth import Depth, deepest, depth_notes
from upvits.calib_data.errors import MissingDependencyError, UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.folders import TRAIN_NAMES, VAL_NAMES
from upvits.calib_data.hugging_face_folder import READERS, check_folder
from upvits.calib_data.labelled import split_by_hash
from upvits.calib_data.printable import printable

_SAFE = 4
"""Since this version the package runs no program that lies in a data set."""

_LOOKED_AT = 512
"""Pictures of a split that are decoded to find the range of their values."""


def open_hfds(spec: str, name: str, columns: Columns = Columns()) -> DataSource:  # noqa: B008  # frozen
    """A data set by its name on the hub, or a local folder, also one that `save_to_disk` wrote.

    Raises:
        MissingDependencyError: the package `datasets` is missing, or the data set cannot be had.
        UserError: it has no images, or its columns cannot be told apart.
    """
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{spec} needs the package datasets.", fix="pip install datasets, or use imagefolder:DIR."
        ) from None
    if int(datasets.__version__.partition(".")[0]) < _SAFE:
        raise MissingDependencyError(
            f"{spec} needs a newer package datasets than {datasets.__version__}.",
            why="Older ones run programs that lie in data sets.",
            fix=f"pip install 'datasets>={_SAFE}', or use imagefolder:DIR.",
        )
    splits = _load(datasets, name)
    train_name = next((split for split in TRAIN_NAMES if split in splits), None)
    if train_name is None:
        if len(splits) != 1:
            raise UserError(
                f"The Hugging Face data set {name} has no split train.",
                why=f"It has {_some(splits)}.",
                fix="It needs a split for training.",
            )
        (train_name,) = splits
    train = splits[train_name]
    image, label = _columns(datasets, train, spec, columns)
    val, notes = None, []
    for split in (split for split in VAL_NAMES if split in splits and split != train_name):
        if label is not None and split == "test" and not _is_labelled(splits[split], label):
            notes.append(f"{split}: its {len(splits[split])} images have no labels and were left out.")
            continue
        val = splits[split]
        break
    names, labels, by_name = _labels(train, val, label, spec)
    parts = [_encoded(part, image) for part in (train, val) if part is not None]
    depth, checked = _depth(parts, image)
    if val is None:
        order = [str(index) for index in range(len(train))]
        at_train, at_val = split_by_hash(list(range(len(train))), labels[0], order)
        chosen = [_images(parts[0], image, labels[0], at, depth) for at in (at_train, at_val)]
    else:
        chosen = [_images(part, image, of, range(len(part)), depth) for part, of in zip(parts, labels, strict=True)]
    return DataSource(
        spec=spec,
        class_names=names,
        train=chosen[0],
        val=chosen[1],
        digest=published_digest(name, *chosen),
        numbered_by_name=by_name,
        notes=(*notes, *depth_notes(depth, checked)),
    )


def _load(datasets: Any, name: str) -> dict[str, Any]:
    """The splits by name."""
    place = user_path(name)
    try:
        if place.is_dir():
            check_folder(place)
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            found = datasets.load_from_disk(str(place))
        else:
            place_or_name = str(place) if place.is_dir() else name
            if place.is_dir():
                _check_reader(datasets.load_dataset_builder(place_or_name).name, place)
            found = datasets.load_dataset(place_or_name)
        # without the state's own format, which may name columns that are not there
        parts = {
            split: part.with_format(None)
            for split, part in (found if isinstance(found, dict) else {"train": found}).items()
        }
    except UserError:
        raise
    except Exception as error:  # of any kind: the library takes its documents as they are
        raise MissingDependencyError(
            f"Cannot load the Hugging Face data set {name}.",
            why=printable(first_line(error), 300),
            fix="Check its name and the network, or save it on a machine with network and give imagefolder:DIR.",
        ) from None
    return parts


def _check_reader(reader: str, place: Path) -> None:
    if reader not in READERS:
        raise UserError(
            f"{place} would be read as {printable(reader, 60)}.",
            why=f"Pictures are read from {', '.join(READERS)}.",
            fix="Unpack it, and give wds:DIR for shards or imagefolder:DIR for pictures.",
        )


def _columns(datasets: Any, split: Any, spec: str, asked: Columns) -> tuple[str, str | None]:
    """The columns of images and labels: those that were asked for, or the only ones of their type and name."""
    features = split.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = asked.image or _one(images, IMAGE_COLUMNS, features, spec, "images", "image_column")
    if image not in images:
        raise UserError(
            f"{spec} has no images in {printable(image, 60)}.", why=f"Columns of images: {_some(images)}.",
            fix="Correct `image_column=`.",
        )  # fmt: skip
    if asked.label == "none":
        return image, None
    if asked.label is not None:
        if asked.label not in features:
            raise UserError(f"{spec} has no column {printable(asked.label, 60)}.", why=f"It has {_some(features)}.",
                            fix="Correct `label_column=`.")  # fmt: skip
        return image, asked.label
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in features if name.lower() in LABEL_COLUMNS]
    if not labels and len(features) == 1:
        return image, None
    return image, _one(labels, ("label",), features, spec, "labels", "label_column")


def _one(found: list[str], usual: Sequence[str], features: Any, spec: str, what: str, argument: str) -> str:
    """The only column, or the only one with a usual name."""
    fitting = found if len(found) == 1 else [name for name in found if name.lower() in usual]
    if len(fitting) != 1:
        more = "" if argument == "image_column" else ', or `label_column="none"` for images without labels'
        raise UserError(
            f"Which column of {spec} holds the {what}?",
            why=f"It has {_some(features)}" + (f"; {_some(found)} may be." if found else "."),
            fix=f'Name it: `{argument}="{(found or ["NAME"])[0]}"`{more}.',
        )
    return fitting[0]


def _is_labelled(split: Any, label: str) -> bool:
    return label in split.column_names and any(value not in (None, -1) for value in _column(split, label))


def _column(split: Any, label: str) -> list[Any]:
    """The values of a column of labels.

    Raises:
        UserError: it holds anything else than numbers or text. Pictures and recordings would be opened by the library,
            which starts other programs for some.
    """
    kind = split.features[label]
    if type(kind).__name__ not in ("ClassLabel", "Value"):
        raise UserError(
            f"The column {printable(label, 60)} holds {type(kind).__name__}, and no labels.",
            why="A label is a number or a name.",
            fix="Name another column with `label_column=`.",
        )
    return list(split.select_columns([label])[label])


def _labels(
    train: Any, val: Any | None, label: str | None, spec: str
) -> tuple[tuple[str, ...] | None, list[list[int]], bool]:
    """Class names, labels of both splits, and whether numbers are places among sorted names."""
    parts = [part for part in (train, val) if part is not None]
    if label is None:
        return None, [[UNLABELLED] * len(part) for part in parts], False
    values = [_column(part, label) for part in parts]
    known = getattr(train.features[label], "names", None)
    if known:
        if val is not None and getattr(val.features[label], "names", None) != known:
            raise UserError(f"{spec} names its classes differently in its splits.", fix="Save it with one list.")
        numbers = [[_number(value, spec) for value in part] for part in values]
        return tuple(known), numbers, False
    texts = [[label_text(value, f"{spec}, {label}") for value in part] for part in values]
    found = {text for part in texts for text in part}
    if all(text.isdecimal() for text in found):
        last = max(map(_label_number, found))
        names: tuple[str, ...] = tuple(str(number) for number in range(last + 1))
        return names, [[int(text) for text in part] for part in texts], False
    names = natural_order(found)
    place = {name: number for number, name in enumerate(names)}
    return names, [[place[text] for text in part] for part in texts], True


def _label_number(text: str) -> int:
    if len(text) > 9 or int(text) >= MAX_CLASSES:
        raise UserError(
            f"There is an image with the label {printable(text, 40)}.",
            why=f"Labels number the classes from 0, and there are at most {MAX_CLASSES:,}.",
            fix="Correct the labels.",
        )
    return int(text)


def _number(value: object, spec: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise UserError(f"{spec} has an image with the label {value!r}.", fix="Label all images or none.")
    return value


def _encoded(split: Any, column: str) -> Any:
    """The split with its pictures as files, and nothing else: our own decoding reads known formats only."""
    import datasets

    return split.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _file(split: Any, column: str, index: int) -> bytes:
    """The content of a picture file."""
    found = split[index][column]
    if not found or (found["bytes"] is None and found["path"] is None):
        raise _unreadable(column, index, "there is none")
    return found["bytes"] if found["bytes"] is not None else read_picture(Path(found["path"]))


def _unreadable(column: str, index: int, why: object) -> UserError:
    return UserError(
        f"Cannot read the image {index} in the column {printable(column, 60)}.",
        why=f"{printable(str(why), 200)}.",
        fix="Repair it or remove its row, or name another column with `image_column=`.",
    )


def _depth(parts: Sequence[Any], column: str) -> tuple[Depth, int]:
    """The range of pictures with more than 8 bits, and how many pictures were looked at: some of every split."""
    depths = [depth_in(_file(p, column, at)) for p in parts for at in range(0, len(p), max(1, len(p) // _LOOKED_AT))]
    return deepest(depth for depth in depths if depth is not None), len(depths)


def _images(split: Any, column: str, labels: Sequence[int], at: Sequence[int], depth: Depth) -> Images:
    def read(index: int) -> Image.Image:
        try:
            return load_rgb(_file(split, column, at[index]), depth)
        except DECODING_ERRORS as error:
            raise _unreadable(column, at[index], error) from None

    return Images([labels[index] for index in at], read)


def _some(names: Sequence[str] | Any) -> str:
    names = list(names)
    return ", ".join(printable(name, 40) for name in names[:12]) or "none"


def published_digest(name: str, train: Images, val: Images) -> str:
    """sha256 over name, labels and the pixels of a few pictures: these sets are published, and rarely change."""
    digest = hashlib.sha256(name.encode())
    for images in (train, val):
        digest.update(bytes(str(images.labels), "ascii"))
        for index in range(0, len(images), max(1, len(images) // 64)):
            digest.update(images[index][0].tobytes())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
