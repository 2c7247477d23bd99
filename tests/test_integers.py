"""Products of integers, in every layout that a tensor can have."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.insert import QuantizedLinear
from quant.integers import IntegerLinear, integer_product
from quant.observers import MinMaxObserver
from quant.quantizers import ActivationQuantizer, largest_value_scale
from tests.conftest import ROOT


def layouts(x: Tensor) -> Iterator[Tensor]:
    """A matrix with its rows one after another, transposed, with gaps, with strides of 0 and 1."""
    yield x
    yield x.t().contiguous().t()
    yield x.repeat_interleave(2, dim=0)[::2]
    yield x.repeat_interleave(2, dim=1)[:, ::2]
    yield x[:1].expand_as(x)
    yield x[:, :1].expand_as(x)
    if 1 in x.shape:
        yield torch.empty_strided(x.shape, (1, 1), dtype=x.dtype).copy_(x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_an_integer_product_is_exact_in_every_layout(dtype):
    for rows, inputs, outputs in itertools.product((1, 2, 33), (1, 2, 96), (1, 2, 10)):
        x, weight = torch.randint(-128, 128, (rows, inputs)), torch.randint(-128, 128, (outputs, inputs))
        for a, b in itertools.product(layouts(x.to(dtype)), layouts(weight.to(torch.int8))):
            assert torch.equal(integer_product(a, b).long(), a.long() @ b.long().t()), (a.stride(), b.stride())


def test_torch_multiplies_integers_in_one_place():
    files = [
        file for name in ("quant", "models", "utils", "inversion", "kt") for file in Path(ROOT, name).glob("**/*.py")
    ]
    places = [file.name for file in files for line in file.read_text().splitlines() if "torch._int_mm(" in line]
    assert places == ["integers.py"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 20), (48, 1), (48, 20)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_integer_layer_is_the_simulated_one_whatever_it_is_fed(bits, inputs, outputs, symmetric):
    x = torch.randn(3, 5, inputs) * 4 - 1
    quantizer = ActivationQuantizer(bits, MinMaxObserver(bits, symmetric=symmetric), symmetric)
    quantizer(x[:2])  # the rest is clipped
    quantizer.freeze()
    linear = torch.nn.Linear(inputs, outputs)
    layer = QuantizedLinear(linear, quantizer, bits, largest_value_scale(linear.weight, bits))
    for fed in (x, x.transpose(0, 1), x[:1, :1], x[:, :1].expand_as(x), x.flatten(0, 1).t().contiguous().t()):
        torch.testing.assert_close(IntegerLinear(layer)(fed), layer(fed), rtol=1e-5, atol=1e-5)
