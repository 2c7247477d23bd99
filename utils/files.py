"""Files that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to; when the block ends well, its files take the places of those in `folder`.

    As with `atomic` its name is fixed, `.part` in `folder`; what a killed run left there is removed.
    """
    partial = folder / ".part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in sorted(partial.iterdir()):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.replace(file, folder / file.name)
    partial.rmdir()


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
    """Add `value` to a file of JSON lines; what a kill left of a line is taken away first."""
    with open(path, "ab+") as file:
        file.seek(0)
        last = file.read().rpartition(b"\n")[2]
        try:
            file.write(b"\n" if last and json.loads(last) else b"")
        except ValueError:
            file.truncate(file.tell() - len(last))
        file.write((json.dumps(value) + "\n").encode())


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write `values` as `append_json_line` would one by one, atomically."""
    with atomic(path) as partial:
        partial.write_text("".join(json.dumps(value) + "\n" for value in values))


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
        with tempfile.TemporaryFile(dir=folder):  # has no name, so that a kill leaves none
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to: {error.strerror}") from None
    return folder
