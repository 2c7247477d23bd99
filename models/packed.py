"""Blocks for inversion on a CPU: frozen weights packed once, forward and backward pass written out.

The stock layers repack their weights at every call and leave the sum with the residual to a pass of its own; with
oneDNN's packed layers (which `torch.compile` uses too) a product runs at the speed of a large one. What is saved for
the backward pass is only what the gradient to the tokens needs.
"""

from __future__ import annotations

import platform

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn

from models.attention import attend, attend_backward, pad_tokens
from models.blocks import BlockOutput, SparseBlock
from models.positions import Turned
from models.sparse_vit import SparseViT

aten = torch.ops.aten


def pack_blocks(vit: SparseViT, dtype: torch.dtype) -> None:
    """Replace, in place, every block but the last that can be packed; the weights of the others are not touched.

    The last block is left as it is: it may be asked for the CLS token alone, or for its attention.
    """
    if not (torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")):
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


class PackedBlock(nn.Module):
    """A plain pre-norm block: tokens (B, T, D) -> tokens (B, T, D). LayerScale and the attention's scale are folded."""

    def __init__(self, block: SparseBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.position = block.heads, block.position.fixed(dtype)
        layers = (block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2)
        self.inner, self.products = block.proj.in_features, sum(layer.weight.numel() for layer in layers)
        self.turns = isinstance(block.position, Turned)
        self.gelu = block.mlp.act.approximate
        self.norm1, self.norm2 = PackedNorm(block.norm1, dtype), PackedNorm(block.norm2, dtype)
        scale = torch.ones(block.qkv.out_features, device=block.qkv.weight.device)
        scale[: block.qkv.out_features // 3] = block.scale
        self.qkv = PackedLinear(block.qkv, dtype, scale)
        self.proj = PackedLinear(block.proj, dtype, _gamma(block.ls1))
        self.fc1 = PackedLinear(block.mlp.fc1, dtype)
        self.fc2 = PackedLinear(block.mlp.fc2, dtype, _gamma(block.ls2))

    @staticmethod
    def fits(block: SparseBlock) -> bool:
        """Whether the block has nothing that is not written out here."""
        if type(block) is not SparseBlock:
            return False
        identities = (block.q_norm, block.k_norm, block.attn_norm, *block.taps())
        layers = (block.qkv, block.proj, getattr(block.mlp, "fc1", None), getattr(block.mlp, "fc2", None))
        return (
            all(type(module) is nn.Identity for module in identities)
            and block.gate is None
            and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2))
            and all(isinstance(scale, nn.Identity | LayerScale) for scale in (block.ls1, block.ls2))
            and type(block.mlp) is Mlp
            and type(block.mlp.act) is nn.GELU
            and type(block.mlp.norm) is nn.Identity
            and all(type(layer) is nn.Linear for layer in layers)
        )

    def __deepcopy__(self, memo: dict) -> PackedBlock:
        """Itself: nothing in it ever changes."""
        return self

    def forward(
        self, x: Tensor, queries: None = None, return_attended: bool = False, where: Tensor | None = None
    ) -> BlockOutput:
        """As `SparseBlock.forward` of all tokens."""
        return BlockOutput(*_PackedBlock.apply(x, self, return_attended, where))

    def attention_weights(self, x: Tensor, queries: None = None, where: Tensor | None = None) -> Tensor:
        """As `SparseBlock.attention_weights` of all tokens."""
        qkv = self.qkv(self.norm1(x)[0]).unflatten(-1, (3, self.heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k, bias = self.position.turned(q, where), self.position.turned(k, where), self.position.bias(where)
        scores = q @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1).mean(dim=1)

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """As `SparseBlock.flops`; every token is computed."""
        return 2 * tokens * self.products, 4 * tokens * tokens * self.inner


class _PackedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, block: PackedBlock, return_attended: bool, where: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
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
        middle = block.proj.plus(out, x)
        y, *moments2 = block.norm2(middle)
        hidden = block.fc1(y)
        ctx.block, ctx.where = block, where
        ctx.save_for_backward(x, *moments1, weights, q, k, v, middle, *moments2, hidden)
        tokens = block.fc2.plus(aten.gelu(hidden, approximate=block.gelu), middle)
        return tokens, out if return_attended else None

    @staticmethod
    def backward(ctx, grad: Tensor, to_attended: Tensor | None) -> tuple[Tensor, None, None, None]:
        block, grad = ctx.block, grad.contiguous()
        x, mean1, rstd1, weights, q, k, v, middle, mean2, rstd2, hidden = ctx.saved_tensors
        batch, tokens, _ = x.shape
        to_hidden = block.fc2.backward(grad)
        aten.gelu_backward.grad_input(to_hidden, hidden, approximate=block.gelu, grad_input=to_hidden)
        to_middle = block.norm2.backward(block.fc1.backward(to_hidden), middle, mean2, rstd2).add_(grad)
        to_out = block.proj.backward(to_middle)
        if to_attended is not None:
            to_out = to_out.add_(to_attended)
        to_out = to_out.view(batch, tokens, block.heads, -1)
        to_out = pad_tokens(to_out.transpose(1, 2)).flatten(0, 1)
        to_qkv = x.new_empty(batch, tokens, 3, block.heads, q.shape[-1])
        for part, to_part in enumerate(attend_backward(weights, q, k, v, to_out)):
            to_part = to_part.view(batch, block.heads, -1, q.shape[-1])[:, :, :tokens]
            if block.turns and part < 2:
                to_part = block.position.turned(to_part, ctx.where, back=True)
            to_qkv[:, :, part] = to_part.transpose(1, 2)
        to_y = block.qkv.backward(to_qkv.flatten(2))
        return block.norm1.backward(to_y, x, mean1, rstd1).add_(to_middle), None, None, None


def _gamma(scale: nn.Module) -> Tensor | None:
    """The factors of a LayerScale; None where there is none."""
    return scale.gamma.detach() if isinstance(scale, LayerScale) else None
