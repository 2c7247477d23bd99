#!/usr/bin/env python3
"""Train judges: small classifiers that never saw the teacher, to say what others see in its inverted images.

A CNN and a ViT, on the real training images at 32 px, in minutes on two cores. They are kept in OUTPUT, one file each
that is named after what it depends on; a training that was stopped goes on from its last epoch with the same command.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import hashlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import ModelConfig
from utils.cli import Parser, add_flags, any_seed, check_numbers, from_flags, positive, setting
from utils.config import DataConfig
from utils.device import pick_dtype
from utils.files import user_path, writable_folder
from utils.lazy import F, torch
from utils.report import table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models import LoadedModel

SIZE = 32
"""Side in px of what judges see."""
BATCH = 128
SHIFT = 4
"""Reflected px round a random crop."""
FEW_IMAGES = 5_000
"""A training set of fewer is passed over as much more often."""
DAMAGED = "remove it, and the judge is trained again"


@dataclass(frozen=True)
class JudgeConfig:
    """How judges are trained. Raises `UserError` for impossible numbers."""

    epochs: int | None = setting(
        None, "passes over the training images; default the judge's", "--judge_epochs", type=positive, metavar="N"
    )
    images: int = setting(50_000, "training images of a judge, at most", "--judge_images", type=positive, metavar="N")
    seed: int = setting(
        1, "seed of a judge's weights, order and augmentation", "--judge_seed", type=any_seed, metavar="N"
    )

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class Kind:
    """A kind of judge: a function that makes its network for a number of classes, and how long and how fast it learns.

    `epochs` over 50,000 images; `lr` is AdamW's peak learning rate.
    """

    make: Callable[[int], nn.Module]
    epochs: int
    lr: float


def convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def residual_cnn(classes: int) -> nn.Module:
    """A residual network of ten layers (He et al., CVPR 2016), 1.1 M parameters; `features` (B, 192)."""
    nn = torch.nn

    class Residual(nn.Sequential):
        def forward(self, images: Tensor) -> Tensor:
            return images + super().forward(images)

    layers, width = [convolution(3, 32)], 32
    for wider in (48, 96, 192):
        layers += [convolution(width, wider, 2), Residual(convolution(wider, wider), convolution(wider, wider))]
        width = wider
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(width, classes))


def overlapping_vit(classes: int) -> nn.Module:
    """A ViT of 64 overlapping patches, which come out of convolutions (Xiao et al., NeurIPS 2021); 0.7 M parameters.

    So its patches are not those of a teacher with 8 x 8 of them, whose edges it sees.
    """
    from timm.models.vision_transformer import VisionTransformer

    nn, width = torch.nn, 128

    class Stem(nn.Module):
        num_patches = (SIZE // 4) ** 2

        def __init__(self, **_: object) -> None:
            super().__init__()
            layers = convolution(3, 32, 2), convolution(32, 64), nn.Conv2d(64, width, 3, 2, 1)
            self.layers = nn.Sequential(*layers)

        def forward(self, images: Tensor) -> Tensor:
            return self.layers(images).flatten(2).transpose(1, 2)

    vit = VisionTransformer(
        SIZE,
        num_classes=classes,
        embed_dim=width,
        depth=3,
        num_heads=4,
        embed_layer=Stem,
        global_pool="avg",
        class_token=False,
    )
    for block in vit.blocks:
        block.attn.fused_attn = False  # whose gradient takes five times as long on a CPU
    return vit


KINDS: dict[str, Kind] = {"cnn": Kind(residual_cnn, 10, 4e-3), "vit": Kind(overlapping_vit, 8, 2e-3)}


@dataclass(frozen=True)
class Judge:
    """A trained judge.

    `name`: tells it from all others, by all that it depends on. `top1`: in percent, on `test_images` real ones.
    `seconds`: of its training.
    """

    name: str
    net: nn.Module
    top1: float
    test_images: int
    seconds: float

    def logits(self, seen: Tensor) -> Tensor:
        """What it says of images (B, 3, SIZE, SIZE) in [0, 1]: (B, classes)."""
        return self._in_batches(self.net, seen)

    def features(self, seen: Tensor) -> Tensor:
        """What its CNN's last layer is fed with: (B, 192)."""
        return self._in_batches(self.net[0], seen)

    @staticmethod
    def _in_batches(net: nn.Module, seen: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([net(standardized(batch)) for batch in seen.split(500)])


def judge_view(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as judges see them: SIZE x SIZE, antialiased, in 256 steps."""
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round().div(255)


def standardized(seen: Tensor) -> Tensor:
    """Images in [0, 1] -> about mean 0 and deviation 1, for no data set in particular."""
    return ((seen - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


def real_images(
    model: LoadedModel, data: DataConfig, split: str, limit: int | None = None, only: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Real images as the teacher is given them and judges see that: bytes (N, 3, SIZE, SIZE), and labels (N,).

    `only`: numbers of those that are wanted; else `limit` of them, or all.
    """
    from torch.utils.data import Subset

    from utils.data import limited, loader, tell_transparent

    there = split_of(model, data, split)
    found = limited(there, limit) if only is None else Subset(there, only)
    pixels, labels = zip(*loader(found, 500, data.num_workers, (3, SIZE, SIZE)), strict=True)
    tell_transparent(found)
    return torch.cat(pixels), torch.cat(labels)


def split_of(model: LoadedModel, data: DataConfig, split: str) -> Any:
    """The `train` or `test` images, each as bytes (3, SIZE, SIZE). Raises `UserError` as `load_split`."""
    from utils.classes import labels_of
    from utils.data import load_split

    teachers = model.preprocessing.eval_transform()

    def seen(image: object) -> Tensor:
        pixels = model.preprocessing.denormalize(teachers(image))
        return judge_view(pixels[None])[0].mul(255).round().byte()

    return load_split(split, model.dataset, data, seen, labels_of(model))


def augmented(pixels: Tensor, flip: bool) -> Tensor:
    """Bytes (B, 3, SIZE, SIZE) -> the same in [0, 1], each moved by up to SHIFT px, half of them mirrored if asked."""
    padded = F.pad(pixels.float().div(255), [SHIFT] * 4, mode="reflect")
    rows, cols = (torch.arange(SIZE) + torch.randint(2 * SHIFT + 1, (len(pixels), 1)) for _ in range(2))
    if flip:
        cols = torch.where(torch.rand(len(pixels), 1) < 0.5, cols.flip(1), cols)
    images = torch.arange(len(pixels))[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)


def judges(
    model: LoadedModel, data: DataConfig, config: JudgeConfig, folder: Path, only: Collection[str] = tuple(KINDS)
) -> dict[str, Judge]:
    """Judges by their kind; what `folder` has not got is trained.

    Args:
        model: the teacher, of which only the preprocessing and the classes are used.
        data: the real images.
        config: how they are trained.
        folder: where they are kept.
        only: the kinds that are wanted.
    """
    trainings = {
        name: Training(name, kind, model, data, config, folder) for name, kind in KINDS.items() if name in only
    }
    if missing := [training for training in trainings.values() if not training.finished]:
        print("reading real images", flush=True)
        images = real_images(model, data, "train", config.images), real_images(model, data, "test")
        for training in missing:
            training.run(*images)
    return {name: training.judge() for name, training in trainings.items()}


class Training:
    """The training of one judge, and its file."""

    def __init__(
        self, name: str, kind: Kind, model: LoadedModel, data: DataConfig, config: JudgeConfig, folder: Path
    ) -> None:
        self.name, self.lr, self.seed = name, kind.lr, config.seed
        self.flip = model.dataset != "digits"
        count = min(len(split_of(model, data, "train")), config.images)
        self.epochs = config.epochs or round(kind.epochs * max(1, FEW_IMAGES / count))
        shape = {key: value for key, value in asdict(model.preprocessing).items() if key not in ("mean", "std")}
        where = None if data.dataset is None else str(user_path(data.dataset, "--dataset").resolve())
        asked = asdict(replace(config, epochs=self.epochs)) | {"judge": name, "dataset": where, "train_images": count}
        depends_on = asked | data.reading() | {"classes": model.classes} | shape
        self.settings = json.loads(json.dumps(depends_on))  # as the file has them
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:10]
        self.file = folder / f"{name}-{digest}.pt"
        torch.manual_seed(self.seed)
        self.net = kind.make(model.classes).to(memory_format=torch.channels_last)
        self.state: dict[str, Any] = {"settings": self.settings, "epochs": 0, "seconds": 0.0}
        if self.file.exists():
            from utils.checkpoint import read_state

            self.state = read_state(self.file, DAMAGED, lambda found: found["settings"] == self.settings)
            self.net.load_state_dict(self.state["net"])

    @property
    def finished(self) -> bool:
        """Whether its judge was trained and tested."""
        return "top1" in self.state

    def judge(self) -> Judge:
        """The judge, when it is `finished`."""
        return Judge(self.file.stem, self.net.eval(), *(self.state[key] for key in ("top1", "test_images", "seconds")))

    def run(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        """Train it on bytes and labels from where it stands, one epoch after another, and test it."""
        from utils.checkpoint import write_state

        optimizer = torch.optim.AdamW(self.net.parameters(), self.lr, weight_decay=0.05)
        steps = -(-len(train[1]) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.epochs * steps)
        if self.state["epochs"]:
            optimizer.load_state_dict(self.state["optimizer"])
            schedule.load_state_dict(self.state["schedule"])
            torch.set_rng_state(self.state["random"])
        for epoch in range(self.state["epochs"], self.epochs):
            start = time.perf_counter()
            loss = self._epoch(train, optimizer, schedule)
            seconds = time.perf_counter() - start
            print(f"{self.name}, epoch {epoch + 1} of {self.epochs}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
            self.state |= {
                "epochs": epoch + 1,
                "seconds": self.state["seconds"] + seconds,
                "net": self.net.state_dict(),
            }
            further = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            write_state(self.file, self.state | further | {"random": torch.get_rng_state()})
        tested = Judge(self.name, self.net.eval(), 0.0, 0, 0.0).logits(test[0].float().div(255)).argmax(1) == test[1]
        self.state = {key: self.state[key] for key in ("settings", "epochs", "seconds", "net")}
        self.state |= {"top1": 100 * tested.float().mean().item(), "test_images": len(tested)}
        write_state(self.file, self.state)

    def _epoch(self, train: tuple[Tensor, Tensor], optimizer: Any, schedule: Any) -> float:
        """One pass over the images; the mean loss of a step."""
        fast = pick_dtype("auto", torch.device("cpu")) == "bfloat16"
        self.net.train()
        losses = []
        for chosen in torch.randperm(len(train[1])).split(BATCH):
            images = standardized(augmented(train[0][chosen], self.flip))
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = self.net(images)
            loss = F.cross_entropy(logits.float(), train[1][chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Train what is missing, and print how good the judges are."""
    parser = Parser(__doc__.splitlines()[0])
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    add_flags(parser, JudgeConfig)
    parser.add_argument("--output", metavar="DIR", default="./runs/judges", help="where judges are kept")
    args = parser.parse_args(argv)
    model, data, config = (from_flags(kind, args) for kind in (ModelConfig, DataConfig, JudgeConfig))
    folder = writable_folder(args.output, "--output")
    from models import load_model

    found = judges(load_model(model), data, config, folder)
    rows = [[name, f"{judge.top1:.2f}", judge.test_images, f"{judge.seconds:.0f}"] for name, judge in found.items()]
    print(table(["judge", "top-1 %", "test images", "seconds"], rows))
    return [{"judge": name, "top1": judge.top1} for name, judge in found.items()]


if __name__ == "__main__":
    run_main(main)
