"""Text from files and options for people: what a terminal would take for a command is shown as a question mark."""

from __future__ import annotations

import json
import re

_COMMANDS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
"""Control characters except the line feed, marks without width or that turn the direction, and halves of characters
(Python's stand-in for bytes that are no UTF-8)."""


def printable(text: str, most: int | None = None) -> str:
    """The text without control characters; of a long one, about `most` characters from both of its ends.

    Example:
        >>> printable("red" + chr(27) + "[31m")
        'red?[31m'
    """
    plain = _COMMANDS.sub("?", text)
    if most is None or len(plain) <= most:
        return plain
    return f"{plain[: 2 * most // 3]}...{plain[len(plain) - most // 3 :]}"


def printable_json(text: str) -> str:
    """JSON, or TOML, that says the same without control characters: they are escaped as `\\uXXXX`.

    Example:
        >>> printable_json('"' + chr(0x9b) + '31m"')
        '"\\\\u009b31m"'
    """
    return _COMMANDS.sub(lambda match: json.dumps(match[0])[1:-1], text)
