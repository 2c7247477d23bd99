"""Which class of a model a folder of images is: by its name where the model's names are known, else by its place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from timm.data import ImageNetInfo, infer_imagenet_subset

from models import LoadedModel
from utils.errors import UserError
from utils.image_files import listing

# torchvision's data sets have them in their files alone.
NAMES = {
    "digits": "0 1 2 3 4 5 6 7 8 9",
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
        can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
        lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
        seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
        tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
        worm
    """,
}
"""The classes of data sets that models are named for, in the models' order."""


def names_of(data: str) -> list[str]:
    """The classes of a data set of `NAMES`."""
    return NAMES[data].split()


@dataclass(frozen=True)
class Labels:
    """What is known of the classes of a model."""

    count: int
    names: Sequence[str] | None = None
    """In the model's order; None where nothing says them."""
    synonyms: Sequence[Sequence[str]] = ()
    """Further names of each class."""
    guessed: bool = False
    """The number of classes alone says that the names are these."""

    def numbers(self, folders: Iterable[str]) -> dict[str, int]:
        """The class of every folder that bears the name of one class and of no other.

        The exact name comes first. After it case, zeros in front of a number, and whether words are divided by blanks,
        `_` or `-` make no difference, and synonyms count.
        """
        further = [(name, number) for number, names in enumerate(self.synonyms) for name in names]
        exact = [(name, number) for number, name in enumerate(self.names)]
        exactly, roughly = _unique(exact), _unique((_plain(name), number) for name, number in exact + further)
        found = {folder: exactly.get(folder, roughly.get(_plain(folder))) for folder in folders}
        return {folder: number for folder, number in found.items() if number is not None}


def labels_of(model: LoadedModel) -> Labels:
    """What a model's configuration, its data set or its number of classes says of its classes.

    Raises:
        UserError: `label_names` of another number of classes than the model has.
    """
    config = getattr(model.vit, "pretrained_cfg", None) or {}
    names = config.get("label_names")
    if names and config.get("num_classes", model.classes) == model.classes:
        names, described = _listed(names, model), config.get("label_descriptions")
        described = described if isinstance(described, Mapping) else {}
        return Labels(model.classes, names, [_readings(str(described.get(name, ""))) for name in names])
    if model.dataset in NAMES and model.classes == len(names_of(model.dataset)):
        return Labels(model.classes, names_of(model.dataset))
    subset = infer_imagenet_subset(model.vit)
    if subset is None:
        return Labels(model.classes)
    info = ImageNetInfo(subset)
    synonyms = [_readings(text) for text in info.label_descriptions()]
    return Labels(model.classes, info.label_names(), synonyms, guessed=model.dataset != "imagenet")


def class_numbers(
    folders: Sequence[str], labels: Labels, order: str | None, where: str, train: Sequence[str] | None = None
) -> tuple[dict[str, int], list[str]]:
    """The class of every folder, and the names of all classes of the model in its order.

    Args:
        folders: names of class folders, in text order.
        labels: what is known of the model's classes.
        order: `text` or `numeric`: how folders that do not bear the model's names are sorted to be its classes; None:
            as text, where sorting by number gives the same.
        where: what errors call the place of the folders.
        train: the folders that the model was trained on; None: `folders`.

    Raises:
        UserError: folders that are no class, two that are the same, another number than the model has, or an order that
            is not certain.
    """
    source = f"the train/ folder beside {where}" if train else where
    train = train or folders
    names, numbers = labels.names, {} if labels.names is None else labels.numbers(folders)
    if names is not None and len(numbers) == len(folders):
        ordered = [] if order is None else _in_order(train, order, source)
        if any(numbers.get(folder, place) != place for place, folder in enumerate(ordered)):
            raise UserError(f"{where}: the folders bear the model's class names; leave out --class_order {order}")
    elif names is not None and order is None:
        raise UserError(f"{where}: {_strangers(folders, numbers, names)}; {_hint(train, labels)}")
    else:
        ordered = _in_order(train, order, source)
        if len(ordered) != labels.count:
            why = "" if names is not None else "; the names of its classes are not known"
            found = f"{len(ordered)} classes, the model has {labels.count}"
            raise UserError(f"{source} has {found}{why} ({listing(ordered)})")
        numbers = Labels(labels.count, ordered).numbers(folders)
        if len(numbers) < len(folders):
            raise UserError(f"{where}: {_strangers(folders, numbers, ordered)}, which are those of train/; rename them")
        names = ordered if names is None or labels.guessed else names
    _require_one_folder_each(numbers, names, where)
    return numbers, list(names)


def _in_order(folders: Sequence[str], order: str | None, where: str) -> list[str]:
    """The folders sorted as text or by the numbers in their names."""
    text, numeric = sorted(folders), _by_number(folders)
    if order is None and text != numeric:
        both = f"as text {listing(text)}; by number {listing(numeric)}"
        raise UserError(f"{where}: which order do its classes have ({both})? give --class_order text or numeric")
    return numeric if order == "numeric" else text


def _by_number(folders: Sequence[str]) -> list[str]:
    """By the numbers alone where each folder has its own, else as text in which numbers count as such."""
    parts = {folder: re.split(r"(\d+)", folder) for folder in folders}
    natural = {name: [int(part) if place % 2 else part for place, part in enumerate(parts[name])] for name in folders}
    numbers = {name: tuple(part[1::2]) for name, part in natural.items()}
    own = all(numbers.values()) and len(set(numbers.values())) == len(folders)
    return sorted(sorted(folders), key=(numbers if own else natural).get)


def _strangers(folders: Sequence[str], numbers: Mapping[str, int], names: Sequence[str]) -> str:
    """Which folders bear no class's name, and which classes have no folder."""
    extra = [folder for folder in folders if folder not in numbers]
    missing = [name for number, name in enumerate(names) if number not in numbers.values()]
    without = f", classes without a folder are {listing(missing)}" if missing else ""
    return f"no single class has the name {listing(extra)}{without}"


def _hint(train: Sequence[str], labels: Labels) -> str:
    if len(train) != labels.count:
        return f"rename or remove folders (there are {len(train)}, the model has {labels.count} classes)"
    return "rename folders, or give --class_order text or numeric if that order of the folders is the model's"


def _require_one_folder_each(numbers: Mapping[str, int], names: Sequence[str], where: str) -> None:
    taken: dict[int, str] = {}
    for folder, number in numbers.items():
        if number in taken:
            raise UserError(f"{where}: {taken[number]} and {folder} are both the class {names[number]}; make them one")
        taken[number] = folder


def _listed(names: Sequence | Mapping, model: LoadedModel) -> list[str]:
    """timm's `label_names`, a list or a dictionary from classes to names, which may leave some out."""
    names = names if isinstance(names, list | tuple | Mapping) else []
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    try:
        found = {int(number): str(name) for number, name in pairs}
    except (ValueError, TypeError):
        found = {}
    named = [found.get(number, str(number)) for number in range(model.classes)]
    complete = len(names) == model.classes or isinstance(names, Mapping)
    if not found or not complete or not found.keys() <= set(range(model.classes)):
        what = f"label_names has {len(names)} entries, which do not name its {model.classes} classes"
        raise UserError(f"{model.name}: {what}; mend it in its config.json")
    return named


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Names that stand for one number only."""
    found: dict[str, set[int]] = {}
    for name, number in pairs:
        found.setdefault(name, set()).add(number)
    return {name: numbers.pop() for name, numbers in found.items() if len(numbers) == 1}


def _readings(description: str) -> list[str]:
    """A description, and each of the names that it is a list of."""
    return [description, *description.split(", ")] if description else []


def _plain(name: str) -> str:
    """A name without what file systems and people change in one."""
    words = re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", unicodedata.normalize("NFKC", name).strip()).casefold()
    return str(int(words)) if words.isdecimal() else words
