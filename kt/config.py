"""Which student, and how it learns: frozen objects, checked when they are made."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from dataclasses import dataclass

from kt.match import MATCHES, parse_match
from utils.augment import AUGMENTATIONS
from utils.cli import NUMBER_FORMATS, any_seed, check_numbers, image_side, natural, positive, rate, setting, weight
from utils.errors import UserError

OPTIMIZERS = ("sgd", "adamw", "lbfgs")
LR_SCHEDULES = ("constant", "cosine")
KEPT = ("last", "agreement")
PRESETS: dict[str, dict[str, object]] = {
    "transfer": {
        "epochs": 10,
        "eval_every": 10,
        "augment": ("flip", "crop", "blur", "colour"),
    },
}
"""What `--preset` says of every student's lessons, besides of the images; flags that are given win."""


@dataclass(frozen=True)
class StudentConfig:
    """Which student, from which weights, and what of it learns. Raises `UserError` for what does not go together."""

    name: str | None = setting(
        None, "the student, any classifier of timm's; default the teacher's architecture", "--student", metavar="NAME"
    )
    path: str | None = setting(None, "its backbone weights, file or folder", "--student_path", metavar="PATH")
    init: str = setting("pretrained", "where its weights start", "--student_init", choices=("pretrained", "scratch"))
    finetune: str = setting("linear", "what learns: the new head, or everything", choices=("linear", "full"))
    key: str | None = setting(
        None, "which of several models in the file of --student_path", "--student_weights_key", metavar="KEY"
    )
    img_size: int | None = setting(
        None,
        "side of its images in px, of a student fed whole images; default its own",
        "--student_img_size",
        type=image_side,
        metavar="PX",
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.init not in ("pretrained", "scratch") or self.finetune not in ("linear", "full"):
            raise UserError("a student is pretrained or scratch, and linear or full")
        if self.init == "scratch" and self.path is not None:
            raise UserError("--student_init scratch starts from random weights; leave out --student_path")
        if self.init == "scratch" and self.finetune == "linear":
            raise UserError("--student_init scratch has no backbone worth freezing; add --finetune full")
        if self.img_size is not None and self.name is None:
            raise UserError("--student_img_size is for a student of an architecture of its own; give it with --student")


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns; the defaults are the published setting, and shifts beside its flips.

    Raises `UserError` for values that cannot be.
    """

    batch_size: int = setting(32, "images per distillation step, over all ranks", "--kr-batchsize", type=positive)
    epochs: int = setting(1000, "rounds of synthesis and distillation", "--epoches", "--epochs", type=positive)
    steps: int = setting(1, "distillation steps per epoch", "--kd_steps", type=positive)
    eval_every: int = setting(1, "epochs between two evaluations", type=positive)
    optimizer: str = setting(
        "sgd",
        "of the student; sgd has momentum 0.9, weight decay is 1e-4; lbfgs: after every epoch a head that learns alone "
        "is the best for all that was looked at",
        choices=OPTIMIZERS,
    )
    head_steps: int = setting(
        0,
        "batches that teacher and student look at before the first step, for which the new head is then the best: all "
        "of the student learns from there",
        type=natural,
    )
    head_penalty: float = setting(
        0.01, "of a head that is fitted: what squared weights cost, for features of variance 1", type=weight
    )
    lr: float = setting(0.1, "learning rate of sgd and adamw", type=rate)
    lr_schedule: str = setting("constant", "of --lr, over all epochs", "--kd_lr_schedule", choices=LR_SCHEDULES)
    temperature: float = setting(20.0, "of the soft targets; logits are divided by it", type=rate)
    augment: tuple[str, ...] = setting(("flip", "shift"), "changes of the images", nargs="*", choices=AUGMENTATIONS)
    reuse: int = setting(
        1,
        "steps for every batch that teacher and backbone look at, of a student whose head alone learns: each draws "
        "from what they said of the last batches",
        type=positive,
    )
    dtype: str = setting(
        "auto",
        "of the teacher, of a backbone that does not learn, and of the products of a Vision Transformer that does",
        "--kd_dtype",
        choices=NUMBER_FORMATS,
    )
    fill: bool | None = setting(
        None,
        "feed whole images; stopped patches as pools show them, else their nearest; default where a student needs them",
        action=BooleanOptionalAction,
    )
    join: bool = setting(False, "feed what the images of a pri trajectory are together, as whole images")
    match: tuple[str, ...] = setting(
        ("logits",),
        f"what is imitated: {', '.join(MATCHES)}; with a weight relations:weight=0.5; default logits",
        nargs="+",
        metavar="M",
    )
    keep: str = setting(
        "last",
        "which student is kept: the last, or the nearest to the teacher on --held_back images",
        "--keep_student",
        choices=KEPT,
    )
    held_back: int = setting(32, "images that --keep_student agreement looks at and nobody learns from", type=positive)
    seed: int = 42

    @classmethod
    def of_preset(cls, preset: str | None, student: StudentConfig, flip: bool = True, **given: object) -> DistillConfig:
        """The lessons of a preset for this student, a head alone or all of it; what is `given` wins.

        `flip`: whether images may be mirrored where `augment` is not given. Raises `UserError` for values that cannot
        be.
        """
        said = dict(PRESETS.get(preset, {}))
        if said:
            head, pretrained, own = student.finetune == "linear", student.init == "pretrained", student.name is None
            by_steps = given.keys() & {"match", "lr", "lr_schedule", "reuse", "head_steps"}
            if given.get("optimizer", "lbfgs" if head and own and not by_steps else "adamw") == "lbfgs":
                said |= {"optimizer": "lbfgs", "temperature": 8.0, "steps": 25}
            else:
                lr = 3e-3 if head else 3e-5 if pretrained else 1e-3
                said |= {"optimizer": "adamw", "lr_schedule": "cosine", "lr": lr, "steps": 200}
                if own and head and "match" not in given:  # what reuse is for
                    said["reuse"] = 8
                elif own and pretrained and not head:
                    said |= {"head_steps": 250, "temperature": 8.0, "steps": 30}
        if not flip:
            said["augment"] = tuple(change for change in said.get("augment", cls.augment) if change != "flip")
        return cls(**(said | given))

    def __post_init__(self) -> None:
        check_numbers(self)
        any_seed.check(self.seed, "--seed")
        known = {"optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES, "keep": KEPT, "dtype": NUMBER_FORMATS}
        for way in self.match:
            parse_match(way)
        ways = {way.partition(":")[0] for way in self.match}
        if len(ways) < len(self.match):
            raise UserError(f"--match {' '.join(self.match)} says one of them twice")
        if self.optimizer == "lbfgs" and ways != {"logits"}:
            raise UserError(f"--match {' '.join(self.match)}: --optimizer lbfgs fits a head to logits alone")
        if self.optimizer == "lbfgs" and self.head_steps:
            raise UserError(
                f"--head_steps {self.head_steps}: --optimizer lbfgs fits the head after every epoch already"
            )
        if self.optimizer == "lbfgs" and self.reuse != 1:
            raise UserError(f"--reuse {self.reuse}: --optimizer lbfgs uses all that was looked at already")
        chosen = [(name, getattr(self, name), values) for name, values in known.items()]
        for name, value, values in (*chosen, *(("augment", change, AUGMENTATIONS) for change in self.augment)):
            if value not in values:
                raise UserError(f"distillation: {name} {value} is unknown; there are {', '.join(values)}")
