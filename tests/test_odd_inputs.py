"""Odd but right inputs, each with the right value, and wrong or ambiguous ones, each with one line of error."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

import test_kt
import test_quant
from models import DEFAULT_MODEL, LoadedModel, load_model
from models.registry import save_local_dir
from quant import QuantConfig
from quant.export import export
from scripts import run_onnx, train_teacher
from tests.conftest import run_script
from tests.odd_images import BACKGROUND, ODD, REFUSED, RGB, Odd, with_alpha
from utils import image_files
from utils.classes import class_numbers, labels_of
from utils.data import DataConfig, Digits, evaluation_loader, evaluation_set, unlabelled_files
from utils.device import multiplies_bytes
from utils.errors import UserError, UserNote, run_main
from utils.evaluation import evaluate
from utils.image_files import read_image
from utils.images import Real, Stored, images_at_hand

TOP1 = 99.444
"""Of the bundled model on the 360 test digits: 358. Most rows take a fifth of them."""
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUMBERS = [str(digit) for digit in range(12)]


@pytest.fixture(scope="session")
def pictures() -> list[tuple[Image.Image, int]]:
    """Every fifth test digit, grey, with its label."""
    data = Digits("test", lambda image: image.convert("L"))
    return [data[number] for number in range(0, len(data), 5)]


@pytest.fixture(scope="session")
def digits(pictures, tmp_path_factory) -> Path:
    """A folder of PNGs for each digit."""
    return written(tmp_path_factory.mktemp("digits"), pictures, lambda image: image)


def written(root: Path, pictures, change: Callable[[Image.Image], Image.Image], ending: str = "png") -> Path:
    """The digits in class folders `0` .. `9`, each picture changed."""
    for number, (image, label) in enumerate(pictures):
        (root / str(label)).mkdir(exist_ok=True, parents=True)
        change(image).save(root / str(label) / f"{number}.{ending}")
    return root


@pytest.fixture(scope="session")
def right(pictures) -> list[list[bool]]:
    """For each digit, whether the bundled model gets each of its pictures right."""
    model = load_model(DEFAULT_MODEL)
    images = torch.stack([model.preprocessing.eval_transform()(image.convert("RGB")) for image, _ in pictures])
    answers, labels = model.vit(images).argmax(1).tolist(), [label for _, label in pictures]
    found = [
        [answer == digit for answer, label in zip(answers, labels, strict=True) if label == digit]
        for digit in range(10)
    ]
    assert not all(map(all, found))  # a row that is right by chance would not be
    return found


def percent(right: Sequence[Sequence[bool]], wrong: int = 0) -> float:
    """Top-1 where all these pictures are there, and some that no model can get right."""
    answers = [answer for of_one in right for answer in of_one]
    return round(100 * sum(answers) / (len(answers) + wrong), 3)


@functools.cache
def bundled() -> LoadedModel:
    return load_model(DEFAULT_MODEL)


def teacher(numbers: Sequence[int] = range(10), count: int = 10, dataset: str | None = None, **config) -> LoadedModel:
    """The bundled model, digit d as its class `numbers[d]` of so many; `config` goes into its configuration."""
    model = copy.deepcopy(bundled())
    head = nn.Linear(model.vit.head.in_features, count)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-100)
        for digit, number in enumerate(numbers):
            head.weight[number], head.bias[number] = model.vit.head.weight[digit], model.vit.head.bias[digit]
    model.vit.head, model.vit.num_classes = head.requires_grad_(False), count
    model.vit.pretrained_cfg = {**model.vit.pretrained_cfg, "num_classes": count, "label_names": None, **config}
    architecture = (model.architecture[0], {**model.architecture[1], "num_classes": count})
    return dataclasses.replace(model, dataset=dataset, architecture=architecture)


def top1(model: LoadedModel, root: Path, **read) -> float:
    data = evaluation_loader(model, DataConfig(str(root), num_workers=0, **read))
    return evaluate({"model": model.sparse()}, data, torch.device("cpu"))["model"]["top1"]


def lay_out(root: Path, digits: Path, folders: Sequence[str | None]) -> Path:
    """Digit d in `folders[d]`, None leaves it out; folders beyond the tenth have a picture that is none of theirs."""
    for digit, name in enumerate(folders):
        if name is not None:
            (root / name).mkdir(parents=True)
            files = sorted((digits / str(min(digit, 9))).iterdir())
            for file in files if digit < 10 else files[:1]:
                (root / name / file.name).hardlink_to(file)
    return root


@dataclasses.dataclass(frozen=True)
class Case:
    """Folders of the digits, a model, and the names that its classes have."""

    folders: Sequence[str | None]
    names: Sequence[str]
    numbers: Sequence[int] = tuple(range(10))
    model: dict = dataclasses.field(default_factory=dict)
    read: dict = dataclasses.field(default_factory=dict)
    train: Sequence[str] = ()


def declared(names: object, **more) -> dict:
    """What makes a model that names its classes."""
    return {"label_names": names, "count": len(names), **more}


def places(folders: Sequence[str], order: Sequence[str]) -> list[int]:
    """The numbers of the ten digits in a model that was trained on `folders` in this order."""
    return [order.index(name) for name in folders[:10]]


INFO = ImageNetInfo("imagenet-1k")
SOME = [0, 3, 17, 207, 281, 340, 388, 555, 817, 999]
WNIDS = [INFO.index_to_label_name(number) for number in SOME]
INFO_21K = ImageNetInfo("imagenet-21k-goog")
PADDED = [f"class{number:02d}" for number in range(1, 13)]
CLASS = [f"class{number}" for number in range(1, 13)]
ACCENT = [f"Zahl {word}é" for word in WORDS]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHUFFLED = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
BY_PLACE = [WORDS[SHUFFLED.index(number)] for number in range(10)]
YEARS = [f"{word} {2000 + len(word)}" for word in WORDS]
PLANES = ["DC-10", "DC-3", *WORDS[2:]]
THREE = [word if digit in (1, 4, 7) else None for digit, word in enumerate(WORDS)]
TEXT, LAST_FIRST = (
    sorted(NUMBERS),
    ["cat_0", "bird_1", "ant_2", *[f"{word}_{n}" for n, word in enumerate(WORDS[3:], 3)]],
)

RIGHT = {
    "as the model names them": Case(NUMBERS[:10], NUMBERS[:10], model={"dataset": "digits"}),
    "zeros in front": Case([f"{d:03d}" for d in range(10)], NUMBERS[:10], model={"dataset": "digits"}),
    "a subset": Case([*NUMBERS[:3], *[None] * 7], NUMBERS[:10], model={"dataset": "digits"}),
    "words": Case(WORDS, WORDS, model=declared(WORDS)),
    "words in another order": Case(WORDS, BY_PLACE, SHUFFLED, declared(BY_PLACE)),
    "a subset of words in another order": Case(THREE, BY_PLACE, SHUFFLED, declared(BY_PLACE)),
    "names by number": Case(WORDS, WORDS, model=declared({str(d): word for d, word in enumerate(WORDS)})),
    "names with gaps": Case(
        WORDS, ["0", *WORDS, "11"], range(1, 11), declared(dict(enumerate(WORDS, 1)), count=12)
    ),
    "names that are integers": Case(NUMBERS[:10], NUMBERS[:10], model=declared(list(range(10)))),
    "other case": Case([word.upper() for word in WORDS], WORDS, model=declared(WORDS)),
    "other separators": Case(
        [f"the-digit_{word}" for word in WORDS],
        [f"the digit {word}" for word in WORDS],
        model=declared([f"the digit {word}" for word in WORDS]),
    ),
    "names that differ in case alone": Case(
        ["A", "a", "B", "b", *WORDS[4:]],
        ["A", "a", "B", "b", *WORDS[4:]],
        model=declared(["A", "a", "B", "b", *WORDS[4:]]),
    ),
    "letters as a Mac writes them": Case(
        [unicodedata.normalize("NFD", name) for name in ACCENT], ACCENT, model=declared(ACCENT)
    ),
    "descriptions": Case(
        WORDS,
        [f"n{d}" for d in range(10)],
        model=declared(
            [f"n{d}" for d in range(10)], label_descriptions={f"n{d}": f"{w}, number {d}" for d, w in enumerate(WORDS)}
        ),
    ),
    "ten of ImageNet": Case(WNIDS, INFO.label_names(), SOME, {"count": 1000}),
    "ten of ImageNet in words": Case(
        [INFO.index_to_description(number).split(", ")[0] for number in SOME], INFO.label_names(), SOME, {"count": 1000}
    ),
    "ten of ImageNet-21k": Case(
        WNIDS, INFO_21K.label_names(), [INFO_21K.label_names().index(name) for name in WNIDS], {"count": 21843}
    ),
    "CIFAR-10's names": Case(CIFAR10, CIFAR10, model={"dataset": "cifar10"}),
    "four of CIFAR-10": Case([*CIFAR10[:4], *[None] * 6], CIFAR10, model={"dataset": "cifar10"}),
    "numbers for words": Case(NUMBERS[:10], WORDS, model=declared(WORDS), read={"class_order": "numeric"}),
    "letters for numbers": Case(
        list("abcdefghij"), NUMBERS[:10], model={"dataset": "digits"}, read={"class_order": "text"}
    ),
    "an order that says what the names say": Case(
        NUMBERS[:10], NUMBERS[:10], model={"dataset": "digits"}, read={"class_order": "numeric"}
    ),
    "twelve by number": Case(NUMBERS, NUMBERS, model={"count": 12}, read={"class_order": "numeric"}),
    "twelve as text": Case(NUMBERS, TEXT, places(NUMBERS, TEXT), {"count": 12}, {"class_order": "text"}),
    "twelve that the model names by number": Case(NUMBERS, NUMBERS, model=declared(NUMBERS)),
    "twelve that the model names as text": Case(NUMBERS, TEXT, places(NUMBERS, TEXT), declared(TEXT)),
    "twelve padded": Case(PADDED, PADDED, model={"count": 12}),
    "twelve class1 .. class12": Case(CLASS, CLASS, model={"count": 12}, read={"class_order": "numeric"}),
    "a number behind each word": Case(LAST_FIRST, LAST_FIRST, model={}, read={"class_order": "numeric"}),
    "no names, words": Case(WORDS, sorted(WORDS), places(WORDS, sorted(WORDS))),
    "no names, some with numbers": Case(
        PLANES, sorted(PLANES), places(PLANES, sorted(PLANES)), read={"class_order": "text"}
    ),
    "numbers and a word": Case(
        [*NUMBERS, "background"], [*NUMBERS, "background"], model={"count": 13}, read={"class_order": "numeric"}
    ),
    "the same numbers, text order is natural": Case(YEARS, sorted(YEARS), places(YEARS, sorted(YEARS))),
    "train/ tells the order of a subset": Case(
        THREE, sorted(WORDS), places(WORDS, sorted(WORDS)), train=WORDS
    ),
    "train/ by number tells the order of a subset": Case(
        [*NUMBERS[:9], None], NUMBERS, model={"count": 12}, read={"class_order": "numeric"}, train=NUMBERS
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::utils.errors.UserNote")
@pytest.mark.parametrize("case", RIGHT.values(), ids=RIGHT.keys())
def test_folders_get_the_classes_that_the_model_has(tmp_path, digits, right, case):
    root = lay_out(tmp_path / "val", digits, case.folders).parent
    for name in case.train:
        (root / "train" / name).mkdir(parents=True)
    model = teacher(case.numbers, **case.model)
    there = [answers for name, answers in zip(case.folders, right, strict=False) if name]
    assert top1(model, root, **case.read) == percent(there, len(case.folders[10:]))
    assert model.classes == len(case.names)
    assert evaluation_set(model, DataConfig(str(root), **case.read)).classes == list(case.names)


def test_all_test_digits_as_a_folder_have_the_accuracy_of_the_bundled_ones(tmp_path):
    data = Digits("test", lambda image: image)
    root = written(tmp_path / "val", [data[number] for number in range(360)], lambda image: image)
    assert top1(load_model(DEFAULT_MODEL), root.parent) == TOP1 == top1(teacher(), root)


@pytest.mark.parametrize(
    "junk",
    [
        "val/.ipynb_checkpoints/1-checkpoint.png",
        "val/3/.ipynb_checkpoints/1-checkpoint.png",
        "val/3/._1.png",
        "val/__MACOSX/3/._1.png",
        "val/3/__MACOSX/1.png",
        "val/@eaDir/1.png",
        "val/3/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
        "val/lost+found/1.png",
        "val/$RECYCLE.BIN/1.png",
        "val/System Volume Information/1.png",
        "val/.Trash-1000/files/1.png",
        "val/3/Thumbs.db",
        "val/3/desktop.ini",
        "val/.DS_Store",
        "val/readme.txt",
        ".ipynb_checkpoints/val/1.png",
        "train/.ipynb_checkpoints/1.png",
    ],
)
def test_what_tools_leave_behind_is_no_class_and_no_image(tmp_path, digits, right, junk):
    root = lay_out(tmp_path / "val", digits, NUMBERS[:10]).parent
    for name in NUMBERS[:10]:
        (root / "train" / name).mkdir(parents=True)
    (root / junk).parent.mkdir(parents=True, exist_ok=True)
    (root / junk).write_bytes(b"Mac OS X")
    assert top1(teacher(), root) == percent(right)
    below = unlabelled_files(root, lambda image: image)  # as --images
    assert len(below) == sum(map(len, right))
    assert all(isinstance(below[number][0], Image.Image) for number in range(len(below)))


def test_a_training_folder_with_junk_has_as_many_classes_as_without(tmp_path):
    for split in ("train", "val"):
        for name in ("b", "a", ".ipynb_checkpoints", "__MACOSX"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(RGB).save(tmp_path / split / name / "1.png")
    assert train_teacher.count_classes("folder", str(tmp_path)) == 2


def test_links_are_followed_once(tmp_path, digits, right):
    root = tmp_path / "val"
    root.mkdir()
    for digit in range(10):
        (root / str(digit)).symlink_to(digits / str(digit))
    assert top1(teacher(), tmp_path) == percent(right)
    deep = tmp_path / "photos" / "of" / "1"
    deep.mkdir(parents=True)
    Image.fromarray(RGB).save(deep / "1.png")
    (deep / "again").symlink_to(tmp_path / "photos")
    assert unlabelled_files(tmp_path / "photos", lambda image: image).files == [str(deep / "1.png")]


ALPHA_OF_NOISE = np.random.default_rng(0)


def veiled(image: Image.Image, shown: int) -> Image.Image:
    """A digit that is drawn by its alpha alone: the ink is `shown`, what is hidden any colour."""
    pixels = np.asarray(image)
    alpha = pixels if shown else 255 - pixels
    colours = ALPHA_OF_NOISE.integers(0, 256, (*pixels.shape, 3))
    colours[alpha > 0] = shown
    return Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8))


CONVERTED = {
    "RGB": (lambda image: image.convert("RGB"), "png", {}),
    "a palette": (lambda image: image.convert("P"), "png", {}),
    "16 bits, PNG": (lambda image: Image.fromarray(np.asarray(image) * np.uint16(257)), "png", {}),
    "16 bits, TIFF": (lambda image: Image.fromarray(np.asarray(image) * np.uint16(257)), "tiff", {}),
    "16 bits, PGM": (lambda image: Image.fromarray(np.asarray(image) * np.int32(257)), "pgm", {}),
    "opaque alpha": (lambda image: image.convert("RGBA"), "png", {}),
    "black ink on white": (lambda image: veiled(image, 0), "png", {}),
    "white ink on black": (lambda image: veiled(image, 255), "png", {"background": (0, 0, 0)}),
    "black ink, WebP": (lambda image: veiled(image, 0), "webp", {}),
    "LOUD ENDINGS": (lambda image: image, "PNG", {}),
    "GIF": (lambda image: image, "gif", {}),
}


@pytest.mark.filterwarnings("ignore::utils.errors.UserNote")
@pytest.mark.parametrize(("change", "ending", "read"), CONVERTED.values(), ids=CONVERTED.keys())
def test_digits_in_other_kinds_of_files_are_as_accurate(tmp_path, pictures, right, monkeypatch, change, ending, read):
    monkeypatch.setattr(Image.Image, "save", lossless(Image.Image.save)) if ending == "webp" else None
    root = written(tmp_path, pictures, change, ending)
    assert top1(teacher(), root, **read) == percent(right)


def lossless(save: Callable) -> Callable:
    return lambda image, file: save(image, file, lossless=True, exact=True)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_an_odd_image_is_read_as_what_it_shows_and_alike_in_both_places(tmp_path, odd: Odd):
    file = tmp_path / odd.name
    file.write_bytes(odd.data)
    try:
        Image.open(file).load()
    except OSError:  # some versions of Pillow cannot
        with pytest.raises(UserError, match="cannot read the image"):
            read_image(file)
        return
    for read in (read_image, run_onnx.read_image):
        image, transparent = read(str(file), BACKGROUND)
        assert image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image, dtype=int), odd.pixels, rtol=0, atol=odd.tolerance)
        assert transparent == odd.transparent
    assert np.array_equal(read_image(file)[0], run_onnx.read_image(str(file))[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_runner_turns_photographs_and_evaluation_does_not(tmp_path, orientation, form):
    """Upright is (40, 24), the file holds it as the camera was held; Pillow itself turns TIFF."""
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20], upright[12:, :20] = (250, 20, 20), (20, 250, 20)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose, which take the upright one to the file
    held = Image.fromarray(upright)
    held = held if orientation == 1 else held.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    held.save(tmp_path / f"photo.{form.lower()}", form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    file = str(tmp_path / f"photo.{form.lower()}")
    turned = np.asarray(run_onnx.read_image(file)[0], dtype=int)
    assert turned.shape == upright.shape
    assert np.abs(turned - upright).mean() < 4
    expected = upright if form == "TIFF" else np.asarray(held)
    assert np.abs(np.asarray(read_image(file)[0], dtype=int) - expected).mean() < 4


def test_damaged_exif_is_no_reason_to_refuse_a_picture(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    for read in (read_image, run_onnx.read_image):
        assert np.array_equal(read(str(tmp_path / "a.png"))[0], RGB)


@pytest.mark.parametrize("read", [read_image, run_onnx.read_image], ids=["evaluation", "runner"])
def test_a_picture_beyond_pillows_own_limit_is_read_in_silence(tmp_path, monkeypatch, recwarn, read):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    assert np.array_equal(read(str(tmp_path / "a.png"))[0], RGB)
    assert not recwarn
    if read is read_image:
        assert Image.MAX_IMAGE_PIXELS == 3  # of whoever else is in this process


@pytest.mark.parametrize("read", [read_image, run_onnx.read_image], ids=["evaluation", "runner"])
@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_is_not_read_is_named(tmp_path, read, name):
    file, (data, why) = tmp_path / name, REFUSED[name]
    file.write_bytes(data)
    if read is read_image:
        with pytest.raises(UserError, match=why) as error:
            read(file)
        assert name in str(error.value) and "\n" not in str(error.value)
    else:
        with pytest.raises(Exception, match=None if why == "cannot read" else why):
            read(str(file))


def with_holes(root: Path) -> Path:
    """Twelve pictures of two classes, three of them transparent in part; the alpha of others hides nothing."""
    hidden = np.full((2, 4), 255, np.uint8)
    hidden[0, 0] = 0
    for number in range(12):
        alpha = hidden if number in (4, 7, 10) else np.full((2, 4), 255, np.uint8)
        file = root / f"{number // 6}" / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True, parents=True)
        (with_alpha(RGB, alpha) if number > 2 else Image.fromarray(RGB)).save(file)
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_transparency_is_told_once_with_the_number_and_the_first_file(tmp_path, workers):
    model = teacher(range(10), 12, label_names=NUMBERS)
    root = with_holes(tmp_path)
    data = evaluation_loader(model, DataConfig(str(root), num_workers=workers, val_batchsize=1, background=(1, 2, 3)))
    with pytest.warns(UserNote) as notes:
        for _ in range(2):
            evaluate({"model": model.sparse()}, data, torch.device("cpu"))
    (said,) = [str(note.message) for note in notes]
    assert said.startswith(f"3 of the images that were read have transparency, first {root / '0' / '04.png'}")
    assert said.endswith("--background 1,2,3")


def test_stored_and_real_images_are_laid_on_the_background_too(tmp_path):
    model = teacher(count=12, label_names=NUMBERS)
    with_holes(tmp_path / "train")
    for source in (Stored(tmp_path / "train", (0, 0, 0)), Real(tmp_path, background=(0, 0, 0))):
        with pytest.warns(UserNote, match="3 of the images.*0/04.png.*--background 0,0,0"):
            found = images_at_hand(model, source, None, 0)
        plain = dataclasses.replace(source, background=None)
        with pytest.warns(UserNote, match="255,255,255"):
            white = images_at_hand(model, plain, None, 0)
        differ = (found.patches != white.patches).flatten(1).any(1)
        assert differ.sum() == 3
        assert found.patches.mean() < white.patches.mean()


def test_real_images_have_the_labels_of_the_model(tmp_path, digits):
    lay_out(tmp_path / "train", digits, NUMBERS)
    for order, number in (("numeric", 10), ("text", 2)):
        images = images_at_hand(teacher(count=12), Real(tmp_path, order), None, 0)
        assert torch.bincount(images.labels)[number] == 1  # the one picture of the folder 10
    named = images_at_hand(teacher(**declared(NUMBERS)), Real(tmp_path), None, 0)
    assert torch.bincount(named.labels)[10] == 1


def test_classes_without_an_image_are_told(tmp_path, digits):
    lay_out(tmp_path, digits, [None, *NUMBERS[1:10]])
    with pytest.warns(UserNote, match="images of 9 of the model's 10 classes; accuracy is over all of them"):
        evaluation_set(teacher(dataset="digits"), DataConfig(str(tmp_path)))


def test_a_thousand_numbers_are_the_order_of_imagenet_if_one_says_so():
    folders = sorted(str(number) for number in range(1000))
    of_imagenet = labels_of(teacher(count=1000, dataset="imagenet"))
    numbers, names = class_numbers(folders, of_imagenet, "numeric", "here")
    assert all(numbers[folder] == int(folder) for folder in folders)
    assert names == INFO.label_names()
    by_count = labels_of(teacher(count=1000))  # their number alone does not make them ImageNet's
    assert class_numbers(folders, by_count, "text", "here")[1] == folders
    with pytest.raises(UserError, match="--class_order"):
        class_numbers(folders, by_count, None, "here")


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory) -> Path:
    """A teacher of twelve classes in the order of their numbers, as an ONNX file in full precision."""
    pytest.importorskip("onnxruntime")
    model = teacher(**declared([f"digit {name}" for name in NUMBERS]))
    return export(
        tmp_path_factory.mktemp("onnx") / "t.onnx", model.sparse(), model, QuantConfig(32, 32), labels_of(model).names
    )


def test_the_runner_names_classes_turns_photographs_and_tells_of_transparency(tmp_path, pictures, onnx_file, capsys):
    ink = Image.fromarray(255 - np.asarray(pictures[3][0].resize((32, 32))))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[3][0].resize((32, 32)).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    veil = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    veil.putalpha(ink)
    veil.save(tmp_path / "ink.png")
    names = run_onnx.main([str(onnx_file), str(tmp_path / "photo.png"), str(tmp_path / "ink.png")])
    assert names == [f"digit {pictures[3][1]}"] * 2
    told = capsys.readouterr().err.splitlines()
    first = f"note: 1 of the images have transparency, first {tmp_path / 'ink.png'}"
    assert told == [f"{first}; they are laid on --background 255,255,255"]


@pytest.mark.parametrize("name", REFUSED)
def test_the_runner_refuses_in_one_line(tmp_path, onnx_file, capsys, name):
    (tmp_path / name).write_bytes(REFUSED[name][0])
    with pytest.raises(SystemExit) as exit:
        run_onnx.main([str(onnx_file), str(tmp_path / name)])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and name in line and REFUSED[name][1] in line


def saved_teacher(folder: Path, model: LoadedModel) -> str:
    """It in timm's `local-dir` format, as `--model` takes it."""
    names = {"label_names": labels_of(model).names}
    model.vit.pretrained_cfg = {**model.vit.pretrained_cfg, **names}
    save_local_dir(model, folder, "test", **(names if names["label_names"] else {}))
    return f"local-dir:{folder}"


@pytest.mark.filterwarnings("ignore::utils.errors.UserNote")
def test_twelve_classes_are_right_from_the_folder_to_the_exported_file(tmp_path, digits, right):
    """Quantized, saved, exported and taught: every number and every name."""
    pytest.importorskip("onnxruntime")
    lay_out(tmp_path / "val", digits, NUMBERS)
    name = saved_teacher(tmp_path / "teacher", teacher(count=12))
    data = ["--model", name, "--dataset", str(tmp_path), "--class_order", "numeric", "--num_workers", "0"]
    flags = [*data, "--mode", "1", "--output", str(tmp_path / "out"), "--save", str(tmp_path / "saved")]
    flags += ["--check_images", "0"]
    report = test_quant.main([*flags, "--export", str(tmp_path / "q.onnx")])
    assert report["fp"]["top1"] == percent(right, 2)
    assert report["quant"]["top1"] == pytest.approx(percent(right, 2), abs=3)
    # Where sums are made of halves, a value on the edge of two codes can move one image.
    moved = 0 if multiplies_bytes() else 100 / report["quant"]["images"]
    assert report["export"]["top1"] == pytest.approx(report["quant"]["top1"], abs=moved + 0.01)
    assert json.loads((tmp_path / "saved" / "quantized.json").read_text())["classes"] == NUMBERS
    files = [str(next((digits / str(digit)).iterdir())) for digit in range(10)]
    assert run_onnx.main([str(tmp_path / "q.onnx"), *files]) == NUMBERS[:10]
    learn = ["--mode", "1", "--student", name, "--student_init", "scratch", "--finetune", "full", "--epoches", "1"]
    test_kt.main([*data, *learn, "--images_per_epoch", "8", "--output", str(tmp_path / "kt")])
    student = load_model(f"local-dir:{tmp_path / 'kt' / 'student'}")
    assert labels_of(student).names == NUMBERS


@pytest.mark.parametrize(("order", "names"), [(None, TEXT), ("text", TEXT), ("numeric", NUMBERS)])
def test_the_trainer_defines_the_order_and_writes_it_down(tmp_path, digits, order, names):
    for split in ("train", "val"):
        lay_out(tmp_path / "data" / split, digits, [*[None] * 10, "10", "11"])
        for number in NUMBERS[:10]:
            (tmp_path / "data" / split / number).mkdir()
            Image.fromarray(RGB).save(tmp_path / "data" / split / number / "1.png")
    flags = ["--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--epochs", "1"]
    flags += [] if order is None else ["--class_order", order]
    train_teacher.main([*flags, "--model_path", str(saved_weights(tmp_path)), "--num_workers", "0"])
    trained = load_model(f"local-dir:{tmp_path / 'out'}")
    assert labels_of(trained).names == names
    found = evaluation_set(trained, DataConfig(str(tmp_path / "data")))
    assert [found.classes[label] for label in found.targets] == [Path(file).parent.name for file in found.files]


def saved_weights(folder: Path) -> Path:
    torch.save(load_model(DEFAULT_MODEL).vit.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def plain(names: Sequence[str]) -> Callable[[Path], object]:
    """Folders of these names with a picture in each; a name that ends in / has none."""

    def make(root: Path) -> None:
        for name in names:
            (root / name).mkdir(parents=True)
            if not name.endswith("/"):
                Image.fromarray(RGB).save(root / name / "1.png")

    return make


TEN = {"count": 10}
DIGITS = {"dataset": "digits"}
WRONG = {
    "numbers, no names": (NUMBERS, {"count": 12}, {}, "which order.*0, 1, 10 and 9 more.*0, 1, 2 and 9.*--class_order"),
    "class1 .. class12": (CLASS, {"count": 12}, {}, "class1, class10, class11.*class1, class2, class3.*--class_order"),
    "numbers behind words": (LAST_FIRST, TEN, {}, "ant_2, bird_1.*cat_0, bird_1, ant_2.*--class_order"),
    "numbers and a word": ([*NUMBERS, "background"], {"count": 13}, {}, "0, 1, 10 and 10.*0, 1, 2 and 10.*class_order"),
    "some with numbers": (PLANES, TEN, {}, "DC-10, DC-3, eight.*DC-3, DC-10, eight.*--class_order"),
    "numbers and train/": (["val/1", *[f"train/{n}" for n in NUMBERS]], {"count": 12}, {}, "train/ folder.*order"),
    "from one on": ([*NUMBERS[1:11]], DIGITS, {}, "the name 10, classes without a folder are 0;.*--class_order"),
    "numbers for words": (NUMBERS[:10], declared(WORDS), {}, "name 0, 1, 2 and 7 more.*zero, one, two.*--class_order"),
    "words for numbers": (WORDS, DIGITS, {}, "name eight, five, four and 7 more.*0, 1, 2 and 7 more.*--class_order"),
    "an extra folder": ([*WORDS, "misc"], declared(WORDS), {}, "the name misc; rename or remove.*11.*10"),
    "a misspelt folder": (["aeroplane", *CIFAR10[1:]], {"dataset": "cifar10"}, {}, "name aeroplane, classes.*airplane"),
    "a few folders, no names": (WORDS[:3], TEN, {}, "val has 3 classes, the model has 10; the names.*not known"),
    "an empty class": ([*NUMBERS[:9], "9/"], DIGITS, {}, "no images .*in 9; "),
    "five empty classes": ([*NUMBERS[:5], *[f"{n}/" for n in range(5, 10)]], DIGITS, {}, "in 5, 6, 7 and 2 more;"),
    "junk alone": ([*NUMBERS[:9], "9/.ipynb_checkpoints"], DIGITS, {}, "no images .*in 9; "),
    "no folders": (["./"], DIGITS, {}, "needs a folder per class"),
    "not in train/": ([*[f"train/{w}" for w in WORDS], "val/one", "val/dog"], TEN, {}, "the name dog.*train/"),
    "train/ of another model": ([*[f"train/{w}" for w in WORDS[:4]], "val/one"], TEN, {}, "train/.*has 4 classes.*10"),
    "one class twice": ([*NUMBERS[:10], "07"], DIGITS, {}, "07 and 7 are both the class 7"),
    "a synonym beside the name": (["n01440764", "tench"], {"count": 1000}, {}, "n01440764 and tench are both"),
    "a name of two classes": (["crane"], {"count": 1000}, {}, "no single class has the name crane"),
    "a name twice in the model": (["a", "b"], declared(["a", "b", "b"]), {}, "no single class has the name b,"),
    "too few label_names": (WORDS, {"count": 10, "label_names": WORDS[:9]}, {}, "label_names has 9 entries.*10"),
    "label_names beyond": (WORDS, {"count": 10, "label_names": {"10": "ten"}}, {}, "label_names has 1 entries"),
    "label_names turned round": (WORDS, {"count": 10, "label_names": {"ten": 1}}, {}, "label_names has 1 entries"),
    "an order against the names": (NUMBERS, declared(NUMBERS), {"class_order": "text"}, "leave out --class_order text"),
    "an order for a subset": (WNIDS, {"count": 1000}, {"class_order": "text"}, "leave out --class_order text"),
    "an order that is none": (WORDS, TEN, {"class_order": "by name"}, "class_order by name is none of text, numeric"),
    "an order and too few": (WORDS[:4], DIGITS, {"class_order": "text"}, "has 4 classes, the model has 10"),
    "a background of two": (NUMBERS[:10], DIGITS, {"background": (1, 2)}, r"background \(1, 2\)"),
    "a background beyond": (NUMBERS[:10], DIGITS, {"background": (1, 2, 256)}, r"background \(1, 2, 256\)"),
}  # fmt: skip


@pytest.mark.parametrize(("folders", "model", "read", "why"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_or_not_certain_is_one_line(tmp_path, folders, model, read, why):
    in_splits = any(name.startswith(("train/", "val/")) for name in folders)
    plain(folders)(tmp_path if in_splits else tmp_path / "val")
    with pytest.raises(UserError, match=why) as error:
        evaluation_set(teacher(range(min(10, model.get("count", 10))), **model), DataConfig(str(tmp_path), **read))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--class_order", "alphabetical"], "--class_order: invalid choice"),
        (["--background", "white"], "--background: 'white' is not R,G,B"),
        (["--background", "1,2"], "--background: '1,2' is not R,G,B"),
        (["--background", "0,0,256"], "--background: '0,0,256' is not R,G,B"),
        (["--dataset", "DATA", "--mode", "2"], "DATA/train.*the name dog"),
        (["--dataset", "DATA/val"], "no images .*in 9"),
        (["--images", "DATA/val/9"], "9 is no image pool.*no image files"),
    ],
)
def test_wrong_flags_and_folders_are_told_before_anything_is_made(tmp_path, flags, why):
    data = tmp_path / "DATA"
    plain(
        [*[f"val/{n}" for n in range(9)], "val/9/"]
        if "DATA/val" in str(flags)
        else [*[f"val/{n}" for n in range(10)], "train/dog"]
    )(data)
    given = [flag.replace("DATA", str(data)) for flag in flags]
    with pytest.raises(UserError, match=why) as error:
        test_quant.main([*given, "--num_workers", "0", "--output", str(tmp_path / "out"), "--num_images", "1"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        (["train/a", "train/b", "val/a"], "no test images of b"),
        (["train/a", "train/b", "val/a", "val/b", "val/c"], "the name c.*train/"),
        (["train/a", "train/b/", "val/a", "val/b"], "train has no images .*in b"),
        (["train/a", "val/a"], "2 or more classes"),
    ],
)
def test_the_trainer_names_classes_that_do_not_agree(tmp_path, folders, why):
    plain(folders)(tmp_path / "data")
    with pytest.raises(UserError, match=why):
        train_teacher.main(
            ["--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--num_workers", "0"]
        )


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refused(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=f"cannot read the folder {tmp_path}: Permission denied"):
        image_files.image_paths(tmp_path)


def test_an_ambiguous_folder_ends_the_program_with_code_2_and_one_line(tmp_path, digits, capsys):
    lay_out(tmp_path / "val", digits, NUMBERS)
    flags = ["--model", saved_teacher(tmp_path / "teacher", teacher(count=12)), "--dataset", str(tmp_path)]
    with pytest.raises(SystemExit) as exit:
        run_main(lambda: test_quant.main([*flags, "--mode", "1", "--output", str(tmp_path / "out")]))
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert line.startswith(f"error: --dataset {tmp_path / 'val'}: which order")


def test_the_command_line_tells_of_transparency_in_one_line(tmp_path):
    with_holes(tmp_path / "val")
    done = run_script(
        "test_quant.py", "--dataset", tmp_path, "--mode", 1, "--output", tmp_path / "out", "--check_images", 0
    )
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.split("\n") if "note: " in line]
    assert [note.partition("note: ")[2].split(",")[0] for note in notes] == [
        f"--dataset {tmp_path} has images of 2 of the model's 10 classes; accuracy is over all of them",
        "3 of the images that were read have transparency",
    ]


def test_the_bundled_digits_have_the_classes_of_the_model_too():
    """A model that names its classes is not asked where its classes stand."""
    numbers = [int(name) for name in reversed(NUMBERS[:10])]
    turned = teacher(numbers, dataset="digits", label_names=NUMBERS[9::-1])
    assert evaluation_set(turned, DataConfig()).targets == [9 - label for label in Digits("test", None).targets]
    for names, count, why in (
        (WORDS, 10, "bundled digits: no single class has the name 0"),
        (None, 5, "10 classes.* 5"),
    ):
        with pytest.raises(UserError, match=why):
            evaluation_set(teacher(range(min(count, 10)), count, "digits", label_names=names), DataConfig())
