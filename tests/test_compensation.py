"""Layers fitted to their quantized input, and weights rounded in turn."""

import copy

import pytest
import torch

from models import SparseImages, SparseViT
from quant import QuantConfig, quantize
from quant.calibration import calibrated, fitting
from quant.compensation import RIDGE, compensate, rounded_in_turn
from quant.insert import quantized_layers
from quant.quantizers import least_error_scale, round_weight
from tests.conftest import tiny_vit, whole_images


@pytest.fixture
def vit() -> SparseViT:
    return SparseViT(tiny_vit())


def lost(vit: SparseViT, quantized: SparseViT, images: SparseImages) -> float:
    """Squared error of the logits."""
    with torch.no_grad():
        pairs = (model(images.patches, images.positions).logits for model in (vit, quantized))
        return torch.sub(*pairs).square().mean().item()


def correlated(count: int, size: int) -> torch.Tensor:
    """Inputs of which every channel goes with the others, and some are larger."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + 3 * torch.ones(size, size) / size
    return torch.randn(count, size, generator=generator) @ mixing


@pytest.mark.parametrize("size", [20, 300])
def test_rounding_in_turn_changes_the_output_less_than_rounding_to_the_nearest(size):
    x, weight = correlated(4 * size, size), torch.randn(7, size, generator=torch.Generator().manual_seed(1))
    scale = least_error_scale(weight, 3)
    errors = []
    for rounded in (round_weight(weight, scale, 3), rounded_in_turn(weight, x.T @ x, scale, 3)):
        codes = rounded / scale[:, None]
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert codes.min() >= -4.001 and codes.max() <= 3.001
        errors.append(((weight - rounded) @ x.T).square().mean())
    assert errors[1] < errors[0]


def test_where_inputs_have_nothing_in_common_rounding_in_turn_is_to_the_nearest():
    weight, scale = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)), torch.full((5,), 0.3)
    rounded = rounded_in_turn(weight, torch.diag(torch.rand(12) + 0.5), scale, 4)
    torch.testing.assert_close(rounded, round_weight(weight, scale, 4))


def test_by_the_plain_formula_one_column_after_another():
    """Optimal brain surgeon: with the inverse P of what is left, the others move by -error P[:, i] / P[i, i]."""
    size, bits = 9, 3
    x, weight = correlated(50, size), torch.randn(4, size, generator=torch.Generator().manual_seed(1))
    scale, moments = least_error_scale(weight, bits), (x.T @ x).double()
    moments += 0.01 * moments.diagonal().mean() * torch.eye(size)
    left, wanted = weight.double().clone(), torch.zeros(4, size)
    order = moments.diagonal().argsort(descending=True).tolist()
    for number, column in enumerate(order):
        rest = order[number:]
        inverse = torch.linalg.inv(moments[rest][:, rest])
        wanted[:, column] = (left[:, column] / scale).round().clamp(-4, 3) * scale
        error = (left[:, column] - wanted[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    torch.testing.assert_close(rounded_in_turn(weight, x.T @ x, scale, bits), wanted)


def test_a_layer_is_the_ridge_regression_of_what_it_should_give(vit):
    """The first layer behind the patch projection, weights not rounded, by numpy's words: rows of tokens, and one."""
    images = whole_images(6)
    reference, quantized = calibrated(vit, images, fitting(vit, QuantConfig(32, 3, "mse", compensate=True)))
    before = copy.deepcopy(quantized)
    compensate(reference, quantized, images, batch_size=4)
    inputs = {}
    for key, model in (("full", reference), ("quantized", before)):
        layer = model.patch_proj
        layer.register_forward_pre_hook(lambda _, x, key=key: inputs.update({key: x[0].flatten(0, -2)}))
        model(images.patches, images.positions)
    original = reference.patch_proj.linear
    x, wanted = before.patch_proj.quantizer(inputs["quantized"]).double(), original(inputs["full"]).double()
    lacking = wanted - (x @ original.weight.double().T + original.bias.double())
    rows = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    ridge = torch.eye(rows.shape[1]).double() * RIDGE * x.square().sum(dim=0).mean()
    ridge[-1, -1] = 0
    change = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ lacking)
    found = quantized.patch_proj.linear
    torch.testing.assert_close((found.weight - original.weight).double(), change[:-1].T, atol=2e-5, rtol=0.02)


@pytest.mark.parametrize("bits", [(3, 4), (4, 8), (3, 32)])
def test_a_compensated_model_loses_less_on_images_it_has_not_seen(vit, bits):
    images, unseen = whole_images(64), whole_images(64, seed=1)
    plain, fitted = (quantize(vit, images, QuantConfig(*bits, "mse", compensate=on)) for on in (False, True))
    assert lost(vit, fitted, unseen) < 0.8 * lost(vit, plain, unseen)
    for layer in quantized_layers(fitted).values():
        codes = layer.linear.weight / layer.weight_scale[:, None]
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("arguments", [{}, {"init_values": 0.5}, {"global_pool": "avg"}, {"qkv_bias": False}])
def test_any_number_of_images_and_batches_gives_about_the_same(arguments):
    vit, images = SparseViT(tiny_vit(**arguments)), whole_images(9)
    config = {"w_bit": 8, "a_bit": 8, "observer": "mse", "compensate": True, "rotate": True}
    models = [quantize(vit, images, QuantConfig(**config, batch_size=size)) for size in (9, 4)]
    assert lost(*models, images) < 1e-3 * lost(vit, quantize(vit, images, QuantConfig(3, 3)), images)


def test_one_image_of_zeros_is_enough_not_to_fail(vit):
    images = SparseImages.whole(vit.grid, torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long))
    quantized = quantize(vit, images, QuantConfig(3, 3, "auto"))
    assert quantized.forward_images(torch.randn(2, 3, 32, 32)).isfinite().all()
