"""A transformer block on kept tokens, built from a timm block's own modules.

What a kind of block has besides is a subclass in the file of its family (`models/families`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from models.attention import attention
from models.positions import Position

MLP_INPUTS = ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x")
"""Names of the layers that read what an MLP reads."""


class Inside(NamedTuple):
    """What a block's attention computes on its way, of T tokens of B images, prefix tokens first.

    Of attention in windows these take the place of images, and places in them that of tokens; `present` (windows,
    places) says which of the places have a token, None: all of them.

    `attended` (B, T, D): what it puts out before its projection, `heads` side by side. `queries`, `keys` (B, heads, T,
    head_dim) as they are compared, but for a scale. `weights`: gives what each of the first Q tokens (None: all) gives
    each token, (B, heads, Q, T); of attention in windows what each of the first Q patches of an image gives each patch,
    (B, heads, Q, n), mean over the tokens of the former.
    """

    attended: Tensor
    heads: int
    queries: Tensor
    keys: Tensor
    weights: Callable[[int | None], Tensor]
    present: Tensor | None = None


class BlockOutput(NamedTuple):
    """What a block gives: tokens (B, Q, D), and on request what its attention computes on the way.

    `inside` is None as well where patches put nothing out.
    """

    tokens: Tensor
    inside: Inside | None = None


class SparseBlock(nn.Module):
    """One transformer block.

    `tap_*` are identities on tensors that are no module's input; a caller may put its own modules there. `plain`: by
    stock kernels and autograd alone. `norms`: names of those that read the stream; `sources`: of the layers that make
    queries, keys and values; `signed_probs`: whether what multiplies the values may be negative.

    Args:
        heads: of the attention.
        scale: of its scores.
        qkv: tokens -> queries, keys and values, side by side; None where `sources` are others.
        proj: the attention's output -> tokens.
        mlp: tokens -> tokens.
        norm1: what the attention reads is normalized by; nothing of a post-norm block. `norm2`: the same of the MLP.
        ls1: what the attention's output goes through before it is added: a LayerScale, the norm of a post-norm block,
            or nothing. `ls2`: the same of the MLP.
        q_norm: norm of each head's queries. `k_norm`: of its keys.
        attn_norm: norm of the attention's output.
        gate: what the attention's output is multiplied by, before its sigmoid.
        position: what the attention knows of where tokens are.
    """

    plain = False
    norms: tuple[str, ...] = ("norm1", "norm2")
    sources: tuple[str, ...] = ("qkv",)
    signed_probs = False

    def __init__(
        self,
        *,
        heads: int,
        scale: float,
        qkv: nn.Linear | None,
        proj: nn.Linear,
        mlp: nn.Module,
        norm1: nn.Module | None = None,
        norm2: nn.Module | None = None,
        ls1: nn.Module | None = None,
        ls2: nn.Module | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attn_norm: nn.Module | None = None,
        gate: nn.Linear | None = None,
        position: Position | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm1, self.ls1 = _or_nothing(norm1), _or_nothing(ls1)
        self.qkv, self.q_norm, self.k_norm = qkv, _or_nothing(q_norm), _or_nothing(k_norm)
        self.attn_norm, self.proj, self.gate = _or_nothing(attn_norm), proj, gate
        self.norm2, self.mlp, self.ls2 = _or_nothing(norm2), mlp, _or_nothing(ls2)
        self.position = Position() if position is None else position
        self.tap_q, self.tap_k, self.tap_v = nn.Identity(), nn.Identity(), nn.Identity()
        self.tap_scores, self.tap_probs = nn.Identity(), nn.Identity()
        self.tap_qkv, self.tap_proj, self.tap_mlp = nn.Identity(), nn.Identity(), nn.Identity()
        self.tap_attn_sum, self.tap_mlp_sum = nn.Identity(), nn.Identity()

    @property
    def score_heads(self) -> int:
        """How many heads queries and keys have, and so the scores."""
        return self.heads

    @property
    def hidden(self) -> int:
        """Width of the widest layer of the MLP."""
        return max(layer.out_features for layer in self.mlp.modules() if isinstance(layer, nn.Linear))

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """The norms whose output only linear layers read, and these layers, by their names in the block."""
        found = {"norm1": (*self.sources, "gate"), "norm2": MLP_INPUTS}
        return {norm: named_layers(self, layers) for norm, layers in found.items() if self.normalizes(norm)}

    @property
    def writers(self) -> dict[str, tuple[str, str]]:
        """The layers whose output is added to the stream that a norm reads, by way of a module: names in the block."""
        found = {"proj": ("norm1", "ls1"), "mlp.fc2": ("norm2", "ls2")}
        return {layer: names for layer, names in found.items() if self.normalizes(names[0])}

    def projection(self, part: int) -> tuple[nn.Linear, slice]:
        """The layer that makes queries (0), keys (1) or values (2), and which of its outputs they are."""
        layers = [getattr(self, name) for name in self.sources]
        if len(layers) > 1:
            return layers[part], slice(None)
        size = layers[0].out_features // 3
        return layers[0], slice(part * size, (part + 1) * size)

    def normalizes(self, norm: str) -> bool:
        """Whether there is a norm of this name."""
        return not isinstance(getattr(self, norm), nn.Identity)

    def taps(self) -> tuple[nn.Module, ...]:
        """The taps."""
        return tuple(module for name, module in self.named_children() if name.startswith("tap_"))

    def forward(
        self, x: Tensor, queries: int | None = None, return_inside: bool = False, where: Tensor | None = None
    ) -> BlockOutput:
        """One block.

        Args:
            x: tokens (B, T, D).
            queries: compute only the first Q tokens of the output; all of them if None.
            return_inside: whether what the attention computes is wanted as well, of all tokens.
            where: what `SparseViT.where` says of their positions.
        """
        change, inside = self.attention_change(x, queries, where, return_inside)
        x = self.tap_attn_sum(x[:, :queries] + change)
        x = self.tap_mlp_sum(x + self.mlp_change(x))
        return BlockOutput(x, inside)

    def attention_change(
        self, x: Tensor, queries: int | None, where: Tensor | None, return_inside: bool = False
    ) -> tuple[Tensor, Inside | None]:
        """Tokens (B, T, D) -> what the attention adds to the first Q (B, Q, D), and what it computes, if asked for."""
        out, inside = self._attended(self.norm1(x), queries, where, return_inside)
        return self.ls1(self.tap_proj(self.proj(out))), inside

    def mlp_change(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) -> what the MLP adds to them."""
        return self.ls2(self.tap_mlp(self.mlp(self.norm2(x))))

    def attention_weights(self, x: Tensor, queries: int | None = None, where: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) -> what each of the first Q gives each token (B, Q, T), mean over heads."""
        q, k, _ = self._qkv(self.norm1(x), queries, where)
        return self._maps(q, k, where).mean(dim=1)

    def write_probs(self, graph: Any, scores: str) -> str:
        """Scores (B, heads, Q, T) -> what multiplies the values, as operators of an ONNX `quant.onnx_graph.Graph`."""
        scores = graph.quantized(scores, self.tap_scores)
        return graph.quantized(graph.op("Softmax", scores, axis=-1), self.tap_probs)

    def flops(self, tokens: int, queries: int) -> tuple[int, int]:
        """Operations in the layers, and between tokens, of `forward` on one image."""
        inner, width = self.proj.in_features, self.proj.out_features
        mlp = sum(m.weight.numel() for m in self.mlp.modules() if isinstance(m, nn.Linear))
        gate = 0 if self.gate is None else self.gate.weight.numel()
        if queries < tokens and self._folds():
            return 2 * queries * (4 * inner * width + mlp + gate), 4 * queries * tokens * self.heads * width
        sources = sum(getattr(self, name).weight.numel() for name in self.sources)
        layers = tokens * sources + queries * (inner * width + mlp + gate)
        return 2 * layers, 4 * queries * tokens * inner

    def largest(self, tokens: int) -> int:
        """Numbers in the largest tensor of the forward pass of one image."""
        return tokens * max(self.score_heads * tokens, self.hidden)

    def saved(self, tokens: int, pairs: bool) -> int:
        """About how many numbers are kept for the gradient to the tokens of one image; `pairs`: scores among them."""
        of_pairs = self.score_heads * tokens * (pairs + self.position.biases)
        return tokens * (5 * self.proj.out_features + self.hidden + of_pairs)

    def _attended(
        self, y: Tensor, queries: int | None, where: Tensor | None, return_inside: bool
    ) -> tuple[Tensor, Inside | None]:
        """Normalized tokens (B, T, D) -> what the projection reads (B, Q, D), and what was computed on the way."""
        inside = None
        if queries is not None and not return_inside and self._folds():
            out = self.attn_norm(self._attention_of_few(y, queries))
        else:
            q, k, v = self._compared(y, None if return_inside else queries, where)
            out = self._attention(q, k, v, where)
            out = self.attn_norm(out.view(len(y), -1, out.shape[-1]))
            if return_inside:
                inside = Inside(out, self.heads, q, k, lambda first: self._maps(q[:, :, :first], k, where))
                out = out[:, :queries]
        if self.gate is not None:
            out = out * self.gate(y[:, :queries]).sigmoid()
        return out, inside

    def _compared(self, y: Tensor, queries: int | None, where: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `_qkv` gives, in the groups in which tokens look at each other: here those of an image."""
        return self._qkv(y, queries, where)

    def _qkv(self, y: Tensor, queries: int | None, where: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized tokens (B, T, D) -> queries (B, heads, Q, head_dim), keys and values (B, heads, T, head_dim)."""
        q, k, v = self.tap_qkv(self.qkv(y)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q[:, :, :queries]), self.k_norm(k)
        q, k = self.position.turned(q, where), self.position.turned(k, where)
        return self.tap_q(q), self.tap_k(k), self.tap_v(v)

    def _probs(self, q: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
        """Queries and keys -> attention weights (B, heads, Q, T)."""
        scores, bias = (q * self.scale) @ k.transpose(-2, -1), self.position.bias(where)
        scores = scores if bias is None else scores + bias[:, :, : q.shape[2]]
        return self.tap_probs(self.tap_scores(scores).softmax(dim=-1))

    def _maps(self, q: Tensor, k: Tensor, where: Tensor | None) -> Tensor:
        """Queries and keys -> what each head multiplies the values by (B, heads, Q, T)."""
        return self._probs(q, k, where)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, where: Tensor | None) -> Tensor:
        """Queries, keys and values -> attention's output (B, Q, heads * head_dim)."""
        if type(self.tap_scores) is type(self.tap_probs) is nn.Identity:
            bias = self.position.bias(where)
            bias = None if bias is None else bias[:, :, : q.shape[2]]
            if self.plain:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
            else:
                out = attention(q, k, v, self.scale, bias)
        else:
            out = self._probs(q, k, where) @ v
        return out.transpose(1, 2).flatten(2)

    def _folds(self) -> bool:
        """Whether keys and values are plain products, which `_attention_of_few` moves behind the sum over tokens."""
        taps = self.tap_qkv, self.tap_q, self.tap_k, self.tap_v, self.tap_scores, self.tap_probs
        between = self.q_norm, self.k_norm, *taps
        identities = all(type(module) is nn.Identity for module in between) and type(self.position) is Position
        linear = all(type(getattr(self, name)) is nn.Linear for name in self.sources)
        return identities and linear and not self.plain

    def _attention_of_few(self, y: Tensor, queries: int) -> Tensor:
        """As `_attention`, without a key or value of any token: q (W y) = (q W) y, and sum a (W y) = W (sum a y).

        A key's bias adds the same to every score of a query, which the softmax does not see.
        """
        parts = [self.projection(part) for part in range(3)]
        weights = [layer.weight[rows].unflatten(0, (self.heads, -1)) for layer, rows in parts]
        q_bias, _, v_bias = (None if layer.bias is None else layer.bias[rows] for layer, rows in parts)
        q_weight, k_weight, v_weight = weights
        q = F.linear(y[:, :queries], q_weight.flatten(0, 1), q_bias).unflatten(-1, (self.heads, -1))
        asked = torch.einsum("bqhd,hdw->bqhw", q * self.scale, k_weight).flatten(1, 2)
        weights = (asked @ y.transpose(1, 2)).softmax(dim=-1)
        seen = (weights @ y).unflatten(1, (queries, self.heads))
        out = torch.einsum("bqhw,hdw->bqhd", seen, v_weight).flatten(2)
        return out if v_bias is None else out + v_bias


def _or_nothing(module: nn.Module | None) -> nn.Module:
    return nn.Identity() if module is None else module


def standard_mlp(mlp: nn.Module) -> bool:
    """Whether an MLP is `fc1` (SwiGLU has two), an activation, `norm`, which may be nothing, and `fc2`, in turn."""
    in_a_row = ["fc1", "act", "norm", "fc2"]
    parts = [name for name, _ in mlp.named_children()]
    return type(mlp) in (Mlp, GluMlp, SwiGLU) or (type(mlp) is nn.Sequential and parts == in_a_row)


def gelu(act: nn.Module) -> str | None:
    """Which GELU an activation is, as `torch.nn.functional.gelu` calls it; None where it is another function."""
    if type(act) in (nn.GELU, GELU):
        return getattr(act, "approximate", "none")
    return "tanh" if type(act) is GELUTanh else None


def plain(layer: nn.Module) -> nn.Linear:
    """A linear layer itself, also where something that has it as its `linear` stands in its place."""
    return layer if isinstance(layer, nn.Linear) else layer.linear


def named_layers(block: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the names that are linear layers of the block."""
    modules = dict(block.named_modules())
    return tuple(name for name in names if isinstance(modules.get(name), nn.Linear))


def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer, of weights of its own, that gives what several of the same input give, side by side."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    made = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases:
        made.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return made


def joined_linear(layers: Sequence[nn.Linear], biases: Sequence[Tensor | None] | None = None) -> nn.Linear:
    """One linear layer that gives what several give, side by side; what it learns is learned by them.

    The parameters of `layers` become views of those of the layer. A bias that one of them has not stays zero.

    Args:
        layers: all of the same input; the one layer, if it is one already.
        biases: of the parts of the output, where they are not those of `layers`.
    """
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers] if biases is None else list(biases)
    made = nn.Linear(weights[0].shape[1], sum(map(len, weights)), bias=False, device="meta")
    made.weight = weights[0] if len(weights) == 1 else _together(weights)
    if any(bias is not None for bias in biases):
        made.bias = biases[0] if len(biases) == 1 else _together(biases, made.out_features // len(biases))
    return made


def part_of_linear(
    layer: nn.Linear, rows: slice = slice(None), columns: slice = slice(None), bias: nn.Parameter | None = None
) -> nn.Linear:
    """A linear layer of some outputs (`rows`) and inputs (`columns`) of one, whose weights are views of that one's.

    `bias`: its own (rows,), a parameter, or None.
    """
    weight = layer.weight.detach()[rows, columns]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    part.weight = nn.Parameter(weight, layer.weight.requires_grad)
    part.bias = bias
    return part


def _together(parts: Sequence[Tensor | None], size: int | None = None) -> nn.Parameter:
    """One parameter of several, which become views of it; None: zeros (`size`,), which do not learn."""
    there = [part for part in parts if part is not None]
    sizes = [size if part is None else len(part) for part in parts]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    row = there[0][0].numel()
    learns = any(part.requires_grad for part in there)
    whole = None
    if all(part.is_contiguous() for part in there):
        offsets = [p.storage_offset() - start * row for p, start in zip(parts, starts, strict=True) if p is not None]
        storages = {part.untyped_storage().data_ptr() for part in there}
        if len(storages) == 1 and len(set(offsets)) == 1 and not there[0].is_meta:  # they are such views already
            room = there[0].untyped_storage().nbytes() // there[0].element_size()
            if offsets[0] >= 0 and offsets[0] + sum(sizes) * row <= room:
                whole = there[0].detach().as_strided((sum(sizes), *there[0].shape[1:]), there[0].stride(), offsets[0])
    if whole is None:
        filled = [there[0].new_zeros(size) if part is None else part.detach() for part in parts]
        whole = torch.cat(filled)
        for part, start, count in zip(parts, starts, sizes, strict=True):
            if part is not None:
                part.data = whole[start : start + count]
    parameter = nn.Parameter(whole, requires_grad=learns)
    if learns and len(there) < len(parts):
        mask = torch.cat([torch.full((count,), part is not None) for part, count in zip(parts, sizes, strict=True)])
        parameter.register_hook(lambda grad: grad * mask.to(grad.device))
    return parameter
