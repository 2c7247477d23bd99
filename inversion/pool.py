"""The image pool: inverted images on disk.

    DATAPOOL/<model>-<strategy>-<configuration hash>/
        pool.json                      format version and everything that the pixels depend on
        images/<class>/<number>.png    8-bit images, stopped patches black; a `torchvision.datasets.ImageFolder`
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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from inversion.config import InversionConfig
from inversion.engine import InvertedBatch, Snapshot
from models import LoadedModel, SparseImages
from models.registry import short_name
from utils.errors import UserError
from utils.files import atomic, read_json, writable_folder, write_json
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
        UserError: there is no pool yet and the folder cannot be written, or it holds something else.
    """

    def __init__(self, root: str | Path, model: LoadedModel, config: InversionConfig) -> None:
        self._describe(model, config)
        digest = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:10]
        name = re.sub(r"[^\w.]+", "_", short_name(model.name))
        self.path = Path(root).expanduser() / f"{name}-{config.strategy}-s{config.seed}-{digest}"
        with rank_zero_first():
            self._open()

    def _describe(self, model: LoadedModel, config: InversionConfig) -> None:
        self.model, self.config = model, config
        self.grid = model.grid
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
            "inversion": config.settings(),
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
        saved, pool = read_json(file), cls.__new__(cls)
        pool._describe(model, InversionConfig.from_settings(saved.get("inversion", {})))
        if any(saved.get(key) != pool.description[key] for key in ("format_version", "model", "grid")):
            raise UserError(f"{folder} is a pool of another model than {model.name}")
        pool.path = folder
        return pool

    def has(self, batch: int) -> bool:
        """Whether batch number `batch` is complete."""
        return self._batch_file(batch).is_file()

    def batches(self) -> int:
        """How many batches are complete, from the first on without a gap."""
        return next(batch for batch in itertools.count() if not self.has(batch))

    def write(self, batch: int, inverted: InvertedBatch, just_before: Callable[[], None] | None = None) -> None:
        """Add a batch: its images first, then the file that makes it count.

        `just_before` is called between the two: for what has to be there of every batch that counts.
        """
        images = inverted.images
        pixels = self.model.preprocessing.denormalize(images.patches).clamp(0, 1)
        for index, (image, label) in enumerate(
            zip(self.grid.unpatchify(pixels, images.positions), images.labels.tolist(), strict=True)
        ):
            path = self.path / self._image_name(batch, index, label)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as partial:
                to_pil_image(image.mul(255).round().byte()).save(partial, format="PNG")
        if inverted.snapshots:
            self._snapshot_file(batch).parent.mkdir(exist_ok=True)
            with atomic(self._snapshot_file(batch)) as partial:
                torch.save([vars(snapshot) for snapshot in inverted.snapshots], partial)
        record = {
            "format_version": FORMAT_VERSION,
            "batch": batch,
            "seed": self.config.seed,
            "labels": images.labels.tolist(),
            "kept_positions": images.positions.tolist(),
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
        patches, positions, labels = [], [], []
        skipped = first // self.config.batch_size * self.config.batch_size
        for record in self._records(count, first):
            files = [
                self.path / self._image_name(record["batch"], index, label)
                for index, label in enumerate(record["labels"])
            ]
            images = torch.stack([pil_to_tensor(self._image(file)) for file in files])
            kept = torch.tensor(record["kept_positions"])
            normalized = self.model.preprocessing.normalize(images / 255)
            patches.append(self.grid.patchify(normalized)[torch.arange(len(kept))[:, None], kept])
            positions.append(kept)
            labels.append(torch.tensor(record["labels"]))
        wanted = slice(first - skipped, count - skipped)
        return SparseImages(*(torch.cat(parts)[wanted] for parts in (patches, positions, labels)))

    def before(self, batch: int) -> SparseImages | None:
        """The images of all batches before number `batch`, None before the first."""
        return self.read(batch * self.config.batch_size) if batch else None

    def snapshots(self, batch: int) -> list[Snapshot]:
        """The snapshots of a batch, in their order.

        Raises:
            UserError: there are none.
        """
        file = self._snapshot_file(batch)
        if not file.is_file():
            raise UserError(f"{self.path} has no snapshots of batch {batch}; make it with --snapshots")
        return [Snapshot(**fields) for fields in torch.load(file, weights_only=True)]

    def losses(self, count: int) -> torch.Tensor:
        """Loss at every iteration of the batches that hold the first `count` images: (batches, iterations)."""
        return torch.tensor([record["losses"] for record in self._records(count)])

    def _open(self) -> None:
        file = self.path / "pool.json"
        if os.path.isfile(file):  # then it may be on a disk that cannot be written
            if read_json(file) != self.description:
                raise UserError(f"{self.path} was written by another configuration; give another --datapool")
            return
        writable_folder(self.path.parent, "--datapool")
        if self.path.exists() and any(not entry.name.startswith(".pool.json") for entry in self.path.iterdir()):
            raise UserError(f"{self.path} holds files but no pool.json; give another --datapool")
        self.path.mkdir(exist_ok=True)
        write_json(file, self.description)

    def _records(self, count: int, first: int = 0) -> Iterator[dict]:
        for batch in range(first // self.config.batch_size, -(-count // self.config.batch_size)):
            file = self._batch_file(batch)
            record = read_json(file)
            lists = [record.get(key) for key in ("labels", "kept_positions", "losses")]
            if record.get("format_version") != FORMAT_VERSION or not all(isinstance(part, list) for part in lists):
                raise UserError(f"{file} is not a batch of pool format {FORMAT_VERSION}")
            yield record

    def _image(self, file: Path) -> Image.Image:
        image = read_image(file)[0]
        if image.size != self.grid.image_size[::-1]:
            raise UserError(f"{file} is {image.size[0]}x{image.size[1]}, the pool's images are not; remove it")
        return image

    def _batch_file(self, batch: int) -> Path:
        return self.path / "batches" / f"{batch:06d}.json"

    def _snapshot_file(self, batch: int) -> Path:
        return self.path / "snapshots" / f"{batch:06d}.pt"

    def _image_name(self, batch: int, index: int, label: int) -> str:
        number = batch * self.config.batch_size + index
        return f"images/{label:0{len(str(self.model.classes - 1))}d}/{number:06d}.png"
