"""`python -m upvits`, which torchrun can start: `torchrun --nproc-per-node 8 -m -- upvits build --model pvtv2_b0`."""

import os
import sys

from upvits.deploy.cli.app import main
from upvits.toolchain.processes.launchers import number_of_processes


def run() -> None:
    """The command line; one of several processes ends at once.

    torch's groups leave threads behind that now and then abort the interpreter on its way out (pytorch/pytorch#179291),
    and torchrun then stops the processes that still work.
    """
    code: str | int | None = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    if number_of_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


if __name__ == "__main__":
    run()
