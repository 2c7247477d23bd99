"""The course of an inversion in TensorBoard's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from inversion.schedule import Stage
from utils.errors import UserError


def require_tensorboard() -> None:
    """Raise `UserError` unless TensorBoard's writer is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None


def write_events(folder: Path, batch: int, losses: Sequence[float], stages: Sequence[Stage]) -> None:
    """Loss and patches left at every iteration of a batch, as a run of its own in `folder`."""
    from torch.utils.tensorboard import SummaryWriter

    folder = folder / f"batch-{batch:06d}"
    for left in folder.glob("events.out.tfevents.*"):  # by a run that was stopped before the batch counted
        left.unlink()
    with SummaryWriter(str(folder)) as writer:
        for iteration, loss in enumerate(losses):
            writer.add_scalar("inversion/loss", loss, iteration)
        for stage in stages:
            for iteration in (stage.start, stage.stop - 1):
                writer.add_scalar("inversion/patches", stage.patches, iteration)
