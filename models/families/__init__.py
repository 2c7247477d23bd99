"""Families of architectures, a file each: how a timm model becomes what `SparseViT` runs."""

from __future__ import annotations

from torch import nn

from models.families import beit, cait, eva, relpos, swin, vision_transformer
from models.families.base import Family

FAMILIES: tuple[Family, ...] = (vision_transformer, eva, beit, relpos, swin, cait)


def family_of(vit: nn.Module) -> Family | None:
    """The family of a timm model; None where it is of none."""
    return next((family for family in FAMILIES if type(vit) in family.MODELS), None)


def known_classes() -> str:
    """timm's classes that have a family, for errors."""
    return ", ".join(kind.__name__ for family in FAMILIES for kind in family.MODELS)
