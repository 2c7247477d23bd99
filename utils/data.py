"""Data sets: the bundled digits, CIFAR through torchvision, image folders, ImageNet's `val/`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from models import LoadedModel
from utils.cli import natural, positive, setting
from utils.errors import UserError
from utils.ranks import rank, ranks


@dataclass(frozen=True)
class DataConfig:
    """What a model is evaluated on, and how it is read."""

    dataset: str | None = setting(None, "data: image folder or CIFAR; the bundled model needs none", metavar="DIR")
    val_limit: int | None = setting(None, "evaluate on N images only; default all", type=positive, metavar="N")
    val_batchsize: int = setting(200, "images per evaluation batch", "--val-batchsize", type=positive)
    num_workers: int = setting(4, "processes that load images", "--num-workers", type=natural)


CIFAR = {"cifar10": (CIFAR10, "cifar-10-batches-py"), "cifar100": (CIFAR100, "cifar-100-python")}
SPLITS = {"train": ("train",), "test": ("val", "test")}


class Digits(Dataset):
    """The 1,797 handwritten digits that scikit-learn ships, 8x8 grey pixels, as RGB images.

    The split is fixed: 80% for training, 20% for testing, stratified by class.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str, transform: Callable) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        index = np.arange(len(data.target))
        train, test = train_test_split(index, test_size=0.2, random_state=0, stratify=data.target)
        chosen = np.sort(train if split == "train" else test)
        self.images = (data.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = data.target[chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), self.targets[index]


class ImageFiles(Dataset):
    """All image files in a folder, at any depth and in the order of their paths, with the label 0.

    Raises `UserError` where there are none.
    """

    def __init__(self, folder: str | Path, transform: Callable) -> None:
        root = Path(folder).expanduser()
        self.files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not self.files:
            raise UserError(f"{root} is no image pool (it has no pool.json), and holds no image files")
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(load_rgb(str(self.files[index]))), 0


def load_rgb(path: str) -> Image.Image:
    """An image file as RGB. Raises `UserError`, naming the file, where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"cannot read the image {path} ({type(error).__name__}); repair or remove it") from None


def load_split(split: str, kind: str | None, path: str | Path | None, transform: Callable, classes: int) -> Dataset:
    """The `train` or `test` split of a data set of PIL images, transformed, with integer labels.

    Args:
        split: `train` or `test`.
        kind: what the model was trained on: `digits`, `cifar10`, `cifar100`, `imagenet` or None.
        path: where the data is: an image folder with `train/` and `val/` or `test/`, an evaluation set of class
            folders, or the root that torchvision's CIFAR classes take. The digits need none.
        transform: PIL image -> tensor.
        classes: how many classes the model has.

    Raises:
        UserError: nothing there, no such split, or another number of classes.
    """
    if kind == "digits" and path is None:
        return Digits(split, transform)
    if path is None:
        raise UserError("this model needs --dataset DIR, the path to its data")
    root = Path(path).expanduser()
    if not root.is_dir():
        hint = f"; make the folder to have {kind} downloaded into it" if kind in CIFAR else ""
        raise UserError(f"--dataset {root} is not a folder{hint}")
    folders = [root / name for name in SPLITS[split] if (root / name).is_dir()]
    has_splits = any((root / name).is_dir() for names in SPLITS.values() for name in names)
    if folders:
        dataset = _image_folder(folders[0], transform)
    elif kind in CIFAR and not has_splits and _is_cifar_root(root, kind):
        dataset = _cifar(root, kind, split, transform)
    elif has_splits:
        raise UserError(f"--dataset {root} has no {' or '.join(f'{n}/' for n in SPLITS[split])} folder")
    elif split == "test":
        dataset = _image_folder(root, transform)
    else:
        raise UserError(f"--dataset {root} has no train/ folder, which real calibration images are taken from")
    if len(dataset.classes) != classes:
        raise UserError(f"--dataset {root} has {len(dataset.classes)} classes, the model has {classes}")
    return dataset


def evaluation_set(model: LoadedModel, config: DataConfig) -> Dataset:
    """The images that a model is evaluated on. Raises `UserError` as `load_split` does."""
    transform = model.preprocessing.eval_transform()
    return load_split("test", model.dataset, config.dataset, transform, model.classes)


def evaluation_loader(model: LoadedModel, config: DataConfig) -> DataLoader:
    """Batches of normalized images (B, C, H, W) and labels (B,), for `evaluate`. Raises as `load_split` does."""
    return loader(limited(evaluation_set(model, config), config.val_limit), config.val_batchsize, config.num_workers)


def random_subset(dataset: Dataset, count: int, seed: int) -> Subset:
    """`count` different items drawn with `seed`. Raises `UserError` where there are fewer."""
    if count > len(dataset):
        raise UserError(f"{count} images were asked for, the data set has {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def limited(dataset: Dataset, limit: int | None) -> Dataset:
    """At most `limit` items, drawn with a fixed seed so that all classes are met; all of them if None."""
    return dataset if limit is None or limit >= len(dataset) else random_subset(dataset, limit, seed=0)


def loader(dataset: Dataset, batch_size: int, workers: int) -> DataLoader:
    """A loader of this rank's share, in the data set's own order; sets in memory are read without worker processes."""
    if ranks() > 1:
        dataset = Subset(dataset, range(rank(), len(dataset), ranks()))
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    workers = 0 if isinstance(base, Digits) else min(workers, os.cpu_count() or 1)
    return DataLoader(dataset, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())


def _image_folder(root: Path, transform: Callable) -> ImageFolder:
    try:
        return ImageFolder(str(root), transform, loader=load_rgb)
    except FileNotFoundError:
        kinds = ", ".join(IMG_EXTENSIONS[:4])
        raise UserError(f"--dataset: {root} needs a folder per class with images ({kinds}, ...) in each") from None


def _is_cifar_root(root: Path, kind: str) -> bool:
    return (root / CIFAR[kind][1]).is_dir() or not any(entry.is_dir() for entry in root.iterdir())


def _cifar(root: Path, kind: str, split: str, transform: Callable) -> Dataset:
    dataset, _ = CIFAR[kind]
    try:
        return dataset(str(root), train=split == "train", transform=transform, download=True)
    except Exception as error:  # network, disk and checksum errors alike
        raise UserError(f"cannot get {kind} into {root}: {type(error).__name__}: {error}") from None
