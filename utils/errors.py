"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """A wrong input: one line that says what was wrong and what to do about it."""


class UserNote(UserWarning):
    """A right input that is not read as it stands: one line that says how it is read."""


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; `UserError` and `UserNote` become lines on stderr, exit codes are 2, and 130 for Ctrl-C."""
    warnings.formatwarning = _formatted
    warnings.filterwarnings("ignore", module="PIL")  # of files that are then read or refused in a line of ours
    try:
        main()
    except UserError as error:
        # DataLoader workers wrap the message in a traceback; its last line is the message itself.
        line = str(error).strip().splitlines()[-1].removeprefix("utils.errors.UserError: ")
        rank = os.environ.get("RANK", "0")
        print("error: " + ("" if rank == "0" else f"rank {rank}: ") + line, file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print("error: there is not enough GPU memory left; lower the batch sizes", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; finished batches are kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def _formatted(message: Warning | str, category: type[Warning], *where: object, **how: object) -> str:
    """A note as one line, other warnings as Python shows them."""
    return f"note: {message}\n" if issubclass(category, UserNote) else _python_format(message, category, *where, **how)


_python_format = warnings.formatwarning
