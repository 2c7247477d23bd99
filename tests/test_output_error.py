"""Ranges by what they do to a layer's output, against those by what they do to tensors."""

import pytest
import torch
from torch import nn

import quant.output_error
from models import SparseViT
from quant import QuantConfig, quantize
from quant.calibration import calibrated
from quant.insert import QuantizedLinear, quantized_layers
from quant.observers import MSEObserver
from quant.output_error import fit_ranges
from quant.quantizers import ActivationQuantizer, largest_value_scale, least_error_scale, round_weight
from tests.conftest import tiny_vit, whole_images


def layer_of(weight: torch.Tensor, rows: torch.Tensor, bits: int, symmetric: bool = False) -> QuantizedLinear:
    """Quantized with ranges and scales that change rows (n, in) and weight (out, in) least."""
    linear = nn.Linear(*weight.T.shape)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantizer = ActivationQuantizer(bits, MSEObserver(bits, None, symmetric), symmetric)
    for _ in range(2):
        quantizer(rows)
        quantizer.observer.end_pass()
    quantizer.freeze()
    return QuantizedLinear(linear, quantizer, bits, least_error_scale(weight, bits))


def error(layer: QuantizedLinear, weight: torch.Tensor, rows: torch.Tensor) -> float:
    """Squared, of the output."""
    return (layer.quantizer(rows) @ layer.linear.weight.T - rows @ weight.T).square().sum().item()


@pytest.mark.parametrize("symmetric", [False, True])
def test_channels_that_nothing_reads_do_not_widen_a_range(symmetric):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(count, 8, generator=generator) for count in (500, 6))
    rows[:, 0], weight[:, 0] = 40 * rows[:, 0], 0.0
    layer = layer_of(weight, rows, 4, symmetric)
    before, wide = error(layer, weight, rows), layer.quantizer.ends()[1]
    quant.output_error._fit(layer, weight, rows, True)
    low, high = layer.quantizer.ends()
    assert high < 0.3 * wide and low < 0 < high
    assert error(layer, weight, rows) < 0.2 * before
    assert symmetric == (layer.quantizer.zero_point == 0)


def test_a_weights_scale_is_that_of_the_channels_which_have_values():
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(count, 8, generator=generator) for count in (500, 6))
    rows[:, :2], weight[:, :2] = 0.0, 20.0
    layer = layer_of(weight, rows, 4)
    before, scale = error(layer, weight, rows), layer.weight_scale.clone()
    quant.output_error._fit(layer, weight, rows, True)
    assert (layer.weight_scale < 0.5 * scale).all()
    assert error(layer, weight, rows) < 0.2 * before
    levels = layer.linear.weight / layer.weight_scale[:, None]
    torch.testing.assert_close(levels, levels.round().clamp(-8, 7))


@pytest.mark.parametrize("outputs", [6, 20])
def test_a_range_is_the_best_of_all_in_its_turn(outputs):
    """By plain code, whichever way products are summed up; the weight is not the original one any more."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(50, 8, generator=generator).exp(), torch.randn(outputs, 8, generator=generator)
    layer, plain = layer_of(weight, rows, 3), layer_of(weight, rows, 3)
    quant.output_error._fit_input(layer.quantizer, layer.linear.weight, weight, rows)

    def error_at(low: torch.Tensor, high: torch.Tensor) -> float:
        plain.quantizer.fix(*plain.quantizer.at(low, high))
        return error(plain, weight, rows)

    low, high = plain.quantizer.ends()
    high = min((high, *(rows.max() * share for share in quant.output_error.SHARES)), key=lambda end: error_at(low, end))
    torch.testing.assert_close(layer.quantizer.ends(), (low, high))
    scale = quant.output_error._least_scale(weight, 3, layer.weight_scale, rows, layer.quantizer(rows))

    def errors_at(scale: torch.Tensor) -> torch.Tensor:
        return (layer.quantizer(rows) @ round_weight(weight, scale, 3).T - rows @ weight.T).square().sum(dim=0)

    largest = largest_value_scale(weight, 3)
    least = torch.stack([errors_at(largest * share) for share in quant.output_error.SHARES]).amin(dim=0)
    torch.testing.assert_close(errors_at(scale), torch.minimum(least, errors_at(layer.weight_scale)))


@pytest.mark.parametrize(("w_bit", "a_bit"), [(3, 3), (3, 32), (32, 3)])
def test_no_layers_error_grows_on_what_is_compared(w_bit, a_bit, monkeypatch):
    vit, images, errors, fit = SparseViT(tiny_vit()), whole_images(8), [], quant.output_error._fit

    def watched(layer, weight, rows, weights):
        before = error(layer, weight, rows)
        fit(layer, weight, rows, weights)
        errors.append((before, error(layer, weight, rows)))

    reference, quantized = calibrated(vit, images, QuantConfig(w_bit, a_bit, "heads"))
    kept = {name: layer.linear.weight.clone() for name, layer in quantized_layers(quantized).items()}
    monkeypatch.setattr(quant.output_error, "_fit", watched)
    fit_ranges(reference, quantized, images, 4)
    assert len(errors) == len(quantized_layers(quantized))
    assert all(after <= 1.0001 * before for before, after in errors)
    before, after = (sum(each) for each in zip(*errors, strict=True))
    assert after < (0.95 if w_bit == 3 else 1) * before  # weights drawn alike leave ranges little to gain
    same = [torch.equal(layer.linear.weight, kept[name]) for name, layer in quantized_layers(quantized).items()]
    assert all(same) == (w_bit == 32)


def test_the_observer_is_these_ranges_and_compensation_rounds_its_own_weights():
    vit, images = SparseViT(tiny_vit()), whole_images(8)
    reference, quantized = calibrated(vit, images, QuantConfig(4, 4, "heads"))
    fit_ranges(reference, quantized, images, 32)
    found = quantize(vit, images, QuantConfig(4, 4, "output")).state_dict()
    assert all(torch.equal(found[key], value) for key, value in quantized.state_dict().items())
    plain, fitted = (quantize(vit, images, QuantConfig(4, 4, each, compensate=True)) for each in ("heads", "output"))
    for layer in quantized_layers(fitted).values():
        levels = layer.linear.weight / layer.weight_scale[:, None]
        torch.testing.assert_close(levels, levels.round().clamp(-8, 7))
    scales = [[layer.quantizer.scale.item() for layer in quantized_layers(each).values()] for each in (plain, fitted)]
    assert scales[0] != scales[1]
