"""Blocks for inversion on a CPU: frozen weights packed once, forward and backward pass written out.

The stock layers repack their weights at every call and leave the sum with the residual to a pass of its own; with
oneDNN's packed layers (which `torch.compile` uses too) a product runs at the speed of a large one. What is saved for
the backward pass is only what the gradient to the tokens needs.
"""

from __future__ import annotations

import copy
import platform

import torch
from timm.layers import GluMlp, LayerScale, Mlp, SwiGLU
from torch import Tensor, nn

from models.attention import attend, attend_backward, pad_tokens
from models.blocks import BlockOutput, Inside, SparseBlock, gelu, joined
from models.sparse_vit import SparseViT
from utils.device import keep_freed_memory

aten = torch.ops.aten

SLACK = 4.0
"""Errors of the fast paths, in those of plain code in the same number format."""
FLOOR = 1e-2
"""Relative error that is nobody's fault."""
DISAGREE = (
    "packed layers or gradients written out do not compute what plain code does here, so plain code runs: slower, and "
    "right (as with --eager)"
)
"""What a user is told where `near` says no."""


def frozen_copy(vit: nn.Module, device: torch.device, dtype: torch.dtype, plain: bool = False) -> SparseViT:
    """A copy of a timm model on kept patches, whose weights will not change: made fast for gradients to pixels alone.

    Args:
        vit: left alone.
        device: where the copy runs.
        dtype: of its weights, and of the patches that it is fed.
        plain: by stock kernels and autograd alone.
    """
    copied = SparseViT(vit)
    if plain:
        copied.plainly()
    elif device.type == "cpu":
        keep_freed_memory()
        pack_blocks(copied, dtype)
    return copy.deepcopy(copied).to(device, dtype).requires_grad_(False).with_fixed_positions()


def near(found: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """Whether a fast path's error is about as large as that of plain code, or small.

    A model that is not finite is no kernel's fault.

    Args:
        found: by the fast path.
        expected: by plain code in the same number format.
        exact: by plain code in float32.
    """
    allowed = SLACK * (expected - exact).norm() + FLOOR * exact.norm()
    return not bool(allowed.isfinite()) or bool((found - exact).norm() <= allowed)


def pack_blocks(vit: SparseViT, dtype: torch.dtype) -> None:
    """Replace, in place, every block but the last that can be packed; the weights of the others are not touched.

    The last block is left as it is: it may be asked for the CLS token alone, or for its attention. So are all in number
    formats that oneDNN does not multiply on this CPU.
    """
    if not (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")):
        return
    packs_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and packs_bfloat16)):
        return
    for index, block in enumerate(vit.blocks[:-1]):
        if PackedBlock.fits(block):
            vit.blocks[index] = PackedBlock(block, dtype)


class PackedLinear:
    """A frozen `nn.Linear`, times a constant per output: packed for the forward product, and for its gradient."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, factor: Tensor | None = None) -> None:
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if factor is not None:
            weight, bias = weight * factor[:, None], None if bias is None else bias * factor
        self.bias = None if bias is None else bias.to(dtype)
        pack = torch.ops.mkldnn._reorder_linear_weight
        self.weight, self.transposed = (pack(w.to(dtype).contiguous(), None) for w in (weight, weight.t()))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., in), (..., out) -> the layer's output plus the residual."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient to the output (..., out) -> gradient to the input (..., in)."""
        return torch.ops.mkldnn._linear_pointwise(grad, self.transposed, None, "none", [], "")


class PackedNorm:
    """A frozen layer norm."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = (None if p is None else p.detach().to(dtype) for p in (norm.weight, norm.bias))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens -> normalized tokens, and the means and inverse deviations that `backward` needs."""
        return aten.native_layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def backward(self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """Gradient to the output -> gradient to the tokens `x`."""
        wanted = [True, False, False]
        return aten.native_layer_norm_backward(grad, x, self.shape, mean, rstd, self.weight, self.bias, wanted)[0]


class PackedMlp:
    """A frozen MLP with one hidden layer and GELU."""

    def __init__(self, mlp: nn.Module, dtype: torch.dtype, factor: Tensor | None) -> None:
        self.gelu = gelu(mlp.act)
        self.fc1, self.fc2 = PackedLinear(mlp.fc1, dtype), PackedLinear(mlp.fc2, dtype, factor)

    @staticmethod
    def fits(mlp: nn.Module) -> bool:
        """Whether the MLP has nothing that is not written out here."""
        layers = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
        plain = type(mlp) is Mlp and gelu(mlp.act) is not None and type(mlp.norm) is nn.Identity
        return plain and all(type(layer) is nn.Linear for layer in layers)

    def __call__(self, y: Tensor, residual: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalized tokens and the stream -> the stream behind the MLP, and what `backward` needs."""
        hidden = self.fc1(y)
        return self.fc2.plus(aten.gelu(hidden, approximate=self.gelu), residual), (hidden,)

    def backward(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient to the stream behind -> gradient to the normalized tokens."""
        to_hidden = self.fc2.backward(grad)
        aten.gelu_backward.grad_input(to_hidden, hidden, approximate=self.gelu, grad_input=to_hidden)
        return self.fc1.backward(to_hidden)


class PackedGatedMlp:
    """A frozen SwiGLU, silu(gate) * value; gate and value are of one layer or of two, behind them may be a norm."""

    def __init__(self, mlp: nn.Module, dtype: torch.dtype, factor: Tensor | None) -> None:
        layers = [mlp.fc1] if type(mlp) is GluMlp else [mlp.fc1_g, mlp.fc1_x]
        self.gate_last = type(mlp) is GluMlp and mlp.gate_last
        self.fc1 = PackedLinear(joined(layers), dtype)
        self.fc2 = PackedLinear(mlp.fc2, dtype, factor)
        self.norm = None if type(mlp.norm) is nn.Identity else PackedNorm(mlp.norm, dtype)

    @staticmethod
    def fits(mlp: nn.Module) -> bool:
        """Whether the MLP has nothing that is not written out here."""
        layers = {GluMlp: ("fc1", "fc2"), SwiGLU: ("fc1_g", "fc1_x", "fc2")}.get(type(mlp), ())
        return (
            bool(layers)
            and type(mlp.act) is nn.SiLU
            and isinstance(mlp.norm, nn.Identity | nn.LayerNorm)
            and all(type(getattr(mlp, name)) is nn.Linear for name in layers)
        )

    def __call__(self, y: Tensor, residual: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `PackedMlp`."""
        hidden = self.fc1(y)
        gate, value = self._halves(hidden)
        product, moments = aten.silu(gate).mul_(value), ()
        if self.norm is None:
            return self.fc2.plus(product, residual), (hidden,)
        normalized, *moments = self.norm(product)
        return self.fc2.plus(normalized, residual), (hidden, product, *moments)

    def backward(self, grad: Tensor, hidden: Tensor, *normalized: Tensor) -> Tensor:
        """As `PackedMlp.backward`."""
        to_product = self.fc2.backward(grad)
        if self.norm is not None:
            to_product = self.norm.backward(to_product, *normalized)
        gate, value = self._halves(hidden)
        to_hidden = torch.empty_like(hidden)
        to_gate, to_value = self._halves(to_hidden)
        torch.mul(to_product, aten.silu(gate), out=to_value)
        to_gate.copy_(aten.silu_backward(to_product.mul_(value), gate))
        return self.fc1.backward(to_hidden)

    def _halves(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and value."""
        first, second = hidden.chunk(2, dim=-1)
        return (second, first) if self.gate_last else (first, second)


PACKED_MLPS = (PackedMlp, PackedGatedMlp)


class PackedBlock(nn.Module):
    """A plain pre-norm block: tokens (B, T, D) -> tokens (B, T, D). LayerScale and the attention's scale are folded."""

    def __init__(self, block: SparseBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.position = block.heads, block.position.fixed(dtype)
        self.turns = block.position.turns
        mlp = sum(m.weight.numel() for m in block.mlp.modules() if isinstance(m, nn.Linear))
        self.inner, self.products = block.proj.in_features, mlp
        self.products += block.qkv.weight.numel() + block.proj.weight.numel()
        self.norm1, self.norm2 = PackedNorm(block.norm1, dtype), PackedNorm(block.norm2, dtype)
        self.attn_norm = None if type(block.attn_norm) is nn.Identity else PackedNorm(block.attn_norm, dtype)
        scale = torch.ones(block.qkv.out_features, device=block.qkv.weight.device)
        scale[: block.qkv.out_features // 3] = block.scale
        self.qkv = PackedLinear(block.qkv, dtype, scale)
        self.proj = PackedLinear(block.proj, dtype, _gamma(block.ls1))
        kind = next(kind for kind in PACKED_MLPS if kind.fits(block.mlp))
        self.mlp = kind(block.mlp, dtype, _gamma(block.ls2))

    @staticmethod
    def fits(block: SparseBlock) -> bool:
        """Whether the block has nothing that is not written out here."""
        return (
            type(block) is SparseBlock
            and all(type(module) is nn.Identity for module in (block.q_norm, block.k_norm, *block.taps()))
            and block.gate is None
            and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2))
            and isinstance(block.attn_norm, nn.Identity | nn.LayerNorm)
            and all(isinstance(scale, nn.Identity | LayerScale) for scale in (block.ls1, block.ls2))
            and all(type(layer) is nn.Linear for layer in (block.qkv, block.proj))
            and any(kind.fits(block.mlp) for kind in PACKED_MLPS)
        )

    def __deepcopy__(self, memo: dict) -> PackedBlock:
        """Itself: nothing in it ever changes."""
        return self

    def forward(
        self, x: Tensor, queries: None = None, return_inside: bool = False, where: Tensor | None = None
    ) -> BlockOutput:
        """As `SparseBlock.forward` of all tokens."""
        after, *inside = _PackedBlock.apply(x, self, return_inside, where)
        if not return_inside:
            return BlockOutput(after)
        out, q, k = inside
        return BlockOutput(after, Inside(out, self.heads, q, k, lambda first: self._maps(q[:, :, :first], k, where)))

    @property
    def score_heads(self) -> int:
        """As `SparseBlock.score_heads`."""
        return self.heads

    def attention_weights(self, x: Tensor, queries: None = None, where: Tensor | None = None) -> Tensor:
        """As `SparseBlock.attention_weights` of all tokens."""
        qkv = self.qkv(self.norm1(x)[0]).unflatten(-1, (3, self.heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._maps(self.position.turned(q, where), self.position.turned(k, where), where).mean(dim=1)

    def _maps(self, q: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
        """Queries, scaled, and keys -> attention weights (B, heads, Q, T)."""
        scores, bias = q @ k.transpose(-2, -1), self.position.bias(where)
        return (scores if bias is None else scores + bias[:, :, : q.shape[2]]).softmax(dim=-1)

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops`; every token is computed."""
        return 2 * tokens * self.products, 4 * tokens * tokens * self.inner


class _PackedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, block: PackedBlock, return_inside: bool, where: Tensor | None) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        y, *moments1 = block.norm1(x)
        qkv = block.qkv(y).view(batch, tokens, 3, block.heads, -1)
        if block.turns:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = block.position.turned(q, where), block.position.turned(k, where)
            q, k, v = (pad_tokens(x).flatten(0, 1) for x in (q, k, v))
        else:
            q, k, v = pad_tokens(qkv.permute(2, 0, 3, 1, 4)).flatten(1, 2).unbind(0)
        weights, out = attend(q, k, v, tokens, block.position.bias(where))
        out = out.view(batch, block.heads, -1, q.shape[-1])[:, :, :tokens].transpose(1, 2).flatten(2)
        summed, moments = out, ()
        if block.attn_norm is not None:
            out, *moments = block.attn_norm(summed)
            moments = (summed, *moments)
        middle = block.proj.plus(out, x)
        y, *moments2 = block.norm2(middle)
        after, hidden = block.mlp(y, middle)
        ctx.set_materialize_grads(False)
        ctx.block, ctx.where, ctx.counts = block, where, (len(moments), len(hidden))
        ctx.save_for_backward(x, *moments1, weights, q, k, v, middle, *moments2, *moments, *hidden)
        if not return_inside:
            return (after,)
        return after, out, *(part.view(batch, block.heads, -1, part.shape[-1])[:, :, :tokens] for part in (q, k))

    @staticmethod
    def backward(
        ctx,
        grad: Tensor | None,
        to_attended: Tensor | None = None,
        to_queries: Tensor | None = None,
        to_keys: Tensor | None = None,
    ) -> tuple[Tensor, None, None, None]:
        block = ctx.block
        x, mean1, rstd1, weights, q, k, v, middle, mean2, rstd2, *rest = ctx.saved_tensors
        moments, hidden = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
        batch, tokens, _ = x.shape
        grad = torch.zeros_like(x) if grad is None else grad.contiguous()
        to_middle = block.norm2.backward(block.mlp.backward(grad, *hidden), middle, mean2, rstd2).add_(grad)
        to_out = block.proj.backward(to_middle)
        if to_attended is not None:
            to_out = to_out.add_(to_attended)
        if block.attn_norm is not None:
            to_out = block.attn_norm.backward(to_out, *moments)
        to_out = to_out.view(batch, tokens, block.heads, -1)
        to_out = pad_tokens(to_out.transpose(1, 2)).flatten(0, 1)
        to_qkv = x.new_empty(batch, tokens, 3, block.heads, q.shape[-1])
        besides = to_queries, to_keys, None
        for part, to_part in enumerate(attend_backward(weights, q, k, v, to_out)):
            to_part = to_part.view(batch, block.heads, -1, q.shape[-1])[:, :, :tokens]
            if besides[part] is not None:
                to_part = to_part + besides[part]
            if block.turns and part < 2:
                to_part = block.position.turned(to_part, ctx.where, back=True)
            to_qkv[:, :, part] = to_part.transpose(1, 2)
        to_y = block.qkv.backward(to_qkv.flatten(2))
        return block.norm1.backward(to_y, x, mean1, rstd1).add_(to_middle), None, None, None


def _gamma(scale: nn.Module) -> Tensor | None:
    """The factors of a LayerScale; None where there is none."""
    return scale.gamma.detach() if isinstance(scale, LayerScale) else None
