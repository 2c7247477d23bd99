"""`--observer published`: SMI's and PSAQ-ViT's quantizer, place by place, against plain code written from its facts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import SparseImages, SparseViT
from quant import QuantConfig, quantize
from quant.export import require_export
from quant.insert import quantized_layers
from quant.quantizers import ActivationQuantizer
from tests.conftest import tiny_model, tiny_vit
from tests.families import family_vit
from utils.errors import UserError


class Plain:
    """A plain ViT with a class token, all of whose tensors are written out, each quantizer by the name of its place.

    A first pass in full precision finds lowest and highest value of every place; then `__call__` rounds.
    """

    def __init__(self, vit: torch.nn.Module, bits: int) -> None:
        self.vit, self.bits, self.ranges, self.observing = copy.deepcopy(vit), bits, {}, True

    def place(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.observing:
            low, high = self.ranges.get(name, (torch.inf, -torch.inf))
            self.ranges[name] = min(low, x.min().item()), max(high, x.max().item())
            return x
        low, high = (min(self.ranges[name][0], 0.0), max(self.ranges[name][1], 0.0))
        scale = torch.tensor((high - low) / (2**self.bits - 1))
        zero = torch.clamp(torch.round(torch.tensor(-low) / scale), 0, 2**self.bits - 1)
        return (torch.clamp(torch.round(x / scale) + zero, 0, 2**self.bits - 1) - zero) * scale

    def round_weights(self, bits: int) -> None:
        self.observing = False
        for name, parameter in self.vit.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                largest = parameter.detach().flatten(1).abs().amax(1).view(-1, *[1] * (parameter.ndim - 1))
                scale = largest / ((2**bits - 1) / 2)
                parameter.data = (parameter / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        vit, place = self.vit, self.place
        patches = vit.patch_embed.proj(place("image", images)).flatten(2).transpose(1, 2)
        patches = place("patches", patches)
        x = place("joined", torch.cat([vit.cls_token.expand(len(images), -1, -1), patches], dim=1))
        x = place("embed", x + place("positions", vit.pos_embed))
        for i, block in enumerate(vit.blocks):
            attn, heads = block.attn, block.attn.num_heads
            qkv = place(f"{i} qkv", attn.qkv(place(f"{i} norm1", block.norm1(x))))
            q, k, v = qkv.view(len(x), -1, 3, heads, qkv.shape[-1] // 3 // heads).permute(2, 0, 3, 1, 4)
            scores = place(f"{i} scores", (q * attn.scale) @ k.transpose(-2, -1))
            out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            out = place(f"{i} proj", attn.proj(place(f"{i} attended", out)))
            x = place(f"{i} first sum", x + out)
            hidden = F.gelu(block.mlp.fc1(place(f"{i} norm2", block.norm2(x))))
            out = place(f"{i} fc2", block.mlp.fc2(place(f"{i} gelu", hidden)))
            x = place(f"{i} second sum", x + out)
        return place("logits", vit.head(place("class token", vit.norm(x)[:, 0])))


@pytest.mark.parametrize(("w_bit", "a_bit"), [(8, 8), (4, 8), (6, 6)])
def test_it_is_the_published_quantizer(w_bit, a_bit):
    vit = tiny_vit()
    sparse = SparseViT(vit)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(w_bit, a_bit, "published", batch_size=8)
    quantized = quantize(sparse, SparseImages.whole(sparse.grid, images, torch.zeros(16)), config)
    plain = Plain(vit, a_bit)
    plain(images)
    plain.round_weights(w_bit)
    expected = plain(images)
    found = quantized.forward_images(images).detach()
    scales = [module.scale.item() for module in quantized.modules() if type(module) is ActivationQuantizer]
    widths = [max(high, 0.0) - min(low, 0.0) for low, high in plain.ranges.values()]
    torch.testing.assert_close(sorted(scales), sorted(width / (2**a_bit - 1) for width in widths), rtol=1e-4, atol=0)
    step = quantized.head.tap_logits.scale
    # Sums in another order move a value over a rounding step now and then, and a logit with it.
    assert (found - expected).abs().max() < 2.5 * step
    assert (found == expected).float().mean() > 0.5
    for name, layer in quantized_layers(quantized).items():
        kernel = {"patch_proj": "patch_embed.proj", "head.head": "head"}.get(name, name)
        kernel = kernel.replace(".qkv", ".attn.qkv").replace(".proj", ".attn.proj") if "blocks" in kernel else kernel
        wanted = plain.vit.get_submodule(kernel).weight.flatten(1)
        # The largest weight of a channel lies half way between two levels, and falls to either side.
        assert ((layer.linear.weight - wanted).abs() > 1e-6).sum(dim=1).max() <= 1


def test_ranges_are_those_of_the_full_precision_model_and_of_all_tokens():
    vit = SparseViT(tiny_vit())
    images = SparseImages.whole(vit.grid, torch.randn(4, 3, 32, 32), torch.zeros(4))
    coarse, fine = (quantize(vit, images, QuantConfig(bits, 8, "published")) for bits in (2, 8))
    for name in ("blocks.1.tap_mlp_sum", "blocks.1.mlp.fc2.quantizer", "head.tap_logits"):
        assert torch.equal(coarse.get_submodule(name).scale, fine.get_submodule(name).scale)
    seen = []
    hook = vit.blocks[-1].mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vit.every_token = True
    vit(images.patches, images.positions)
    hook.remove()
    assert seen[0].shape[1] == 17
    quantizer = fine.get_submodule("blocks.1.mlp.fc1.quantizer")
    width = seen[0].max().clamp(min=0) - seen[0].min().clamp(max=0)
    torch.testing.assert_close(quantizer.scale, width / 255)


def test_it_is_not_exported(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
    with pytest.raises(UserError, match="--observer published"):
        require_export(tmp_path / "a.onnx", tiny_model(), QuantConfig(8, 8, "published"))


def test_it_is_refused_for_blocks_that_the_papers_did_not_have():
    vit = SparseViT(family_vit("cait_xxs24_224"))
    images = SparseImages.whole(vit.grid, torch.randn(2, 3, *vit.grid.image_size), torch.zeros(2))
    with pytest.raises(UserError, match="published is for plain Vision Transformers"):
        quantize(vit, images, QuantConfig(8, 8, "published"))
