"""The student: which model it is, where its weights start, and how it is kept."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from timm.models import save_for_hf
from torch import nn

from models import DEFAULT_MODEL, LoadedModel, ModelConfig, load_model
from models.registry import NAMED_MODELS, WEIGHTS_DIR
from utils.cli import setting
from utils.errors import UserError
from utils.files import user_path, writing

BUNDLED_BACKBONE = WEIGHTS_DIR / "deit_nano_4_letters" / "model.safetensors"
"""Trained on rendered letters; the student of the bundled teacher starts from it."""


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


def load_student(teacher: LoadedModel, config: StudentConfig) -> LoadedModel:
    """A student with a new head for the teacher's classes.

    Args:
        teacher: whose task it will learn.
        config: what it is.

    Raises:
        UserError: no pretrained backbone to start from, or a student that cannot see the teacher's patches.
    """
    scratch, path = config.init == "scratch", config.path
    if not scratch and path is None:
        path = _backbone(teacher, config.name)
    sides = teacher.grid.image_size
    size = sides[0] if config.name is None and sides[0] == sides[1] else None
    student = load_model(
        ModelConfig(config.name or teacher.name, path, config.key, size),
        random_weights=scratch,
        classes=teacher.classes,
        path_flag="--student_path",
    )
    ours, theirs = (model.vit.patch_embed for model in (student, teacher))
    if (tuple(ours.img_size), tuple(ours.patch_size)) != (tuple(theirs.img_size), tuple(theirs.patch_size)):
        raise UserError(
            f"the student {student.name} has {ours.img_size[0]} px images in patches of {ours.patch_size[0]}, the "
            f"teacher {teacher.name} has {theirs.img_size[0]} in patches of {theirs.patch_size[0]}; "
            "both are fed the same patches"
        )
    student.vit.reset_classifier(teacher.classes)
    heads = {id(p) for name in ("head", "head_dist") for p in getattr(student.vit, name, nn.Identity()).parameters()}
    for parameter in student.vit.parameters():
        parameter.requires_grad_(config.finetune == "full" or id(parameter) in heads)
    return student


def save_student(student: LoadedModel, teacher: LoadedModel, folder: str | Path, **facts: object) -> None:
    """Write `config.json` and `model.safetensors`, timm's `local-dir` format; `facts` go into the configuration.

    The student reads images normalized as the teacher's are. The classes are called `label_names` if they are given,
    else as the teacher's configuration calls them.
    """
    folder, ways = user_path(folder, "the student's folder"), teacher.preprocessing
    config = {"mean": ways.mean, "std": ways.std, "interpolation": ways.interpolation, "crop_pct": ways.crop_pct}
    config = {**config, "crop_mode": ways.crop_mode, "input_size": ways.input_size, "num_classes": teacher.classes}
    known = getattr(teacher.vit, "pretrained_cfg", None) or {}
    config |= {key: known.get(key) for key in ("label_names", "label_descriptions")}
    student.vit.pretrained_cfg = {**student.vit.pretrained_cfg, **config}
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as partial:
        save_for_hf(student.vit, partial, {"pretrained_cfg": {"tag": "student"}, **facts}, safe_serialization=True)
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)


def _backbone(teacher: LoadedModel, name: str | None) -> Path | None:
    """Weights of the default student; None where timm has them. Never the teacher's own: that would teach nothing."""
    if (name or teacher.name) == DEFAULT_MODEL:
        return BUNDLED_BACKBONE
    if name is None and not (teacher.name in NAMED_MODELS and teacher.dataset in ("cifar10", "cifar100")):
        raise UserError(
            f"a student of {teacher.name} would start from the teacher's own weights; "
            "give --student NAME, --student_path PATH, or --student_init scratch --finetune full"
        )
    return None
