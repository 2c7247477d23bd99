"""Files that are either there in full or not at all, and JSON that is what it should be or refused by its name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

_KINDS = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a finite number"}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; it takes the place of `path` when the block ends well.

    The folder is made if needed. The temporary name is fixed, so a run that takes up where a killed one stopped
    overwrites its half-written file. Raises `UserError` where the block or the renaming finds no room, no right or
    something in the way; nothing is left then.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong in the block for want of room or right becomes a `UserError` that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}") from None


def _reason(error: BaseException | None) -> str | None:
    """The system's own words, where it refused something; torch and safetensors hide them behind errors of theirs."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if found := re.search(r"([^:]+) \(os error \d+\)", str(error)):
            return found[1].strip()
        error = error.__context__
    return None


@contextlib.contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to; when the block ends well, its files take the places of those in `folder`.

    As with `atomic` its name is fixed, `.part` in `folder`, what a killed run left there is removed, and errors are one
    line.
    """
    partial = folder / ".part"
    try:
        with writing(folder):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.iterdir()):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path, **fields: type) -> dict[str, Any]:
    """Read a JSON object that has `fields` of these types (see `require_fields`).

    Raises:
        UserError: naming the file, where it cannot be read or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {_told(error)}") from None
    return require_fields(found, fields, path)


def require_fields(found: Any, fields: Mapping[str, type], where: object) -> dict[str, Any]:
    """`found`, a JSON object that has `fields` of these types: an int is no bool, a float is finite or an int.

    Raises `UserError`, which begins with `where`, for anything else.
    """
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged: it holds no JSON object")
    for name, kind in fields.items():
        value = found.get(name)
        if not (is_number(value, kind) if kind in (int, float) else isinstance(value, kind)):
            raise UserError(f"{where} is damaged: its {name} is not {_KINDS[kind]}")
    return found


def is_number(value: Any, kind: type) -> bool:
    """Whether a value of JSON is a number: an integer for `int`, one that float32 holds for `float`."""
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return False
    return kind is int or -1e38 <= value <= 1e38


def append_json_line(path: Path, value: Any) -> None:
    """Add `value` to a file of JSON lines; what a kill left of a line is taken away first.

    Raises `UserError` where it cannot be written.
    """
    line = json.dumps(value).encode() + b"\n"
    with writing(path), open(path, "ab+", buffering=0) as file:
        file.seek(0)
        there = file.read()
        size, last = len(there), there.rpartition(b"\n")[2]
        try:
            line = (b"\n" if last and json.loads(last) else b"") + line
        except ValueError:
            size -= len(last)
            file.truncate(size)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write `values` as `append_json_line` would one by one, atomically."""
    with atomic(path) as partial:
        partial.write_text("".join(json.dumps(value) + "\n" for value in values))


def read_json_lines(path: Path, **fields: type) -> list[dict[str, Any]]:
    """What `append_json_line` wrote, objects with `fields`; nothing where there is no file.

    A line that a kill cut off is passed over. Raises `UserError` for any other line, and a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {_told(error)}") from None
    values = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number},"
        try:
            values.append(require_fields(json.loads(line), fields, where))
        except UserError as error:
            raise UserError(f"{error}; remove the line") from None
        except (ValueError, RecursionError) as error:
            if line and not (line.startswith(b"{") and isinstance(error, json.JSONDecodeError)):
                raise UserError(f"{where} is damaged: {_told(error)}; remove the line") from None
    return values


def user_path(path: str | Path, flag: str) -> Path:
    """A path as a user gives it, `~` resolved. Raises `UserError` where it is nobody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{flag} {path}: there is no such user") from None


def writable_folder(path: str | Path, flag: str) -> Path:
    """Make the folder if needed. Raises `UserError` where files cannot be written into it."""
    folder = user_path(path, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # has no name, so that a kill leaves none
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to: {error.strerror}") from None
    return folder


def _told(error: Exception) -> str:
    """The reason in one line, without the path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
