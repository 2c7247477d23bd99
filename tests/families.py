"""A small model of every kind of architecture that `SparseViT` runs, with weights that matter."""

from __future__ import annotations

import timm
import torch
from timm.layers import PatchDropoutWithIndices
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models import LoadedModel, SparseImages, SparseViT

TIMM = tuple(int(part) for part in timm.__version__.split(".")[:3])
ARGS = {"depth": 2, "num_classes": 10, "embed_dim": 96, "num_heads": 4}
NAMES = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_rpn_224",  # norms behind attention and MLP
    "vit_pwee_patch16_reg1_gap_256",  # attention beside MLP
    "vit_small_patch16_18x2_224",  # two attentions, then two MLPs
    "eva02_tiny_patch14_224",
    "eva_large_patch14_196",
    "eva02_enormous_patch14_clip_224",
    "vit_small_patch16_dinov3",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224",
    "vit_relpos_medium_patch16_rpn_224",
    "cait_xxs24_224",
)
LATE_NAMES = ("vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256")  # differential attention
FAMILIES = (*NAMES, *(name for name in LATE_NAMES if timm.is_model(name)))
# What these have is told from one of the above by what is written out a second time, packed blocks and graphs, alone.
MORE_NAMES = (
    "eva02_base_patch14_448",
    "eva02_base_patch16_clip_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_relpos_base_patch16_clsgap_224",
    "beit3_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
)
ALL_FAMILIES = (*FAMILIES, *(name for name in MORE_NAMES if timm.is_model(name)))
STAGES = {"num_classes": 10, "embed_dim": 24, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
OWN = {
    "beit3_base_patch16_224": {"img_size": (64, 48), **ARGS},
    "swin_tiny_patch4_window7_224": {"img_size": 96, "window_size": 5, **STAGES},
    "swinv2_tiny_window8_256": {"img_size": (64, 96), "window_size": 4, **STAGES},
}


def arguments(name: str, **kwargs: object) -> dict[str, object]:
    """What makes a small model of this name."""
    return OWN.get(name, {"img_size": 56 if "patch14" in name else 64, **ARGS}) | kwargs


def family_vit(name: str, **kwargs: object) -> nn.Module:
    """A timm model of 6 to 16 patches, every parameter drawn so that none could be left out unnoticed."""
    vit, generator = timm.create_model(name, **arguments(name, **kwargs)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            std = {1: 0.3, 4: 0.05}.get(parameter.ndim, 0.15)
            parameter.copy_(torch.empty_like(parameter).normal_(0, std, generator=generator))
    return vit.eval()


def family_model(name: str, **kwargs: object) -> LoadedModel:
    """`family_vit` as the registry would give it."""
    return LoadedModel.of(family_vit(name, **kwargs), name, architecture=(name, arguments(name, **kwargs)))


def images_of(vit: SparseViT, count: int, kept: int | None = None) -> SparseImages:
    """Noise around colours of each image, whole or with so many patches of each, other ones of each."""
    generator = torch.Generator().manual_seed(1)
    grid = vit.grid
    colours = 2 * torch.randn(count, grid.channels, 1, 1, generator=generator)
    images = colours + torch.randn(count, grid.channels, *grid.image_size, generator=generator)
    patches, positions = grid.patchify(images), grid.all_positions(count)
    if kept is not None:
        positions = torch.stack([torch.randperm(grid.count, generator=generator)[:kept] for _ in range(count)])
        patches = patches[torch.arange(count)[:, None], positions]
    return SparseImages(patches, positions, torch.zeros(count, dtype=torch.long))


def fed_to_timm(vit: nn.Module, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Logits (B, classes) of timm's own modules that go on with the tokens of the patches `kept` (B, n) alone.

    With rotary embeddings timm's patch dropout takes the tokens; with relative positions, which it has for whole grids
    alone, nobody reads the tokens of other patches, and they are left out at the end.
    """
    rows = torch.arange(len(kept))[:, None]
    if isinstance(vit, Eva):
        vit.patch_drop = _Chosen(0.5, num_prefix_tokens=vit.num_prefix_tokens)
        vit.patch_drop.kept = kept
        return vit(images)
    if isinstance(vit, Cait):
        tokens = (vit.patch_embed(images) + vit.pos_embed)[rows, kept]
        return vit.forward_head(vit.norm(vit.forward_cls(vit.blocks(tokens))))
    prefix = vit.num_prefix_tokens
    order = torch.cat([torch.arange(prefix).expand(len(kept), -1), prefix + kept], dim=1)
    if isinstance(vit, VisionTransformer):
        tokens = vit._pos_embed(vit.patch_embed(images))[rows, order]
        return vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(tokens))))
    tokens = vit.patch_embed(images)
    if vit.cls_token is not None:
        tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    hidden = torch.full(tokens.shape[:2], float("-inf")).scatter(1, order, 0.0)[:, None, None]
    if isinstance(vit, Beit):
        assert vit.pos_embed is None and vit.rel_pos_bias is None  # its blocks have tables of their own
    for block in vit.blocks:
        if isinstance(vit, Beit):
            tokens = block(tokens, shared_rel_pos_bias=hidden)
        else:
            shared = vit.shared_rel_pos if vit.shared_rel_pos is not None else block.attn.rel_pos
            block.attn.rel_pos = None
            tokens = block(tokens, shared_rel_pos=shared.get_bias() + hidden)
    return vit.forward_head(vit.norm(tokens)[rows, order])


class _Chosen(PatchDropoutWithIndices):
    """timm's patch dropout, of patches that are given and not drawn."""

    kept: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        return torch.cat([prefix, patches[torch.arange(len(x))[:, None], self.kept]], dim=1), self.kept
