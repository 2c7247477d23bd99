"""Where a training stands, so that the same command goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import atomic

CHECKPOINT = "checkpoint.pt"


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
        self.state = self._read(folder, made_by_run)
        """What `write` was given last, None where nothing was."""

    def write(self, state: dict[str, Any]) -> None:
        """Put `state` in the place of the last one, in one step."""
        with atomic(self.file) as partial:
            torch.save({"config": self.settings, "state": state}, partial)

    def _read(self, folder: Path, made_by_run: str) -> dict[str, Any] | None:
        if not self.file.exists():
            if (folder / made_by_run).exists():
                raise UserError(f"--output {folder} holds a model that this command did not make; give another folder")
            return None
        try:
            checkpoint = torch.load(self.file, map_location="cpu", weights_only=True)
            found, state = checkpoint["config"], checkpoint["state"]
        except Exception as error:  # torch raises many kinds on damaged files
            reason = type(error).__name__
            raise UserError(f"cannot read {self.file} ({reason}); give another --output or remove it") from None
        for key in self.settings | found:
            if self.settings.get(key) != found.get(key):
                raise UserError(
                    f"--output {folder} holds a run with --{key} {found.get(key)}, not {self.settings.get(key)}; "
                    "give another folder, or the same flags to go on with it"
                )
        return state
