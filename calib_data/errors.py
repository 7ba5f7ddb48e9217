"""Errors that a user caused or can fix: the message says what was wrong, why it matters and what to do.

They live in the lowest room so that every other one can raise them. The command line prints them without a
traceback and exits with `exit_code`.
"""


class UserError(Exception):
    """A mistake in usage, configuration or input data (exit code 2).

    Example:
        >>> import upvits
        >>> try:
        ...     upvits.open_data("demos")
        ... except upvits.UserError as error:
        ...     print(error.what, error.exit_code)
        Unknown data 'demos'. 2
    """

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.fix) if part)


class MissingDependencyError(UserError):
    """A feature needs a package, a driver or a download that this machine lacks (exit code 3)."""

    exit_code = 3


class GateError(UserError):
    """The pipeline ran, but a parity or accuracy gate failed (exit code 4)."""

    exit_code = 4


class BuildError(UserError):
    """An exporter or engine builder failed (exit code 5)."""

    exit_code = 5


class TargetError(UserError):
    """A requested target (latency, size) was not met (exit code 6)."""

    exit_code = 6


class StoppedError(UserError):
    """Training was asked to stop by a signal, and wrote a checkpoint (exit code 76)."""

    exit_code = 76


class LostProcessError(UserError):
    """One of several processes ended before its work was done (exit code 75, EX_TEMPFAIL: try again)."""

    exit_code = 75
