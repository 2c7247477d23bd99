"""Data sets: layouts, splits, and what is wrong with a path."""

import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import utils.data
import utils.device
from utils.classes import Labels, names_of
from utils.data import DataConfig, Digits, limited, load_split, loader, random_subset
from utils.device import shared_memory_bytes, usable_cpus
from utils.errors import UserError, UserNote


def split_of(root, split="test", kind=None, classes=3):
    """What `load_split` gives for a model with so many classes, the names of which are not known."""
    return load_split(split, kind, DataConfig(root), pil_to_tensor, Labels(classes))


def image_folder(root, splits=("train", "val"), classes=("cat", "dog", "emu"), per_class=2):
    for split in splits:
        for shade, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                Image.new("RGB", (9, 7), (shade * 10, number, 0)).save(folder / f"{number}.JPEG", format="PNG")
    return root


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("val",), ("",)])
def test_image_folders_number_classes_in_sorted_order(tmp_path, splits):
    dataset = split_of(image_folder(tmp_path, splits))
    assert [label for _, label in dataset] == [0, 0, 1, 1, 2, 2]
    assert [int(image[0, 0, 0]) for image, _ in dataset] == [0, 0, 10, 10, 20, 20]


def test_train_split_is_found_beside_the_test_split(tmp_path):
    image_folder(tmp_path, ("train",), per_class=5)
    image_folder(tmp_path, ("val",), per_class=1)
    assert len(split_of(tmp_path, "train")) == 15
    assert len(split_of(tmp_path)) == 3


def test_imagenet_layout_is_an_image_folder(tmp_path):
    image_folder(tmp_path, ("val",), ("n01440764", "n01443537"))
    assert split_of(tmp_path, kind="imagenet", classes=2).classes == ["n01440764", "n01443537"]


@pytest.mark.parametrize(
    ("kind", "folder", "classes"), [("cifar10", "cifar-10-batches-py", 10), ("cifar100", "cifar-100-python", 100)]
)
def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch, kind, folder, classes):
    (tmp_path / folder).mkdir()
    calls = []

    def fake(root, train, transform, download):
        calls.append((root, train, download))
        return type("Cifar", (list,), {"classes": names_of(kind)[::-1], "targets": [0, classes - 1]})()

    monkeypatch.setitem(utils.data.CIFAR, kind, (fake, folder))
    found = load_split("test", kind, DataConfig(tmp_path), pil_to_tensor, Labels(classes, names_of(kind)))
    assert (found.classes, found.targets) == (names_of(kind), [classes - 1, 0])
    split_of(tmp_path, "train", kind, classes)
    assert calls == [(str(tmp_path), False, True), (str(tmp_path), True, True)]


def test_digits_are_split_without_overlap_and_stratified():
    train, test = Digits("train", pil_to_tensor), Digits("test", pil_to_tensor)
    assert (len(train), len(test)) == (1437, 360)
    assert min(np.bincount(test.targets)) >= 34
    image, label = test[0]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert 0 <= label < 10
    assert train.images.max() == 255


@pytest.mark.parametrize(
    ("split", "layout", "classes", "why"),
    [
        ("test", None, 3, "not a folder"),
        ("test", (), 3, "folder per class"),
        ("test", ("train",), 3, "no val/ or test/"),
        ("train", ("val",), 3, "no train/"),
        ("train", ("",), 3, "no train/"),
        ("test", ("val",), 10, "3 classes.*10"),
    ],
)
def test_wrong_folders_say_what_is_wrong(tmp_path, split, layout, classes, why):
    root = tmp_path / "data"
    if layout is not None:
        root.mkdir()
        image_folder(root, layout)
    with pytest.raises(UserError, match=why):
        split_of(root, split, classes=classes)


def test_no_path_and_empty_class_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match="--dataset"):
        split_of(None, "test", "cifar10", 10)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="images"):
        split_of(tmp_path, classes=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, workers):
    image_folder(tmp_path)
    (tmp_path / "val" / "dog" / "1.JPEG").write_bytes(b"\xff\xd8 cut off")
    dataset = split_of(tmp_path)
    with pytest.raises(UserError, match=r"dog/1\.JPEG"):
        list(loader(dataset, 2, workers, (3, 32, 32)))


def test_workers_are_no_more_than_the_cpus_that_may_be_used(tmp_path, monkeypatch):
    image_folder(tmp_path)
    dataset = split_of(tmp_path)
    monkeypatch.setattr(utils.data, "usable_cpus", lambda: 2)
    assert loader(dataset, 2, 4, (3, 32, 32)).num_workers == 2
    assert loader(dataset, 2, 1, (3, 32, 32)).num_workers == 1
    assert loader(Digits("test", pil_to_tensor), 2, 4, (3, 32, 32)).num_workers == 0


@pytest.mark.parametrize(("quota", "cpus"), [("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1)])
def test_usable_cpus_are_those_that_the_process_is_bound_to_and_has_time_on(quota, cpus, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(utils.device, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    assert usable_cpus() == cpus


@pytest.mark.parametrize(
    ("free", "workers", "said"),
    [(2**40, 4, None), (9 * 24576, 4, None), (9 * 24576 - 1, 3, "3 processes"), (24576, 0, "no processes")],
)
def test_little_shared_memory_takes_fewer_workers_and_says_so(tmp_path, monkeypatch, recwarn, free, workers, said):
    """A batch is 2 images of 3 * 32 * 32 numbers of 4 bytes; four workers have two each on their way, one is used."""
    image_folder(tmp_path)
    monkeypatch.setattr(utils.data, "usable_cpus", lambda: 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(sys, "platform", "linux")
    found = loader(split_of(tmp_path), 2, 4, (3, 32, 32))
    assert found.num_workers == workers
    assert found.dataset.transparent.is_shared() == bool(workers)
    notes = [str(warning.message) for warning in recwarn if warning.category is UserNote]
    assert len(notes) == (said is not None)
    assert all(said in note and "--shm-size" in note for note in notes)


def test_no_shared_memory_at_all_is_none_that_is_free(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(shutil, "disk_usage", missing)
    monkeypatch.setattr(sys, "platform", "linux")
    assert shared_memory_bytes() == 0


def test_subsets_are_drawn_by_seed():
    data = Digits("test", pil_to_tensor)
    assert random_subset(data, 32, 0).indices == random_subset(data, 32, 0).indices
    assert random_subset(data, 32, 0).indices != random_subset(data, 32, 1).indices
    assert len(limited(data, 50)) == 50
    assert limited(data, None) is data
    assert len({data.targets[i] for i in limited(data, 100).indices}) == 10
    with pytest.raises(UserError, match="360"):
        random_subset(data, 361, 0)
