"""Files that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the place of `path` when the block ends well.

    The temporary name is fixed, so a run that takes up where a killed one stopped overwrites its half-written file.
    """
    partial = path.with_name(f".{path.name}.part")
    yield partial
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises `UserError`, naming the file, where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def append_json_line(path: Path, value: Any) -> None:
    """Add `value` to a file of JSON lines; a line that a kill cut off is ended first."""
    with open(path, "ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
            file.write(b"\n")
        file.write((json.dumps(value) + "\n").encode())


def read_json_lines(path: Path) -> list[Any]:
    """What `append_json_line` wrote, nothing where there is no file; a line that a kill cut off is passed over."""
    values = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values


def writable_folder(path: str | Path, flag: str) -> Path:
    """Make the folder if needed. Raises `UserError` where files cannot be written into it."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to: {error.strerror}") from None
    return folder
