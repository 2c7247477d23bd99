"""What every task is asked for: a model, its data, images, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from models import ModelConfig
from utils.cli import any_seed, by_flag, check_numbers, natural, setting
from utils.data import DataConfig
from utils.device import device_name, versions
from utils.files import writable_folder
from utils.images import Inverted, Source, Stored


@dataclass(frozen=True)
class RunConfig:
    """Where a task runs and where its outcome goes; only `seed` changes numbers.

    `progress`: show progress bars on stderr. `command`: as typed, for the report. Raises `UserError` for impossible
    numbers.
    """

    output: str | None = setting(None, "where report and pictures go; default runs/ and the task's name", metavar="DIR")
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    gpu: int = setting(0, "number of the CUDA GPU", type=natural)
    seed: int = setting(0, "seed of noise, labels, jitter and random choices", type=any_seed)
    tensorboard: bool = setting(False, "write the course of the inversion to OUTPUT/tensorboard")
    progress: bool = False
    command: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class Task:
    """What the tasks have in common."""

    model: ModelConfig
    data: DataConfig
    images: Source
    run: RunConfig

    @property
    def name(self) -> str:
        """What its folder is called."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where the outcome goes: the run's `output`, or runs/NAME. Raises `UserError` where it cannot be written."""
        return writable_folder(self.run.output or Path("runs", self.name), "--output")

    @property
    def events(self) -> Path | None:
        """Where TensorBoard's files go, None if nobody asked."""
        return self.folder / "tensorboard" if self.run.tensorboard else None

    def settings(self) -> dict[str, object]:
        """What its numbers depend on besides the model's weights, by the names of the flags."""
        flags = {"mode": self.images.mode, "seed": self.run.seed, **by_flag(self.model)}
        flags |= {"dataset": self.data.dataset, "val_limit": self.data.val_limit, **self.data.reading()}
        if isinstance(self.images, Inverted):
            how = self.images.config
            flags |= {**by_flag(how), **how.weights, **how.options, "inversion_batchsize": how.batch_size}
            flags["dtype"] = how.dtype
        if isinstance(self.images, Stored):
            flags["images"] = str(self.images.path)
        return flags

    def origin(self, device: torch.device) -> dict[str, object]:
        """What a report says of where its numbers come from."""
        return {
            "seed": self.run.seed,
            "device": device_name(device),
            "dtype": self.images.config.dtype if isinstance(self.images, Inverted) else "float32",
            "versions": versions(),
            "command": self.run.command,
        }
