"""Where a training stands, so that the same command goes on with it."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import atomic

CHECKPOINT = "checkpoint.pt"


def configuration(args: argparse.Namespace, without: Collection[str]) -> dict[str, Any]:
    """What makes two runs the same: every flag but those that say where and how fast."""
    return {key: value for key, value in vars(args).items() if key not in without}


def read_checkpoint(folder: Path, config: dict[str, Any], made_by_run: str) -> dict[str, Any] | None:
    """The last finished epoch of the run in `folder`, None where there is none yet.

    Args:
        folder: the run's `--output`.
        config: the run's `configuration`.
        made_by_run: a file that only a run puts there, at its end.

    Raises:
        UserError: the folder holds a run with other flags, a damaged checkpoint, or a result but no checkpoint.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        if (folder / made_by_run).exists():
            raise UserError(f"--output {folder} holds a model that this command did not make; give another folder")
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, state = checkpoint["config"], checkpoint["state"]
    except Exception as error:  # torch raises many kinds on damaged files
        raise UserError(f"cannot read {path} ({type(error).__name__}); give another --output or remove it") from None
    for key in config | found:
        if config.get(key) != found.get(key):
            raise UserError(
                f"--output {folder} holds a run with --{key} {found.get(key)}, not {config.get(key)}; "
                "give another folder, or the same flags to go on with it"
            )
    return state


def write_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, Any]) -> None:
    """Put `state` in the place of the last checkpoint, in one step."""
    with atomic(folder / CHECKPOINT) as partial:
        torch.save({"config": config, "state": state}, partial)
