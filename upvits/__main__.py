"""`upvits-deploy`, or `python -m upvits`, which torchrun can start:
`torchrun --nproc-per-node 8 -m -- upvits build --model pvtv2_b0`.
"""

import os
import sys
from contextlib import suppress


def run() -> None:
    """The command line; one of several processes ends at once.

    torch's groups leave threads behind that now and then abort the interpreter on its way out (pytorch/pytorch#179291),
    and torchrun then stops the processes that still work.
    """
    code: str | int | None = 0
    several = False
    try:  # what is imported, too, so that Ctrl-C meanwhile is no traceback
        from upvits.calib_data.errors import UserError
        from upvits.deploy.cli.app import main
        from upvits.toolchain.processes.launchers import number_of_processes

        with suppress(UserError):  # the command says it
            several = number_of_processes() > 1
        main()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 130
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


if __name__ == "__main__":
    run()
