"""Opens an image set by its name: the embedded one, a folder, or one of timm's sources."""

from __future__ import annotations

import difflib
import os

from upvits.calib_data.datasets import DataSource
from upvits.calib_data.demo import demo_source
from upvits.calib_data.errors import UserError
from upvits.calib_data.files import user_path
from upvits.calib_data.folders import open_folder
from upvits.calib_data.shards import open_shards
from upvits.calib_data.timm_sources import open_hfds, open_torch

_FORMS = {
    "demo": "demo (embedded)",
    "imagefolder": "imagefolder:DIR",
    "wds": "wds:DIR (local WebDataset shards)",
    "hfds": "hfds:NAME (Hugging Face datasets)",
    "torch": "torch:NAME or torch:NAME:DIR (torchvision)",
}


def open_data(spec: str, *, quiet: bool = True) -> DataSource:
    """Opens the image set that `spec` names.

    Args:
        spec: "demo", "imagefolder:DIR", "wds:DIR", "hfds:NAME" or "torch:NAME[:DIR]"; timm's spelling with a slash
            ("hfds/NAME") works too.
        quiet: no progress bar while the images are checked.

    Raises:
        UserError: unknown form; folder missing, unreadable, empty or inconsistent; more than 1 % unreadable images.
        MissingDependencyError: a package or a download is missing.

    Example:
        >>> source = open_data("demo")
        >>> len(source.class_names), len(source.train), len(source.val)
        (12, 6000, 1200)
        >>> image, label = source.val[3]
        >>> image.size, source.class_names[label]
        ((64, 64), 'plain_square')
    """
    if spec == "demo":
        return demo_source()
    form, place = _parse(spec)
    if form == "imagefolder":
        return open_folder(spec, user_path(place), quiet=quiet)
    if form == "wds":
        return open_shards(spec, user_path(place), quiet=quiet)
    if form == "hfds":
        return open_hfds(spec, place)
    name, _, root = place.partition(":")
    return open_torch(spec, name.lower(), user_path(root) if root else None)


def _parse(spec: str) -> tuple[str, str]:
    """Form and what follows it, for "form:place" and "form/place"."""
    for form in ("imagefolder", "wds", "hfds", "torch"):
        for separator in ":/" if form != "imagefolder" else ":":
            head, mark, place = spec.partition(separator)
            if head.lower() == form and mark and place:
                return form, place
    raise _unknown(spec)


def _unknown(spec: str) -> UserError:
    head = spec.replace("/", ":").partition(":")[0].lower()
    near = difflib.get_close_matches(head, _FORMS, n=1)
    if os.path.isdir(os.path.expanduser(spec)):
        hint = f"For the image folder write imagefolder:{spec}. "
    elif near:
        hint = f"Did you mean {_FORMS[near[0]]}? "
    else:
        hint = ""
    return UserError(f"Unknown data {spec!r}.", fix=hint + "Valid: " + ", ".join(_FORMS.values()) + ".")
