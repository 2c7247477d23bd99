"""One run of a task: where it runs and where its outcome goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.files import writable_folder


@dataclass(frozen=True)
class RunConfig:
    """Where a task runs and where its outcome goes; only `seed` changes numbers.

    `output`: folder of the report; None: one below `runs/`, called after the task. `device`, `gpu`: as for
    `process_group`. `seed`: of noise, labels, jitter and random choices. `tensorboard`: write the course of the
    inversion to `output`/tensorboard. `progress`: show progress bars on stderr. `command`: as typed, for the report.
    """

    output: str | Path | None = None
    device: str = "auto"
    gpu: int = 0
    seed: int = 0
    tensorboard: bool = False
    progress: bool = False
    command: str | None = None

    def folder(self, name: str) -> Path:
        """`output`, or runs/`name`. Raises `UserError` where it cannot be written."""
        return writable_folder(self.output or Path("runs", name), "--output")

    def events(self, folder: Path) -> Path | None:
        """Where TensorBoard's files go, None if nobody asked."""
        return folder / "tensorboard" if self.tensorboard else None
