"""The student: which model it is, where its weights start, and how it is kept."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kt.config import StudentConfig
from models import DEFAULT_MODEL, LoadedModel, ModelConfig, load_model
from models.config import NAMED_MODELS, WEIGHTS_DIR
from models.registry import save_local_dir
from utils.errors import UserError
from utils.files import atomic_files, user_path

BUNDLED_BACKBONE = WEIGHTS_DIR / "deit_nano_4_letters" / "model.safetensors"
"""Trained on rendered letters; the student of the bundled teacher starts from it."""


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
    config = {key: getattr(ways, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    known = getattr(teacher.vit, "pretrained_cfg", None) or {}
    config |= {key: known.get(key) for key in ("label_names", "label_descriptions")}
    student.vit.pretrained_cfg = {**student.vit.pretrained_cfg, **config}
    with atomic_files(folder) as partial:
        save_local_dir(student, partial, "student", **facts)


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
