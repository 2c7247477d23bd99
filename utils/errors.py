"""How a program ends that did not do what it was for: one line on stderr, code 2 for what the user can mend, 130 for
Ctrl-C.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from _signal import SIG_IGN, SIGINT, getsignal, signal

# Ctrl-C has to be in hand within milliseconds: nothing else is imported up here, and of `signal` its part in C alone.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = "interrupted; what is finished is kept, the same command goes on from there\n"


class UserError(Exception):
    """A wrong input: one line that says what was wrong and what to do about it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserNote(UserWarning):
    """A right input that is not read as it stands: one line that says how it is read."""


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: `\\n` for a line's end, `\\x1b` for an escape, and so on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_on_interrupt(name: str) -> None:
    """From here on Ctrl-C ends the program at once, with one line and code 130; its worker processes end silently.

    Called by scripts before they import anything else. No exception runs through code that may hold it up, print it or
    take it for something else, and nothing is cleaned up: that is as after a kill, which leaves whole files
    (`utils/files.py`).

    Args:
        name: the script's `__name__`; nothing happens where it is imported by another program.
    """
    if name not in ("__main__", "__mp_main__") or getsignal(SIGINT) == SIG_IGN:
        return
    outermost = os.getpid() if name == "__main__" and os.environ.get("RANK", "0") == "0" else None
    signal(SIGINT, lambda *_: _interrupt(outermost))
    # The last thing that runs: the interpreter then takes handlers down, and has nothing left to lose.
    atexit.register(signal, SIGINT, SIG_IGN)


_ending = False
"""Whether the last line is being written, so that none comes after it."""


def _interrupt(outermost: int | None) -> None:
    global _ending
    if _ending:
        return
    _ending = True
    if os.getpid() == outermost:
        for ending in (_say_so, sys.stdout.flush, _end_workers):
            try:
                ending()
            except Exception:  # there is no stderr, or the interrupted code was in the middle of the same
                continue
    os._exit(130)


def _say_so() -> None:
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())  # of progress on the last line
    os.write(2, (("\n" if len(bars) else "") + INTERRUPTED).encode())


def _end_workers() -> None:
    """Those of a data loader, which would find out by themselves after some seconds."""
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.terminate()


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point: `UserNote` and `UserError` become lines on stderr, the latter with exit code 2.

    What the system refuses, a file or memory, is such a line as well. What libraries warn of is shown when the run has
    ended, and not at all above the one line of an error.
    """
    global _ending
    import logging

    held: list[str] = []

    def show(message: Warning | str, category: type[Warning], *where: object, **how: object) -> None:
        if issubclass(category, UserNote):
            print(f"note: {printable(str(message))}", file=sys.stderr)
        else:
            held.append(warnings.formatwarning(message, category, *where[:2]))

    class Held(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            held.append(f"{self.format(record)}\n")

    last_resort, logging.lastResort = logging.lastResort, Held(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            warnings.filterwarnings("ignore", module="PIL")  # of files that are then read or refused in a line of ours
            if sys.platform == "win32":
                raise UserError("this runs on Linux and macOS; on Windows, in its Subsystem for Linux (WSL)")
            main()
        sys.stdout.flush()
    except Exception as error:
        refused = error if isinstance(error, UserError) else _refused(error)
        if refused is None:
            raise
        held.clear()
        _ending = True
        _flush()
        rank = os.environ.get("RANK", "0")
        print("error: " + ("" if rank == "0" else f"rank {rank}: ") + _message(refused), file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        logging.lastResort = last_resort
        sys.stderr.write("".join(held))


def _message(error: UserError) -> str:
    """What was raised; torch passes on what a worker process raised as the last line of a traceback."""
    text = str(error.args[0]) if error.args else ""
    if text.startswith("Caught UserError in ") and "\nOriginal Traceback" in text:
        return text.strip().splitlines()[-1].removeprefix("utils.errors.UserError: ")
    return str(error)


def _refused(error: Exception) -> UserError | None:
    """What the system did not give, in words; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"cannot use {error.filename}: "
        return UserError(where + (error.strerror or type(error).__name__))
    import re

    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        wanted = re.search(r"allocate (\d[\d.]* ?\w*)", text)
        tried = f" (for {wanted[1]})" if wanted else ""
        return UserError(f"there is no memory left{tried}; ask for smaller batches, fewer images or a smaller model")
    return None


def _flush() -> None:
    """Print what is to be printed, or drop it where there is no room for it: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
