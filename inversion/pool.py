"""The image pool: inverted images on disk.

    DATAPOOL/<model>-<strategy>-<configuration hash>/
        pool.json                      format version and everything that the pixels depend on
        images/<class>/<number>.png    8-bit images of the model's channels (grey, RGB, RGBA), a
                                       `torchvision.datasets.ImageFolder`; stopped patches are zeros, on a spectral
                                       canvas as they were when they stopped
        snapshots/<batch>.pt           where --snapshots asks for them: the batch in the middle of its inversion
        batches/<batch>.json           labels, kept positions, loss at every iteration; written last

A batch exists once its file in `batches/` does. Every file is written under another name and renamed, and batches
depend on the configuration and their number alone, so a run that is killed and started again ends with the same pool.
Class folders are class numbers, zero-padded: `int(dataset.classes[label])` is the model's class.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from inversion.config import InversionConfig
from inversion.engine import InvertedBatch, Snapshot
from inversion.strategies import others as others_of
from models import LoadedModel, SparseImages, SparseViT
from models.registry import short_name
from utils.checkpoint import read_state, write_state
from utils.errors import UserError
from utils.files import atomic, is_number, read_json, user_path, writable_folder, write_json, writing
from utils.image_files import read_image
from utils.ranks import rank_zero_first

FORMAT_VERSION = 1


class ImagePool:
    """The images of one model under one configuration.

    Args:
        root: the data pool; each configuration has a folder of its own in it.
        model: what is inverted.
        config: how.

    Raises:
        UserError: there is no pool yet and the folder cannot be written, or it holds something else, or is damaged.
    """

    def __init__(self, root: str | Path, model: LoadedModel, config: InversionConfig) -> None:
        self._describe(model, config)
        digest = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:10]
        name = re.sub(r"[^\w.]+", "_", short_name(model.name))
        self.path = user_path(root, "--datapool") / f"{name}-{config.strategy}-s{config.seed}-{digest}"
        with rank_zero_first(), writing(self.path):
            self._open()

    def _describe(self, model: LoadedModel, config: InversionConfig) -> None:
        self.model, self.config = model, config.of(SparseViT(model.vit))
        self.grid = model.grid
        self.sound: set[int] = set()
        """Batches whose records were read."""
        self.description = {
            "format_version": FORMAT_VERSION,
            "model": {
                "name": model.name,
                "fingerprint": model.fingerprint(),
                "classes": model.classes,
                "mean": list(model.preprocessing.mean),
                "std": list(model.preprocessing.std),
            },
            "grid": asdict(self.grid),
            "inversion": self.config.settings(),
        }

    @classmethod
    def existing(cls, folder: Path, model: LoadedModel) -> ImagePool:
        """The pool in a folder, whatever its configuration is, settings that came later included; writes nothing.

        Raises:
            UserError: there is none, or it is of another model.
        """
        file = folder / "pool.json"
        if not file.is_file():
            raise UserError(f"{folder} is not an image pool: it has no pool.json")
        saved, pool = read_json(file, inversion=dict), cls.__new__(cls)
        try:
            pool._describe(model, InversionConfig.from_settings(saved["inversion"]))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        if any(saved.get(key) != pool.description[key] for key in ("format_version", "model", "grid")):
            raise UserError(f"{folder} is a pool of another model than {model.name}")
        pool.path = folder
        return pool

    def has(self, batch: int) -> bool:
        """Whether batch number `batch` is complete."""
        return self._batch_file(batch).is_file()

    def missing(self, batches: Iterable[int]) -> list[int]:
        """Those of the batches that are not complete. Raises `UserError` where one that is has a damaged record."""
        missing = [batch for batch in batches if not self.has(batch)]
        if missing:  # before anything is made
            for batch in set(batches) - set(missing) - self.sound:
                self.record(batch)
        return missing

    def batches(self) -> int:
        """How many batches are complete, from the first on without a gap."""
        return next(batch for batch in itertools.count() if not self.has(batch))

    def write(self, batch: int, inverted: InvertedBatch, just_before: Callable[[], None] | None = None) -> None:
        """Add a batch: its images first, then the file that makes it count.

        `just_before` is called between the two: for what has to be there of every batch that counts.
        """
        images = inverted.images.shown()
        pixels = self.model.preprocessing.denormalize(images.patches).clamp(0, 1)
        for index, (image, label) in enumerate(
            zip(self.grid.unpatchify(pixels, images.positions), images.labels.tolist(), strict=True)
        ):
            path = self.path / self._image_name(batch, index, label)
            with atomic(path) as partial:
                to_pil_image(image.mul(255).round().byte()).save(partial, format="PNG")
        if inverted.snapshots:
            write_state(self._snapshot_file(batch), [vars(snapshot) for snapshot in inverted.snapshots])
        record = {
            "format_version": FORMAT_VERSION,
            "batch": batch,
            "seed": self.config.seed,
            "labels": images.labels.tolist(),
            "kept_positions": inverted.images.positions.tolist(),
            "losses": [float(f"{loss:.6g}") for loss in inverted.losses.tolist()],
        }
        self._batch_file(batch).parent.mkdir(exist_ok=True)
        if just_before is not None:
            just_before()
        write_json(self._batch_file(batch), record)

    def read(self, count: int, first: int = 0) -> SparseImages:
        """Images `first` .. `count - 1` as 8-bit PNG holds them: kept patches, positions, labels.

        Raises:
            UserError: an image or a record that is missing or damaged.
        """
        found: list[SparseImages] = []
        skipped = first // self.config.batch_size * self.config.batch_size
        for record in self._records(count, first):
            files = [
                self.path / self._image_name(record["batch"], index, label)
                for index, label in enumerate(record["labels"])
            ]
            images = torch.stack([pil_to_tensor(self._image(file)) for file in files])
            kept = torch.tensor(record["kept_positions"])
            labels, stopped = torch.tensor(record["labels"]), None
            patches = self.grid.patchify(self.model.preprocessing.normalize(images / 255))
            rows = torch.arange(len(kept))[:, None]
            if self.config.shows_stopped:
                others = others_of(kept, self.grid.count)
                stopped = SparseImages(patches[rows, others], others, labels)
            else:
                self._require_black(images, kept, files)
            found.append(SparseImages(patches[rows, kept], kept, labels, stopped))
        return SparseImages.of_parts(found).at(slice(first - skipped, count - skipped))

    def before(self, batch: int) -> SparseImages | None:
        """The images of all batches before number `batch`, None before the first."""
        return self.read(batch * self.config.batch_size) if batch else None

    def snapshots(self, batch: int) -> list[Snapshot]:
        """The snapshots of a batch, in their order.

        Raises:
            UserError: there are none, or they are damaged.
        """
        file = self._snapshot_file(batch)
        if not file.is_file():
            raise UserError(f"{self.path} has no snapshots of batch {batch}; make it with --snapshots")
        found = read_state(file, self._remake(batch), self._are_snapshots)
        return [Snapshot(**fields) for fields in found]

    def _are_snapshots(self, found: object) -> bool:
        """Whether these are the fields of `Snapshot`s of a batch of the pool."""
        shape = self.grid.channels, self.grid.height, self.grid.width
        for one in found:
            pixels, positions, attention = one["pixels"], one["positions"], one["attention"]
            right = pixels.shape == (*positions.shape, *shape) and torch.isfinite(pixels).all()
            right &= positions.min() >= 0 and positions.max() < self.grid.count
            if not right or one.keys() != Snapshot.__dataclass_fields__.keys() or one["iteration"] < 0:
                return False
            if attention is not None and attention.shape != positions.shape:
                return False
        return len(found) > 0

    def losses(self, count: int) -> torch.Tensor:
        """Loss at every iteration of the batches that hold the first `count` images: (batches, iterations)."""
        return torch.tensor([record["losses"] for record in self._records(count)])

    def _open(self) -> None:
        file = self.path / "pool.json"
        if os.path.isfile(file):  # then it may be on a disk that cannot be written
            if read_json(file) != self.description:
                raise UserError(f"{file} was written by another configuration; give another --datapool")
            return
        writable_folder(self.path.parent, "--datapool")
        if self.path.exists() and any(not entry.name.startswith(".pool.json") for entry in self.path.iterdir()):
            raise UserError(f"{self.path} holds files but no pool.json; give another --datapool")
        self.path.mkdir(exist_ok=True)
        write_json(file, self.description)

    def _records(self, count: int, first: int = 0) -> Iterator[dict]:
        for batch in range(first // self.config.batch_size, -(-count // self.config.batch_size)):
            yield self.record(batch)

    def record(self, batch: int) -> dict:
        """What `batches/` says of a batch. Raises `UserError` unless the pool's configuration can give that."""
        file = self._batch_file(batch)
        try:
            record = read_json(file)
        except UserError as error:
            raise UserError(f"{error}; {self._remake(batch)}") from None
        if fault := self._fault(record, batch):
            raise UserError(f"{file} is damaged: its {fault}; {self._remake(batch)}")
        self.sound.add(batch)
        return record

    def _fault(self, record: dict, batch: int) -> str | None:
        """What is wrong with a batch's record, None where nothing is."""
        config, count, left = self.config, self.config.batch_size, self.config.kept(self.grid)

        def integers(values: object, length: int, below: int) -> bool:
            right = isinstance(values, list) and len(values) == length and all(is_number(v, int) for v in values)
            return right and all(0 <= value < below for value in values)

        same = {"format_version": FORMAT_VERSION, "batch": batch, "seed": config.seed}
        for key, value in same.items():
            if record.get(key) != value or isinstance(record[key], bool):
                return f"{key} is not {value}"
        if not integers(record.get("labels"), count, self.model.classes):
            return f"labels are not {count} integers from 0 to {self.model.classes - 1}"
        rows = record.get("kept_positions")
        rows = rows if isinstance(rows, list) else []
        if len(rows) != count or not all(integers(row, left, self.grid.count) and len({*row}) == left for row in rows):
            return f"kept_positions are not {left} places of {self.grid.count} for {count} images"
        losses = record.get("losses")
        losses = losses if isinstance(losses, list) else []
        if len(losses) != config.iterations or not all(is_number(value, float) for value in losses):
            return f"losses are not {config.iterations} finite numbers"
        return None

    def _require_black(self, images: torch.Tensor, kept: torch.Tensor, files: list[Path]) -> None:
        """Raise `UserError` where images (B, C, H, W) have pixels at places that are not among `kept` (B, n)."""
        shown = self.grid.patchify(images).flatten(2).any(dim=2).scatter(1, kept, False)
        if shown.any():
            file = files[int(shown.any(dim=1).nonzero()[0])]
            raise UserError(f"{file} has pixels where patches stopped; {self._remake(self._batch_of(file))}")

    def _image(self, file: Path) -> Image.Image:
        try:
            image = read_image(file, mode=self.model.preprocessing.mode)[0]
        except UserError as error:
            reason = str(error).removesuffix("; repair or remove it")
            raise UserError(f"{reason}; {self._remake(self._batch_of(file))}") from None
        if image.size != self.grid.image_size[::-1]:
            size = f"{image.size[0]}x{image.size[1]}"
            raise UserError(f"{file} is {size}, the pool's images are not; {self._remake(self._batch_of(file))}")
        return image

    def _remake(self, batch: int) -> str:
        """What to do about a damaged batch."""
        return f"delete {self._batch_file(batch)}, and the command that made the pool makes the batch again"

    def _batch_of(self, image: Path) -> int:
        return int(image.stem) // self.config.batch_size

    def _batch_file(self, batch: int) -> Path:
        return self.path / "batches" / f"{batch:06d}.json"

    def _snapshot_file(self, batch: int) -> Path:
        return self.path / "snapshots" / f"{batch:06d}.pt"

    def _image_name(self, batch: int, index: int, label: int) -> str:
        number = batch * self.config.batch_size + index
        return f"images/{label:0{len(str(self.model.classes - 1))}d}/{number:06d}.png"
