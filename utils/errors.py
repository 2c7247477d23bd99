"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A wrong input: one line that says what was wrong and what to do about it."""


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        # DataLoader workers wrap the message in a traceback; its last line is the message itself.
        line = str(error).strip().splitlines()[-1].removeprefix("utils.errors.UserError: ")
        rank = os.environ.get("RANK", "0")
        print("error: " + ("" if rank == "0" else f"rank {rank}: ") + line, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; finished batches are kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
