"""Quantizers, their placement and calibration."""

import pytest
import torch

from models import SparseImages, SparseViT
from quant import calibrate
from quant.insert import QuantizedLinear, quantizers
from quant.integers import IntegerLinear, with_integer_products
from quant.observers import MinMaxObserver
from quant.quantizers import ActivationQuantizer, largest_value_scale, quantized_weight
from tests.conftest import tiny_vit
from utils.errors import UserError
from utils.evaluation import evaluate


@pytest.fixture
def vit() -> SparseViT:
    return SparseViT(tiny_vit())


@pytest.fixture
def images(vit) -> SparseImages:
    return SparseImages.whole(vit.grid, torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_rounded_per_output_channel(bits):
    weight = torch.randn(6, 40) * torch.logspace(-3, 2, 6)[:, None]
    high = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True) / high
    expected = (weight / scale).round().clamp(-high - 1, high) * scale
    torch.testing.assert_close(quantized_weight(weight, bits), expected)
    assert all(len(row.unique()) <= 2**bits for row in quantized_weight(weight, bits))


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(quantized_weight(torch.zeros(2, 3), 4), torch.zeros(2, 3))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_activations_are_rounded_per_tensor_asymmetrically(bits, shift):
    x = torch.randn(1000) + shift
    quantizer = ActivationQuantizer(bits, MinMaxObserver())
    assert torch.equal(quantizer(x), x)  # passes through while it observes
    quantizer.freeze()
    low, high = min(x.min().item(), 0), max(x.max().item(), 0)
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    expected = ((x / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point) * scale
    torch.testing.assert_close(quantizer(x), expected, rtol=1e-4, atol=1e-4)
    assert quantizer(torch.zeros(1)) == 0


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_simulation_on_a_cpu_is_torchs_to_the_bit(bits, symmetric, heads):
    """Edges between two codes too, where an odd zero point added before rounding would change the even one."""
    quantizer = ActivationQuantizer(bits, None, symmetric, heads)
    shape = () if heads is None else (heads,)
    for scale in (0.125, 0.037, 3e-3):
        zero_point = torch.zeros(shape) if symmetric else torch.randint(0, 2**bits, shape)
        quantizer.fix(torch.full(shape, scale) * (1 + torch.rand(shape)), zero_point.int())
        edges = (torch.arange(-300, 300) + 0.5)[:, None] * quantizer.scale.reshape(1, -1)
        x = torch.cat([edges, torch.randn(5000, edges.shape[1]) * scale * 2**bits]).T.reshape(1, edges.shape[1], -1, 8)
        if heads is None:
            expected = torch.fake_quantize_per_tensor_affine(
                x, quantizer.scale, quantizer.zero_point, quantizer.low, quantizer.high
            )
        else:
            expected = torch.fake_quantize_per_channel_affine(
                x, quantizer.scale, quantizer.zero_point, 1, quantizer.low, quantizer.high
            )
        before = x.clone()
        assert torch.equal(quantizer(x), expected)
        assert torch.equal(x, before)

    x = torch.tensor([[[[-100.0, 0.0, 100.0]]]]).expand(1, heads or 1, 1, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(x).sum(), x)  # straight through within the range
    assert torch.equal(gradient, torch.tensor([0.0, 1.0, 0.0]).expand_as(x))


@pytest.mark.parametrize("heads", [None, 2])
def test_what_is_no_number_stays_none(heads):
    quantizer = ActivationQuantizer(4, None, heads=heads)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.3]).view(1, 2, 2, 1)
    out = quantizer(x).flatten()
    assert out[0].isnan()
    assert torch.equal(out[1:], torch.tensor([15.0, 0.0, 0.0]))


def test_min_max_is_over_all_tensors_and_a_tensor_of_zeros_counts_as_seen():
    """Defect: ranges treated "max == 0" as "not seen yet", and forgot what came before."""
    observer = MinMaxObserver()
    observer.observe(torch.tensor([-3.0, 0.0]))
    observer.observe(torch.tensor([-1.0, -0.5]))
    assert [value.item() for value in observer.range()] == [-3.0, 0.0]
    zeros = ActivationQuantizer(8, MinMaxObserver())
    zeros(torch.zeros(5))
    zeros.freeze()
    assert torch.equal(zeros(torch.zeros(5)), torch.zeros(5))


def test_an_unused_quantizer_is_an_error():
    with pytest.raises(RuntimeError):
        ActivationQuantizer(8, MinMaxObserver()).freeze()


def test_quantizers_sit_where_they_should(vit, images):
    names = set(quantizers(calibrate(vit, images, 8, 8)))
    expected = {"patch_proj.quantizer", "tap_embed", "head.head.quantizer"}
    for block in ("blocks.0", "blocks.1"):
        expected |= {f"{block}.{layer}.quantizer" for layer in ("qkv", "proj", "mlp.fc1", "mlp.fc2")}
        expected |= {f"{block}.tap_{tap}" for tap in ("q", "k", "v", "scores", "attn_sum", "mlp_sum")}
    assert names == expected


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "global_pool": "avg"}, {"init_values": 0.1}], ids=str)
def test_quantized_forward_is_the_plain_formula(options):
    """With 8 bits, logits stay near; the full-precision model is left as it was."""
    vit = SparseViT(tiny_vit(**options))
    images = SparseImages.whole(vit.grid, torch.randn(8, 3, 32, 32), torch.zeros(8))
    with torch.no_grad():
        before = vit(images.patches, images.positions).logits
        quantized = calibrate(vit, images, 8, 8)(images.patches, images.positions).logits
        after = vit(images.patches, images.positions).logits
    assert torch.equal(before, after)
    error = (quantized - before).abs().max() / before.abs().max()
    assert 0 < error < 0.1


def test_weights_are_quantized_once(vit, images):
    """Defect: weights were re-quantized at every forward pass."""
    quantized = calibrate(vit, images, 4, 32)
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * 4 + 2
    weights = [layer.linear.weight.clone() for layer in layers]
    calls = []
    original = torch.fake_quantize_per_channel_affine
    torch.fake_quantize_per_channel_affine = lambda *args: calls.append(1) or original(*args)
    try:
        quantized(images.patches, images.positions)
    finally:
        torch.fake_quantize_per_channel_affine = original
    assert not calls
    assert all(torch.equal(layer.linear.weight, weight) for layer, weight in zip(layers, weights, strict=True))


def test_32_bits_leave_the_model_alone(vit, images):
    same = calibrate(vit, images, 32, 32)
    with torch.no_grad():
        assert torch.equal(same(images.patches, images.positions)[0], vit(images.patches, images.positions).logits)

    assert not quantizers(same)


def test_fewer_bits_are_further_off(vit, images):
    expected = vit(images.patches, images.positions).logits
    errors = [
        (calibrate(vit, images, bits, bits)(images.patches, images.positions)[0] - expected).norm().item()
        for bits in (8, 6, 4, 2)
    ]
    assert errors == sorted(errors)


def test_ranges_come_from_kept_patches_alone(vit):
    """Stopped patches, whatever their pixels, are not fed."""
    patches, positions = torch.randn(2, 5, 3, 8, 8), torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    quantized = calibrate(vit, SparseImages(patches, positions, torch.zeros(2)), 8, 8)
    quantizer = quantized.patch_proj.quantizer
    span = (patches.max() - patches.min()).item()
    assert quantizer.scale.item() == pytest.approx(span / 255)


def test_batches_do_not_change_the_ranges(vit, images):
    one, many = calibrate(vit, images, 4, 4, batch_size=4), calibrate(vit, images, 4, 4, batch_size=1)
    for name, quantizer in quantizers(one).items():
        torch.testing.assert_close(quantizer.scale, quantizers(many)[name].scale)


@pytest.mark.parametrize(("w_bit", "a_bit"), [(1, 8), (9, 8), (8, 0), (8, 16), (-4, 8)])
def test_widths_out_of_range_are_refused(vit, images, w_bit, a_bit):
    with pytest.raises(UserError, match="2 to 8"):
        calibrate(vit, images, w_bit, a_bit)


def test_evaluation_counts_top1_top5_and_loss(vit):
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        logits = vit.forward_images(images)
    labels = logits.argsort(dim=1)[:, [-1, -1, -1, -2, -2, 0, 0]].diagonal()
    data = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    result = evaluate({"fp": vit}, data, torch.device("cpu"))["fp"]
    assert result["top1"] == pytest.approx(100 * 3 / 7, abs=1e-3)
    assert result["top5"] == 100.0
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("a_bit", range(2, 9))
@pytest.mark.parametrize("w_bit", [2, 4, 8])
def test_an_integer_product_is_the_simulated_one(w_bit, a_bit):
    linear = torch.nn.Linear(48, 20, bias=a_bit % 2 == 0)
    x = torch.randn(3, 5, 48) * 4 - 1
    quantizer = ActivationQuantizer(a_bit, MinMaxObserver())
    quantizer(x[:2])  # the rest is clipped
    quantizer.freeze()
    layer = QuantizedLinear(linear, quantizer, w_bit, largest_value_scale(linear.weight, w_bit))
    torch.testing.assert_close(IntegerLinear(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_model_of_integer_products_predicts_what_the_simulated_one_does(vit, images):
    batch = torch.randn(64, 3, 32, 32)
    quantized = calibrate(vit, images, 8, 8, "repq")
    integer = with_integer_products(quantized, batch)
    assert with_integer_products(vit, batch) is vit
    assert (quantized.forward_images(batch).argmax(1) == integer.forward_images(batch).argmax(1)).float().mean() > 0.9
