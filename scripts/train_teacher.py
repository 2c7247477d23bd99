#!/usr/bin/env python3
"""Train or fine-tune a teacher: any model of the registry, on digits, CIFAR or an image folder.

The result is a folder in timm's `local-dir` format, so `--model local-dir:OUTPUT` takes it everywhere:

    python scripts/train_teacher.py --model_path BACKBONE --data digits --epochs 60 --output runs/digits
    python scripts/train_teacher.py --model deit_tiny_16_cifar10 --dataset DIR --output runs/cifar10

A run that was stopped goes on from its last finished epoch when the same command is given again.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import argparse
import ast
import math
import time
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import DEFAULT_MODEL, NAMED_MODELS, ModelConfig
from utils.cli import (
    NUMBER_FORMATS,
    Parser,
    add_flags,
    any_seed,
    check_numbers,
    from_flags,
    image_side,
    natural,
    positive,
    rate,
    setting,
    workers,
)
from utils.config import DataConfig, Reading
from utils.device import pick_device, pick_dtype, seed_all, versions
from utils.errors import UserError
from utils.files import atomic_files, user_path, writable_folder, write_json
from utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    from models import LoadedModel, SparseViT
    from models.registry import Preprocessing

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}
EVAL_BATCH_SIZE = 200

# What says where and how fast, not what: a run may go on with others.
NOT_SETTINGS = ("output", "device", "num_workers")


def share(text: str) -> float:
    """argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def deviation(text: str) -> float:
    """argparse type: a number of 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


@dataclass(frozen=True)
class TrainConfig(Reading):
    """A training. Raises `UserError` where settings contradict each other; what None means is filled in."""

    output: str = setting("", "folder for checkpoint, trained model and training.json", metavar="DIR", required=True)
    model: str = setting(DEFAULT_MODEL, "a name of the registry, a timm name, hf-hub:NAME or local-dir:PATH")
    model_path: str | None = setting(None, "weights to start from, file or folder; default its own", metavar="PATH")
    key: str | None = setting(None, "which of several models in a weights file", "--weights_key", metavar="KEY")
    img_size: int | None = setting(None, "side of its images in px; default its own", type=image_side, metavar="PX")
    model_args: tuple[str, ...] = setting(
        (),
        "with --init scratch: timm's arguments that change the architecture; depth=6 depths=2,4",
        nargs="+",
        metavar="A=B",
    )
    init: str = setting("pretrained", "start from trained or random weights", choices=("pretrained", "scratch"))
    dataset: str | None = setting(None, "folder of the data, of CIFAR its root; the digits need none", metavar="DIR")
    data: str | None = setting(None, "kind of data; default what the model's name tells", choices=(*CLASSES, "folder"))
    epochs: int = setting(100, "passes over the training images", type=positive)
    batch_size: int = setting(64, "images per step", type=positive)
    lr: float | None = setting(None, "peak learning rate of AdamW; default 1e-3 from scratch, else 1e-4", type=rate)
    head_lr: float | None = setting(None, "peak learning rate of the head; default --lr", type=rate, metavar="LR")
    weight_decay: float = setting(0.05, "AdamW's weight decay, times the learning rate, of matrices", type=share)
    label_smoothing: float = setting(0.1, "share of the label's weight spread over all classes", type=share)
    warmup_epochs: int | None = setting(None, "epochs of rising rate; default --epochs / 20", type=natural, metavar="N")
    crop_padding: int | None = setting(None, "reflected px round a random crop; default size / 16", type=natural)
    flip: bool | None = setting(None, "mirror half of the images; default all but digits", action=BooleanOptionalAction)
    noise: float = setting(0.0, "noise added, normalized pixels: standard deviations in [0, NOISE)", type=deviation)
    patch_drop: float = setting(0.0, "patches left out of a step: a share in [0, PATCH_DROP)", type=share)
    dtype: str = setting("auto", "number format of matrix products", choices=NUMBER_FORMATS)
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = setting(0, "seed of weights, order and augmentation", type=any_seed)
    num_workers: int = setting(4, "processes that load images, at most one a usable CPU", type=workers)
    val_limit: int | None = setting(None, "evaluate on N images only; default all", type=positive, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self)
        if self.init == "scratch" and self.model_path is not None:
            raise UserError("--init scratch starts from random weights; leave out --model_path")
        if self.model_args and self.init != "scratch":
            raise UserError("--model_args makes another architecture, which has no weights; add --init scratch")
        if self.model_args and self.img_size is not None:
            raise UserError("--img_size is one of --model_args here; give img_size=PX there")
        self.architecture()
        data = self.data or implied_data(self.model, self.dataset)
        found = {
            "data": data,
            "lr": self.lr or (1e-3 if self.init == "scratch" else 1e-4),
            "warmup_epochs": self.epochs // 20 if self.warmup_epochs is None else self.warmup_epochs,
            "flip": data != "digits" if self.flip is None else self.flip,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup_epochs {self.warmup_epochs} must be below --epochs {self.epochs}")
        if data == "digits" and self.dataset is not None:
            raise UserError("--data digits is bundled; leave out --dataset")

    def architecture(self) -> dict[str, object]:
        """What `model_args` say. Raises `UserError` where they are not names with values."""
        found = {}
        for text in self.model_args:
            name, _, value = text.partition("=")
            if name in found:
                raise UserError(f"--model_args gives {name} twice")
            try:
                found[name] = ast.literal_eval(value) if name.isidentifier() else None
            except (ValueError, SyntaxError):
                found[name] = value if value else None
            if found[name] is None and value != "None":
                raise UserError(f"--model_args {text} is not like depth=6")
        return found

    def settings(self) -> dict[str, object]:
        """What the trained weights depend on."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}


def parse_arguments(argv: Sequence[str] | None = None) -> TrainConfig:
    """The command line."""
    parser = Parser(__doc__.splitlines()[0])
    add_flags(parser, TrainConfig)
    return from_flags(TrainConfig, parser.parse_args(argv))


def implied_data(model: str, dataset: str | None) -> str:
    """The kind of data that a named model is for; `folder` where the name does not tell."""
    named = NAMED_MODELS.get(model)
    if named is None or named.dataset not in CLASSES or (named.dataset == "digits" and dataset is not None):
        return "folder"
    return named.dataset


def count_classes(data: str, dataset: str | None) -> int:
    """How many classes the data has. Raises `UserError` where it is not told or not there."""
    from utils.image_files import subfolders

    if dataset is None and data != "digits":
        what = "an image folder with train/ and val/ or test/" if data == "folder" else f"the root of {data}"
        raise UserError(f"--dataset DIR is missing: {what}")
    if data in CLASSES:
        return CLASSES[data]
    train = user_path(dataset, "--dataset") / "train"
    count = len(subfolders(train)) if train.is_dir() else 0
    if count < 2:
        raise UserError(
            f"--dataset {dataset} needs a train/ folder with a folder of images for each of 2 or more classes"
        )
    return count


def train_transform(preprocessing: Preprocessing, data: str, crop_padding: int | None, flip: bool) -> v2.Compose:
    """PIL image -> normalized tensor: the evaluation transform, its centre crop replaced by random changes."""
    from torchvision.transforms import v2

    resize, _, *to_normalized = preprocessing.eval_transform().transforms
    size = preprocessing.input_size[1:]
    padding = min(size) // 16 if crop_padding is None else crop_padding
    steps = [resize]
    if data == "digits":
        # Black, the fill, is the digits' background. A 6 must not turn into a 9.
        steps.append(v2.RandomAffine(12, (0.06, 0.06), (0.88, 1.12), interpolation=v2.InterpolationMode.BILINEAR))
    steps.append(v2.RandomCrop(size, padding, pad_if_needed=True, padding_mode="reflect"))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, *to_normalized])


def load_data(
    config: TrainConfig, preprocessing: Preprocessing, classes: int
) -> tuple[DataLoader, DataLoader, list[str]]:
    """Loaders of the shuffled, augmented training images and of the test images, and the names of the classes.

    The order of the training folders becomes the model's: as text, as torchvision has it, unless the flag says else.
    """
    from torch.utils.data import DataLoader

    from utils.classes import Labels
    from utils.data import limited, load_split, loader
    from utils.image_files import listing

    kind = None if config.data == "folder" else config.data
    augment = train_transform(preprocessing, config.data, config.crop_padding, config.flip)
    data = DataConfig(config.dataset, class_order=config.class_order or "text", background=config.background)
    train = load_split("train", kind, data, augment, Labels(classes), preprocessing.mode)
    test = load_split("test", kind, data, preprocessing.eval_transform(), Labels(classes), preprocessing.mode)
    missing = [train.classes[number] for number in sorted(set(train.targets) - set(test.targets))]
    if missing:
        raise UserError(f"--dataset {config.dataset} has no test images of {listing(missing)}, which train/ has")
    workers, image_size = config.num_workers, preprocessing.input_size
    plain = loader(train, config.batch_size, workers, image_size)
    shuffled = DataLoader(
        train, config.batch_size, shuffle=True, num_workers=plain.num_workers, pin_memory=plain.pin_memory
    )
    limited_test = limited(test, config.val_limit)
    return shuffled, loader(limited_test, EVAL_BATCH_SIZE, workers, image_size), list(train.classes)


def parameter_groups(
    learning: nn.Module, vit: nn.Module, lr: float, head_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: the head at its own rate; no decay of biases, norms, tokens and position embeddings.

    `learning` is `vit`, or runs its modules.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    names = vit.no_weight_decay()
    spared = {id(parameter) for name, parameter in vit.named_parameters() if any(one in name for one in names)}
    for name, parameter in learning.named_parameters():
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in spared else weight_decay
        groups.setdefault((head_lr if name.startswith("head") else lr, decay), []).append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


def patch_dropout(vit: nn.Module) -> nn.Module | None:
    """timm's module that leaves patches out of a model in training; None where the model takes none."""
    import timm.layers

    if not hasattr(vit, "patch_drop"):
        return None
    if vit.patch_drop is not None:
        return timm.layers.PatchDropout(num_prefix_tokens=vit.num_prefix_tokens)
    # Models that look positions up by block are told which patches are left, by one of two names.
    with_indices = getattr(timm.layers, "PatchDropoutWithIndices", None)
    if with_indices is None:
        return timm.layers.PatchDropout(num_prefix_tokens=vit.num_prefix_tokens, return_indices=True)
    return with_indices(num_prefix_tokens=vit.num_prefix_tokens)


class Trainer:
    """A model in training: AdamW under a cosine schedule with warm-up, stepped once per batch."""

    def __init__(self, vit: nn.Module, train: DataLoader, config: TrainConfig) -> None:
        from timm.scheduler import CosineLRScheduler

        from models import SparseViT

        self.device = pick_device(config.device)
        self.dtype = getattr(torch, pick_dtype(config.dtype, self.device))
        self.vit = vit.requires_grad_(True).to(self.device)
        self.train = train
        self.noise, self.patch_drop = config.noise, config.patch_drop
        self.sparse: SparseViT | None = None
        """The model on kept patches, where timm's cannot leave patches out; what it learns timm's modules learn."""
        if self.patch_drop:
            dropout = patch_dropout(vit)
            if dropout is None:
                self.sparse = SparseViT(self.vit)
            else:
                vit.patch_drop = dropout
        self.loss = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        groups = parameter_groups(self.sparse or vit, vit, config.lr, config.head_lr or config.lr, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=config.epochs * len(train),
            warmup_t=config.warmup_epochs * len(train),
            t_in_epochs=False,
        )
        self.history: list[dict[str, float]] = []
        """Loss, seconds and top-1 of each finished epoch; top-1 is None until it is evaluated."""

    def run_epoch(self) -> None:
        """Train on every image once, and add a line to the history."""
        start = time.perf_counter()
        loss = self._train_epoch()
        self.history.append({"loss": round(loss, 4), "top1": None, "seconds": round(time.perf_counter() - start, 1)})

    def _train_epoch(self) -> float:
        """One pass over the training images; the mean loss of an image. Raises `UserError` where it diverges."""
        from tqdm import tqdm

        from utils.data import tell_transparent

        self.vit.train()
        epoch, total, seen = len(self.history), 0.0, 0
        bar = tqdm(self.train, f"epoch {epoch + 1}", leave=False, dynamic_ncols=True)
        for step, (images, labels) in enumerate(bar, start=1 + epoch * len(self.train)):
            loss = self.loss(self._taught(self._impaired(images)), labels.to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step_update(step)
            total += loss.item() * len(labels)
            seen += len(labels)
            if not math.isfinite(total):
                raise UserError(f"the loss became {loss.item()} in epoch {epoch + 1}; lower --lr, in a new --output")
            bar.set_postfix(loss=f"{total / seen:.3f}", refresh=False)
        tell_transparent(self.train.dataset)
        return total / seen

    def _impaired(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) with noise, each its own strength, and the share of patches to drop in this step drawn.

        A small model does not learn by itself what large ones do, to recognize an object by some of its patches
        (Naseer et al., NeurIPS 2021); sparse inversion and its use rest on that.
        """
        if self.patch_drop and self.sparse is None:
            self.vit.patch_drop.prob = self.patch_drop * torch.rand(()).item()
        if not self.noise:
            return images
        strength = self.noise * torch.rand(len(images), 1, 1, 1)
        return images + strength * torch.randn(images.shape)

    def evaluate(self, test: DataLoader) -> float:
        """Top-1 accuracy in percent."""
        from utils.data import tell_transparent

        self.vit.eval()
        with torch.inference_mode():
            correct = sum((self._logits(images).argmax(1).cpu() == labels).sum().item() for images, labels in test)
        tell_transparent(test.dataset)
        return round(100 * correct / len(test.dataset), 2)

    def _taught(self, images: Tensor) -> Tensor:
        """Logits of a step's images; of random patches of them where it is not timm that leaves some out."""
        if self.sparse is None:
            return self._logits(images)
        grid, images = self.sparse.grid, images.to(self.device, non_blocking=True)
        kept = max(1, round(grid.count * (1 - self.patch_drop * torch.rand(()).item())))
        positions = torch.rand(len(images), grid.count).argsort(dim=1)[:, :kept].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.sparse(grid.taken(images, positions), positions).logits.float()

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.vit(images.to(self.device, non_blocking=True)).float()

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "model": self.vit.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.vit.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = [{key: one[key] for key in ("loss", "top1", "seconds")} for one in state["history"]]
        torch.set_rng_state(state["random"])
        if len(state["cuda_random"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_random"])


def save_model(model: LoadedModel, labels: list[str], config: TrainConfig, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, timm's `local-dir` format."""
    from models.registry import save_local_dir

    vit = model.vit.cpu()
    if config.init == "scratch":  # nothing is left of the weights that this licence is for
        vit.pretrained_cfg = {key: value for key, value in vit.pretrained_cfg.items() if key != "license"}
    vit.pretrained_cfg = {**vit.pretrained_cfg, "label_names": labels}
    with atomic_files(folder) as partial:
        save_local_dir(model, partial, config.data, label_names=labels)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate after each epoch, save."""
    config = parse_arguments(argv)
    from models import load_model
    from models.registry import new_model
    from utils.checkpoint import Checkpoint

    classes = count_classes(config.data, config.dataset)
    folder = writable_folder(config.output, "--output")
    checkpoint = Checkpoint(folder, config.settings(), made_by_run="model.safetensors")
    seed_all(config.seed)
    source = ModelConfig(config.model, config.model_path, config.key, config.img_size)
    if config.model_args:
        loaded = new_model(config.model, config.architecture(), classes, "--model_args")
    else:
        loaded = load_model(source, random_weights=config.init == "scratch", classes=classes)
    train, test, labels = load_data(config, loaded.preprocessing, classes)
    trainer = Trainer(loaded.vit, train, config)
    if checkpoint.state is not None:
        with checkpoint.going_on():
            trainer.load_state_dict(checkpoint.state)
            print(f"going on after epoch {len(trainer.history)} of {config.epochs}")
    while (pending := trainer.history and trainer.history[-1]["top1"] is None) or len(trainer.history) < config.epochs:
        if not pending:
            trainer.run_epoch()
            checkpoint.write(trainer.state_dict())  # before the evaluation, which may fail
        last = trainer.history[-1]
        last["top1"] = trainer.evaluate(test)
        checkpoint.write(trainer.state_dict())
        print(f"epoch {len(trainer.history)}: loss {last['loss']:.3f}, top-1 {last['top1']:.2f}%, {last['seconds']} s")
    save_model(loaded, labels, config, folder)
    result = {"top1": trainer.history[-1]["top1"], "test_images": len(test.dataset), "train_images": len(train.dataset)}
    arguments = {"arguments": config.settings(), "epochs": trainer.history}
    write_json(folder / "training.json", {**result, **arguments, **versions()})
    print(f"top-1 {result['top1']:.2f}% on {result['test_images']} test images; saved in {folder}")


if __name__ == "__main__":
    run_main(main)
