"""Blocks whose parts run side by side: attention beside MLP, or several attentions and then several MLPs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from models.blocks import MLP_INPUTS, BlockOutput, Inside, SparseBlock, named_layers, part_of_linear


class ParallelBlock(SparseBlock):
    """Attention and MLP read the same normalized tokens (ViT-22B, Dehghani et al., ICML 2023): one norm, one sum.

    Arguments as of `SparseBlock`; `norm1` and `ls1` are those of both.
    """

    norms = ("norm1",)

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        del self.tap_attn_sum

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """As `SparseBlock.readers`."""
        layers = named_layers(self, (*self.sources, "gate", *MLP_INPUTS))
        return {"norm1": layers} if self.normalizes("norm1") else {}

    @property
    def writers(self) -> dict[str, tuple[str, str]]:
        """As `SparseBlock.writers`."""
        return dict.fromkeys(("proj", "mlp.fc2"), ("norm1", "ls1")) if self.normalizes("norm1") else {}

    def forward(
        self, x: Tensor, queries: int | None = None, return_inside: bool = False, where: Tensor | None = None
    ) -> BlockOutput:
        """As `SparseBlock.forward`."""
        y = self.norm1(x)
        out, inside = self._attended(y, queries, where, return_inside)
        x = self.tap_mlp_sum(x[:, :queries] + self.ls1(self.proj(out) + self.mlp(y[:, :queries])))
        return BlockOutput(x, inside)

    def write(self, graph: Any, stream: Any, queries: int | None, where: Any) -> Any:
        """As `quant.onnx_graph.Graph` asks for."""
        entering, asking = graph.entering(stream, queries)
        y = graph.norm(entering, self.norm1)
        out = graph.linear(graph.attended(self, y, stream, queries, where), self.proj)
        of_mlp = graph.mlp(graph.first(y, queries, stream.tokens, stream.width), self.mlp)
        rows = graph.op("Add", asking, graph.scaled(graph.op("Add", out, of_mlp), self.ls1))
        return replace(stream, rows=rows, tap=self.tap_mlp_sum, tokens=queries or stream.tokens)


def parallel_parts(block: nn.Module) -> dict[str, Any]:
    """What `ParallelBlock` takes of timm's block, its joined layers parted into those that other blocks have.

    So each has the places of quantizers that it has there. timm's layers keep the weights, and learn what parts learn.
    """
    width, of_mlp, of_qkv = block.in_proj.in_features, slice(block.in_split[0]), slice(block.in_split[0], None)
    bias = block.in_proj.bias
    biases = (block.mlp_bias, None) if bias is None else (_rows(bias, of_mlp), _rows(bias, of_qkv))
    fc1, qkv = (
        part_of_linear(block.in_proj, rows, bias=each) for rows, each in zip((of_mlp, of_qkv), biases, strict=True)
    )
    if getattr(block, "out_proj", None) is None:
        proj, fc2 = block.attn_out_proj, block.mlp_out_proj
    else:
        proj = part_of_linear(block.out_proj, columns=slice(width), bias=block.out_proj.bias)
        fc2 = part_of_linear(block.out_proj, columns=slice(width, None))
    return {
        "heads": block.num_heads,
        "scale": block.scale,
        "qkv": qkv,
        "proj": proj,
        "mlp": nn.Sequential(OrderedDict(fc1=fc1, act=block.mlp_act, norm=nn.Identity(), fc2=fc2)),
        "norm1": block.in_norm,
        "ls1": block.ls,
        "q_norm": block.q_norm,
        "k_norm": block.k_norm,
    }


def parallel_refusal(block: ParallelScalingBlock) -> str | None:
    """What of a block cannot be honoured, as `Family.refusal` says it."""
    if getattr(block, "qkv_bias", None) is not None:
        return "this version of timm adds the bias of a parallel block's MLP in the wrong place; install a newer one"
    return None


def _rows(bias: nn.Parameter, rows: slice) -> nn.Parameter:
    """Some values of a bias, which learns what they learn."""
    return nn.Parameter(bias.detach()[rows], bias.requires_grad)


class BranchedBlock(nn.Module):
    """Several attentions side by side, then several MLPs (Touvron et al., Three things, ECCV 2022, section 3).

    The interface is that of `SparseBlock`; what it says of heads and channels is of all branches, one behind the other.

    Args:
        branches: an attention and an MLP each, which share their tokens with the other branches.
    """

    def __init__(self, branches: Sequence[SparseBlock]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.tap_attn_sum, self.tap_mlp_sum = nn.Identity(), nn.Identity()
        for branch in self.branches:
            del branch.tap_attn_sum, branch.tap_mlp_sum

    @property
    def heads(self) -> int:
        """Of all branches."""
        return sum(branch.heads for branch in self.branches)

    @property
    def score_heads(self) -> int:
        """How many heads the queries and keys of all branches have."""
        return sum(branch.score_heads for branch in self.branches)

    @property
    def hidden(self) -> int:
        """Width of the widest layers of the MLPs, together."""
        return sum(branch.hidden for branch in self.branches)

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """As `SparseBlock.readers`."""
        return {
            f"branches.{index}.{norm}": tuple(f"branches.{index}.{name}" for name in layers)
            for index, branch in enumerate(self.branches)
            for norm, layers in branch.readers.items()
        }

    @property
    def writers(self) -> dict[str, tuple[str, str]]:
        """As `SparseBlock.writers`; the norm is that of the first branch, which reads what the others read."""
        return {
            f"branches.{index}.{layer}": (f"branches.0.{norm}", f"branches.{index}.{scale}")
            for index, branch in enumerate(self.branches)
            for layer, (norm, scale) in branch.writers.items()
        }

    def taps(self) -> tuple[nn.Module, ...]:
        """The taps of the branches, and of the sums."""
        return (*(tap for branch in self.branches for tap in branch.taps()), self.tap_attn_sum, self.tap_mlp_sum)

    def forward(
        self, x: Tensor, queries: int | None = None, return_inside: bool = False, where: Tensor | None = None
    ) -> BlockOutput:
        """As `SparseBlock.forward`."""
        changes, insides = zip(
            *(b.attention_change(x, queries, where, return_inside) for b in self.branches), strict=True
        )
        x = self.tap_attn_sum(x[:, :queries] + sum(changes))
        x = self.tap_mlp_sum(x + sum(branch.mlp_change(x) for branch in self.branches))
        return BlockOutput(x, self._together(insides) if return_inside else None)

    def write(self, graph: Any, stream: Any, queries: int | None, where: Any) -> Any:
        """As `quant.onnx_graph.Graph` asks for."""
        entering, x = graph.entering(stream, queries)
        for branch in self.branches:
            out = graph.attended(branch, graph.norm(entering, branch.norm1), stream, queries, where)
            x = graph.op("Add", x, graph.attention_change(branch, out))
        rows = x = graph.quantized(x, self.tap_attn_sum)
        for branch in self.branches:
            rows = graph.op("Add", rows, graph.mlp_change(branch, x))
        return replace(stream, rows=rows, tap=self.tap_mlp_sum, tokens=queries or stream.tokens)

    def _together(self, branches: Sequence[Inside]) -> Inside:
        """What the branches' attentions compute, as of one that has the heads of all."""
        attended, queries, keys = (
            torch.cat([getattr(inside, name) for inside in branches], dim=dim)
            for name, dim in (("attended", -1), ("queries", 1), ("keys", 1))
        )
        weights = lambda first: torch.cat([inside.weights(first) for inside in branches], dim=1)  # noqa: E731
        return Inside(attended, self.heads, queries, keys, weights)

    def attention_weights(self, x: Tensor, queries: int | None = None, where: Tensor | None = None) -> Tensor:
        """As `SparseBlock.attention_weights`, mean over the heads of all branches."""
        return torch.stack([branch.attention_weights(x, queries, where) for branch in self.branches]).mean(dim=0)

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops`."""
        layers, attention = zip(*(branch.flops(tokens, queries) for branch in self.branches), strict=True)
        return sum(layers), sum(attention)

    def largest(self, tokens: int) -> int:
        """As `SparseBlock.largest`."""
        return max(branch.largest(tokens) for branch in self.branches)

    def saved(self, tokens: int, pairs: bool) -> int:
        """As `SparseBlock.saved`."""
        return sum(branch.saved(tokens, pairs) for branch in self.branches)
