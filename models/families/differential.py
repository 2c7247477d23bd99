"""Differential attention: a head's weights are one softmax less a share of another (Ye et al., ICLR 2025)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.blocks import SparseBlock
from models.families.parallel import ParallelBlock

LAMBDAS = ("lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialBlock(SparseBlock):
    """A block whose heads have two queries and two keys each, of half the width of its values.

    What a head puts out is (softmax(s q1 k1^T) - share softmax(s q2 k2^T)) v, eq. 1. Quantized are the two softmax
    outputs, `tap_probs` (B, 2 heads, Q, T), and not their difference, which has signs.

    Args:
        share: gives lambda (), what is taken of the second softmax.
        parts: as of `SparseBlock`.
    """

    def __init__(self, share: nn.Module, **parts: Any) -> None:
        super().__init__(**parts)
        self.share = share

    @property
    def score_heads(self) -> int:
        """Two for each head of the values."""
        return 2 * self.heads

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops`; the values are read by both maps."""
        layers, attention = super().flops(tokens, queries)
        return layers, attention + 2 * queries * tokens * self.proj.in_features

    def write(self, graph: Any, stream: Any, queries: int | None, where: Any) -> Any:
        """As `quant.onnx_graph.Graph` asks for."""
        return graph.in_turn(self, stream, queries, where)

    def write_probs(self, graph: Any, scores: str) -> str:
        """As `SparseBlock.write_probs`; heads of two maps -> their difference."""
        factors = torch.stack([torch.ones(()), -self.share().float()]).expand(self.heads, 2)
        return graph.mixed_heads(super().write_probs(graph, scores), factors, groups=self.heads)

    def _qkv(self, y: Tensor, queries: int | None, where: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, 2 heads, .., head_dim), the two of a head together; values (B, heads, T, 2 head_dim)."""
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        q, k = (part.unflatten(-1, (self.score_heads, -1)).transpose(1, 2) for part in (q[:, :queries], k))
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.tap_q(self.q_norm(q)), self.tap_k(self.k_norm(k)), self.tap_v(v)

    def _maps(self, q: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
        """As `SparseBlock._maps`, the difference of two: a row sums to 1 - lambda, with signs."""
        return self._difference(self._probs(q, k, where))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor | None) -> Tensor:
        if type(self.tap_scores) is type(self.tap_probs) is nn.Identity:
            v = v.repeat_interleave(2, dim=1)
            if self.plain:
                out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            else:
                out = attention(q, k, v, self.scale)
            out = self._difference(out)
        else:
            out = self._maps(q, k, where) @ v
        return out.transpose(1, 2).flatten(2)

    def _difference(self, pairs: Tensor) -> Tensor:
        """(B, 2 heads, ..) -> the first of each head less its share of the second, (B, heads, ..)."""
        first, second = pairs.unflatten(1, (self.heads, 2)).unbind(2)
        return first - self.share().to(pairs.dtype) * second

    def _folds(self) -> bool:
        return False


class DifferentialParallelBlock(DifferentialBlock, ParallelBlock):
    """Differential attention beside the MLP; arguments of both."""

    write = ParallelBlock.write


class Share(nn.Module):
    """lambda () of an attention, of the vectors or the two numbers that it is learned by (eq. 2)."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.initial = attn.lambda_init
        for name in LAMBDAS:
            setattr(self, name, getattr(attn, name))

    def forward(self) -> Tensor:
        if self.lambda_a is not None:
            first, second = self.lambda_a, self.lambda_b
        else:
            first, second = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        return first.float().exp() - second.float().exp() + self.initial


class HeadNorm(nn.Module):
    """The norm of each head's output, times 1 - the initial lambda, and the norm of all of them if there is one."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.heads, self.factor, self.sub_norm = attn.num_heads, 1 - attn.lambda_init, attn.sub_norm
        self.norm = getattr(attn, "norm", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads * width) -> the same."""
        return self.norm((self.sub_norm(x.unflatten(-1, (self.heads, -1))) * self.factor).flatten(-2))

    def write(self, graph: Any, x: str) -> str:
        """The same of rows, as operators of an ONNX graph."""
        x = graph.norm(graph.reshape(x, 0, self.heads, -1), self.sub_norm)
        return graph.norm(graph.reshape(graph.op("Mul", x, graph.constant(self.factor)), 0, -1), self.norm)


def differential_parts(attn: nn.Module) -> dict[str, nn.Module]:
    """What `DifferentialBlock` takes of timm's attention, or of its parallel block, besides what other blocks take."""
    return {"attn_norm": HeadNorm(attn), "share": Share(attn)}
