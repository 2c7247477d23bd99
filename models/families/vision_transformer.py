"""`VisionTransformer`: ViT, DeiT, DINOv2, CLIP, SigLIP and all else that timm makes of its plain class."""

from __future__ import annotations

import timm.models.vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from models.blocks import SparseBlock
from models.families.base import Parts, block_parts, one_token
from models.families.differential import DifferentialBlock, DifferentialParallelBlock, differential_parts
from models.families.parallel import BranchedBlock, ParallelBlock, parallel_parts, parallel_refusal
from models.head import Head

tokens_per_side = one_token
MODELS = (VisionTransformer, VisionTransformerDistilled)
# Late versions of timm have these.
DiffAttention = getattr(timm_vit, "DiffAttention", None)
DiffParallelScalingBlock = getattr(timm_vit, "DiffParallelScalingBlock", None)


def refusal(vit: VisionTransformer) -> str | None:
    if vit.pos_embed is None and vit.num_prefix_tokens:
        tokens = vit.patch_embed.proj.weight.new_zeros(1, *vit.patch_embed.grid_size, vit.embed_dim)
        if vit._pos_embed(tokens).shape[1] != vit.patch_embed.num_patches + vit.num_prefix_tokens:
            return "without position embeddings this version of timm leaves the class token out; install a newer one"
    for block in vit.blocks:
        if type(block) in (ParallelScalingBlock, DiffParallelScalingBlock):
            if why := parallel_refusal(block):
                return why
            continue
        if type(block) not in (Block, ResPostBlock, ParallelThingsBlock):
            return f"its blocks are {type(block).__name__}, which is not known"
        attentions = [branch.attn for branch in block.attns] if type(block) is ParallelThingsBlock else [block.attn]
        for attn in attentions:
            if type(attn) not in (Attention, DiffAttention):
                return f"its attention is {type(attn).__name__}, which is not known"
    return None


def parts(vit: VisionTransformer) -> Parts:
    distilled = isinstance(vit, VisionTransformerDistilled)
    return Parts(
        blocks=[_block(block) for block in vit.blocks],
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


def _block(block: nn.Module) -> nn.Module:
    if type(block) is ParallelThingsBlock:
        pairs = zip(block.attns, block.ffns, strict=True)
        return BranchedBlock([_attention_and_mlp(_Branch(attn, ffn)) for attn, ffn in pairs])
    if type(block) is ParallelScalingBlock:
        return ParallelBlock(**parallel_parts(block))
    if type(block) is DiffParallelScalingBlock:
        return DifferentialParallelBlock(**parallel_parts(block) | differential_parts(block))
    return _attention_and_mlp(block, type(block) is ResPostBlock)


def _attention_and_mlp(block: nn.Module, post_norm: bool = False) -> SparseBlock:
    """A block of one attention, of either kind, and one MLP."""
    found = block_parts(block, post_norm)
    if type(block.attn) is DiffAttention:
        return DifferentialBlock(**found | differential_parts(block.attn))
    return SparseBlock(**found)


class _Branch(nn.Module):
    """An attention and an MLP of a `ParallelThingsBlock`, by the names that a `Block` has."""

    def __init__(self, attn: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = attn.norm, attn.attn, attn.ls
        self.norm2, self.mlp, self.ls2 = ffn.norm, ffn.mlp, ffn.ls
