"""Which student, and how it learns: frozen objects, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from kt.augment import AUGMENTATIONS
from utils.cli import any_seed, check_numbers, positive, rate, setting
from utils.errors import UserError

OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class StudentConfig:
    """Which student, from which weights, and what of it learns. Raises `UserError` for what does not go together."""

    name: str | None = setting(None, "architecture of the student; default the teacher's", "--student", metavar="NAME")
    path: str | None = setting(None, "its backbone weights, file or folder", "--student_path", metavar="PATH")
    init: str = setting("pretrained", "where its weights start", "--student_init", choices=("pretrained", "scratch"))
    finetune: str = setting("linear", "what learns: the new head, or everything", choices=("linear", "full"))
    key: str | None = setting(
        None, "which of several models in the file of --student_path", "--student_weights_key", metavar="KEY"
    )

    def __post_init__(self) -> None:
        if self.init not in ("pretrained", "scratch") or self.finetune not in ("linear", "full"):
            raise UserError("a student is pretrained or scratch, and linear or full")
        if self.init == "scratch" and self.path is not None:
            raise UserError("--student_init scratch starts from random weights; leave out --student_path")
        if self.init == "scratch" and self.finetune == "linear":
            raise UserError("--student_init scratch has no backbone worth freezing; add --finetune full")


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns; the defaults are the published setting. Raises `UserError` for values that cannot be."""

    batch_size: int = setting(32, "images per distillation step, over all ranks", "--kr-batchsize", type=positive)
    epochs: int = setting(1000, "rounds of synthesis and distillation", "--epoches", "--epochs", type=positive)
    steps: int = setting(1, "distillation steps per epoch", "--kd_steps", type=positive)
    eval_every: int = setting(1, "epochs between two evaluations", type=positive)
    optimizer: str = setting("sgd", "of the student; sgd has momentum 0.9; weight decay is 1e-4", choices=OPTIMIZERS)
    lr: float = setting(0.1, "learning rate of the student", type=rate)
    lr_schedule: str = setting("constant", "of --lr, over all epochs", "--kd_lr_schedule", choices=LR_SCHEDULES)
    temperature: float = setting(20.0, "of the soft targets; logits are divided by it", type=rate)
    augment: tuple[str, ...] = setting(("flip", "shift"), "changes of the images", nargs="*", choices=AUGMENTATIONS)
    fill: bool = setting(False, "feed whole images; stopped patches as pools show them, else their nearest")
    seed: int = 42

    def __post_init__(self) -> None:
        check_numbers(self)
        any_seed.check(self.seed, "--seed")
        known = {"optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES}
        chosen = [(name, getattr(self, name), values) for name, values in known.items()]
        for name, value, values in (*chosen, *(("augment", change, AUGMENTATIONS) for change in self.augment)):
            if value not in values:
                raise UserError(f"distillation: {name} {value} is unknown; there are {', '.join(values)}")
