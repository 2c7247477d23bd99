"""Rotation: the same function, with channels that look alike."""

import pytest
import timm
import torch

from models import SparseViT
from quant import QuantConfig, fitting, load_quantized, quantize, save_quantized
from quant.rotation import orthogonal, rotated, rotations
from tests.conftest import TINY_ARGS, randomize, tiny_model, tiny_vit, whole_images
from utils.errors import UserError

ALL = {"stream", "scores", "values"}
ARCHITECTURES = {
    "deit": ({}, ALL),
    "layer scale": ({"init_values": 0.3}, ALL),
    "registers": ({"reg_tokens": 2, "no_embed_class": True}, ALL),
    "mean, its norm behind": ({"global_pool": "avg"}, ALL),
    "mean, its norm in front": ({"global_pool": "avg", "fc_norm": False}, ALL),
    "no bias": ({"qkv_bias": False}, ALL),
    "RMS norms": ({"norm_layer": "rmsnorm"}, ALL),
    "no final norm": ({"final_norm": False}, ALL),
    "SwiGLU": ({"mlp_layer": "SwiGLU"}, ALL),
    "norms on q and k": ({"qk_norm": True}, {"stream", "values"}),
    "norm behind attention": ({"scale_attn_norm": True}, {"stream", "scores"}),
    "norm in front of the blocks": ({"pre_norm": True}, {"scores", "values"}),
    "largest value": ({"global_pool": "max"}, {"scores", "values"}),
    "attention pool": ({"global_pool": "map", "class_token": False}, ALL),
}


def built(arguments: dict) -> SparseViT:
    arguments = dict(arguments)
    if "mlp_layer" in arguments:
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    return SparseViT(tiny_vit(**arguments))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rotated_model_computes_the_same(name):
    arguments, parts = ARCHITECTURES[name]
    vit = built(arguments)
    found = rotations(vit)
    assert {part for part in ALL if getattr(found, part) is None} == parts
    assert len(found.refused()) == len(ALL - parts)
    patches, positions = torch.randn(3, 6, 3, 8, 8), torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    turned = rotated(vit, seed=1)
    with torch.no_grad():
        wanted, other = vit(patches, positions).logits, turned(patches, positions).logits
    assert (wanted - other).abs().max() < 1e-4 * wanted.abs().max()
    first, second = vit.blocks[0], turned.blocks[0]
    assert torch.equal(first.qkv.weight, second.qkv.weight) == (not parts)


def test_a_distilled_model_too():
    torch.manual_seed(0)
    vit = SparseViT(randomize(timm.create_model("deit_tiny_distilled_patch16_224", **TINY_ARGS)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(rotated(vit).forward_images(images), vit.forward_images(images))


def test_channels_of_the_stream_look_alike():
    """One channel is a thousand times as large as the others: what one scale per tensor cannot hold."""
    vit = SparseViT(tiny_vit())
    vit.pos_embed.data[..., 3] *= 1000
    ratios = []
    for model in (vit, rotated(vit)):
        with torch.no_grad():
            x = model.embed(torch.randn(8, 16, 3, 8, 8), model.grid.all_positions(8)).flatten(0, 1)
        x = x - x.mean(dim=-1, keepdim=True)  # as a layer norm sees it
        ratios.append((x.square().mean(dim=0).max() / x.square().mean(dim=0).median()).item())
    assert ratios[0] > 500 > 30 > ratios[1]


@pytest.mark.parametrize("fixed", [False, True])
def test_matrices_are_orthogonal(fixed):
    matrix = orthogonal(12, torch.Generator().manual_seed(0), fixed)
    ones = torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12, dtype=torch.float64))
    assert torch.allclose(matrix @ ones, ones) == fixed
    other = orthogonal(12, torch.Generator().manual_seed(1), fixed)
    assert not torch.allclose(matrix, other)


def test_a_model_of_which_nothing_can_be_rotated_is_refused_and_auto_does_without():
    vit = built({"pre_norm": True, "qk_norm": True, "scale_attn_norm": True})
    with pytest.raises(UserError, match="nothing of this model can be rotated: the residual stream: norm_pre"):
        fitting(vit, QuantConfig(4, 4, "mse", rotate=True))
    chosen = fitting(vit, QuantConfig(4, 4, "auto"))
    assert (chosen.rotate, chosen.observer, chosen.compensate) == (False, "repq", True)


@pytest.mark.parametrize(
    "arguments", [{"init_values": 0.3}, {"init_values": 0.3, "pre_norm": True}, {"qkv_bias": False}]
)
def test_a_saved_rotated_model_is_the_same(tmp_path, arguments):
    model = tiny_model(**arguments)
    config = QuantConfig(4, 4, "auto", seed=3)
    vit = SparseViT(model.vit)
    quantized = quantize(vit, whole_images(8), config)
    save_quantized(tmp_path, quantized, model, config, list("abcde"))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path).forward_images(images), quantized.forward_images(images))
