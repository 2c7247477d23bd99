"""Attention between tokens, by the way that is fastest where it runs (measured: docs/performance.md).

On a CPU the stock fused kernel has a slow backward pass; batched matrix products and a softmax, keeping the attention
weights in the model's dtype, are two to six times faster. Elsewhere the stock fused kernel is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import bfloat16_units

# AMX multiplies bfloat16 in pairs along the summed dimension: an odd token count is slow there, and there only.
PADDED_MULTIPLE = 2 if "amx_bf16" in bfloat16_units() else 1


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v for queries, keys and values of shape (B, heads, T, head_dim).

    The values' head_dim may be another one. `bias` (B, heads, Q, T), or (1, heads, Q, T).
    """
    learns = bias is not None and bias.requires_grad
    if q.device.type == "cpu" and q.requires_grad and not learns:
        return _WrittenOut.apply(q * scale, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def padded_count(tokens: int, dtype: torch.dtype) -> int:
    """Tokens after padding: `tokens`, or the next count that the matrix units of this CPU like."""
    return -(-tokens // PADDED_MULTIPLE) * PADDED_MULTIPLE if dtype == torch.bfloat16 else tokens


def pad_tokens(x: Tensor) -> Tensor:
    """(..., T, head_dim) -> contiguous (..., T', head_dim), zeros after the tokens."""
    extra = padded_count(x.shape[-2], x.dtype) - x.shape[-2]
    return F.pad(x, (0, 0, 0, extra)) if extra else x.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, tokens: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention weights (M, Q, T') and outputs (M, Q, head_dim) for `tokens` tokens padded to T', q scaled already.

    M = B * heads; `bias` as for `attention`.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        scores.unflatten(0, (-1, bias.shape[1]))[:, :, : bias.shape[2], :tokens] += bias
    scores[..., tokens:] = float("-inf")
    weights = scores.softmax(dim=-1)
    return weights, torch.bmm(weights, v)


def attend_backward(weights: Tensor, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k, v of `attend`; `grad` (M, Q, head_dim) is zero at padded queries, so they add nothing."""
    to_v = torch.bmm(weights.transpose(1, 2), grad)
    to_weights = torch.bmm(grad, v.transpose(1, 2))
    to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
    return torch.bmm(to_scores, k), torch.bmm(to_scores.transpose(1, 2), q), to_v


class _WrittenOut(torch.autograd.Function):
    """`attend` on q (B, heads, Q, head_dim), k and v (B, heads, T, head_dim); no gradient to the bias."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.shapes = q.shape, k.shape, v.shape
        padded = [pad_tokens(x.flatten(0, 1)) for x in (q, k, v)]
        weights, out = attend(*padded, k.shape[-2], bias)
        ctx.save_for_backward(weights, *padded)
        return out[:, : q.shape[-2]].unflatten(0, q.shape[:2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        grads = attend_backward(*ctx.saved_tensors, pad_tokens(grad.flatten(0, 1)))
        return *(x[:, : shape[-2]].reshape(shape) for x, shape in zip(grads, ctx.shapes, strict=True)), None
