"""A Vision Transformer, quantized or not, as an ONNX graph that ONNX Runtime can run on integers.

Every quantizer becomes QuantizeLinear and DequantizeLinear around the product that reads it; weights are stored as
integers with a scale per output channel. Layers are written as Gemm on rows of tokens, which is what ONNX Runtime
turns into an integer product with a floating-point result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.layers import AttentionPoolLatent, GluMlp, LayerScale, QuickGELU, RmsNorm, SwiGLU
from torch import Tensor, nn

from models import SparseViT
from models.blocks import SparseBlock, gelu, plain, standard_mlp
from models.positions import Position, Turned
from quant.config import stores_int4
from quant.quantizers import ActivationQuantizer, LogSqrt2Quantizer
from utils.errors import UserError

INPUT, OUTPUT = "images", "logits"


NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm)


def require_exportable(vit: SparseViT) -> None:
    """Raise `UserError` for a model with a part that is not written out here."""

    def refuse(what: str) -> None:
        raise UserError(f"--export: {what} cannot be exported")

    def require_mlp(mlp: nn.Module) -> None:
        if not standard_mlp(mlp):
            refuse(f"an MLP of the kind {type(mlp).__name__}")
        if gelu(mlp.act) is None and not isinstance(mlp.act, nn.SiLU | QuickGELU):
            refuse(f"the activation {type(mlp.act).__name__}")

    head, norms = vit.head, [vit.patch_norm, vit.norm_pre, vit.norm, vit.head.fc_norm]
    parts = [module for module in vit.blocks.modules() if isinstance(module, SparseBlock)]
    for block in (*vit.blocks, *parts):
        if type(block) is not SparseBlock and not hasattr(block, "write"):
            refuse(f"a block of the kind {type(block).__name__}")
    for block in parts:
        require_mlp(block.mlp)
        norms += [block.norm1, block.norm2, block.attn_norm, block.q_norm, block.k_norm, block.mlp.norm]
        norms += [scale for scale in (block.ls1, block.ls2) if not isinstance(scale, LayerScale)]
    if head.attn_pool is not None:
        pool = head.attn_pool
        if type(pool) is not AttentionPoolLatent or pool.pool not in ("token", "avg") or pool.pos_embed is not None:
            refuse(f"a pooling of the kind {type(pool).__name__}")
        if pool.mlp is not None:
            require_mlp(pool.mlp)
        norms += [pool.norm, pool.q_norm, pool.k_norm]
    for norm in norms:
        for part in norm.children() if hasattr(norm, "write") else (norm,):
            if not isinstance(part, (*NORMS, nn.Identity)):
                refuse(f"the norm {type(part).__name__}")
    if 4 * sum(parameter.numel() for parameter in vit.parameters()) >= 2**31:
        refuse("a model of 2 GB or more")


@torch.no_grad()
def onnx_model(vit: SparseViT, metadata: dict[str, str], opset: int) -> onnx.ModelProto:
    """`images` (batch, C, H, W), normalized -> `logits` (batch, classes), the batch of any size.

    Args:
        vit: a full-precision or quantized model that `require_exportable` lets through.
        metadata: what else the file says about itself.
        opset: `OLDEST_OPSET` or newer. What it lacks is written out: Gelu below 20, int4 (weights of 4 bits and fewer,
            two in a byte) as int8 below 21.
    """
    vit = vit.cpu()
    graph, operators = Graph(opset), [helper.make_opsetid("", opset)]
    _write(graph, vit)
    size = ["batch", vit.grid.channels, *vit.grid.image_size]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "vit",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, size)],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", vit.num_classes])],
            graph.initializers,
        ),
        opset_imports=operators,
        ir_version=helper.find_min_ir_version_for(operators),
        producer_name="sparse-model-inversion",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class Stream:
    """Tokens between blocks: the name of their rows (B * tokens, width), and the tap that has yet to quantize them.

    Tokens are chosen before they are quantized: with int8 ONNX Runtime's optimizer fails on a reshape behind it.
    """

    rows: str
    tap: nn.Module
    tokens: int
    width: int


class Graph:
    """Nodes and constants as they are written; methods return the name of their result, those of blocks a `Stream`.

    A block that is not exactly a `SparseBlock` has a method `write(graph, stream, queries, where)`, which gives the
    stream behind it: of the first `queries` tokens, or of all of them if that is None; `where` is what
    `SparseViT.where` says of one whole image. A norm of its own has `write(graph, rows)`.
    """

    def __init__(self, opset: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.opset = opset

    def constant(self, value: Tensor | np.ndarray | list, dtype: type = np.float32) -> str:
        """A constant of any shape."""
        array = np.asarray(value.detach().numpy() if isinstance(value, Tensor) else value).astype(dtype)
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, result: str | None = None, **attributes: object):
        """An operator's result; a list where it has several."""
        names = [result] if result else [f"{kind}{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names if outputs > 1 else names[0]

    def reshape(self, x: str, *shape: int) -> str:
        """`x` with another shape; -1 for what follows from the rest, 0 for what it is."""
        return self.op("Reshape", x, self.constant(list(shape), np.int64))

    def norm(self, x: str, norm: nn.Module) -> str:
        """A layer norm or an RMS norm over the last axis, one that writes itself, or nothing."""
        if hasattr(norm, "write"):
            return norm.write(self, x)
        if isinstance(norm, nn.Identity):
            return x
        if not isinstance(norm, nn.LayerNorm):
            return self.rms_norm(x, norm)
        ones = torch.ones(norm.normalized_shape)
        scale = self.constant(ones if norm.weight is None else norm.weight)
        offset = self.constant(ones * 0 if norm.bias is None else norm.bias)
        return self.op("LayerNormalization", x, scale, offset, axis=-1, epsilon=norm.eps)

    def rms_norm(self, x: str, norm: nn.Module) -> str:
        """x / sqrt(mean(x^2) + eps), times the norm's scale."""
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        mean = self.op("Add", self.mean(self.op("Mul", x, x), -1, keep=True), self.constant(eps))
        x = self.op("Div", x, self.op("Sqrt", mean))
        return x if norm.weight is None else self.op("Mul", x, self.constant(norm.weight))

    def scaled(self, x: str, scale: nn.Module) -> str:
        """A LayerScale, the norm of a post-norm block, or nothing."""
        return self.op("Mul", x, self.constant(scale.gamma)) if isinstance(scale, LayerScale) else self.norm(x, scale)

    def mlp(self, x: str, mlp: nn.Module) -> str:
        """Rows through an MLP, gated or not."""
        if type(mlp) is SwiGLU:
            hidden = self.op("Mul", self.activated(self.linear(x, mlp.fc1_g), mlp.act), self.linear(x, mlp.fc1_x))
        elif type(mlp) is GluMlp:
            first, second = self.parts(self.linear(x, mlp.fc1), 2)
            gate, value = (second, first) if mlp.gate_last else (first, second)
            hidden = self.op("Mul", self.activated(gate, mlp.act), value)
        else:
            hidden = self.activated(self.linear(x, mlp.fc1), mlp.act)
        return self.linear(self.norm(hidden, mlp.norm), mlp.fc2)

    def activated(self, x: str, act: nn.Module) -> str:
        """GELU, SiLU or quick GELU, which is x sigmoid(1.702 x)."""
        if isinstance(act, nn.SiLU | QuickGELU):
            inner = self.op("Mul", x, self.constant(1.702)) if isinstance(act, QuickGELU) else x
            return self.op("Mul", x, self.op("Sigmoid", inner))
        return self.gelu(x, gelu(act))

    def in_turn(self, block: SparseBlock, stream: Stream, queries: int | None, where: Any) -> Stream:
        """A block of attention, then MLP."""
        entering, asking = self.entering(stream, queries)
        out = self.attended(block, self.norm(entering, block.norm1), stream, queries, where)
        rows = self.behind_attention(block, asking, out)
        return replace(stream, rows=rows, tap=block.tap_mlp_sum, tokens=queries or stream.tokens)

    def entering(self, stream: Stream, queries: int | None) -> tuple[str, str]:
        """Quantized rows of all tokens, and of the first `queries` of every image."""
        rows = self.quantized(stream.rows, stream.tap)
        if queries is None:
            return rows, rows
        return rows, self.quantized(self.first(stream.rows, queries, stream.tokens, stream.width), stream.tap)

    def first(self, rows: str, queries: int | None, tokens: int, size: int) -> str:
        """Rows of `tokens` tokens an image, (B * tokens, size) -> those of the first `queries`; None: all."""
        if queries is None:
            return rows
        return self.reshape(self.sliced(self.reshape(rows, -1, tokens, size), 0, queries), -1, size)

    def sliced(self, x: str, start: int, end: int) -> str:
        """Tokens (B, T, ..) from `start` to `end`."""
        return self.op("Slice", x, *(self.constant([value], np.int64) for value in (start, end, 1)))

    def in_front(self, same: Tensor, x: str) -> str:
        """Tokens (1, P, D), which are the same for all images, in front of (B, T, D)."""
        batch = self.op("Shape", x, start=0, end=1)
        shape = self.op("Concat", batch, self.constant(list(same.shape[1:]), np.int64), axis=0)
        return self.op("Concat", self.op("Expand", self.constant(same), shape), x, axis=1)

    def attended(self, block: SparseBlock, y: str, stream: Stream, queries: int | None, where: Any) -> str:
        """Normalized rows of a stream -> rows of the first `queries` tokens that the projection of attention reads."""
        tokens, inner, width = stream.tokens, plain(block.proj).in_features, plain(block.proj).out_features

        def of_heads(rows: str, heads: int, count: int, norm: nn.Module | None = None) -> str:
            rows = self.reshape(rows, -1, count, heads, inner // heads)
            return rows if norm is None else self.norm(rows, norm)

        if len(block.sources) == 1:
            q, k, v = self.parts(self.linear(y, block.qkv), 3)
            q = self.first(q, queries, tokens, inner)
        else:
            q, k, v = (getattr(block, name) for name in block.sources)
            q = self.linear(self.first(y, queries, tokens, width), q)
            k, v = self.linear(y, k), self.linear(y, v)
        q = of_heads(q, block.score_heads, queries or tokens, block.q_norm)
        q = self.quantized(
            self.turned(q, block.position, where, tokens, queries), block.tap_q, (0, 2, 1, 3), block.scale
        )
        k = of_heads(k, block.score_heads, tokens, block.k_norm)
        k = self.quantized(self.turned(k, block.position, where, tokens), block.tap_k, (0, 2, 3, 1))
        v = self.quantized(of_heads(v, block.heads, tokens), block.tap_v, (0, 2, 1, 3))
        scores, bias = self.op("MatMul", q, k), block.position.bias(where)
        scores = scores if bias is None else self.op("Add", scores, self.constant(bias[:, :, :queries]))
        out = self.op("MatMul", block.write_probs(self, scores), v)
        out = self.norm(self.reshape(self.op("Transpose", out, perm=(0, 2, 1, 3)), -1, inner), block.attn_norm)
        if block.gate is None:
            return out
        gate = self.linear(self.first(y, queries, tokens, width), block.gate)
        return self.op("Mul", out, self.op("Sigmoid", gate))

    def mixed_heads(self, x: str, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> str:
        """(B, heads, Q, T) -> the same of as many heads as `weight` (heads, heads of a group) has, each a mix."""
        constants = [self.constant(weight[:, :, None, None])] + ([] if bias is None else [self.constant(bias)])
        return self.op("Conv", x, *constants, group=groups)

    def behind_attention(self, block: SparseBlock, x: str, out: str) -> str:
        """Rows of the stream and of what attention put out -> rows behind the block, its last sum not quantized yet."""
        x = self.quantized(self.op("Add", x, self.attention_change(block, out)), block.tap_attn_sum)
        return self.op("Add", x, self.mlp_change(block, x))

    def attention_change(self, block: SparseBlock, out: str) -> str:
        """Rows of what attention put out -> what is added to the stream."""
        return self.scaled(self.linear(out, block.proj), block.ls1)

    def mlp_change(self, block: SparseBlock, x: str) -> str:
        """Rows of the stream -> what the MLP adds to them."""
        return self.scaled(self.mlp(self.norm(x, block.norm2), block.mlp), block.ls2)

    def unit(self, x: str) -> str:
        """Vectors along the last axis, of length one."""
        length = self.over_axis("ReduceL2", x, -1, keep=True)
        return self.op("Div", x, self.op("Max", length, self.constant(1e-12)))

    def gathered(self, rows: str, index: Tensor, tokens: int, size: int) -> str:
        """Rows of `tokens` tokens an image, (B * tokens, size) -> those at `index`, (B * len(index), size)."""
        chosen = self.op("Gather", self.reshape(rows, -1, tokens, size), self.constant(index, np.int64), axis=1)
        return self.reshape(chosen, -1, size)

    def turned(self, x: str, position: Position, where: Tensor | None, tokens: int, queries: int | None = None) -> str:
        """Queries or keys (B, tokens, heads, head_dim), or the first `queries` of them, turned by their positions."""
        if not isinstance(position, Turned):
            return x
        *factors, matrix = position.as_products(where, tokens)
        cosines, sines = (self.constant(factor[:queries]) for factor in factors)
        other = self.op("Mul", self.op("MatMul", x, self.constant(matrix)), sines)
        return self.op("Add", self.op("Mul", x, cosines), other)

    def quantized(
        self, x: str, quantizer: nn.Module, transposed: tuple[int, ...] | None = None, factor: float = 1.0
    ) -> str:
        """What a tap lets through, its axes transposed, times `factor`.

        With a range for each head `x` is (B, heads, ..), or becomes so by `transposed`.
        """
        if isinstance(quantizer, ActivationQuantizer):
            if quantizer.heads is None:
                return self.in_integers(x, quantizer, transposed, factor)
            return self.by_head(x, quantizer, transposed, factor)
        if isinstance(quantizer, LogSqrt2Quantizer):
            x = self.log_sqrt2(x, quantizer)
        if transposed is not None:
            x = self.op("Transpose", x, perm=transposed)
        return x if factor == 1.0 else self.op("Mul", x, self.constant(factor))

    def in_integers(
        self, x: str, quantizer: ActivationQuantizer, transposed: tuple[int, ...] | None, factor: float
    ) -> str:
        """`quantized` with one range for the tensor."""
        scale, stored = quantizer.scale, np.int8 if quantizer.symmetric else np.uint8
        zero_point = self.constant(quantizer.zero_point, stored)
        if quantizer.bits < 8:  # eight bits are stored, the range of fewer is used
            ends = (torch.tensor([quantizer.low, quantizer.high]) - quantizer.zero_point) * scale
            x = self.op("Clip", x, self.constant(ends[0]), self.constant(ends[1]))
        x = self.op("QuantizeLinear", x, self.constant(scale), zero_point)
        if transposed is not None:
            x = self.op("Transpose", x, perm=transposed)
        return self.op("DequantizeLinear", x, self.constant(scale * factor), zero_point)

    def by_head(self, x: str, quantizer: ActivationQuantizer, transposed: tuple[int, ...] | None, factor: float) -> str:
        """`quantized` with a range for each head, in floating point: the runtime's integer product takes one scale."""
        if transposed is not None:
            x = self.op("Transpose", x, perm=transposed)
        spread, ends = quantizer.spread, (quantizer.low, quantizer.high)
        low, high = (self.constant(spread((end - quantizer.zero_point).float())) for end in ends)
        x = self.op("Round", self.op("Mul", x, self.constant(spread(1 / quantizer.scale))))
        x = self.op("Min", self.op("Max", x, low), high)
        return self.op("Mul", x, self.constant(spread(quantizer.scale * factor)))

    def log_sqrt2(self, x: str, quantizer: LogSqrt2Quantizer) -> str:
        """`quant.quantizers.log_sqrt2`."""
        scale = quantizer.scale.item()
        # Anything that is rounded to more than `high` is zero; the smallest float in its place keeps the logarithm.
        x = self.op("Max", self.op("Mul", x, self.constant(1 / scale)), self.constant(2.0**-60))
        q = self.op("Mul", self.op("Log", x), self.constant(-2 / np.log(2)))
        q = self.op("Max", self.op("Round", q), self.constant(0.0))
        value = self.op("Mul", self.op("Exp", self.op("Mul", q, self.constant(-np.log(2) / 2))), self.constant(scale))
        inside = self.op("LessOrEqual", q, self.constant(float(quantizer.high)))
        return self.op("Where", inside, value, self.constant(0.0))

    def linear(self, x: str, layer: nn.Module, result: str | None = None) -> str:
        """Rows (n, in) -> rows (n, out)."""
        if isinstance(layer, nn.Linear):
            bias = [] if layer.bias is None else [self.constant(layer.bias)]
            return self.op("Gemm", x, self.constant(layer.weight.t()), *bias, result=result)
        x, bias = self.quantized(x, layer.quantizer), layer.linear.bias
        if layer.weight_scale is None:
            return self.linear(x, layer.linear, result)
        weight = self.weight(layer.integers().t().contiguous().numpy(), layer.w_bit)
        # The zero points say nothing, but without them the runtime makes no integer product.
        zero_points = self.constant(torch.zeros(len(layer.weight_scale)), np.int8)
        weight = self.op("DequantizeLinear", weight, self.constant(layer.weight_scale), zero_points, axis=1)
        if bias is None:
            return self.op("Gemm", x, weight, result=result)
        # An integer product would take its bias rounded to its own units; added behind it, it is exact.
        return self.op("Add", self.op("Gemm", x, weight), self.constant(bias), result=result)

    def parts(self, x: str, number: int) -> list[str]:
        """So many equal parts of the columns of `x`."""
        count = {"num_outputs": number} if self.opset >= 18 else {}
        return self.op("Split", x, outputs=number, axis=1, **count)

    def mean(self, x: str, axis: int = 1, keep: bool = False) -> str:
        """The mean over an axis."""
        return self.over_axis("ReduceMean", x, axis, keep)

    def pooled(self, x: str, kind: str) -> str:
        """Tokens (B, T, D) -> (B, D): their mean (`avg`), the largest value (`max`), or the mean of both (`avgmax`)."""
        if kind == "avg":
            return self.mean(x)
        largest = self.over_axis("ReduceMax", x, 1, keep=False)
        if kind == "max":
            return largest
        return self.op("Mul", self.op("Add", largest, self.mean(x)), self.constant(0.5))

    def over_axis(self, kind: str, x: str, axis: int, keep: bool) -> str:
        """What an operator of this kind makes of the numbers along an axis."""
        if self.opset < 18:
            return self.op(kind, x, axes=[axis], keepdims=int(keep))
        return self.op(kind, x, self.constant([axis], np.int64), keepdims=int(keep))

    def gelu(self, x: str, approximate: str) -> str:
        """`torch.nn.functional.gelu`; written out as runtimes know it again and fuse it."""
        if self.opset >= 20:
            return self.op("Gelu", x, approximate=approximate)
        if approximate == "none":
            inner = self.op("Erf", self.op("Div", x, self.constant(2**0.5)))
        else:
            cube = self.op("Mul", self.constant(0.044715), self.op("Pow", x, self.constant(3.0)))
            inner = self.op("Tanh", self.op("Mul", self.constant((2 / np.pi) ** 0.5), self.op("Add", x, cube)))
        return self.op("Mul", self.op("Mul", x, self.op("Add", inner, self.constant(1.0))), self.constant(0.5))

    def weight(self, integers: np.ndarray, bits: int) -> str:
        """Integers (in, out) as int8; as int4 in the file where they fit, which the runtime unpacks when it loads."""
        if not stores_int4(bits, self.opset):
            return self.constant(integers, np.int8)
        name = f"c{len(self.initializers)}"
        flat = integers.astype(np.int8).ravel()
        flat = np.append(flat, np.zeros(flat.size % 2, np.int8)).astype(np.uint8) & 0xF
        packed = (flat[0::2] | (flat[1::2] << 4)).tobytes()
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, integers.shape, packed, raw=True))
        return self.op("Cast", name, to=TensorProto.INT8)


def _write(graph: Graph, vit: SparseViT) -> None:
    """Images -> logits."""
    grid, width = vit.grid, plain(vit.patch_proj).out_features
    side = vit.tokens_per_side
    high, wide = grid.height // side, grid.width // side
    x = graph.reshape(INPUT, -1, grid.channels, grid.rows, side, high, grid.cols, side, wide)
    x = graph.op("Transpose", x, perm=(0, 2, 5, 3, 6, 1, 4, 7))
    x = graph.reshape(x, -1, grid.pixels // side**2)
    x = graph.norm(graph.linear(x, vit.patch_proj), vit.patch_norm)
    x = graph.reshape(x, -1, grid.count * side**2, width)
    prefix, positions = vit.prefix_and_positions()
    if positions is not None:
        x = graph.op("Add", x, graph.constant(positions[None]))
    tokens = grid.count * side**2
    if prefix is not None:
        x = graph.in_front(prefix, x)
        tokens += prefix.shape[1]
    x, tap, where = graph.reshape(x, -1, width), vit.tap_embed, vit.where(grid.all_positions(1))
    if not isinstance(vit.norm_pre, nn.Identity):
        x, tap = graph.norm(graph.quantized(x, tap), vit.norm_pre), nn.Identity()
    stream = Stream(x, tap, tokens, width)
    for block in vit.blocks:
        queries = vit.last_queries if block is vit.blocks[-1] else None
        if type(block) is SparseBlock:
            stream = graph.in_turn(block, stream, queries, where)
        else:
            stream = block.write(graph, stream, queries, where)
    _head(graph, vit, stream)


def _head(graph: Graph, vit: SparseViT, stream: Stream) -> None:
    """The stream behind the last block -> logits."""
    head, tokens, width = vit.head, stream.tokens, stream.width
    x = graph.reshape(stream.rows, -1, tokens, width)

    def normalized(chosen: str) -> str:
        return graph.norm(graph.quantized(chosen, stream.tap), vit.norm)

    def behind(start: int) -> str:
        """The tokens from `start` on."""
        return normalized(graph.sliced(x, start, tokens))

    def token(index: int) -> str:
        return normalized(graph.op("Gather", x, graph.constant(index, np.int64), axis=1))

    if head.head_dist is not None:
        both = graph.op("Add", graph.linear(token(0), head.head), graph.linear(token(1), head.head_dist))
        graph.op("Mul", both, graph.constant(0.5), result=OUTPUT)
        return
    if head.attn_pool is not None:
        start = 0 if head.include_prefix else head.prefix_tokens
        pooled = _pool(graph, head.attn_pool, behind(start), tokens - start, width)
    elif head.pool_type == "token":
        pooled = token(0)
    else:
        pooled = graph.pooled(behind(0 if head.include_prefix else head.prefix_tokens), head.pool_type)
    graph.linear(graph.norm(pooled, head.fc_norm), head.head, result=OUTPUT)


def _pool(graph: Graph, pool: AttentionPoolLatent, x: str, tokens: int, width: int) -> str:
    """Tokens (B, tokens, width) -> what the pool's latent tokens, the same for all images, gather: rows (B, width)."""
    heads, count = pool.num_heads, pool.latent_len
    q = pool.q_norm(pool.q(pool.latent).unflatten(-1, (heads, -1))).transpose(1, 2) * pool.scale
    k, v = graph.parts(graph.linear(graph.reshape(x, -1, width), pool.kv), 2)
    k = graph.norm(graph.reshape(k, -1, tokens, heads, q.shape[-1]), pool.k_norm)
    k = graph.op("Transpose", k, perm=(0, 2, 3, 1))
    v = graph.op("Transpose", graph.reshape(v, -1, tokens, heads, q.shape[-1]), perm=(0, 2, 1, 3))
    weights = graph.op("Softmax", graph.op("MatMul", graph.constant(q), k), axis=-1)
    out = graph.op("Transpose", graph.op("MatMul", weights, v), perm=(0, 2, 1, 3))
    out = graph.linear(graph.reshape(out, -1, heads * q.shape[-1]), pool.proj)
    if pool.mlp is not None:
        out = graph.op("Add", out, graph.mlp(graph.norm(out, pool.norm), pool.mlp))
    out = graph.reshape(out, -1, count, width)
    return graph.op("Gather", out, graph.constant(0, np.int64), axis=1) if pool.pool == "token" else graph.mean(out)
