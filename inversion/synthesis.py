"""Filling a pool: the batches that are not there yet, with a progress bar and a record of what they cost."""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from inversion.config import InversionConfig
from inversion.engine import Inverter, Progress, StageStart, require_memory_for
from inversion.events import write_events
from inversion.pool import ImagePool
from models import LoadedModel, SparseViT
from utils.device import peak_memory_bytes, pick_device, reset_peak_memory
from utils.errors import UserError
from utils.files import append_json_line, read_json_lines, writable_folder, write_json_lines
from utils.ranks import rank, ranks, wait_for_all


@dataclass(frozen=True)
class SynthesisReport:
    """What the images of a pool are and cost; the defaults are those of images that nobody had to invert.

    `shows_stopped`: whether pictures show stopped patches as they were when they stopped; if not, black.
    `seconds`: of all batches added up, whichever rank made them; None where they were made by a run logged elsewhere.
    """

    strategy: str | None = None
    images: int = 0
    iterations: int = 0
    seconds: float | None = 0.0
    patches_per_stage: list[int] = field(default_factory=list)
    flops: int = 0
    peak_memory_bytes: int = 0
    pool: str | None = None
    shows_stopped: bool = False


def invert(
    model: LoadedModel,
    config: InversionConfig,
    count: int | None = None,
    datapool: str | Path = "./datapool",
    device: torch.device | str | None = None,
    progress: bool = False,
    on_stage: Callable[[StageStart], None] | None = None,
    eager: bool = False,
) -> ImagePool:
    """Images out of a model (Hu et al., ICML 2024): a pool of at least `count` of them, `pool.read(count)` gives them.

    What the pool holds already is not made again; a run that was stopped goes on from its last finished batch.

    Args:
        model: what `load_model` or `LoadedModel.of` gave.
        config: the inversion.
        count: images; a last batch is made whole. None: one batch.
        datapool: folder of pools; this model and configuration have one of their own in it.
        device: where to run; None: a GPU if there is one.
        progress: show a progress bar on stderr.
        on_stage: called at the start of every stage of every batch that is made here; may change the pixels in place.
        eager: as for `Inverter`.

    Raises:
        UserError: the folder cannot be written or another process is filling the pool, the loss is no longer finite, or
            the model lacks what the configuration needs.
    """
    pool = ImagePool(datapool, model, config)
    device = torch.device(device) if device is not None else pick_device("auto")
    how = {"progress": progress, "on_stage": on_stage, "eager": eager}
    synthesize(pool, config.batch_size if count is None else count, device, **how)
    return pool


def synthesize(
    pool: ImagePool,
    count: int,
    device: torch.device,
    log: Path | None = None,
    progress: bool = False,
    student: LoadedModel | None = None,
    on_stage: Callable[[StageStart], None] | None = None,
    tensorboard: Path | None = None,
    eager: bool = False,
) -> SynthesisReport:
    """Make sure that `pool` holds its first `count` images; finished batches are taken as they are.

    Several ranks divide the missing batches; a batch depends on its number alone, so the images are the same.

    Args:
        pool: where the images go, with the model and the configuration they come from.
        count: images; a last batch is synthesized whole.
        device: where to run.
        log: a file of JSON lines that the seconds of each batch are appended to (the pool itself holds no timing, so
            that two runs write the same bytes); None keeps none, and the report has no seconds.
        progress: show a progress bar on stderr.
        student: for the adversarial loss.
        on_stage: called at the start of every stage of every batch that is made here.
        tensorboard: a folder for loss and patches in TensorBoard's format.
        eager: as for `Inverter`.

    Raises:
        UserError: the pool lacks images and cannot be written or another process is filling it, the loss is no longer
            finite. A callback's errors go through.
    """
    config = pool.config
    if log is not None:
        _logged(log, pool)  # a damaged one is refused before anything is made
    if config.needs("earlier") and ranks() > 1:
        raise UserError("a term that contrasts images with those of earlier batches (--cr) runs on one rank only")
    inverter = Inverter(pool.model, config, device, student, pool.before, eager)
    batches = range(math.ceil(count / config.batch_size))
    with open(pool.path / "pool.json") as held:
        if rank() == 0 and not all(map(pool.has, batches)):
            writable_folder(pool.path, "--datapool")
            _lock(held, pool)
            if log is not None:
                _forget_others(log, pool)
        missing = pool.missing(batches)
        wait_for_all()  # before anyone adds one
        missing = missing[rank() :: ranks()]
        if missing:
            require_memory_for(SparseViT(pool.model.vit), config, device)
        hidden = not (progress and missing) or rank() > 0
        with tqdm(total=len(missing) * config.iterations, unit="it", disable=hidden, desc="inversion") as bar:
            for number, batch in enumerate(missing):
                reset_peak_memory(device)
                start = time.perf_counter()
                inverted = inverter.invert(batch, _shown(bar, number * config.iterations), on_stage)
                if tensorboard is not None:
                    write_events(tensorboard, batch, inverted.losses.tolist(), inverter.stages)
                pool.write(batch, inverted, None if log is None else partial(_append, log, pool, batch, start, device))
        wait_for_all()
    return _report(pool, count, inverter, log)


def synthesis_report(
    pool: ImagePool, count: int, device: torch.device, log: Path | None = None, student: LoadedModel | None = None
) -> SynthesisReport:
    """What the first `count` images of a pool, all of them made, are and cost. Arguments as for `synthesize`."""
    return _report(pool, count, Inverter(pool.model, pool.config, device, student, pool.before), log)


def logged_seconds(pool: ImagePool, log: Path | None) -> float:
    """What the batches of a pool took that `log` knows of. Raises `UserError` where it is damaged."""
    return 0.0 if log is None else sum(entry["seconds"] for entry in _logged(log, pool).values())


def _report(pool: ImagePool, count: int, inverter: Inverter, log: Path | None) -> SynthesisReport:
    config, batches = pool.config, range(math.ceil(count / pool.config.batch_size))
    logged = {} if log is None else _logged(log, pool)
    known = [logged[batch] for batch in batches if batch in logged]
    return SynthesisReport(
        strategy=config.strategy,
        images=count,
        iterations=config.iterations,
        seconds=sum(entry["seconds"] for entry in known) if len(known) == len(batches) else None,
        patches_per_stage=[stage.patches for stage in inverter.stages],
        flops=inverter.total_flops() * len(batches),
        peak_memory_bytes=max(
            (entry["peak_memory_bytes"] for entry in known), default=peak_memory_bytes(inverter.device)
        ),
        pool=str(pool.path),
        shows_stopped=config.shows_stopped,
    )


def _lock(file: TextIO, pool: ImagePool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is filling {pool.path}; wait for it or give another --datapool") from None


def _shown(bar: tqdm, offset: int):
    def show(progress: Progress) -> None:
        loss = "?" if math.isnan(progress.loss) else f"{progress.loss:.4g}"
        bar.set_postfix(loss=loss, patches=progress.patches, refresh=False)
        bar.update(offset + progress.iteration - bar.n)

    return show


def _append(log: Path, pool: ImagePool, batch: int, start: float, device: torch.device) -> None:
    seconds, peak = round(time.perf_counter() - start, 3), peak_memory_bytes(device)
    append_json_line(log, {"pool": pool.path.name, "batch": batch, "seconds": seconds, "peak_memory_bytes": peak})


def _forget_others(log: Path, pool: ImagePool) -> None:
    """Take batches that the pool lacks out of the log: a kill came between the two, or the pool is another one now."""
    entries = read_json_lines(log)
    kept = [entry for entry in entries if entry["pool"] != pool.path.name or pool.has(entry["batch"])]
    if len(kept) < len(entries):
        write_json_lines(log, kept)


def _logged(log: Path, pool: ImagePool) -> dict[int, dict]:
    """What the log says of this pool's batches. Raises `UserError` where it is damaged."""
    entries = read_json_lines(log, pool=str, batch=int, seconds=float, peak_memory_bytes=int)
    return {entry["batch"]: entry for entry in entries if entry["pool"] == pool.path.name}
