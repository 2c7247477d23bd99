#!/usr/bin/env python3
"""How good are inverted images: by judges that never saw the teacher, and by what is seen without real images.

Every pool beside as many real training images and as much pink noise. Stopped patches are filled: as they were when
they stopped where the canvas shows them so, else with their nearest neighbours. Finished figures are kept in
OUTPUT/rows.jsonl; OUTPUT also gets report.json and the tables, quality.md.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from models.config import ModelConfig
from scripts.comparison import Rows
from scripts.studies.train_judges import JudgeConfig, judge_view, judges, real_images, split_of
from utils.augment import AUGMENTATIONS, augmented
from utils.cli import Parser, add_flags, any_seed, check_numbers, from_flags, positive, setting
from utils.config import DataConfig
from utils.device import pick_dtype, versions
from utils.errors import UserError
from utils.files import atomic, user_path, writable_folder, write_json
from utils.lazy import F, torch
from utils.report import markdown, table

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from inversion.priors.natural import DrawnTokens
    from models import LoadedModel, SparseImages, SparseViT
    from scripts.studies.train_judges import Judge

REFERENCE = 5_000
"""Real images that others are held against, at most half of the training images."""
VIEWS = 4
"""Random views of an image."""
RIDGE = 0.1
"""Penalty of the head's regression."""
SLICE = 64
"""Images that the teacher is fed at once."""
REFERENCES = ("real", "noise")
"""Rows that are always there, as far as there are real images."""


@dataclass(frozen=True)
class QualityConfig:
    """What is measured. Raises `UserError` for what cannot be."""

    pools: tuple[str, ...] = setting(
        (), "image pools of the model, each with a name on request", nargs="*", metavar="[NAME=]DIR"
    )
    num_images: int = setting(128, "images of each pool, real ones and noise", type=positive, metavar="N")
    seeds: tuple[int, ...] = setting(
        (0,), "of real images, noise, views and the student's head", nargs="+", type=any_seed
    )
    head: str | None = setting(
        None,
        "weights of a backbone that a linear head is taught on; alone: the student's own",
        nargs="?",
        const="",
        metavar="BACKBONE",
    )
    augment: tuple[str, ...] = setting(
        ("flip", "shift", "mix", "contrast", "noise"),
        "changes of the images that the head is taught; digits are not mirrored",
        nargs="*",
        choices=AUGMENTATIONS,
    )
    looks: int = setting(4, "changed copies of each image", type=positive, metavar="N")
    figures: tuple[str, ...] | None = setting(None, "default all that can be had, some with --head", nargs="+")
    judges: str = setting("./runs/judges", "where judges are kept; what is missing is trained there", metavar="DIR")
    output: str = setting("./runs/image_quality", "where rows and tables go", metavar="DIR")

    def __post_init__(self) -> None:
        check_numbers(self)
        if unknown := set(self.figures or ()) - FIGURES.keys():
            raise UserError(f"--figures {min(unknown)} is none of {', '.join(FIGURES)}")
        names = [name for name, _ in self.named_pools()]
        if taken := [name for name in names if names.count(name) > 1 or name in REFERENCES]:
            raise UserError(f"--pools: {taken[0]} is the name of more than one row; give NAME=DIR")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds: a seed is given twice")

    def named_pools(self) -> list[tuple[str, Path]]:
        """Every pool's name in the tables, its folder's if none is given, and its folder."""
        found = []
        for given in self.pools:
            name, _, where = given.rpartition("=") if not Path(given).is_dir() else ("", "", given)
            folder = user_path(where, "--pools")
            found.append((name or folder.resolve().name, folder))
        return found


@dataclass(frozen=True)
class Images:
    """Images of one kind. `seed` is that of everything drawn for their figures."""

    name: str
    sparse: SparseImages
    model: LoadedModel
    seed: int

    @cached_property
    def filled(self) -> SparseImages:
        """With all their patches."""
        return self.sparse.filled(self.model.grid)

    @cached_property
    def pixels(self) -> Tensor:
        """Filled images (N, 3, H, W) in [0, 1]."""
        images = self.model.grid.unpatchify(self.filled.patches, self.filled.positions)
        return self.model.preprocessing.denormalize(images).clamp(0, 1)

    @cached_property
    def seen(self) -> Tensor:
        """What judges see of them: (N, 3, 32, 32) in [0, 1]."""
        return judge_view(self.pixels)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.sparse.labels

    @cached_property
    def digest(self) -> str:
        """Tells these images from all others."""
        parts = self.filled.patches, self.sparse.positions, self.sparse.labels
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()[:16]

    def generator(self) -> Generator:
        """For what is drawn: the same for every figure and kind of images."""
        return torch.Generator().manual_seed(self.seed)


@dataclass
class Bench:
    """What images are measured with."""

    model: LoadedModel
    data: DataConfig
    judges: Mapping[str, Judge]
    head: str | None = None
    augment: tuple[str, ...] = QualityConfig.augment
    looks: int = QualityConfig.looks
    told: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Probabilities of an image's views, by images and seed."""
    taught: dict[tuple[str, int], Lessons] = field(default_factory=dict)
    """Those of the last images that were asked for."""

    @cached_property
    def teacher(self) -> SparseViT:
        """The model that the images came out of."""
        return self.model.sparse()

    @cached_property
    def untaught(self) -> LoadedModel:
        """The student that a head is taught on."""
        from kt import StudentConfig, load_student

        return load_student(self.model, StudentConfig(path=self.head or None))

    @cached_property
    def student(self) -> SparseViT:
        """Its backbone."""
        return self.untaught.sparse()

    @cached_property
    def drawn(self) -> DrawnTokens:
        """What the backbone's tokens are on drawn scenes."""
        from inversion.priors.natural import DrawnTokens

        return DrawnTokens(self.student, torch.device("cpu"), torch.float32)

    @cached_property
    def test_features(self) -> tuple[Tensor, Tensor]:
        """The student's features (T, D) of real test images, and their labels (T,)."""
        from models import SparseImages
        from utils.data import evaluation_loader

        whole = partial(SparseImages.whole, self.model.grid)
        found = [whole(*batch) for batch in evaluation_loader(self.model, self.data)]
        return torch.cat([features_of(self.student, one) for one in found]), torch.cat([one.labels for one in found])

    @cached_property
    def order(self) -> Tensor:
        """Numbers of all training images, shuffled: the first ones are the reference."""
        count = len(split_of(self.model, self.data, "train"))
        return torch.randperm(count, generator=torch.Generator().manual_seed(0))

    @property
    def references(self) -> int:
        """How many images the reference has."""
        return min(REFERENCE, len(self.order) // 2)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Features (R, D) and labels (R,) of real training images."""
        pixels, labels = real_images(self.model, self.data, "train", only=self.order[: self.references].tolist())
        return self.judges["cnn"].features(pixels.float().div(255)), labels

    def probabilities(self, pixels: Tensor) -> Tensor:
        """What the teacher says of images (B, 3, H, W) in [0, 1]: (B, classes)."""
        with torch.inference_mode():
            parts = self.model.preprocessing.normalize(pixels).split(SLICE)
            return torch.cat([self.teacher.forward_images(part).softmax(1) for part in parts])

    def views(self, images: Images) -> tuple[Tensor, Tensor]:
        """The teacher's answers (N,) to the images, and its probabilities (N, VIEWS, classes) of their views."""
        key = images.digest, images.seed
        if key not in self.told:
            generator, flip = images.generator(), self.model.dataset != "digits"
            seen = [images.pixels] + [view(images.pixels, generator, flip) for _ in range(VIEWS)]
            self.told = {key: torch.stack([self.probabilities(pixels) for pixels in seen], dim=1)}
        return self.told[key][:, 0].argmax(1), self.told[key][:, 1:]

    def lessons(self, images: Images) -> Lessons:
        """What a student is taught with the images; the same object while these are asked for."""
        key = images.digest, images.seed
        if key not in self.taught:
            self.taught = {key: Lessons(self, images)}
        return self.taught[key]

    def lesson_settings(self) -> dict[str, object]:
        """How the head learns; digits are not mirrored."""
        changes = [change for change in self.augment if change != "flip" or self.model.dataset != "digits"]
        return {"looks": self.looks, "ridge": RIDGE, "augment": changes}


@dataclass
class Lessons:
    """Changed copies of images, look after look, and what teacher and student make of them."""

    bench: Bench
    images: Images

    @cached_property
    def changed(self) -> list[SparseImages]:
        """The images, filled and changed: `looks` times all of them."""
        generator, settings = self.images.generator(), self.bench.lesson_settings()
        grid = self.bench.model.grid
        return [augmented(self.images.filled, grid, settings["augment"], generator) for _ in range(settings["looks"])]

    @cached_property
    def logits(self) -> Tensor:
        """The teacher's (looks N, classes)."""
        return torch.cat([logits_of(self.bench.teacher, one) for one in self.changed])

    @cached_property
    def features(self) -> Tensor:
        """The student backbone's (looks N, D)."""
        return torch.cat([features_of(self.bench.student, one) for one in self.changed])


def view(images: Tensor, generator: Generator, flip: bool) -> Tensor:
    """A random view of each image (B, 3, H, W) in [0, 1].

    A square crop of 0.35 to 1 of its area, mirrored or not, with brightness and contrast changed by up to a fifth.
    """
    count = len(images)
    side = torch.empty(count).uniform_(0.35, 1, generator=generator).sqrt()
    across, down = (torch.empty(count).uniform_(-1, 1, generator=generator) * (1 - side) for _ in range(2))
    mirror = 1 - 2 * torch.randint(2, (count,), generator=generator) if flip else torch.ones(count)
    nought = torch.zeros(count)
    theta = torch.stack([side * mirror, nought, across, nought, side, down], dim=1).view(count, 2, 3)
    where = F.affine_grid(theta, images.shape, align_corners=False)
    crops = F.grid_sample(images, where, padding_mode="reflection", align_corners=False)
    contrast, brightness = (torch.empty(count, 1, 1, 1).uniform_(0.8, 1.2, generator=generator) for _ in range(2))
    means = crops.mean(dim=(1, 2, 3), keepdim=True)
    return ((crops - means) * contrast + means * brightness).clamp(0, 1)


def recognized_cnn(bench: Bench, images: Images) -> float:
    return recognized(bench.judges["cnn"], images)


def recognized_vit(bench: Bench, images: Images) -> float:
    return recognized(bench.judges["vit"], images)


def recognized(judge: Judge, images: Images) -> float:
    """Per cent of the images that the judge names as the label."""
    return 100 * (judge.logits(images.seen).argmax(1) == images.labels).float().mean().item()


def frechet(bench: Bench, images: Images) -> float:
    """Fréchet distance of the CNN judge's features from the reference's (Heusel et al., NeurIPS 2017).

    It is the larger the fewer images there are: only rows of as many images compare, and real ones have more than 0.
    """
    return frechet_distance(bench.judges["cnn"].features(images.seen), bench.reference[0])


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """Between normal distributions of the means and covariances of features (N, D) and (M, D)."""
    (mean, covariance), (mean_, covariance_) = (
        (features.mean(0), torch.cov(features.T)) for features in (ours.double(), theirs.double())
    )
    values, vectors = torch.linalg.eigh(covariance_)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The trace of the root of a product of two: of a symmetric matrix with the same eigenvalues.
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    return ((mean - mean_).square().sum() + covariance.trace() + covariance_.trace() - 2 * cross).item()


def spread(bench: Bench, images: Images) -> float:
    """Mean distance between the CNN judge's features of images of one class, in that of the reference."""
    features, labels = bench.reference
    return class_spread(bench.judges["cnn"].features(images.seen), images.labels) / class_spread(features, labels)


def class_spread(features: Tensor, labels: Tensor) -> float:
    """Mean over classes of the mean distance of two features (N, D) of one; NaN where no class has two."""
    groups = [features[labels == label] for label in labels.unique()]
    return statistics.fmean([torch.pdist(one).mean().item() for one in groups if len(one) > 1] or [math.nan])


def slope(bench: Bench, images: Images) -> float:
    """Slope of log power against log frequency, below the Nyquist frequency; about -2 for photographs."""
    power, frequency = radial_power(images.pixels)
    kept = (frequency >= 1) & (frequency <= min(images.pixels.shape[-2:]) // 2)
    x, y = frequency[kept].log(), power[kept].clamp(min=1e-12).log()
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def high(bench: Bench, images: Images) -> float:
    """Per cent of the power at frequencies above half of the Nyquist frequency."""
    spectrum, radius = power_spectrum(images.pixels)
    above = radius > min(images.pixels.shape[-2:]) / 4
    return (100 * spectrum[above].sum() / spectrum[radius >= 1].sum()).item()


def power_spectrum(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power of the brightness of images (N, 3, H, W), and how many waves per shorter side: both (H, W).

    Under a Hann window, since the edges of an image do not continue at the opposite ones.
    """
    grey, (height, width) = pixels.mean(1), pixels.shape[-2:]
    window = torch.hann_window(height, periodic=False)[:, None] * torch.hann_window(width, periodic=False)
    mean = (grey * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2((grey - mean) * window).abs().square().mean(0)
    rows, cols = (torch.fft.fftfreq(side) * min(height, width) for side in (height, width))
    return power, torch.hypot(rows[:, None], cols)


def radial_power(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power of images (N, 3, H, W) in rings, and the rings' frequencies: whole waves per shorter side."""
    power, radius = power_spectrum(pixels)
    ring = radius.round().long().flatten()
    total = torch.zeros(int(ring.max()) + 1).index_add_(0, ring, power.flatten())
    return total / ring.bincount().clamp(min=1), torch.arange(len(total)).float()


def head(bench: Bench, images: Images) -> float:
    """Top-1 in per cent, on real test images, of a linear head fitted to the teacher's logits of the images.

    The backbone is frozen: its features are computed once for each of some drawn changes of the images, and the head is
    the ridge regression from them, which no draw of batches disturbs.
    """
    lessons, (tested, labels) = bench.lessons(images), bench.test_features
    told = ridge(lessons.features, lessons.logits, tested, RIDGE)
    return 100 * (told.argmax(1) == labels).float().mean().item()


def learnable(bench: Bench, images: Images) -> float:
    """Per cent of changed images that a head taught with the other half of the images names as the teacher does.

    Both halves in turn, split at random: how much of what the teacher says of new images the backbone's features tell.
    """
    lessons, count = bench.lessons(images), len(images.labels)
    order, right = torch.randperm(count, generator=images.generator()), 0
    for half in (order[: count // 2], order[count // 2 :]):
        taught = torch.zeros(count, dtype=torch.bool).index_fill_(0, half, True).repeat(bench.looks)
        told = ridge(lessons.features[taught], lessons.logits[taught], lessons.features[~taught], RIDGE)
        right += (told.argmax(1) == lessons.logits[~taught].argmax(1)).sum().item()
    return 100 * right / len(lessons.logits)


def inception(bench: Bench, images: Images) -> float:
    """Inception score (Salimans et al., NeurIPS 2016) of the changed images, by the teacher.

    The exponential of the mutual information of a changed image and the teacher's answer: near the number of classes
    where every answer is sure and every class is as frequent.
    """
    p = bench.lessons(images).logits.double().softmax(1)
    entropy = torch.special.entr
    return (entropy(p.mean(0)).sum() - entropy(p).sum(1).mean()).exp().item()


def ridge(features: Tensor, wanted: Tensor, tested: Tensor, penalty: float) -> Tensor:
    """What a regression from features (M, D) to logits (M, K), squared weights costing `penalty`, says of (T, D)."""
    mean, offset = features.mean(0), wanted.mean(0)
    x, y = (features - mean).double(), (wanted - offset).double()
    weights = torch.linalg.solve(x.T @ x / len(x) + penalty * torch.eye(x.shape[1]).double(), x.T @ y / len(x))
    return (tested - mean).double() @ weights + offset


def features_of(vit: SparseViT, images: SparseImages) -> Tensor:
    """What the classifier of a model reads (N, D)."""
    return _outputs(vit, images, "features").flatten(1)


def logits_of(vit: SparseViT, images: SparseImages) -> Tensor:
    """What a model says (N, classes)."""
    return _outputs(vit, images, "logits")


def _outputs(vit: SparseViT, images: SparseImages, key: str) -> Tensor:
    dtype = getattr(torch, pick_dtype("auto", torch.device("cpu")))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        parts = [getattr(vit(part.patches, part.positions), key) for part in images.batches(SLICE)]
    return torch.cat(parts).float()


def agreement(bench: Bench, images: Images) -> float:
    """Per cent of random views to which the teacher's answer is the one that it gives to the image as it is."""
    answers, views = bench.views(images)
    return 100 * (views.argmax(2) == answers[:, None]).float().mean().item()


def sharpness(bench: Bench, images: Images) -> float:
    """Mean over views of the teacher's probability, in per cent, of the answer that it gives to the image as it is."""
    answers, views = bench.views(images)
    return 100 * views.gather(2, answers[:, None, None].expand(-1, VIEWS, 1)).mean().item()


def blurred(bench: Bench, images: Images) -> float:
    """Mean probability, in per cent, that the teacher gives the label at a third of the resolution."""
    size = images.pixels.shape[-2:]
    coarse = F.interpolate(images.pixels, [max(1, side // 3) for side in size], mode="bilinear", antialias=True)
    found = bench.probabilities(F.interpolate(coarse, size, mode="bicubic").clamp(0, 1))
    return 100 * found.gather(1, images.labels[:, None]).mean().item()


def roughness(bench: Bench, images: Images) -> float:
    """Mean difference of neighbouring pixels, in per cent of the range: total variation."""
    pixels = images.pixels
    return 100 * statistics.fmean(pixels.diff(dim=dim).abs().mean().item() for dim in (2, 3))


def natural(bench: Bench, images: Images) -> float:
    """100 times the distance of tokens in the student's backbone from those of drawn scenes."""
    from inversion.priors.natural import pooled

    parts = images.filled.batches(SLICE)
    with torch.inference_mode():
        found = pooled([bench.drawn.moments(part.patches, part.positions) for part in parts], [*map(len, parts)])
        return 100 * bench.drawn.distance(found).item()


@dataclass(frozen=True)
class Figure:
    """A figure of images: the function, a line of help, whether real images are needed, and which value is best.

    `best`: `high`, `low`, or `real`, that of real images. `judge`: the one that it asks. `student`: whether a student's
    backbone is needed, and `taught` whether changed images are.
    """

    measure: Callable[[Bench, Images], float]
    about: str
    real: bool
    best: str
    judge: str | None = None
    student: bool = False
    taught: bool = False


FIGURES: dict[str, Figure] = {
    "recognized_cnn": Figure(recognized_cnn, "% that the CNN judge names as the label", True, "high", "cnn"),
    "recognized_vit": Figure(recognized_vit, "% that the ViT judge names as the label", True, "high", "vit"),
    "frechet": Figure(frechet, "Fréchet distance from real images, CNN judge's features", True, "low", "cnn"),
    "spread": Figure(spread, "distance of two images of a class, 1 for real ones", True, "real", "cnn"),
    "slope": Figure(slope, "slope of log power against log frequency", True, "real"),
    "high": Figure(high, "% of power above half of the Nyquist frequency", True, "real"),
    "head": Figure(head, "top-1 % of a linear head that they taught", True, "high", student=True, taught=True),
    "agreement": Figure(agreement, "% of random views with the image's answer", False, "high"),
    "sharpness": Figure(sharpness, "mean probability of that answer in the views, %", False, "high"),
    "blurred": Figure(blurred, "mean probability of the label at a third of the resolution, %", False, "high"),
    "learnable": Figure(
        learnable,
        "% of changed images named as the teacher does by a head that the other half taught",
        False,
        "high",
        student=True,
        taught=True,
    ),
    "inception": Figure(inception, "Inception score of changed images by the teacher", False, "high", taught=True),
    "natural": Figure(
        natural, "distance of the student's tokens from drawn scenes', 100 variances", False, "low", student=True
    ),
    "roughness": Figure(roughness, "mean difference of neighbouring pixels, % of the range", False, "low"),
}


def pool_images(name: str, folder: Path, count: int, model: LoadedModel) -> SparseImages:
    """The first `count` images of a pool. Raises `UserError` where it is another model's or has fewer."""
    from inversion import ImagePool

    pool = ImagePool.existing(folder, model)
    there = pool.batches() * pool.config.batch_size
    if there < count:
        raise UserError(f"--num_images {count}: the pool {folder} has {there}")
    return pool.read(count)


def real_sample(bench: Bench, count: int, seed: int) -> SparseImages:
    """`count` real training images that the reference has not. Raises `UserError` where there are fewer."""
    from models import SparseImages
    from utils.classes import labels_of
    from utils.data import load_split

    left = bench.order[bench.references :]
    if len(left) < count:
        raise UserError(f"--num_images {count}: {len(left)} real training images are left beside the reference")
    model = bench.model
    found = load_split("train", model.dataset, bench.data, model.preprocessing.eval_transform(), labels_of(model))
    chosen = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))[:count]]
    images, labels = zip(*(found[number] for number in chosen.tolist()), strict=True)
    return SparseImages.whole(model.grid, torch.stack(images), torch.tensor(labels))


def noise_sample(model: LoadedModel, count: int, seed: int) -> SparseImages:
    """`count` images of pink noise, with the classes in turn as labels."""
    from inversion import INITS
    from models import SparseImages

    noise = INITS["pink"]((count, *model.preprocessing.input_size), torch.Generator().manual_seed(seed))
    return SparseImages.whole(model.grid, noise, torch.arange(count) % model.classes)


def kinds(bench: Bench, config: QualityConfig) -> Iterator[tuple[str, Callable[[int], SparseImages]]]:
    """Names of the rows, and what gives their images for a seed. Raises `UserError` for pools that cannot be used."""
    if has_data(bench.model, bench.data):
        yield "real", lambda seed: real_sample(bench, config.num_images, seed)
    yield "noise", lambda seed: noise_sample(bench.model, config.num_images, seed)
    for name, folder in config.named_pools():
        found = pool_images(name, folder, config.num_images, bench.model)
        yield name, lambda seed, found=found: found


def has_data(model: LoadedModel, data: DataConfig) -> bool:
    """Whether there are real images."""
    return data.dataset is not None or model.dataset == "digits"


def chosen_figures(config: QualityConfig, model: LoadedModel, data: DataConfig) -> dict[str, Figure]:
    """Those of `--figures`, else all that can be had; `head` with `--head`, and no other's student without."""
    if config.figures is not None:
        names = {*config.figures} if config.head is None else {*config.figures, "head"}
    else:
        there, student = has_data(model, data), config.head is not None
        usable = {name for name, figure in FIGURES.items() if student or not figure.student}
        names = {name for name in usable if there or not FIGURES[name].real}
    return {name: figure for name, figure in FIGURES.items() if name in names}


def cell(bench: Bench, images: Images, name: str) -> dict[str, object]:
    """All that a figure depends on."""
    found = {"figure": name, "images": images.digest, "seed": images.seed, "model": bench.model.fingerprint()}
    if (kind := FIGURES[name].judge) is not None:
        judge = bench.judges[kind]
        found |= {"judge": judge.name, "top1": judge.top1, "reference": bench.references}
    if FIGURES[name].student:
        found |= {"backbone": bench.head}
    if FIGURES[name].taught:
        found |= bench.lesson_settings()
    if name == "head":
        found |= {"dataset": bench.data.dataset, "val_limit": bench.data.val_limit, **bench.data.reading()}
    return found


def measured(
    bench: Bench, config: QualityConfig, rows: Rows, given: Iterable[tuple[str, Callable[[int], SparseImages]]]
) -> list[dict]:
    """The figures of every kind of images, as of `kinds`, for every seed, from disk where they are there."""
    found = []
    for name, give in given:
        for seed in config.seeds:
            images = Images(name, give(seed), bench.model, seed)
            values = {}
            for key, figure in chosen_figures(config, bench.model, bench.data).items():
                wanted = cell(bench, images, key)
                row = rows.find(wanted, {"value": float | None})
                if row is None:
                    value = figure.measure(bench, images)
                    value = value if math.isfinite(value) else None
                    row = rows.add(wanted, {"name": name, "figure": key, "value": value})
                values[key] = row["value"]
            told = ", ".join(f"{key} {shown(value)}" for key, value in values.items())
            print(f"{name}, seed {seed}: {told}", flush=True)
            found.append({"images": name, "seed": seed, "count": len(images.labels), **values})
    return found


def summary(rows: Sequence[dict]) -> list[dict]:
    """Means over seeds, a row for each kind of images, and standard deviations, `KEY_std`, where there are several."""
    found = []
    for name in dict.fromkeys(row["images"] for row in rows):
        group = [row for row in rows if row["images"] == name]
        means = {"images": name, "count": group[0]["count"]}
        for key in FIGURES.keys() & group[0].keys():
            values = [row[key] for row in group]
            means[key] = None if None in values else statistics.fmean(values)
            means[f"{key}_std"] = None if None in values or len(values) < 2 else statistics.stdev(values)
        found.append(means)
    return found


def goodness(lines: Sequence[dict], key: str) -> list[float]:
    """A figure of pools, in their order, the higher the better."""
    values = [line[key] for line in lines if line["images"] not in REFERENCES]
    if FIGURES[key].best == "real":
        real = next(line[key] for line in lines if line["images"] == "real")
        return [-abs(value - real) for value in values]
    return values if FIGURES[key].best == "high" else [-value for value in values]


def correlations(lines: Sequence[dict]) -> list[dict]:
    """Spearman's rank correlation over the pools of every figure without real images with every one that takes them.

    Nothing for fewer than three pools; None where a figure is the same for all.
    """
    known = [key for key in FIGURES if all(line.get(key) is not None for line in lines)]
    real, free = ([key for key in known if FIGURES[key].real == wanted] for wanted in (True, False))
    if not real or len([line for line in lines if line["images"] not in REFERENCES]) < 3:
        return []
    found = []
    for key in free:
        ours = goodness(lines, key)
        found.append({"without": key, **{other: spearman(ours, goodness(lines, other)) for other in real}})
        told = [value for value in found[-1].values() if isinstance(value, float)]
        found[-1]["mean"] = statistics.fmean(told) if told else None
    return found


def spearman(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Rank correlation; None where all values of one are the same."""
    from scipy.stats import spearmanr

    return None if 1 in (len({*ours}), len({*theirs})) else float(spearmanr(ours, theirs)[0])


def shown(value: float | None, deviation: float | None = None) -> str:
    """A number in four digits, with its spread where there is one."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def tables(lines: Sequence[dict], ranks: Sequence[dict], judges: Mapping[str, Judge]) -> list[tuple[list, list]]:
    """Header and rows of the judges, of the figures, and of the rank correlations where there are some."""
    known = [key for key in FIGURES if key in lines[0]]
    of_judges = [[name, f"{j.top1:.2f}", j.test_images, f"{j.seconds:.0f}"] for name, j in judges.items()]
    found = [(["judge", "top-1 %", "test images", "trained in s"], of_judges)] if judges else []
    rows = [[line["images"], line["count"], *(shown(line[k], line[f"{k}_std"]) for k in known)] for line in lines]
    found.append((["images", "N", *known], rows))
    if ranks:
        keys = list(ranks[0])
        found.append(
            ([keys[0], *keys[1:]], [[line["without"], *(shown(line[key]) for key in keys[1:])] for line in ranks])
        )
    return found


def write_page(path: Path, found: Sequence[tuple[list, list]]) -> None:
    """The tables, and what their columns are."""
    about = [
        f"- `{key}`: {figure.about}" for key, figure in FIGURES.items() if any(key in header for header, _ in found)
    ]
    text = "\n\n".join([*(markdown(*one) for one in found), "\n".join(about)])
    with atomic(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure what is missing; print and write the tables."""
    parser = Parser(__doc__.splitlines()[0])
    for kind in (QualityConfig, ModelConfig, DataConfig, JudgeConfig):
        add_flags(parser, kind)
    args = parser.parse_args(argv)
    config, of_model, data, trained = (
        from_flags(kind, args) for kind in (QualityConfig, ModelConfig, DataConfig, JudgeConfig)
    )
    output, folder = writable_folder(config.output, "--output"), writable_folder(config.judges, "--judges")
    rows = Rows(output)
    from models import load_model

    model = load_model(of_model)
    for name, pool in config.named_pools():  # before judges are trained
        pool_images(name, pool, config.num_images, model)
    asked = {figure.judge for figure in chosen_figures(config, model, data).values()} - {None}
    bench = Bench(model, data, judges(model, data, trained, folder, asked), config.head, config.augment, config.looks)
    found = measured(bench, config, rows, list(kinds(bench, config)))
    lines = summary(found)
    ranks = correlations(lines)
    told = tables(lines, ranks, bench.judges)
    facts = {
        name: {"top1": j.top1, "test_images": j.test_images, "seconds": j.seconds} for name, j in bench.judges.items()
    }
    settings = {
        "command": args.command,
        **asdict(config),
        **asdict(data),
        **asdict(trained),
        "reference": bench.references,
    }
    report = {
        "model": model.name,
        "settings": settings,
        "judges": facts,
        "figures": {k: f.about for k, f in FIGURES.items()},
    }
    write_json(output / "report.json", report | {"summary": lines, "rows": found, "correlations": ranks, **versions()})
    write_page(output / "quality.md", told)
    print("\n\n".join(table(*one) for one in told))
    print(f"rows and tables: {output}")
    return lines


if __name__ == "__main__":
    run_main(main)
