"""A hook of mkdocs: documents that lie outside of `docs/` become pages, too, and every link goes where its target went.

The same files are read as plain Markdown in the repository, where links are relative to the file. In the site, links to
pages go to pages; links to other files (sources, examples, the licence) have no target there and become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/coco.md",
)
"""Documents outside of `docs/`. The README is the site's first page, the others keep their names."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside of `docs/`."""
    for name in OUTSIDE:
        files.append(File.generated(config, site_name(name), content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point every link of a page at the page of its target."""
    here = page.file.src_uri
    document = next((name for name in OUTSIDE if site_name(name) == here), f"docs/{here}")
    return LINK.sub(lambda link: _moved(link, document, here), markdown)


def site_name(document: str) -> str:
    """Where a document of the repository stands in the site."""
    return "index.md" if document == "README.md" else document.removeprefix("docs/")


def _moved(link: re.Match[str], document: str, here: str) -> str:
    mark, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(document), target))
    if not place.startswith("docs/") and place not in OUTSIDE:
        return text
    return f"{mark}[{text}]({posixpath.relpath(site_name(place), posixpath.dirname(here) or '.')}{anchor})"
