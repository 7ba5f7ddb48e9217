"""How a command ends that did not go well: one message on standard error, and an exit code that says of what kind."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import resource
import shlex
import sys
import tempfile
import traceback
from collections.abc import Collection
from contextlib import suppress
from importlib import metadata
from typing import TextIO

from upvits.calib_data.errors import UserError
from upvits.calib_data.printable import printable
from upvits.deploy.cli.arguments import as_options
from upvits.deploy.cli.console import console

INTERNAL = 70
"""Exit code of an error of this tool (EX_SOFTWARE of sysexits.h)."""

_LOGGER = logging.getLogger("upvits")
_LONGEST = 4_000  # characters of a part of a message
_OF_THE_SYSTEM = (
    errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
_STAND_IN = re.compile(r"[\ud800-\udfff]|\\ud[89a-f][0-9a-f]{2}")
"""Python's stand-ins for bytes that are no UTF-8, as they are or as some libraries write them."""
_NO_UTF8 = ("surrogates not allowed", "is not valid UTF-8", "as a unicode string")
"""What Python, safetensors and pydantic say of such a name."""
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "failed to map segment", "bad_alloc",
              "could not create a primitive")  # fmt: skip
_ADDRESS_SPACE = 8_000_000_000  # bytes; with 4 GB, a build ended in a segmentation fault inside a library
_PACKAGES = ("upvits-deploy", "torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "pillow",
             "pydantic", "typer", "mmdet")  # fmt: skip


def require_working_folder() -> None:
    """Refuse to start in a folder that was deleted: every relative path would fail in a way of its own.

    Raises:
        UserError: the working folder is gone.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("The working folder does not exist any more.", fix="Change to another folder.") from error


def require_address_space() -> None:
    """Refuse to start where libraries would fail to load, some of them by a crash.

    Raises:
        UserError: the address space is limited to less than what every command is known to run in.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE:
        raise UserError(
            f"The address space of this process is limited to {limit / 1e9:.1f} GB.",
            why=f"Libraries are mapped into it before they are used: {_ADDRESS_SPACE / 1e9:.0f} GB are needed.",
            fix="Lift the limit: `ulimit -v unlimited`.",
        )


def exit_code_of(error: Exception, options: Collection[str]) -> int:
    """Say on standard error what went wrong, and return the exit code.

    Args:
        error: whatever ended the command.
        options: of the command line, see `as_options`.
    """
    known = error if isinstance(error, UserError) else _of_the_machine(error)
    try:
        _LOGGER.debug("Raised here:", exc_info=error)
        _tell(_internal(error) if known is None else known, options)
    except OSError:  # standard error is full, too
        _give_up(sys.stderr)
    return INTERNAL if known is None else known.exit_code


def exit_code_of_output(code: int | str | None) -> int | str | None:
    """The exit code once what was printed has left for standard output: it may lie on a full disk, or be closed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        if code not in (0, None):
            return code
        return 1 if isinstance(error, BrokenPipeError) else exit_code_of(error, ())
    return code


def _give_up(stream: TextIO) -> None:
    """Send to nowhere what a stream could not write: the interpreter tries once more on its way out."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(error: UserError, options: Collection[str]) -> None:
    out = console(stderr=True)
    out.print("[bold red]Error:[/]", end=" ")
    for text in (error.what, error.why and f"  {error.why}", error.fix and f"  {error.fix}"):
        if text:
            words = as_options(printable(text, _LONGEST), options)
            out.print(words, soft_wrap=True, highlight=False, markup=False)


def _of_the_machine(error: Exception) -> UserError | None:
    """The message for what the machine or its user can mend; None for an error of this tool."""
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        place = error.filename or "what the command prints"
        return UserError(
            f"{place} cannot be read or written.",
            why=f"The system says: {error.strerror}.",
            fix="Make room, choose another place, or change its permissions.",
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib before Python 3.13
        return UserError("Links lead in a circle.", why=f"{error}.", fix="Give another path.")
    said = any(words in str(error) for words in _NO_UTF8)
    if said or _STAND_IN.search(str(error)):
        # Python's stand-ins for bytes that are no UTF-8: some libraries take no such path
        return UserError(
            "The name of a file or folder is no text in UTF-8.",
            why="Documents and some libraries take no other names.",
            fix="Rename it, or reach it by a link with another name.",
        )
    if "file too large" in str(error).lower():  # EFBIG that a library wrapped
        return UserError(
            "A file would become larger than is allowed here.",
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}.",
            fix="Lift the limit (ulimit -f), or write to another disk.",
        )
    if isinstance(error, MemoryError) or any(text in str(error).lower() for text in _NO_MEMORY):
        return UserError(
            "Memory runs out.",
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}." if str(error) else "",
            fix="Close other programs, lift the limit (ulimit -v), or ask for smaller batches and fewer images.",
        )
    return None


def _internal(error: Exception) -> UserError:
    kind = type(error).__name__
    try:
        descriptor, path = tempfile.mkstemp(prefix="upvits-deploy-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_report(error))
        fix = f"Please report it with {path} (versions, command, traceback; no data)."
    except OSError:
        fix = "Please report it with what the same command prints with --verbose."
    text = " ".join(str(error).split())
    return UserError(
        f"This is an error of upvits-deploy, not of yours: {kind}: {printable(text, 300)}",
        why="Results that were whole before are kept; the same command continues.",
        fix=fix,
    )


def _report(error: Exception) -> str:
    versions = [f"Python {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    command = shlex.join(["upvits-deploy", *sys.argv[1:]])
    return "\n".join([*versions, "", command, "", "".join(traceback.format_exception(error))])
