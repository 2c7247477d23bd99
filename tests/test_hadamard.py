"""Mixing what follows an activation: the same function, with values that one scale holds well."""

import json
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from models import SparseViT
from quant import QuantConfig, fitting, load_quantized, quantize, save_quantized
from quant.hadamard import Hadamard, can_mix, hadamard, unmixed, with_hadamard
from quant.observers import OBSERVERS
from quant.quantizers import ActivationQuantizer
from tests.conftest import tiny_model, tiny_vit, whole_images
from tests.families import family_vit
from tests.test_rotation import ARCHITECTURES, built
from utils.errors import UserError


@pytest.mark.parametrize("size", [4, 16, 64])
def test_the_matrix_is_its_own_inverse_and_leaves_the_vector_of_ones(size):
    matrix = hadamard(size)
    assert torch.equal(matrix @ matrix, torch.eye(size)) and torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.abs(), torch.full((size, size), size**-0.5))
    assert torch.equal(matrix @ torch.ones(size), torch.ones(size))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_model_computes_the_same(name):
    vit = built(ARCHITECTURES[name][0])
    patches, positions = torch.randn(3, 6, 3, 8, 8), torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    turned = with_hadamard(vit)
    with torch.no_grad():
        wanted, other = vit(patches, positions).logits, turned(patches, positions).logits
    assert (wanted - other).abs().max() < 1e-4 * wanted.abs().max()
    assert not unmixed(vit) and all(isinstance(block.mlp.norm, Hadamard) for block in turned.blocks)
    assert not torch.equal(vit.blocks[0].mlp.fc2.weight, turned.blocks[0].mlp.fc2.weight)
    assert not any(isinstance(module, Hadamard) for module in vit.modules())


def test_a_norm_in_front_stays_there():
    vit = SparseViT(tiny_vit())
    for block in vit.blocks:
        block.mlp.norm = nn.LayerNorm(block.mlp.fc2.in_features)
        nn.init.normal_(block.mlp.norm.weight)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(with_hadamard(vit).forward_images(images), vit.forward_images(images))


def test_few_large_values_among_many_small_ones_lose_less():
    """By four bits, with the range of least error for either: one channel of each group is ten times as large."""
    torch.manual_seed(0)
    x = torch.randn(400, 256)
    x[:, ::64] *= 10
    x = nn.functional.gelu(x)
    errors = []
    for seen in (x, (x.unflatten(-1, (-1, 64)) @ hadamard(64)).flatten(-2)):
        quantizer = ActivationQuantizer(4, OBSERVERS["mse"].observer(4))
        for _ in range(quantizer.observer.passes):
            quantizer(seen)
            quantizer.observer.end_pass()
        quantizer.freeze()
        errors.append((quantizer(seen) - seen).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_where_auto_mixes():
    for bits, mixes in (((4, 4), True), ((8, 6), True), ((32, 4), True), ((4, 8), False), ((8, 8), False)):
        assert QuantConfig(*bits, "auto").resolved().hadamard == mixes
    assert not QuantConfig(4, 4, "heads", rotate=True).resolved().hadamard
    assert not QuantConfig(4, 4, "auto", hadamard=False).resolved().hadamard
    assert QuantConfig(8, 8, "mse", hadamard=True).resolved().hadamard


def test_a_model_of_which_nothing_can_be_mixed_is_refused_and_auto_does_without():
    vit = SparseViT(tiny_vit(mlp_ratio=1.25))
    with pytest.raises(UserError, match="nothing of this model can be mixed: no group of 64 or 16 divides its 40"):
        fitting(vit, QuantConfig(4, 4, "mse", hadamard=True))
    chosen = fitting(vit, QuantConfig(4, 4, "auto"))
    assert (chosen.hadamard, chosen.rotate, chosen.observer) == (False, True, "heads")
    with pytest.raises(UserError, match="--hadamard is about activations, which --a_bit 32 leaves alone"):
        QuantConfig(4, 32, hadamard=True)


def test_an_mlp_in_another_order_is_not_taken_for_the_usual_one():
    vit = SparseViT(tiny_vit())
    for block in vit.blocks:
        mlp = block.mlp
        parts = {"fc1": mlp.fc1, "norm": nn.LayerNorm(mlp.fc1.out_features), "act": mlp.act, "fc2": mlp.fc2}
        block.mlp = nn.Sequential(OrderedDict(parts))
    assert unmixed(vit) == ["the MLP is a Sequential"] and not can_mix(vit)
    pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
    from quant.onnx_graph import require_exportable

    with pytest.raises(UserError, match="an MLP of the kind Sequential cannot be exported"):
        require_exportable(vit)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_quantizes_what_is_mixed(observer):
    """Once, in front of the layer, at the layer's width: the mixed values, not those in front of them."""
    vit = SparseViT(tiny_vit())
    quantized = quantize(vit, whole_images(8), QuantConfig(8, 8, observer, hadamard=True))
    seen, hidden, mlp = [], [], quantized.blocks[1].mlp
    mlp.act.register_forward_hook(lambda _, __, out: hidden.append(out))
    mlp.fc2.quantizer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted, found = vit.forward_images(images), quantized.forward_images(images)
    assert (wanted - found).norm() < 0.1 * wanted.norm()
    ((given, rounded),) = seen
    assert 2 < len(rounded.unique()) <= 256
    torch.testing.assert_close(given.unflatten(-1, (-1, 64)) @ hadamard(64), hidden[0].unflatten(-1, (-1, 64)))


def test_a_file_from_a_time_without_it_is_read(tmp_path):
    model = tiny_model()
    config, vit = QuantConfig(4, 4, "auto", hadamard=False), SparseViT(model.vit)
    quantized = quantize(vit, whole_images(8), config)
    save_quantized(tmp_path, quantized, model, config, list("abcde"))
    about = json.loads((tmp_path / "quantized.json").read_text())
    del about["quantization"]["hadamard"], about["sha256"]
    (tmp_path / "quantized.json").write_text(json.dumps(about))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_quantized(tmp_path).forward_images(images), quantized.forward_images(images))


KINDS = {"plain": ("vit_tiny_patch16_224", {}), "gated": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU})}
KINDS |= {"a norm within": ("eva02_base_patch14_224", {}), "in a row": ("vit_dpwee_patch16_reg1_gap_256", {})}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_mixed_model_gives_its_logits(kind):
    pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements-export.txt)")
    from quant.export import OnnxModel
    from quant.onnx_graph import onnx_model, require_exportable

    name, options = KINDS[kind]
    vit = SparseViT(family_vit(name, **options))
    mixed = with_hadamard(vit)
    require_exportable(mixed)
    images = torch.randn(3, 3, *vit.grid.image_size)
    with torch.no_grad():
        expected = vit.forward_images(images)
    found = OnnxModel(onnx_model(mixed, {}, 17).SerializeToString()).forward_images(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert any(isinstance(module, Hadamard) for module in mixed.modules())
