"""How to add an optional part to the installation that is running: advice has to fit how it was installed."""

from __future__ import annotations

import shlex
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict

from upvits.calib_data.documents import parse_document

NAME = "upvits-deploy"


class _DirectUrl(BaseModel):
    """Where an installation came from, if not from an index; written by the installer (PEP 610)."""

    model_config = ConfigDict(extra="ignore")
    url: str
    dir_info: dict[str, Any] | None = None
    vcs_info: dict[str, str] | None = None

    @property
    def folder(self) -> str | None:
        """The source tree, where it was installed from one."""
        return unquote(urlsplit(self.url).path) if self.dir_info is not None else None

    @property
    def reference(self) -> str:
        """The address as a requirement names it."""
        return self.url if self.vcs_info is None else "{vcs}+{url}@{commit_id}".format(url=self.url, **self.vcs_info)


def install_line(extra: str = "") -> str:
    """The command that installs this package, with an extra if one is named, from where it came from.

    Example:
        A copy from an index answers `pip install 'upvits-deploy[openvino]'`, one that was installed from its source
        tree `pip install '/src/upvits-deploy[openvino]'`.
    """
    part = f"[{extra}]" if extra else ""
    origin = _origin()
    if origin is None:
        return f"pip install {shlex.quote(NAME + part)}"
    if origin.folder is None:
        return f"pip install {shlex.quote(f'{NAME}{part} @ {origin.reference}')}"
    editable = "-e " if (origin.dir_info or {}).get("editable") else ""
    return f"pip install {editable}{shlex.quote(origin.folder + part)}"


def version_line(version: str) -> str:
    """The command that installs this version on another machine; paths of this one mean nothing there."""
    origin = _origin()
    if origin is None:
        return f"pip install {NAME}=={version}" if version else f"pip install {NAME}"
    if origin.folder is None:
        return install_line()
    return f"pip install .  # in the source tree of {NAME} {version}".rstrip()


def _origin() -> _DirectUrl | None:
    """None for a copy from an index, or where nothing is known."""
    try:
        text = distribution(NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    if text is None:
        return None
    return parse_document(text, "direct_url.json", _DirectUrl, fix=f"Install {NAME} again.")
