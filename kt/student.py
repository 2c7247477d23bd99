"""The student: which model it is, where its weights start, and how it is kept."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import timm
import torch

from kt.config import StudentConfig
from kt.whole import WholeStudent, classifier_parameters, load_whole
from models import DEFAULT_MODEL, LoadedModel, ModelConfig, PatchGrid, load_model
from models.config import NAMED_MODELS, WEIGHTS_DIR
from models.registry import Preprocessing, save_local_dir
from models.sparse_vit import grid_of, require_supported
from utils.errors import UserError, UserNote
from utils.files import atomic_files, user_path

BUNDLED_BACKBONE = WEIGHTS_DIR / "deit_nano_4_letters" / "model.safetensors"
"""Trained on rendered letters; the student of the bundled teacher starts from it."""


def load_student(teacher: LoadedModel, config: StudentConfig) -> LoadedModel | WholeStudent:
    """A student with a new head for the teacher's classes.

    It is fed the teacher's patches where it is a Vision Transformer of the same images and patches, whole images
    otherwise; what its backbone has seen normalized otherwise than the teacher's images it is made to read as these.

    Args:
        teacher: whose task it will learn.
        config: what it is.

    Raises:
        UserError: no pretrained backbone to start from, or weights that do not fit.
    """
    scratch, path = config.init == "scratch", config.path
    if not scratch and path is None:
        path = _backbone(teacher, config.name)
    name, sides = config.name or teacher.name, teacher.grid.image_size
    if config.name is not None and not _same_patches(teacher, config):
        student = load_whole(teacher, name, path, config.key, scratch, config.img_size)
    else:
        size = sides[0] if config.name is None and sides[0] == sides[1] else config.img_size
        student = load_model(
            ModelConfig(name, path, config.key, size),
            random_weights=scratch,
            classes=teacher.classes,
            path_flag="--student_path",
        )
        if student.grid != teacher.grid:
            raise UserError(
                f"the student {student.name} has {_described(student.grid)}, the teacher {teacher.name} has "
                f"{_described(teacher.grid)}; both are fed the same patches"
            )
        student.vit.reset_classifier(teacher.classes)
        if not scratch:
            student = renormalized(student, teacher.preprocessing)
    heads = {id(parameter) for parameter in classifier_parameters(student.vit)}
    for parameter in student.vit.parameters():
        parameter.requires_grad_(config.finetune == "full" or id(parameter) in heads)
    return student


@torch.no_grad()
def backbone_of(student: LoadedModel) -> LoadedModel:
    """A copy, which learns nothing, with a head of zeros: two students of one backbone have the same."""
    copied = replace(student, vit=copy.deepcopy(student.vit))
    for parameter in classifier_parameters(copied.vit):
        parameter.zero_()
    return copied


@torch.no_grad()
def renormalized(student: LoadedModel, wanted: Preprocessing) -> LoadedModel:
    """The same function of images that are normalized as is wanted: its patch embedding does the rest, in place.

    x std + mean is what both see, so W takes the ratio of the deviations, and its bias, or else the patches' position
    embeddings, what the difference of the means makes of a patch. Where it has neither, a note says that it is left.
    """
    ours, embed = student.preprocessing, student.vit.patch_embed
    if (ours.mean, ours.std) == (wanted.mean, wanted.std):
        return student
    weight, positions = embed.proj.weight, getattr(student.vit, "pos_embed", None)
    mean, std, their_mean, their_std = (
        torch.tensor(values, dtype=torch.float64) for values in (ours.mean, ours.std, wanted.mean, wanted.std)
    )
    shift = weight.double().sum(dim=(2, 3)) @ ((their_mean - mean) / std)
    if embed.proj.bias is not None:
        embed.proj.bias += shift.to(weight.dtype)
    elif isinstance(positions, torch.Tensor) and isinstance(embed.norm, torch.nn.Identity):
        positions[:, -student.grid.count :] += shift.to(positions.dtype)
    else:
        text = f"{student.name} has seen images of mean {ours.mean} and deviation {ours.std}, and is fed the teacher's"
        warnings.warn(UserNote(text), stacklevel=2)
        return student
    weight *= (their_std / std).to(weight.dtype).view(-1, 1, 1)
    return replace(student, preprocessing=replace(ours, mean=wanted.mean, std=wanted.std))


def _same_patches(teacher: LoadedModel, config: StudentConfig) -> bool:
    """Whether a student of that name is a Vision Transformer of the teacher's images and patches."""
    named = NAMED_MODELS.get(config.name)
    name, args = (config.name, {}) if named is None else (named.timm_name, named.model_args or {})
    if config.img_size is not None:
        args = {**args, "img_size": config.img_size}
    try:
        with torch.device("meta"):
            vit = timm.create_model(name, pretrained=False, **{**args, "num_classes": teacher.classes})
        require_supported(vit)
    except Exception:  # whatever it is instead is told where it is loaded
        return False
    return grid_of(vit) == teacher.grid


def _described(grid: PatchGrid) -> str:
    """Images and patches, for errors."""
    height, width = grid.image_size
    size, patch = (f"{a} px" if a == b else f"{a} x {b} px" for a, b in ((height, width), (grid.height, grid.width)))
    return f"images of {size} and {grid.channels} channels in patches of {patch}"


def save_student(
    student: LoadedModel | WholeStudent, teacher: LoadedModel, folder: str | Path, **facts: object
) -> None:
    """Write `config.json` and `model.safetensors`, timm's `local-dir` format; `facts` go into the configuration.

    A student of the teacher's patches reads images normalized as the teacher's are. The classes are called
    `label_names` if they are given, else as the teacher's configuration calls them.
    """
    folder, whole = user_path(folder, "the student's folder"), isinstance(student, WholeStudent)
    ways = student.preprocessing if whole else teacher.preprocessing
    config = {key: getattr(ways, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    known = getattr(teacher.vit, "pretrained_cfg", None) or {}
    config |= {key: known.get(key) for key in ("label_names", "label_descriptions")}
    student.vit.pretrained_cfg = {**student.vit.pretrained_cfg, **config}
    with atomic_files(folder) as partial:
        student.save(partial, **facts) if whole else save_local_dir(student, partial, "student", **facts)


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
