"""Advice about installing fits how this copy was installed."""

import shlex
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from upvits.calib_data import installation
from upvits.calib_data.installation import install_line, version_line

FROM_TREE = '{"url": "file:///home/me/my%20tools/upvits-deploy", "dir_info": {}}'
EDITABLE = '{"url": "file:///src/upvits-deploy", "dir_info": {"editable": true}}'
FROM_GIT = '{"url": "https://example.org/u.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}'
FROM_WHEEL = '{"url": "file:///wheels/upvits_deploy-0.1.0-py3-none-any.whl", "archive_info": {}}'


class Recorded(Distribution):
    """An installed package with this record of its origin."""

    def __init__(self, record: str | None) -> None:
        self._record = record

    def read_text(self, filename: str) -> str | None:
        return self._record if filename == "direct_url.json" else None

    def locate_file(self, path: object) -> Path:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, ["upvits-deploy[openvino]"]),
        (FROM_TREE, ["/home/me/my tools/upvits-deploy[openvino]"]),
        (EDITABLE, ["-e", "/src/upvits-deploy[openvino]"]),
        (FROM_WHEEL, ["upvits-deploy[openvino] @ file:///wheels/upvits_deploy-0.1.0-py3-none-any.whl"]),
        (FROM_GIT, ["upvits-deploy[openvino] @ git+https://example.org/u.git@abc"]),
    ],
)
def test_an_extra_comes_from_where_the_rest_came_from(
    record: str | None, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "distribution", lambda name: Recorded(record))
    assert shlex.split(install_line("openvino")) == ["pip", "install", *words]


def test_a_result_is_reproduced_from_the_same_kind_of_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "distribution", lambda name: Recorded(None))
    assert version_line("1.2") == "pip install upvits-deploy==1.2"
    monkeypatch.setattr(installation, "distribution", lambda name: Recorded(EDITABLE))
    assert version_line("1.2") == "pip install .  # in the source tree of upvits-deploy 1.2"
