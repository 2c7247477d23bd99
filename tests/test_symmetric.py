"""Activations with zero points of 0."""

import pytest
import torch

from models import SparseImages, SparseViT
from quant import OBSERVERS, QuantConfig, quantize
from quant.insert import quantizers
from quant.observers import MinMaxObserver, MSEObserver, PercentileObserver
from quant.quantizers import ActivationQuantizer
from tests.conftest import tiny_vit
from utils.errors import UserError


@pytest.fixture
def vit() -> SparseViT:
    return SparseViT(tiny_vit())


@pytest.fixture
def images(vit) -> SparseImages:
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return SparseImages.whole(vit.grid, pixels, torch.zeros(8, dtype=torch.long))


def calibrated(kind: type, bits: int, x: torch.Tensor, symmetric: bool = True) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, kind(bits, symmetric=symmetric), symmetric)
    for _ in range(quantizer.observer.passes):
        quantizer(x)
        quantizer.observer.end_pass()
    quantizer.freeze()
    return quantizer


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [-3, 0, 3])
def test_codes_are_signed_and_zero_is_zero(bits, shift):
    x = torch.randn(1000) + shift
    quantizer = calibrated(MinMaxObserver, bits, x)
    codes = quantizer(x) / quantizer.scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert -(2 ** (bits - 1)) <= codes.round().min() and codes.round().max() <= 2 ** (bits - 1) - 1
    assert (quantizer(x) - x).abs().max() <= quantizer.scale / 2 * 1.001  # nothing is clipped
    assert not quantizer.zero_point and not quantizer(torch.zeros(3)).any()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_scale_with_the_least_error_is_searched(bits):
    x = torch.cat([torch.randn(5000), torch.tensor([-9.0, 14.0])])
    errors = {kind: (calibrated(kind, bits, x)(x) - x).square().mean() for kind in (MinMaxObserver, MSEObserver)}
    assert errors[MSEObserver] <= errors[MinMaxObserver]
    quantizer = calibrated(MSEObserver, bits, x)
    for share in (0.8, 1.25):
        other = ActivationQuantizer(bits, None, symmetric=True)
        other.fix(quantizer.scale * share, quantizer.zero_point)
        assert errors[MSEObserver] <= 1.05 * (other(x) - x).square().mean()


def test_few_outliers_are_left_out():
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([50.0])])
    assert calibrated(PercentileObserver, 8, x).scale < 1.2 / 127


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_gives_zero_points_of_0_and_stays_near(vit, images, observer):
    quantized = quantize(vit, images, QuantConfig(8, 8, observer, symmetric=True))
    uniform = [one for one in quantizers(quantized).values() if isinstance(one, ActivationQuantizer)]
    assert uniform and not any(one.zero_point.any() for one in uniform)
    pixels = vit.grid.unpatchify(images.patches, images.positions)
    with torch.no_grad():
        plain, found = vit.forward_images(pixels), quantized.forward_images(pixels)
    assert (found - plain).norm() < 0.15 * plain.norm()


def test_learned_ranges_keep_their_zero_points(vit, images):
    config = QuantConfig(4, 4, "mse", symmetric=True, reconstruct=True, reconstruct_steps=4)
    before = quantizers(quantize(vit, images, QuantConfig(4, 4, "mse", symmetric=True)))
    learned = quantizers(quantize(vit, images, config))
    assert not any(one.zero_point for one in learned.values())
    assert any(one.scale != before[name].scale for name, one in learned.items())


def test_it_is_about_activations():
    with pytest.raises(UserError, match="--a_bit 32"):
        QuantConfig(8, 32, "mse", symmetric=True)
