"""How valid things are made hostile or broken: values, documents, files."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str | int, ...]

MARKUP = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
TEXTS = (
    "", " ", ".", "..", "../../../escaped", "../precious/notes.txt", "/dev/zero", "~nosuchuser/x", "a\0b", "x" * 5000,
    "a" * 300, "\x1b[31mred", "\x1b]0;title\x07", "[/]", "[bold red]x", MARKUP, "a\nb", "a\r\nb", "%s%n{}", "{{7*7}}",
    "$(touch MARKER)", "`touch MARKER`", "; touch MARKER", '"; __import__("os").system("touch MARKER"); "',
    "'''\n__import__('os').system('touch MARKER')\n'''", "subprocess.call", "hf-hub:evil/model", "local-dir:/",
    "http://localhost:1/x", "null", "nan", "-1", "1" * 5000, "\u00b2", "\u202eabc", "\U0001f4a5", "null", "CON",
    "1.0\n--index-url http://localhost:1/",
)  # fmt: skip
"""Texts that mean something to a shell, a terminal, Python, a template, a path or a library."""

NUMBERS = (
    -1, 0, 1, 2**31, 2**63, 2**64, 10**12, 10**400, -(10**400), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": ""}, [None], {"type": "os.system"}, [1, "a", None])
DEEP, DIGITS = "DEEP", "DIGITS"
"""Stand for what no value of Python holds or writes; `written` puts it in."""


def value_like(old: object, random: Random) -> Any:
    """A hostile value in place of `old`: of its type more often than not."""
    alike: tuple[Any, ...] = TEXTS if isinstance(old, str) else NUMBERS if isinstance(old, (int, float)) else OTHERS
    chosen = alike if random.random() < 0.6 else random.choice((TEXTS, NUMBERS, OTHERS, (DEEP, DIGITS)))
    return random.choice(chosen)


def places(value: object, at: Place = ()) -> Iterator[tuple[Place, object]]:
    """Every entry of a document, parts before what is in them; of lists, the first three."""
    if at:
        yield at, value
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from places(item, (*at, name))
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            yield from places(item, (*at, index))


def replaced(document: Any, at: Place, value: Any) -> Any:
    """A copy of a document with another value in one place."""
    changed = copy.deepcopy(document)
    part = changed
    for name in at[:-1]:
        part = part[name]
    part[at[-1]] = value
    return changed


def mutated(document: Any, random: Random) -> tuple[str, Any]:
    """What was changed, in words, and a copy of the document with one change."""
    at, old = random.choice(list(places(document)))
    where = ".".join(map(str, at))
    kind = random.choice(("value", "value", "value", "value", "gone", "more", "wrapped"))
    if kind == "value":
        new = value_like(old, random)
        return f"{where} = {shown(new)}", replaced(document, at, new)
    if kind == "wrapped":
        return f"{where} in a list", replaced(document, at, [old])
    changed = copy.deepcopy(document)
    part = changed
    for name in at[:-1]:
        part = part[name]
    if kind == "gone":
        del part[at[-1]]
        return f"{where} is absent", changed
    key = random.choice(TEXTS)
    if isinstance(part, dict):
        part[key] = value_like(old, random)
    else:
        part.append(value_like(old, random))
    return f"{where} has a neighbour {shown(key)}", changed


def written(document: Any) -> bytes:
    """A document as JSON; NaN and infinities as Python writes them."""
    text = json.dumps(document)
    return text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).replace(f'"{DIGITS}"', "9" * 5000).encode()


def no_documents(text: bytes) -> dict[str, bytes]:
    """Bytes that stand where a document is expected; `text` is a valid one."""
    return {
        "nothing": b"", "half of it": text[: len(text) // 2], "a NUL byte": b"\0", "null": b"null", "a list": b"[]",
        "a text": b'"x"', "a number": b"7", "an empty object": b"{}", "brackets without end": b"[" * 100_000,
        "objects without end": b'{"a":' * 100_000, "no UTF-8": b"\xff\xfe" + text,
        "UTF-16": text.decode().encode("utf-16"),
        "a mark of byte order": b"\xef\xbb\xbf" + text, "itself twice": text + text, "text after it": text + b"\nx",
        "HTML": b"<html></html>", "random bytes": Random(0).randbytes(3000),
        "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        "70 MB of blanks": b" " * 70_000_000,
    }  # fmt: skip


def is_file_name(text: str) -> bool:
    """Whether a text can be the name of a file."""
    return text.strip(". ") != "" and not {"/", "\0"} & set(text) and len(text.encode()) < 200


def shown(value: object) -> str:
    """A value in a case's name: short and in ASCII."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


Damage: TypeAlias = Callable[[Path], None]


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x41
    _replace(path, bytes(content))


def _link(target: str) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _huge(path: Path) -> None:
    os.truncate(path, 5 << 30)  # without a block on the disk


DAMAGES: dict[str, Damage] = {
    "is gone": Path.unlink,
    "is cut in half": lambda path: _replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "has another byte": _flip,
    "is empty": lambda path: _replace(path, b""),
    "is random bytes": lambda path: _replace(path, Random(1).randbytes(2000)),
    "is a folder": _folder,
    "is a link to nothing": _link("/nonexistent/x"),
    "is a link in a circle": lambda path: _link(path.name)(path),
    "is a pipe": _pipe,
    "is a link to /dev/zero": _link("/dev/zero"),
    "is a link to a file elsewhere": lambda path: _link(str(_elsewhere(path)))(path),
    "has 5 GiB": _huge,
}


def _elsewhere(path: Path) -> Path:
    """A copy of a file beside the folder that holds it: its content is right, its place is not."""
    copied = next(parent for parent in path.parents if parent.name == "case") / f"elsewhere-{path.name}"
    shutil.copyfile(path, copied)
    return copied
