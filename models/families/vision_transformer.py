"""`VisionTransformer`: ViT, DeiT, DINOv2, CLIP, SigLIP and all else that timm makes of its plain class."""

from __future__ import annotations

from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

from models.blocks import SparseBlock
from models.families.base import Parts, block_parts, one_token
from models.head import Head

tokens_per_side = one_token
MODELS = (VisionTransformer, VisionTransformerDistilled)


def refusal(vit: VisionTransformer) -> str | None:
    if vit.pos_embed is None and vit.num_prefix_tokens:
        tokens = vit.patch_embed.proj.weight.new_zeros(1, *vit.patch_embed.grid_size, vit.embed_dim)
        if vit._pos_embed(tokens).shape[1] != vit.patch_embed.num_patches + vit.num_prefix_tokens:
            return "without position embeddings this version of timm leaves the class token out; install a newer one"
    for block in vit.blocks:
        if type(block) not in (Block, ResPostBlock):
            return f"its blocks are {type(block).__name__}, which is not known"
        if type(block.attn) is not Attention:
            return f"its attention is {type(block.attn).__name__}, which is not known"
    return None


def parts(vit: VisionTransformer) -> Parts:
    distilled = isinstance(vit, VisionTransformerDistilled)
    return Parts(
        blocks=[SparseBlock(**block_parts(block, type(block) is ResPostBlock)) for block in vit.blocks],
        norm=vit.norm,
        head=Head(
            vit.head,
            vit.global_pool,
            vit.num_prefix_tokens,
            vit.cls_token is not None,
            vit.fc_norm,
            vit.attn_pool,
            vit.pool_include_prefix,
            vit.head_dist if distilled else None,
        ),
        cls_token=vit.cls_token,
        other_tokens=vit.dist_token if distilled else vit.reg_token,
        pos_embed=vit.pos_embed,
        prefix_has_positions=not vit.no_embed_class,
        norm_pre=vit.norm_pre,
    )
