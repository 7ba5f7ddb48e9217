"""Opens an image set by its name: the embedded one, a folder, or one of timm's sources."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from upvits.calib_data.choices import Order
from upvits.calib_data.classes import read_class_map, with_class_map, with_names, with_order
from upvits.calib_data.columns import Columns
from upvits.calib_data.datasets import DataSource
from upvits.calib_data.demo import demo_source
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.folders import open_folder
from upvits.calib_data.hugging_face import open_hfds
from upvits.calib_data.shard_files import is_url
from upvits.calib_data.shards import open_shards
from upvits.calib_data.tables import SUFFIXES, open_table
from upvits.calib_data.torchvision_sets import open_torch

_FORMS = {
    "demo": "demo (embedded)",
    "imagefolder": "imagefolder:DIR",
    "csv": "csv:FILE (CSV, TSV or JSON lines of file and label)",
    "wds": "wds:DIR (WebDataset shards; tar files as {000..146}, or a URL)",
    "hfds": "hfds:NAME (Hugging Face datasets)",
    "torch": "torch:NAME or torch:NAME:DIR (torchvision)",
}


def open_data(
    spec: str,
    *,
    class_map: Path | str | None = None,
    class_order: Order | None = None,
    class_names: Sequence[str] | None = None,
    image_key: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    recheck: bool = False,
    quiet: bool = True,
) -> DataSource:
    """Opens the image set that `spec` names.

    A class has the number that the class map gives it; else its place in `class_names`, where these cover all classes;
    else the number that the data give it; else its place among the sorted names.

    Args:
        spec: "demo", "imagefolder:DIR", "csv:FILE", "wds:DIR", "hfds:NAME" or "torch:NAME[:DIR]"; timm's spelling with
            a slash ("hfds/NAME") works too.
        class_map: a file with the names of the classes in the order of the network's outputs, one a line, or JSON.
        class_order: how names are sorted: "natural" (2 before 10, as timm does; also when None) or "text" (10 before 2,
            as torchvision does).
        class_names: the network's own, in the order of its outputs.
        image_key: which picture of a sample in shards, where several have one suffix: "jpg", "mask.png".
        image_column: column of a table, or of a data set of Hugging Face, that holds images.
        label_column: column, or entry of the JSON in shards, that is the label; "none": there are no labels.
        recheck: every image of a folder or a table is looked at again, also those that were seen before and have kept
            size, times and inode (`calib_data/remembered.py`).
        quiet: no progress bar while the images are checked.

    Raises:
        UserError: unknown form; folder missing, unreadable, empty or inconsistent; more than 1 % unreadable images; a
            class map that does not fit.
        MissingDependencyError: a package or a download is missing.

    Example:
        >>> source = open_data("demo")
        >>> len(source.class_names), len(source.train), len(source.val)
        (12, 6000, 1200)
        >>> image, label = source.val[3]
        >>> image.size, source.class_names[label]
        ((64, 64), 'plain_square')
    """
    place = None if class_map is None else user_path(class_map)
    known = class_names or () if place is None else tuple(read_class_map(place))
    columns = Columns(image_column, label_column)
    source = _open(spec, known, image_key, columns, recheck=recheck, quiet=quiet)
    if place is not None:
        return with_class_map(source, place)
    source = with_names(source, class_names)
    return source if class_order is None else with_order(source, class_order)


def _open(
    spec: str, known: Sequence[str], image_key: str | None, columns: Columns, *, recheck: bool, quiet: bool
) -> DataSource:
    if spec == "demo":
        return demo_source()
    form, place = _parse(spec)
    if form == "imagefolder":
        return open_folder(spec, user_path(place), known=known, quiet=quiet, recheck=recheck)
    if form == "csv":
        return open_table(spec, user_path(place), columns, known=known, quiet=quiet, recheck=recheck)
    if form == "wds":
        root = place if is_url(place) else str(user_path(place))
        asked, label = image_key, columns.label
        return open_shards(spec, root, image_key=asked, label_column=label, quiet=quiet, recheck=recheck)
    if form == "hfds":
        return open_hfds(spec, place, columns)
    name, _, root = place.partition(":")
    return open_torch(spec, name.lower(), user_path(root) if root else None)


def _parse(spec: str) -> tuple[str, str]:
    """Form and what follows it, for "form:place" and "form/place"."""
    for form in ("imagefolder", "csv", "wds", "hfds", "torch"):
        for separator in ":" if form in ("imagefolder", "csv") else ":/":
            head, mark, place = spec.partition(separator)
            if head.lower() == form and mark and place:
                return form, place
    raise _unknown(spec)


def _unknown(spec: str) -> UserError:
    head = spec.replace("/", ":").partition(":")[0].lower()
    near = difflib.get_close_matches(head, _FORMS, n=1)
    if os.path.isdir(os.path.expanduser(spec)):
        hint = f"For the image folder write imagefolder:{spec}. "
    elif os.path.isfile(os.path.expanduser(spec)) and spec.lower().endswith(SUFFIXES):
        hint = f"For the table write csv:{spec}. "
    elif near:
        hint = f"Did you mean {_FORMS[near[0]]}? "
    else:
        hint = ""
    return UserError(f"Unknown data {spec!r}.", fix=hint + "Valid: " + ", ".join(_FORMS.values()) + ".")
