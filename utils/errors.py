"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """A wrong input: one line that says what was wrong and what to do about it."""


class UserNote(UserWarning):
    """A right input that is not read as it stands: one line that says how it is read."""


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; `UserError` and `UserNote` become lines on stderr, exit codes are 2, and 130 for Ctrl-C.

    What the system refuses, a file or memory, is a line as well.
    """
    warnings.formatwarning = _formatted
    warnings.filterwarnings("ignore", module="PIL")  # of files that are then read or refused in a line of ours
    try:
        main()
        sys.stdout.flush()
    except Exception as error:
        refused = error if isinstance(error, UserError) else _refused(error)
        if refused is None:
            raise
        # DataLoader workers wrap the message in a traceback; its last line is the message itself.
        _flush()
        line = str(refused).strip().splitlines()[-1].removeprefix("utils.errors.UserError: ")
        rank = os.environ.get("RANK", "0")
        print("error: " + ("" if rank == "0" else f"rank {rank}: ") + line, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; finished batches are kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def _refused(error: Exception) -> UserError | None:
    """What the system did not give, in words; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"cannot use {error.filename}: "
        return UserError(where + (error.strerror or type(error).__name__))
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        wanted = re.search(r"allocate (\d[\w.]* ?\w*)", text)
        tried = f" (for {wanted[1]})" if wanted else ""
        return UserError(f"there is no memory left{tried}; ask for smaller batches, fewer images or a smaller model")
    return None


def _flush() -> None:
    """Print what is to be printed, or drop it where there is no room for it: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _formatted(message: Warning | str, category: type[Warning], *where: object, **how: object) -> str:
    """A note as one line, other warnings as Python shows them."""
    return f"note: {message}\n" if issubclass(category, UserNote) else _python_format(message, category, *where, **how)


_python_format = warnings.formatwarning
