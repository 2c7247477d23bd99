"""What is promised of a model, held against timm's own forward: the checks of `scripts/model_support.py --check`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models import SparseImages, SparseViT, pack_blocks
from models.families import family_of
from models.packed import PackedBlock
from quant import QuantConfig, quantize
from quant.export import OnnxModel
from quant.rotation import rotated, rotations
from utils.errors import UserError

LOGITS, GRADIENTS = 1e-4, 1e-3
"""How far logits and pixel gradients may be apart, in units of the largest."""
LOW, QUANTIZED, EXPORTED = 0.1, 0.1, 0.01
"""The same of a model in bfloat16, of a W8/A8 model and its original, and of a file in ONNX Runtime and the model that
it simulates: a value on the edge between two integers may go to either."""
SMALL = {"depth": 3, "embed_dim": 64, "num_heads": 2, "num_classes": 7}
STAGES = {"depths": (2, 2, 2, 2), "embed_dim": 32, "num_heads": (1, 2, 4, 4), "num_classes": 7, "window_size": 4}
"""Arguments that make a small model; `STAGES` where it has stages of windows, shifted, padded and whole ones."""
GRID = 3, 4
IMAGES, OPSET = 4, 17


@dataclass(frozen=True)
class Found:
    """What a check found: how far two things are apart, relative to the larger; None where it cannot be asked.

    `why`: why not, or of what it is.
    """

    error: float | None
    bound: float = 0.0
    why: str = ""

    @property
    def held(self) -> bool:
        """Whether nothing speaks against the model; what cannot be asked does not."""
        return self.error is None or self.error <= self.bound

    def __str__(self) -> str:
        error = [] if self.error is None else [f"{self.error:.0e}"]
        return " ".join([*error, *([self.why] if self.why else []), *([] if self.held else ["FAILED"])])


@dataclass(frozen=True)
class Case:
    """A small model of some kind with random weights, and images for it."""

    vit: nn.Module

    @cached_property
    def sparse(self) -> SparseViT:
        """The model on kept patches."""
        return SparseViT(self.vit).requires_grad_(False)

    @cached_property
    def images(self) -> Tensor:
        """Noise, (`IMAGES`, C, H, W)."""
        generator = torch.Generator().manual_seed(1)
        grid = self.sparse.grid
        return torch.randn(IMAGES, grid.channels, *grid.image_size, generator=generator)

    @cached_property
    def quantized(self) -> SparseViT:
        """The model at W8/A8."""
        images = SparseImages.whole(self.sparse.grid, self.images, torch.zeros(IMAGES, dtype=torch.long))
        return quantize(self.sparse, images, QuantConfig(8, 8, "mse"))


def small_model(architecture: str) -> nn.Module:
    """A model of that name of timm, but for its size, with weights that all matter.

    Raises `UserError` where timm does not make it so small.
    """
    with torch.device("meta"):
        whole = timm.create_model(architecture)
    family = family_of(whole)
    per_side = 1 if family is None else family.tokens_per_side(whole)
    size = [count * per_side * side for count, side in zip(GRID, whole.patch_embed.patch_size, strict=True)]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what rotary embeddings draw is left as it is
            vit = timm.create_model(architecture, img_size=size, **(STAGES if per_side > 1 else SMALL))
    except Exception as error:
        raise UserError(f"{architecture} cannot be made small: {' '.join(str(error).split())[:160]}") from None
    return with_random_weights(vit).eval().requires_grad_(False)


@torch.no_grad()
def with_random_weights(vit: nn.Module) -> nn.Module:
    """Itself, with weights of such sizes that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vit.named_parameters():
        if parameter.ndim < 2:
            parameter.normal_(0.5, 0.2, generator=generator)
        elif re.search("token|pos_embed|latent|table", name):
            parameter.normal_(generator=generator)
        elif not name.startswith("rope."):
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return vit


def kind(vit: nn.Module) -> str:
    """What models have in common that differ in sizes alone: their classes, modules, parameters and switches."""

    def described(name: str, module: nn.Module) -> str:
        switches = {key: value for key, value in vars(module).items() if isinstance(value, str | bool | None)}
        return f"{name} {type(module).__name__} {sorted(switches.items())}"

    modules = {described(re.sub(r"\d+", "#", name), module) for name, module in vit.named_modules()}
    parameters = {re.sub(r"\d+", "#", name) for name, _ in vit.named_parameters()}
    return "\n".join(sorted(modules | parameters))


def apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number; infinite where a number is not finite."""
    difference = (got - expected).detach().abs().max() / expected.detach().abs().max()
    return float(difference) if difference.isfinite() else float("inf")


def pixel_gradient(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The gradient to the pixels of logits, each with a weight of its own."""
    images = images.clone().requires_grad_(True)
    logits = model(images)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), images)[0]


def logits(case: Case) -> Found:
    """Logits of whole images."""
    return Found(apart(case.sparse.forward_images(case.images), case.vit(case.images)), LOGITS)


def gradients(case: Case) -> Found:
    """Gradients to the pixels of whole images."""
    expected = pixel_gradient(case.vit, case.images)
    return Found(apart(pixel_gradient(case.sparse.forward_images, case.images), expected), GRADIENTS)


def packed(case: Case) -> Found:
    """Logits and gradients with blocks packed for a CPU."""
    fast = SparseViT(case.vit).requires_grad_(False)
    pack_blocks(fast, torch.float32)
    if not any(isinstance(block, PackedBlock) for block in fast.blocks):
        return Found(None, why="not packed")
    by_ours, by_timm = (pixel_gradient(model, case.images) for model in (fast.forward_images, case.vit))
    of_logits = apart(fast.forward_images(case.images), case.vit(case.images))
    return Found(max(of_logits, apart(by_ours, by_timm) * LOGITS / GRADIENTS), LOGITS)


def permuted(case: Case) -> Found:
    """Logits of patches in another order."""
    grid = case.sparse.grid
    order = torch.randperm(grid.count, generator=torch.Generator().manual_seed(2))
    patches, positions = grid.patchify(case.images)[:, order], grid.all_positions(IMAGES)[:, order]
    return Found(apart(case.sparse(patches, positions).logits, case.vit(case.images)), LOGITS)


class OnlyKept(TorchFunctionMode):
    """Inside it no attention of timm's reads a token that is not kept; (B, T) says which are."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.hidden, self.calls = torch.zeros(kept.shape).masked_fill(~kept, float("-inf"))[:, None, None], 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[1].shape[-2] == self.hidden.shape[-1]:
            mask = kwargs.get("attn_mask")
            kwargs["attn_mask"] = self.hidden if mask is None else self.hidden + mask
            self.calls += 1
        return func(*args, **kwargs)


def sparse(case: Case) -> Found:
    """Logits of kept patches, others for each image, against timm's own for these tokens.

    timm is fed all of them, its attention kept from reading the others, and its head given the kept ones.
    """
    grid, prefix, rows = case.sparse.grid, case.sparse.prefix_tokens, torch.arange(IMAGES)[:, None]
    generator = torch.Generator().manual_seed(3)
    kept = torch.stack([torch.randperm(grid.count, generator=generator)[: grid.count // 2] for _ in range(IMAGES)])
    tokens = torch.cat([torch.arange(prefix).expand(IMAGES, -1), kept + prefix], dim=1)
    reads = torch.zeros(IMAGES, prefix + grid.count, dtype=torch.bool).scatter_(1, tokens, True)
    with OnlyKept(reads) as mode:
        features = case.vit.forward_features(case.images)
    if mode.calls < len(case.sparse.blocks) or features.shape[:2] != reads.shape:
        return Found(None, why="not by timm")
    expected = case.vit.forward_head(features[rows, tokens])
    return Found(apart(case.sparse(grid.patchify(case.images)[rows, kept], kept).logits, expected), LOGITS)


def low_precision(case: Case) -> Found:
    """Logits in bfloat16, packed where blocks can be."""
    fast = SparseViT(case.vit).requires_grad_(False)
    pack_blocks(fast, torch.bfloat16)
    fast = copy.deepcopy(fast).to(torch.bfloat16)
    return Found(apart(fast.forward_images(case.images.bfloat16()).float(), case.vit(case.images)), LOW)


def rotation(case: Case) -> Found:
    """Logits of the model rotated where it can be."""
    parts = vars(rotations(case.sparse))
    turned = [name for name, refused in parts.items() if refused is None]
    if not turned:
        return Found(None, why="not rotated")
    error = apart(rotated(case.sparse).forward_images(case.images), case.vit(case.images))
    return Found(error, LOGITS, "" if len(turned) == len(parts) else ", ".join(turned))


def quantization(case: Case) -> Found:
    """Logits at W8/A8, calibrated on the same images."""
    return Found(apart(case.quantized.forward_images(case.images), case.vit(case.images)), QUANTIZED)


def export(case: Case) -> Found:
    """Logits of the W8/A8 model as a file in ONNX Runtime, against the simulated ones."""
    try:
        from quant.onnx_graph import onnx_model, require_exportable
    except ImportError:
        return Found(None, why="no onnx")
    try:
        require_exportable(case.sparse)
    except UserError as error:
        return Found(None, why=str(error).removeprefix("--export: ").removesuffix(" cannot be exported"))
    file = onnx_model(copy.deepcopy(case.quantized), {}, OPSET).SerializeToString()
    expected = case.quantized.forward_images(case.images)
    return Found(apart(OnnxModel(file).forward_images(case.images), expected), EXPORTED)


CHECKS: dict[str, Callable[[Case], Found]] = {
    "logits": logits,
    "gradients": gradients,
    "packed": packed,
    "bfloat16": low_precision,
    "permuted": permuted,
    "sparse": sparse,
    "rotated": rotation,
    "W8/A8": quantization,
    "ONNX": export,
}


def checked(vit: nn.Module) -> Iterator[tuple[str, Found]]:
    """Every check of a small model, by name; one that ends in an error says which."""
    case = Case(vit)
    for name, check in CHECKS.items():
        try:
            with torch.set_grad_enabled(name in ("gradients", "packed")):
                found = check(case)
        except Exception as error:  # one model that fails keeps no other from being checked
            found = Found(float("inf"), why=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        yield name, found
