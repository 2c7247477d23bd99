"""`SwinTransformer` and `SwinTransformerV2`: attention in shifted windows, and stages of fewer and wider tokens.

A patch of the grid, which stops as a whole, is one token of the last stage and a square of tokens of those before it.
Stopped patches are no tokens: windows in which nothing is kept are not computed, and in others nobody looks at what
stopped. timm's own forward of an image with zeros in place of the stopped patches computes all of it and gives other
logits, for there these places are keys and values like any other; only padding is, here as there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from models.attention import attention
from models.blocks import BlockOutput, Inside, SparseBlock, plain
from models.families.base import Parts, block_parts
from models.head import Head
from models.windows import WindowBias, WindowCut, WindowPlaces, Windows

MODELS = (SwinTransformer, SwinTransformerV2)
POOLING = ("avg", "max", "avgmax")
LARGEST_SCALE = math.log(1.0 / 0.01)
"""Logarithm of the most that version 2 multiplies cosines by."""


def refusal(vit: SwinTransformer | SwinTransformerV2) -> str | None:
    version_1, side = isinstance(vit, SwinTransformer), tokens_per_side(vit)
    block_kind = swin_transformer.SwinTransformerBlock if version_1 else swin_transformer_v2.SwinTransformerV2Block
    attn_kind = (swin_transformer if version_1 else swin_transformer_v2).WindowAttention
    if any(count % side for count in vit.patch_embed.grid_size):
        size, token = tuple(vit.patch_embed.img_size), tuple(size * side for size in vit.patch_embed.patch_size)
        return f"its image size {size} is no multiple of {token}, the pixels of a token of its last stage"
    if type(vit.head) is not ClassifierHead or vit.head.global_pool.pool_type not in POOLING:
        return f"its head is not one layer behind a pooling of {', '.join(POOLING)}"
    for block in (block for stage in vit.layers for block in stage.blocks):
        if type(block) is not block_kind or type(block.attn) is not attn_kind:
            return f"its blocks are {type(block).__name__} of {type(block.attn).__name__}, which is not known"
    return None


def tokens_per_side(vit: SwinTransformer | SwinTransformerV2) -> int:
    return 2 ** (len(vit.layers) - 1)


def parts(vit: SwinTransformer | SwinTransformerV2) -> Parts:
    cuts, blocks = [], []
    for number, stage in enumerate(vit.layers):
        side = tokens_per_side(vit) >> number
        for index, block in enumerate(stage.blocks):
            cut = WindowCut(tuple(stage.output_resolution), block.window_size, block.shift_size, side)
            if cut not in cuts:
                cuts.append(cut)
            merge = _Merge(stage.downsample, side) if number and not index else None
            blocks.append(SwinBlock(block, cut, cuts.index(cut), merge))
    return Parts(
        blocks=blocks,
        norm=vit.norm,
        head=Head(vit.head.fc, vit.head.global_pool.pool_type, 0, False),
        places=WindowPlaces(cuts),
    )


class SwinBlock(SparseBlock):
    """A block whose tokens look at those of their window; the first of a stage merges four tokens into one before.

    Tokens (B, T, D) are ordered patch by patch, row by row within a patch.

    Args:
        block: timm's, of version 1 or 2.
        cut: of its stage's tokens into windows.
        number: of the cut among those that `WindowPlaces` knows.
        merge: what merges the tokens of the stage before.
    """

    def __init__(self, block: nn.Module, cut: WindowCut, number: int, merge: nn.Module | None) -> None:
        attn, version_2 = block.attn, hasattr(block.attn, "logit_scale")
        table = _ContinuousBias(attn) if version_2 else _BiasTable(attn)
        normalized = {"q_norm": _Unit(), "k_norm": _Unit()} if version_2 else {}
        taken = block_parts(block, post_norm=version_2) | normalized
        super().__init__(**taken, position=WindowBias(table, cut.window))
        self.logit_scale = attn.logit_scale if version_2 else None  # of cosines, one of each head
        self.merge = nn.Identity() if merge is None else merge
        self.cut, self.number = cut, number

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """As `SparseBlock.readers`; padding, which a norm does not put out, is read beside what it does."""
        found = {norm: layers for norm, layers in super().readers.items() if norm != "norm1" or not self.cut.pads}
        if getattr(self.merge, "in_front", False):
            found["merge.norm"] = ("merge.reduction",)
        return found

    def forward(
        self,
        x: Tensor,
        queries: int | None = None,
        return_inside: bool = False,
        where: tuple[Windows, ...] | None = None,
    ) -> BlockOutput:
        """As `SparseBlock.forward`; `inside` is by windows, its weights between patches."""
        windows = where[self.number]
        tokens, inside = super().forward(self.merge(x), queries, return_inside, windows)
        if inside is None:
            return BlockOutput(tokens)
        attended = windows.of(inside.attended.flatten(0, 1), plain=self.plain)
        q, k = (part.unflatten(1, (-1, self.heads)).flatten(0, 1) for part in (inside.queries, inside.keys))
        patches = tokens.shape[1] // self.cut.side**2

        def weights(first: int | None) -> Tensor:
            each = inside.weights(None).unbind(1)
            return torch.stack([windows.between_patches(head, len(x), patches) for head in each], dim=1)[:, :, :first]

        return BlockOutput(tokens, Inside(attended, self.heads, q, k, weights, windows.present))

    def attention_weights(
        self, x: Tensor, queries: int | None = None, where: tuple[Windows, ...] | None = None
    ) -> Tensor:
        """Tokens (B, T, D) -> what each patch gives each (B, n, n), mean over heads and the tokens of the former."""
        x, windows = self.merge(x), where[self.number]
        q, k, _ = self._compared(self.norm1(x), None, windows)
        weights = self._maps(q, k, windows).mean(dim=1)
        return windows.between_patches(weights, len(x), x.shape[1] // self.cut.side**2)[:, :queries]

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops` for so many patches; at most, where some have stopped."""
        count = tokens * self.cut.side**2
        layers = sum(m.weight.numel() for part in (self.qkv, self.proj, self.mlp, self.merge) for m in _linear(part))
        return 2 * count * layers, 4 * self._pairs(tokens) * self.proj.in_features

    def largest(self, tokens: int) -> int:
        """Numbers in the largest tensor of the forward pass of one image of so many patches."""
        count = tokens * self.cut.side**2
        wide = max(self.hidden, self.qkv.out_features, 4 * self._merged())
        return max(count * wide, self.heads * self._pairs(tokens))

    def saved(self, tokens: int, pairs: bool) -> int:
        """As `SparseBlock.saved` for so many patches; queries, keys and values are kept by windows as well."""
        count = tokens * self.cut.side**2
        numbers = count * (9 * self.proj.out_features + self.hidden + 4 * self._merged())
        return numbers + (self.heads * self._pairs(tokens) if pairs else 0)

    def write(self, graph: Any, stream: Any, queries: int | None, where: tuple[Windows, ...]) -> Any:
        """As `quant.onnx_graph.Graph` asks for; the head reads all tokens."""
        windows, heads, inner = where[self.number], self.heads, plain(self.proj).in_features
        if not isinstance(self.merge, nn.Identity):
            stream = self.merge.write(graph, stream)
        x, tokens, (count, area) = graph.quantized(stream.rows, stream.tap), stream.tokens, windows.rows.shape
        width = inner // heads

        def in_windows(y: str) -> str:
            """Rows of tokens -> rows of the places in all windows."""
            if windows.padding is None:
                return graph.gathered(y, windows.rows.flatten(), tokens, stream.width)
            ends = graph.constant([0, 0, 0, 0, 1, 0], np.int64)  # one more token, of zeros
            y = graph.op("Pad", graph.reshape(y, -1, tokens, stream.width), ends)
            rows = torch.where(windows.padding, tokens, windows.rows)
            return graph.gathered(y, rows.flatten(), tokens + 1, stream.width)

        if self.normalizes("norm1"):
            y = in_windows(graph.norm(x, self.norm1))
        else:
            y = graph.quantized(in_windows(stream.rows), stream.tap)
        q, k, v = (
            graph.reshape(part, -1, count, area, heads, width) for part in graph.parts(graph.linear(y, self.qkv), 3)
        )
        q, k = graph.norm(q, self.q_norm), graph.norm(k, self.k_norm)
        q = graph.quantized(q, self.tap_q, (0, 1, 3, 2, 4), 1.0 if self.logit_scale is not None else self.scale)
        k, v = graph.quantized(k, self.tap_k, (0, 1, 3, 4, 2)), graph.quantized(v, self.tap_v, (0, 1, 3, 2, 4))
        if self.logit_scale is not None:
            q = graph.op("Mul", q, graph.constant(self.logit_scale.clamp(max=LARGEST_SCALE).exp()))
            if windows.padding is not None:
                k = graph.op("Mul", k, graph.constant(~windows.padding[:, None, None]))
        scores = graph.op("Add", graph.op("MatMul", q, k), graph.constant(self.position.bias(windows)))
        scores = graph.quantized(scores, self.tap_scores)
        if windows.mask is not None:
            scores = graph.op("Add", scores, graph.constant(windows.mask[:, None]))
        probs = graph.quantized(graph.op("Softmax", scores, axis=-1), self.tap_probs)
        out = graph.op("Transpose", graph.op("MatMul", probs, v), perm=(0, 1, 3, 2, 4))
        x = graph.behind_attention(self, x, graph.gathered(out, windows.at, count * area, inner))
        return replace(stream, rows=x, tap=self.tap_mlp_sum)

    def _merged(self) -> int:
        """Width of the tokens that are merged; 0 where none are."""
        return 0 if isinstance(self.merge, nn.Identity) else self.merge.reduction.in_features // 4

    def _pairs(self, patches: int) -> int:
        """Pairs of places that look at each other, at most."""
        count = patches * self.cut.side**2
        places = self.cut.area if self.cut.pads else min(self.cut.area, count)
        return min(self.cut.windows, count) * places**2

    def _compared(self, y: Tensor, queries: int | None, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized tokens (B, T, D) -> queries, keys and values (groups, K * heads, L, head_dim), queries scaled."""
        pads, rows = windows.padding is not None, y.flatten(0, 1)[None]
        q, k, v = self._qkv(F.pad(rows, (0, 0, 0, 1)) if pads else rows, None, None)
        scale = self.scale if self.logit_scale is None else self.logit_scale.clamp(max=LARGEST_SCALE).exp()
        q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (q * scale, k, v))
        if not pads:
            return tuple(self._by_head(windows.of(x, plain=self.plain), windows) for x in (q, k, v))
        # Of length zero the key has no direction, which a bias that quantization adds to keys would give it.
        key = k[-1] if self.logit_scale is None else torch.zeros_like(k[-1])
        each = (q, q[-1]), (k, key), (v, v[-1])
        return tuple(self._by_head(windows.of(x[:-1], padding, self.plain), windows) for x, padding in each)

    def _by_head(self, x: Tensor, windows: Windows) -> Tensor:
        """Windows (M, L, heads * head_dim) -> (groups, K * heads, L, head_dim)."""
        return x.unflatten(0, (windows.groups, -1)).unflatten(-1, (self.heads, -1)).transpose(2, 3).flatten(1, 2)

    def _probs(self, q: Tensor, k: Tensor, windows: Windows) -> Tensor:
        """Queries, scaled, and keys -> attention weights (M, heads, L, L)."""
        scores = (q @ k.transpose(-2, -1)).unflatten(1, (-1, self.heads)) + self.position.bias(windows)
        scores = self.tap_scores(scores.flatten(0, 1))
        if windows.mask is not None:
            mask = windows.mask[:, None].to(scores.dtype)
            scores = (scores.unflatten(0, (windows.groups, -1)) + mask).flatten(0, 1)
        return self.tap_probs(scores.softmax(dim=-1))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
        """Queries, keys and values of windows -> attention's output of tokens (B * T, heads * head_dim)."""
        if type(self.tap_scores) is type(self.tap_probs) is nn.Identity:
            bias = self.position.bias(windows)
            bias = bias if windows.mask is None else bias + windows.mask[:, None].to(bias.dtype)
            bias = bias.flatten(0, 1)[None]
            if self.plain:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
            else:
                out = attention(q, k, v, 1.0, bias)
            out = out.unflatten(1, (-1, self.heads)).flatten(0, 1)
        else:
            out = self._probs(q, k, windows) @ v.unflatten(1, (-1, self.heads)).flatten(0, 1)
        return windows.tokens(out.transpose(1, 2).flatten(2), self.plain)


class _Merge(nn.Module):
    """Tokens (B, T, D) -> a quarter of them, (B, T / 4, 2 D), of each square of four one; the squares lie in a patch.

    `side`: tokens per side of a patch, afterwards. `in_front`: whether the norm is in front of the layer.
    """

    def __init__(self, merging: nn.Module, side: int) -> None:
        super().__init__()
        self.norm, self.reduction, self.side = merging.norm, merging.reduction, side
        self.in_front = type(merging) is swin_transformer.PatchMerging

    def write(self, graph: Any, stream: Any) -> Any:
        """The stream of the stage before -> that of merged tokens, as operators of an ONNX graph."""
        x = graph.reshape(stream.rows, -1, self.side, 2, self.side, 2, stream.width)
        x = graph.reshape(graph.op("Transpose", x, perm=(0, 1, 3, 4, 2, 5)), -1, 4 * stream.width)
        x = graph.quantized(x, stream.tap)
        if self.in_front:
            x = graph.linear(graph.norm(x, self.norm), self.reduction)
        else:
            x = graph.norm(graph.linear(x, self.reduction), self.norm)
        width = plain(self.reduction).out_features
        return replace(stream, rows=x, tap=nn.Identity(), tokens=stream.tokens // 4, width=width)

    def forward(self, x: Tensor) -> Tensor:
        squares = x.view(len(x), -1, self.side, 2, self.side, 2, x.shape[-1]).permute(0, 1, 2, 4, 5, 3, 6)
        joined = squares.flatten(4).flatten(1, 3)
        return self.reduction(self.norm(joined)) if self.in_front else self.norm(self.reduction(joined))


class _BiasTable(nn.Module):
    """Version 1's bias of every distance (distances, heads): what it has learned."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.table = attn.relative_position_bias_table

    def forward(self) -> Tensor:
        return self.table


class _ContinuousBias(nn.Module):
    """Version 2's bias of every distance (distances, heads): a small network of its logarithm (section 3.3)."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.network = attn.cpb_mlp
        self.register_buffer("distances", attn.relative_coords_table.flatten(0, 2), persistent=False)

    def forward(self) -> Tensor:
        return 16 * self.network(self.distances).sigmoid()


class _Unit(nn.Module):
    """Vectors (.., head_dim) of length one, whose products are cosines."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    def write(self, graph: Any, x: str) -> str:
        """The same as operators of an ONNX graph."""
        return graph.unit(x)


def _linear(part: nn.Module) -> list[nn.Linear]:
    return [module for module in part.modules() if isinstance(module, nn.Linear)]
