"""`Beit`: BEiT and BEiT v2, whose attention knows positions by a bias for every distance, one table a block or one."""

from __future__ import annotations

from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from models.blocks import SparseBlock
from models.families.base import Parts, block_parts, one_token
from models.head import Head
from models.positions import PairPlaces, RelativeBias

tokens_per_side = one_token
MODELS = (Beit,)


def refusal(vit: Beit) -> str | None:
    for block in vit.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            return f"its blocks are {type(block).__name__} of {type(block.attn).__name__}, which is not known"
        if block.attn.relative_position_bias_table is not None and vit.rel_pos_bias is not None:
            return "it has relative positions of blocks and shared ones at once"
    return None


def parts(vit: Beit) -> Parts:
    return Parts(
        blocks=[SparseBlock(**block_parts(block), position=_bias(vit, block)) for block in vit.blocks],
        norm=vit.norm,
        head=Head(vit.head, vit.global_pool, vit.num_prefix_tokens, vit.cls_token is not None, vit.fc_norm),
        cls_token=vit.cls_token,
        pos_embed=vit.pos_embed,
        places=PairPlaces(vit.num_prefix_tokens, vit.patch_embed.num_patches),
    )


class _Table(nn.Module):
    """A table of biases by distance, and which distance each pair of tokens has, shared with timm's attention."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.table = attn.relative_position_bias_table
        self.register_buffer("index", attn.relative_position_index, persistent=False)

    def forward(self) -> Tensor:
        return self.table[self.index].permute(2, 0, 1)


def _bias(vit: Beit, block: nn.Module) -> RelativeBias | None:
    if vit.rel_pos_bias is not None:
        return RelativeBias(_Table(vit.rel_pos_bias))
    if block.attn.relative_position_bias_table is not None:
        return RelativeBias(_Table(block.attn))
    return None
