"""Data sets: the bundled digits, CIFAR through torchvision, image folders, ImageNet's `val/`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2

from models import LoadedModel
from utils.classes import Labels, class_numbers, labels_of, names_of
from utils.config import Colour, DataConfig
from utils.device import shared_memory_bytes, usable_cpus
from utils.errors import UserError, UserNote
from utils.files import user_path
from utils.image_files import (
    ENDINGS,
    WHITE,
    image_paths,
    listing,
    read_image,
    subfolders,
)
from utils.ranks import highest, rank, ranks

CIFAR = {"cifar10": (CIFAR10, "cifar-10-batches-py"), "cifar100": (CIFAR100, "cifar-100-python")}
SPLITS = {"train": ("train",), "test": ("val", "test")}


class Digits(Dataset):
    """The 1,797 handwritten digits that scikit-learn ships, 8x8 grey pixels, as images of Pillow's `mode`.

    The split is fixed: 80% for training, 20% for testing, stratified by class.
    """

    classes = tuple(names_of("digits"))

    def __init__(self, split: str, transform: Callable, mode: str = "RGB") -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        data = load_digits()
        index = np.arange(len(data.target))
        train, test = train_test_split(index, test_size=0.2, random_state=0, stratify=data.target)
        chosen = np.sort(train if split == "train" else test)
        self.images = (data.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = data.target[chosen].tolist()
        self.transform, self.mode = transform, mode

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index]).convert(self.mode)), self.targets[index]


class ImageFiles(Dataset):
    """Image files with labels.

    Args:
        files: (path, label) of each.
        classes: names of all classes of the model, in its order.
        transform: PIL image -> tensor.
        background: what is behind transparency; None: white.
        mode: Pillow's name of the images' channels.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, int]],
        classes: Sequence[str],
        transform: Callable,
        background: Colour | None,
        mode: str = "RGB",
    ) -> None:
        self.files, self.targets = [path for path, _ in files], [label for _, label in files]
        self.classes, self.transform, self.background = list(classes), transform, background or WHITE
        self.mode = mode
        self.transparent = torch.zeros(len(files), dtype=torch.uint8)
        """1 for each image that was read, by any process (`loader` shares it), and had transparency."""
        self.told = False

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, transparent = read_image(self.files[index], self.background, self.mode)
        if transparent:
            self.transparent[index] = 1
        return self.transform(image), self.targets[index]


def unlabelled_files(
    folder: str | Path, transform: Callable, background: Colour | None = None, mode: str = "RGB"
) -> ImageFiles:
    """All image files in a folder, at any depth and in the order of their paths, with the label 0.

    Raises `UserError` where there are none.
    """
    root = user_path(folder, "--images")
    files = image_paths(root) if root.is_dir() else []
    if not files:
        raise UserError(f"{root} is no image pool (it has no pool.json), and holds no image files")
    return ImageFiles([(path, 0) for path in files], [], transform, background, mode)


def load_split(
    split: str, kind: str | None, data: DataConfig, transform: Callable, labels: Labels, mode: str = "RGB"
) -> Dataset:
    """The `train` or `test` split of a data set of PIL images, transformed, with the model's classes as labels.

    Its `classes` are the names of all classes of the model in its order, of which a folder may have some.

    Args:
        split: `train` or `test`.
        kind: what the model was trained on: `digits`, `cifar10`, `cifar100`, `imagenet` or None.
        data: where it is (an image folder with `train/` and `val/` or `test/`, an evaluation set of class folders, or
            the root that torchvision's CIFAR classes take; the digits need none), and how it is read.
        transform: PIL image -> tensor.
        labels: the classes of the model.
        mode: Pillow's name of the channels that images are given to `transform` with.

    Raises:
        UserError: nothing there, no such split, a class without images, or classes that are not the model's.
    """
    if kind == "digits" and data.dataset is None:
        return _in_order_of(Digits(split, transform, mode), labels, data, "the bundled digits")
    if data.dataset is None:
        raise UserError("this model needs --dataset DIR, the path to its data")
    root = user_path(data.dataset, "--dataset")
    if not root.is_dir():
        hint = f"; make the folder to have {kind} downloaded into it" if kind in CIFAR else ""
        raise UserError(f"--dataset {root} is not a folder{hint}")
    folders = [root / name for name in SPLITS[split] if (root / name).is_dir()]
    has_splits = any((root / name).is_dir() for names in SPLITS.values() for name in names)
    if folders:
        return _class_folders(folders[0], root / "train", data, transform, labels, mode)
    if kind in CIFAR and not has_splits and _is_cifar_root(root, kind):
        return _in_order_of(
            _cifar(root, kind, split, _after_conversion(transform, mode)), labels, data, f"--dataset {root}"
        )
    if has_splits:
        raise UserError(f"--dataset {root} has no {' or '.join(f'{n}/' for n in SPLITS[split])} folder")
    if split == "test":
        return _class_folders(root, None, data, transform, labels, mode)
    raise UserError(f"--dataset {root} has no train/ folder, which real calibration images are taken from")


def evaluation_set(model: LoadedModel, config: DataConfig) -> Dataset:
    """The images that a model is evaluated on; warns of classes that have none. Raises as `load_split` does."""
    how = model.preprocessing
    found = load_split("test", model.dataset, config, how.eval_transform(), labels_of(model), how.mode)
    present = len(set(found.targets))
    if present < model.classes and rank() == 0:
        text = f"--dataset {config.dataset} has images of {present} of the model's {model.classes} classes"
        warnings.warn(UserNote(f"{text}; accuracy is over all of them"), stacklevel=2)
    return found


def evaluation_loader(model: LoadedModel, config: DataConfig) -> DataLoader:
    """Batches of normalized images (B, C, H, W) and labels (B,), for `evaluate`. Raises as `load_split` does."""
    found = limited(evaluation_set(model, config), config.val_limit)
    return loader(found, config.val_batchsize, config.num_workers, model.preprocessing.input_size)


def random_subset(dataset: Dataset, count: int, seed: int) -> Subset:
    """`count` different items drawn with `seed`. Raises `UserError` where there are fewer."""
    if count > len(dataset):
        raise UserError(f"{count} images were asked for, the data set has {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return Subset(dataset, order[:count].tolist())


def limited(dataset: Dataset, limit: int | None) -> Dataset:
    """At most `limit` items, drawn with a fixed seed so that all classes are met; all of them if None."""
    return dataset if limit is None or limit >= len(dataset) else random_subset(dataset, limit, seed=0)


def loader(dataset: Dataset, batch_size: int, workers: int, image_size: Sequence[int]) -> DataLoader:
    """A loader of this rank's share, in the data set's own order.

    Args:
        dataset: of images and labels; sets in memory are read without worker processes.
        batch_size: images.
        workers: processes at most; there is one for each CPU that may be used, and no more than can hand over their
            batches in shared memory, which is said.
        image_size: (C, H, W) of the images.
    """
    if ranks() > 1:
        dataset = Subset(dataset, range(rank(), len(dataset), ranks()))
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    workers = 0 if isinstance(base, Digits) else min(workers, usable_cpus())
    if workers:
        workers = _sharing(workers, 4 * math.prod(image_size) * min(batch_size, len(dataset)))
    if workers and isinstance(base, ImageFiles):
        base.transparent.share_memory_()
    return DataLoader(dataset, batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())


def _sharing(workers: int, batch_bytes: int) -> int:
    """As many of the workers as can share their batches: two of each are on their way, and one is being used."""
    free = shared_memory_bytes() / ranks()
    if (2 * workers + 1) * batch_bytes <= free:
        return workers
    fewer = max(0, int(free / batch_bytes - 1) // 2)
    if rank() == 0:
        text = f"{free / 1e6:.0f} MB of shared memory are free, so {fewer or 'no'} processes load images instead of"
        text = f"{text} {workers}; have more (docker run --shm-size) or smaller batches"
        warnings.warn(UserNote(text), stacklevel=3)
    return fewer


def tell_transparent(data: Dataset | None, shared_on: torch.device | None = None) -> None:
    """Warn of the images that were read so far and had transparency, once for each set of files.

    Args:
        data: what was read, wholly or in part.
        shared_on: where ranks can add up, of which each read a part; None: this one read all.
    """
    while isinstance(data, Subset):
        data = data.dataset
    if not isinstance(data, ImageFiles) or data.told:
        return
    transparent = data.transparent if shared_on is None else highest(data.transparent.to(shared_on))
    found = transparent.nonzero().flatten().tolist()
    data.told = bool(found)
    if found and rank() == 0:
        text = f"{len(found)} of the images that were read have transparency, first {data.files[found[0]]}"
        colours = ",".join(map(str, data.background))
        warnings.warn(UserNote(f"{text}; they are laid on --background {colours}"), stacklevel=2)


def _class_folders(
    root: Path, train: Path | None, data: DataConfig, transform: Callable, labels: Labels, mode: str
) -> ImageFiles:
    """The images of the class folders in `root`; those in `train`, where there are some, may tell the order."""
    where, folders = f"--dataset {root}", subfolders(root)
    if not folders:
        raise UserError(f"{where} needs a folder per class with images ({', '.join(ENDINGS[:4])}, ...) in each")
    files = {folder: image_paths(root / folder) for folder in folders}
    empty = [folder for folder in folders if not files[folder]]
    if empty:
        raise UserError(f"{where} has no images ({', '.join(ENDINGS)}) in {listing(empty)}; fill or remove it")
    trained = subfolders(train) if train is not None and train.is_dir() else []
    numbers, names = class_numbers(folders, labels, data.class_order, where, trained)
    labelled = [(path, numbers[folder]) for folder in folders for path in files[folder]]
    return ImageFiles(labelled, names, transform, data.background, mode)


def _in_order_of(dataset: Dataset, labels: Labels, data: DataConfig, where: str) -> Dataset:
    """A data set that knows its classes, numbered as the model's are."""
    own = list(dataset.classes)
    numbers, dataset.classes = class_numbers(own, labels, data.class_order, where)
    dataset.targets = [numbers[own[target]] for target in dataset.targets]
    return dataset


def _is_cifar_root(root: Path, kind: str) -> bool:
    return (root / CIFAR[kind][1]).is_dir() or not any(entry.is_dir() for entry in root.iterdir())


def _after_conversion(transform: Callable, mode: str) -> Callable:
    """RGB image -> what `transform` makes of it in `mode`."""
    return transform if mode == "RGB" else v2.Compose([v2.Lambda(methodcaller("convert", mode)), transform])


def _cifar(root: Path, kind: str, split: str, transform: Callable) -> Dataset:
    dataset, _ = CIFAR[kind]
    try:
        return dataset(str(root), train=split == "train", transform=transform, download=True)
    except Exception as error:  # network, disk and checksum errors alike
        raise UserError(f"cannot get {kind} into {root}: {type(error).__name__}: {error}") from None
