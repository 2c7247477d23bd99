"""Where a training stands, so that the same command goes on with it; and files of tensors as torch writes them."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import atomic

CHECKPOINT = "checkpoint.pt"


def write_state(path: Path, state: object) -> None:
    """Write tensors in dicts and lists, atomically. Raises `UserError` where it cannot be written."""
    with atomic(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)


def read_state(path: Path, advice: str, right: Callable[[Any], bool]) -> Any:
    """What `write_state` wrote, on the CPU; no file can run code.

    Args:
        path: the file.
        advice: what to do about a damaged one.
        right: whether this is what the file has to hold; may fail in any way where it is not.

    Raises:
        UserError: it cannot be read, its checksums are not those of its content, or it holds something else.
    """
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch does not look at checksums
            raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not right(state):
            raise ValueError("it holds something else")
    except Exception as error:  # torch and zipfile raise many kinds on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UserError(f"cannot read {path} ({reason}); {advice}") from None
    return state


class Checkpoint:
    """The last finished epoch of the run in a folder.

    Args:
        folder: the run's `--output`.
        settings: what the run's numbers depend on, by the names of the flags; another run with the same goes on.
        made_by_run: a file that only a run puts there, at its end.

    Raises:
        UserError: the folder holds a run with other settings, a damaged checkpoint, or a result but no checkpoint.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], made_by_run: str) -> None:
        self.file, self.settings = folder / CHECKPOINT, dict(settings)
        self.advice = "give another --output, or remove it to begin anew"
        self.state = self._read(folder, made_by_run)
        """What `write` was given last, None where nothing was."""

    def write(self, state: dict[str, Any]) -> None:
        """Put `state` in the place of the last one, in one step. Raises `UserError` where it cannot be written."""
        write_state(self.file, {"config": self.settings, "state": state})

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """For a block that puts `state` to use; whatever it fails at is a `UserError`, for the state is not a run's."""
        try:
            yield
        except Exception as error:
            raise UserError(f"cannot go on from {self.file} ({type(error).__name__}); {self.advice}") from None

    def _read(self, folder: Path, made_by_run: str) -> dict[str, Any] | None:
        if not self.file.exists():
            if (folder / made_by_run).exists():
                raise UserError(f"--output {folder} holds a model that this command did not make; give another folder")
            return None
        kinds = {"config": dict, "state": dict}
        checkpoint = read_state(
            self.file, self.advice, lambda found: all(isinstance(found[key], kind) for key, kind in kinds.items())
        )
        found, state = checkpoint["config"], checkpoint["state"]
        for key in self.settings | found:
            if self.settings.get(key) != found.get(key):
                raise UserError(
                    f"--output {folder} holds a run with --{key} {found.get(key)}, not {self.settings.get(key)}; "
                    "give another folder, or the same flags to go on with it"
                )
        return state
