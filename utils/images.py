"""Where images come from, for calibration and for distillation alike: inverted, noise, real, or images that one has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from inversion import ImagePool, InversionConfig, SynthesisReport, synthesis_report, synthesize
from inversion.events import require_tensorboard
from inversion.synthesis import logged_seconds
from models import LoadedModel, SparseImages
from utils.classes import labels_of
from utils.config import Colour, DataConfig
from utils.data import load_split, random_subset, tell_transparent, unlabelled_files
from utils.device import pick_device, require_memory
from utils.errors import UserError
from utils.files import user_path
from utils.pictures import LossCurve
from utils.ranks import rank, rank_zero_first, ranks, summed


@dataclass(frozen=True)
class Inverted:
    """Inverted out of the model as `config` says, and kept in a pool below the folder `datapool`."""

    config: InversionConfig
    datapool: str | Path = "./datapool"
    mode: ClassVar[int] = 0

    @property
    def kind(self) -> str:
        """The strategy."""
        return self.config.strategy


@dataclass(frozen=True)
class Noise:
    """Standard normal pixels, whole images; their labels mean nothing."""

    mode: ClassVar[int] = 1
    kind: ClassVar[str] = "gaussian"


@dataclass(frozen=True)
class Real:
    """Of the training split of the model's data set; `dataset` is its path, None for the bundled digits.

    `class_order` and `background` as in `DataConfig`.
    """

    dataset: str | Path | None = None
    class_order: str | None = None
    background: Colour | None = None
    mode: ClassVar[int] = 2
    kind: ClassVar[str] = "real"


@dataclass(frozen=True)
class Stored:
    """Images that one has: a pool of the same model, read as it is, or a folder with image files at any depth.

    Image files are cropped and normalized as in evaluation; they need no labels, and have the label 0. `background` as
    in `DataConfig`.
    """

    path: str | Path
    background: Colour | None = None
    mode: ClassVar[None] = None
    kind: ClassVar[str] = "stored"

    def pool(self, model: LoadedModel) -> ImagePool | None:
        """The pool, None where the folder is none. Raises `UserError` where it is another model's."""
        folder = user_path(self.path, "--images")
        return ImagePool.existing(folder, model) if (folder / "pool.json").is_file() else None


Source = Inverted | Noise | Real | Stored

NEEDS_PRI = "--join puts the images of pri trajectories together; give --strategy pri"
"""To a user who asks for it with other images."""


def calibration_images(
    model: LoadedModel, source: Source, count: int, seed: int = 0, device: torch.device | str | None = None
) -> SparseImages:
    """`count` images of a source, as `quantize` and `distill` take them; what is not there yet is inverted.

    Args:
        model: what `load_model` or `LoadedModel.of` gave.
        source: where they come from.
        count: how many.
        seed: of noise, and of the choice of real or stored images; inverted ones have their configuration's.
        device: where to invert; None: a GPU if there is one.

    Raises:
        UserError: fewer images than that, no memory for them, or what `invert` raises.
    """
    if isinstance(source, Inverted):
        device = torch.device(device) if device is not None else pick_device("auto")
        return Synthesis(model, source, device).first(count)
    return images_at_hand(model, source, count, seed)


def images_at_hand(model: LoadedModel, source: Noise | Real | Stored, count: int | None, seed: int) -> SparseImages:
    """`count` images that nobody has to invert, drawn with `seed`; of real and stored ones all if None."""
    if isinstance(source, Noise):
        _require_memory(count, model)
        noise = torch.randn(count, *model.preprocessing.input_size, generator=torch.Generator().manual_seed(seed))
        return SparseImages.whole(model.grid, noise, torch.zeros(count, dtype=torch.long))
    transform, mode = model.preprocessing.eval_transform(), model.preprocessing.mode
    if isinstance(source, Real):
        data = DataConfig(source.dataset, class_order=source.class_order, background=source.background)
        found = load_split("train", model.dataset, data, transform, labels_of(model), mode)
    elif (pool := source.pool(model)) is not None:
        there = pool.batches() * pool.config.batch_size
        if not there or (count or 0) > there:
            raise UserError(f"{count or 'some'} images were asked for, the pool {source.path} has {there}")
        return pool.read(count or there)
    else:
        found = unlabelled_files(source.path, transform, source.background, mode)
    chosen = random_subset(found, count or len(found), seed)
    _require_memory(len(chosen), model)
    images, labels = zip(*chosen, strict=True)
    tell_transparent(found)
    return SparseImages.whole(model.grid, torch.stack(images), torch.tensor(labels))


class Synthesis:
    """Inverted images that are made when they are asked for, and read once.

    Args:
        model: what is inverted.
        source: how, and where the pool is.
        device: where to run.
        log: file that keeps the seconds of each batch; None keeps none.
        student: for the adversarial term.
        tensorboard: folder for the course of the inversion in TensorBoard's format.
        progress: show a progress bar on stderr.
        eager: as for `Inverter`.

    Raises:
        UserError: the pool cannot be opened, or TensorBoard's writer is missing.
    """

    def __init__(
        self,
        model: LoadedModel,
        source: Inverted,
        device: torch.device,
        log: Path | None = None,
        student: LoadedModel | None = None,
        tensorboard: Path | None = None,
        progress: bool = False,
        eager: bool = False,
    ) -> None:
        if tensorboard is not None:
            require_tensorboard()
        with rank_zero_first():
            self.pool = ImagePool(source.datapool, model, source.config)
        self.where = {"device": device, "log": log, "student": student}
        self.how = {"tensorboard": tensorboard, "progress": progress, "eager": eager}
        self.images: SparseImages | None = None

    def first(self, count: int, add: bool = True) -> SparseImages:
        """The first `count` images. Where `add` is off, all of them have to be there."""
        have = 0 if self.images is None else len(self.images)
        if count > have:
            _require_memory(count, self.pool.model, self.pool.config.kept(self.pool.grid))
            if add:
                synthesize(self.pool, count, **self.where, **self.how)
            new = self.pool.read(count, first=have)
            self.images = new if self.images is None else self.images.joined(new)
        return self.images

    def filled_for(self, seconds: float, most: float = math.inf) -> int:
        """Add batches until those that this run made took so long, one at least. Returns how many images there are.

        What was there is used, at most `most` images; a run that is started again goes on with the time it has left.
        """
        size, count = self.pool.config.batch_size, self.pool.batches() * self.pool.config.batch_size
        while count < most and (not count or self._seconds() < seconds):
            self.first(min(count + size, most))
            count += size
        return min(count, most)

    def _seconds(self) -> float:
        """What this run has spent on the pool, as the first rank's log says, divided by the ranks."""
        spent = logged_seconds(self.pool, self.where["log"]) if rank() == 0 else 0.0
        return summed([spent], torch.device(self.where["device"]))[0] / ranks()

    def made(self, most: float = math.inf) -> int:
        """How many images the pool holds, at most `most`. Raises `UserError` where it holds none."""
        count = min(self.pool.batches() * self.pool.config.batch_size, most)
        if not count:
            raise UserError(
                f"{self.pool.path} holds no images; raise --images_per_epoch above 0 or give another --datapool"
            )
        return count

    def cost(self, count: int) -> SynthesisReport:
        """What the first `count` images are and cost."""
        return synthesis_report(self.pool, count, **self.where)

    def course(self, count: int) -> LossCurve:
        """The loss of the first `count` images."""
        config = self.pool.config
        stages = config.strategy_object().stages(config.iterations, self.pool.grid)
        return LossCurve(self.pool.losses(count), [stage.start for stage in stages], [s.patches for s in stages])


def _require_memory(count: int, model: LoadedModel, patches: int | None = None) -> None:
    """Raise `UserError` where images of so many patches, all if None, find no room: in float32, twice."""
    each = 2 * 4 * (patches or model.grid.count) * model.grid.pixels
    require_memory(count, each, torch.device("cpu"), f"holding {count:,} images", "--num_images or --max_images")
