"""A Vision Transformer, quantized or not, as an ONNX graph that ONNX Runtime can run on integers.

Every quantizer becomes QuantizeLinear and DequantizeLinear around the product that reads it; weights are stored as
integers with a scale per output channel. Layers are written as Gemm on rows of tokens, which is what ONNX Runtime
turns into an integer product with a floating-point result.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from timm.layers import AttentionPoolLatent, GluMlp, LayerScale, Mlp, RmsNorm, SwiGLU
from torch import Tensor, nn

from models import SparseViT
from models.blocks import SparseBlock
from models.positions import Position, Turned
from quant.config import stores_int4
from quant.insert import QuantizedLinear
from quant.quantizers import ActivationQuantizer, LogSqrt2Quantizer
from utils.errors import UserError

INPUT, OUTPUT = "images", "logits"


NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm)


def require_exportable(vit: SparseViT) -> None:
    """Raise `UserError` for a model with a part that is not written out here."""

    def refuse(what: str) -> None:
        raise UserError(f"--export: {what} cannot be exported")

    def require_mlp(mlp: nn.Module) -> None:
        if type(mlp) not in (Mlp, GluMlp, SwiGLU):
            refuse(f"an MLP of the kind {type(mlp).__name__}")
        if not isinstance(mlp.act, nn.GELU | nn.SiLU):
            refuse(f"the activation {type(mlp.act).__name__}")

    head, norms = vit.head, [vit.patch_norm, vit.norm_pre, vit.norm, vit.head.fc_norm]
    for block in vit.blocks:
        if type(block) is not SparseBlock:
            refuse(f"a block of the kind {type(block).__name__}")
        require_mlp(block.mlp)
        norms += [block.norm1, block.norm2, block.q_norm, block.k_norm, block.attn_norm, block.mlp.norm]
        norms += [scale for scale in (block.ls1, block.ls2) if not isinstance(scale, LayerScale)]
    if head.attn_pool is not None:
        pool = head.attn_pool
        if type(pool) is not AttentionPoolLatent or pool.pool not in ("token", "avg") or pool.pos_embed is not None:
            refuse(f"a pooling of the kind {type(pool).__name__}")
        if pool.mlp is not None:
            require_mlp(pool.mlp)
        norms += [pool.norm, pool.q_norm, pool.k_norm]
    elif head.pool_type not in ("token", "avg"):
        refuse("a pooling other than the class token's, the mean and a latent token's")
    for norm in norms:
        if not isinstance(norm, (*NORMS, nn.Identity)):
            refuse(f"the norm {type(norm).__name__}")
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


class Graph:
    """Nodes and constants as they are written; every method returns the name of its result."""

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
        """`x` with another shape; -1 for what follows from the rest."""
        return self.op("Reshape", x, self.constant(list(shape), np.int64))

    def norm(self, x: str, norm: nn.Module) -> str:
        """A layer norm or an RMS norm over the last axis, or nothing."""
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
        """GELU or SiLU."""
        return self.op("Mul", x, self.op("Sigmoid", x)) if isinstance(act, nn.SiLU) else self.gelu(x, act.approximate)

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
        if self.opset < 18:
            return self.op("ReduceMean", x, axes=[axis], keepdims=int(keep))
        return self.op("ReduceMean", x, self.constant([axis], np.int64), keepdims=int(keep))

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
    grid, width = vit.grid, _plain(vit.patch_proj).out_features
    x = graph.reshape(INPUT, -1, grid.channels, grid.rows, grid.height, grid.cols, grid.width)
    x = graph.op("Transpose", x, perm=(0, 2, 4, 1, 3, 5))
    x = graph.norm(graph.linear(graph.reshape(x, -1, grid.pixels), vit.patch_proj), vit.patch_norm)
    x = graph.reshape(x, -1, grid.count, width)
    prefix, positions = vit.prefix_and_positions()
    if positions is not None:
        x = graph.op("Add", x, graph.constant(positions[None]))
    tokens = grid.count
    if prefix is not None:
        batch = graph.op("Shape", x, start=0, end=1)
        shape = graph.op("Concat", batch, graph.constant(list(prefix.shape[1:]), np.int64), axis=0)
        x = graph.op("Concat", graph.op("Expand", graph.constant(prefix), shape), x, axis=1)
        tokens += prefix.shape[1]
    x, tap, where = graph.reshape(x, -1, width), vit.tap_embed, vit.where(grid.all_positions(1))
    if not isinstance(vit.norm_pre, nn.Identity):
        x, tap = graph.norm(graph.quantized(x, tap), vit.norm_pre), nn.Identity()
    for block in vit.blocks:
        queries = vit.last_queries if block is vit.blocks[-1] else None
        x, tap = _block(graph, block, x, tap, tokens, queries, width, where), block.tap_mlp_sum
    _head(graph, vit, x, tap, vit.last_queries or tokens, width)


def _block(
    graph: Graph,
    block: SparseBlock,
    x: str,
    tap: nn.Module,
    tokens: int,
    queries: int | None,
    width: int,
    where: Tensor | None,
) -> str:
    """Rows of tokens (B * tokens, width), that `tap` quantizes -> rows of the first `queries` tokens of every image.

    `where` is what the model says of all positions. Tokens are chosen before they are quantized: with int8 ONNX
    Runtime's optimizer fails on a reshape behind it.
    """

    def first(rows: str, size: int) -> str:
        """The rows of the first `queries` tokens."""
        if queries is None:
            return rows
        ends = (graph.constant([value], np.int64) for value in (0, queries, 1))
        return graph.reshape(graph.op("Slice", graph.reshape(rows, -1, tokens, size), *ends), -1, size)

    def of_heads(rows: str, norm: nn.Module, count: int) -> str:
        return graph.norm(graph.reshape(rows, -1, count, block.heads, inner // block.heads), norm)

    entering = graph.quantized(x, tap)
    rest = entering if queries is None else graph.quantized(first(x, width), tap)
    y = graph.norm(entering, block.norm1)
    inner = _plain(block.proj).in_features
    q, k, v = graph.parts(graph.linear(y, block.qkv), 3)
    q = graph.turned(of_heads(first(q, inner), block.q_norm, queries or tokens), block.position, where, tokens, queries)
    q = graph.quantized(q, block.tap_q, (0, 2, 1, 3), block.scale)
    k = graph.turned(of_heads(k, block.k_norm, tokens), block.position, where, tokens)
    k = graph.quantized(k, block.tap_k, (0, 2, 3, 1))
    v = graph.quantized(of_heads(v, nn.Identity(), tokens), block.tap_v, (0, 2, 1, 3))
    scores, bias = graph.op("MatMul", q, k), block.position.bias(where)
    scores = scores if bias is None else graph.op("Add", scores, graph.constant(bias[:, :, :queries]))
    scores = graph.quantized(scores, block.tap_scores)
    probs = graph.quantized(graph.op("Softmax", scores, axis=-1), block.tap_probs)
    out = graph.op("Transpose", graph.op("MatMul", probs, v), perm=(0, 2, 1, 3))
    out = graph.norm(graph.reshape(out, -1, inner), block.attn_norm)
    if block.gate is not None:
        out = graph.op("Mul", out, graph.op("Sigmoid", graph.linear(first(y, width), block.gate)))
    out = graph.scaled(graph.linear(out, block.proj), block.ls1)
    x = graph.quantized(graph.op("Add", rest, out), block.tap_attn_sum)
    y = graph.scaled(graph.mlp(graph.norm(x, block.norm2), block.mlp), block.ls2)
    return graph.op("Add", x, y)


def _head(graph: Graph, vit: SparseViT, x: str, tap: nn.Module, tokens: int, width: int) -> None:
    """Rows of tokens (B * tokens, width), that `tap` quantizes -> logits; as in a block, they are chosen before."""
    head, x = vit.head, graph.reshape(x, -1, tokens, width)

    def normalized(chosen: str) -> str:
        return graph.norm(graph.quantized(chosen, tap), vit.norm)

    def sliced(start: int) -> str:
        """The tokens from `start` on."""
        return graph.op("Slice", x, *(graph.constant([value], np.int64) for value in (start, tokens, 1)))

    def token(index: int) -> str:
        return normalized(graph.op("Gather", x, graph.constant(index, np.int64), axis=1))

    if head.head_dist is not None:
        both = graph.op("Add", graph.linear(token(0), head.head), graph.linear(token(1), head.head_dist))
        graph.op("Mul", both, graph.constant(0.5), result=OUTPUT)
        return
    if head.attn_pool is not None:
        start = 0 if head.include_prefix else head.prefix_tokens
        pooled = _pool(graph, head.attn_pool, normalized(sliced(start)), tokens - start, width)
    elif head.pool_type == "token":
        pooled = token(0)
    else:
        pooled = graph.mean(normalized(sliced(0 if head.include_prefix else head.prefix_tokens)))
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


def _plain(layer: nn.Module) -> nn.Linear:
    """The linear layer itself, quantized or not."""
    return layer.linear if isinstance(layer, QuantizedLinear) else layer
