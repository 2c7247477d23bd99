"""Observers, quantizers of softmax outputs and scale reparameterization, each against a plain formula."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from models import DEFAULT_MODEL, SparseImages, SparseViT, load_model
from quant import QuantConfig, quantize
from quant.calibration import calibrated
from quant.insert import quantizers
from quant.observers import OBSERVERS, MSEObserver, PercentileObserver
from quant.quantizers import (
    ActivationQuantizer,
    LogSqrt2Quantizer,
    largest_value_scale,
    least_error_scale,
    log_sqrt2,
    round_weight,
)
from quant.reparameterization import norm_sites, reparameterize
from tests.conftest import tiny_vit
from utils import augmented
from utils.errors import UserError
from utils.images import Real, calibration_images


@pytest.fixture
def vit() -> SparseViT:
    return SparseViT(tiny_vit())


@pytest.fixture
def images(vit) -> SparseImages:
    return SparseImages.whole(vit.grid, torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))


def watched(observer, *tensors):
    """The range that an observer gives after it has seen the tensors as often as it asks."""
    for _ in range(observer.passes):
        for x in tensors:
            observer.observe(x)
        observer.end_pass()
    return observer.range()


def rounded(x, low, high, bits):
    """Plain uniform quantization with an integer zero point."""
    steps = 2**bits - 1
    scale = (high - low) / steps
    zero_point = torch.round(-low / scale)
    return ((torch.round(x / scale) + zero_point).clamp(0, steps) - zero_point) * scale


def heavy_tailed(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < 2e-3, 20 * x, x)


def test_percentiles_are_those_of_sorted_values():
    x = heavy_tailed(50_000)
    low, high = watched(PercentileObserver(8), x[:20_000], x[20_000:])
    step, tail = (x.max() - x.min()) / 2048, PercentileObserver.tail
    share_below, share_above = ((x < low).float().mean(), (x > high).float().mean())
    assert max(share_below, share_above) <= tail
    assert min((x < low + step).float().mean(), (x > high - step).float().mean()) >= tail


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_least_squares_range_beats_every_plain_shrinking(bits):
    x = torch.nn.functional.gelu(heavy_tailed(40_000))
    low, high = watched(MSEObserver(bits), x)
    assert low <= 0 <= high
    found = (rounded(x, low, high, bits) - x).square().mean()
    shrunk = [
        (rounded(x, x.min() * share, x.max() * share, bits) - x).square().mean()
        for share in torch.linspace(0.02, 1, 50)
    ]
    assert found <= 1.02 * min(shrunk)
    if bits < 8:
        assert found < 0.8 * shrunk[-1]


def test_ranges_of_channels_are_those_of_each_alone():
    x = torch.randn(500, 3) * torch.tensor([0.1, 1.0, 30.0]) + torch.tensor([0.0, 5.0, 0.0])
    low, high = watched(MSEObserver(4, channels=3), x)
    assert low[1] > 0  # a channel's range need not hold zero
    for channel in range(3):
        plain = (rounded(x[:, channel], x[:, channel].min(), x[:, channel].max(), 4) - x[:, channel]).square().mean()
        found = (rounded(x[:, channel], low[channel], high[channel], 4) - x[:, channel]).square().mean()
        assert found <= 1.02 * plain


@pytest.mark.parametrize("observer", ["percentile", "mse", "repq"])
def test_a_tensor_of_zeros_stays_zero(observer):
    quantizer = ActivationQuantizer(4, OBSERVERS[observer].observer(4))
    for _ in range(quantizer.observer.passes):
        quantizer(torch.zeros(5))
        quantizer.observer.end_pass()
    quantizer.freeze()
    assert torch.equal(quantizer(torch.zeros(5)), torch.zeros(5))


def test_weight_scales_with_the_least_error_are_no_worse_in_any_channel():
    weight = heavy_tailed(12, 600)
    errors = [
        (round_weight(weight, scale_of(weight, 4), 4) - weight).square().sum(dim=1)
        for scale_of in (least_error_scale, largest_value_scale)
    ]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.8 * errors[1].sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_softmax_outputs_are_powers_of_the_root_of_two(bits):
    x, scale = torch.randn(200, 65).mul(3).softmax(dim=-1), torch.tensor(0.9)
    q = torch.round(-torch.log(x / scale) / torch.log(torch.tensor(2**0.5))).clamp(min=0)
    expected = torch.where(q >= 2**bits, torch.zeros(()), scale * torch.tensor(2**0.5).pow(-q))
    torch.testing.assert_close(log_sqrt2(x, scale, 2**bits - 1), expected)
    assert log_sqrt2(torch.zeros(3), scale, 2**bits - 1).eq(0).all()


def test_reparameterization_leaves_the_model_as_it_was(vit, images):
    moved = copy.deepcopy(vit)
    generator = torch.Generator().manual_seed(0)
    for site in norm_sites(moved):
        width = moved.get_submodule(site.norm).normalized_shape[-1]
        high = torch.rand(width, generator=generator) * 10 + 0.1
        reparameterize(moved, site, -torch.rand(width, generator=generator) * 5, high, 4)
    with torch.no_grad():
        expected, found = (model(images.patches, images.positions).logits for model in (vit, moved))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(moved.blocks[0].qkv.weight, vit.blocks[0].qkv.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_one_scale_behind_the_norm_equals_a_scale_for_each_channel_before(bias):
    """RepQ-ViT's claim: per-tensor quantization of the reparameterized model is per-channel quantization."""
    vit = SparseViT(tiny_vit(qkv_bias=bias))
    block, site = vit.blocks[0], norm_sites(vit)[0]
    assert (site.norm, site.readers) == ("blocks.0.norm1", ("blocks.0.qkv",))
    x = torch.randn(4, 17, 32)
    with torch.no_grad():
        y = block.norm1(x)
        low, high = watched(MSEObserver(4, channels=32), y)
        steps = 15
        scale = (high - low) / steps
        # the zero points differ by what the shift makes exact, so they need not be whole
        per_channel = ((y / scale - low / scale).round().clamp(0, steps) + low / scale) * scale
        expected = nn.functional.linear(per_channel, block.qkv.weight, block.qkv.bias)
        quantizer = ActivationQuantizer(4, None)
        quantizer.fix(*reparameterize(vit, site, low, high, 4))
        found = block.qkv(quantizer(block.norm1(x)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 1, "global_pool": "avg", "fc_norm": True}, {"init_values": 0.1}], ids=str
)
def test_at_eight_bits_every_observer_stays_near(options):
    vit = SparseViT(tiny_vit(**options))
    images = SparseImages.whole(vit.grid, torch.randn(8, 3, 32, 32), torch.zeros(8))
    with torch.no_grad():
        expected = vit(images.patches, images.positions).logits
        for observer in ("percentile", "mse", "repq"):
            quantized = quantize(vit, images, QuantConfig(8, 8, observer))
            error = quantized(images.patches, images.positions).logits - expected
            assert 0 < error.abs().max() < 0.15 * expected.abs().max(), observer


def test_ranges_by_least_error_are_nearer_than_min_max_at_four_bits():
    model = load_model(DEFAULT_MODEL)
    vit, images = SparseViT(model.vit), calibration_images(model, Real(), 32)
    with torch.no_grad():
        expected = vit(images.patches, images.positions).logits
        errors = {
            name: (quantize(vit, images, QuantConfig(4, 4, name))(images.patches, images.positions).logits - expected)
            for name in OBSERVERS
        }
    assert errors["mse"].norm() < 0.8 * errors["minmax"].norm()
    assert errors["repq"].norm() < 0.8 * errors["minmax"].norm()


def test_what_is_quantized_besides_linear_inputs(vit, images):
    for observer in ("percentile", "mse", "repq"):
        found = quantizers(quantize(vit, images, QuantConfig(8, 8, observer)))
        taps = {name.partition("tap_")[2] for name in found if "tap_" in name}
        assert taps == {"q", "k", "v", "probs"}
        kinds = {type(found[f"blocks.{i}.tap_probs"]) for i in range(2)}
        assert kinds == {LogSqrt2Quantizer if observer == "repq" else ActivationQuantizer}


def test_batches_do_not_change_what_any_observer_finds(vit, images):
    for observer in OBSERVERS:
        one, many = (quantizers(quantize(vit, images, QuantConfig(4, 4, observer, batch_size=n))) for n in (8, 3))
        for name, quantizer in one.items():
            torch.testing.assert_close(quantizer.scale, many[name].scale, rtol=1e-4, atol=1e-6)


def test_auto_chooses_by_width():
    for bits in ((4, 4), (8, 6), (4, 8), (4, 32)):
        chosen = QuantConfig(*bits, "auto").resolved()
        assert (chosen.observer, chosen.rotate, chosen.compensate, chosen.fill) == ("heads", True, True, True)
        assert chosen.augment == ("crop", "blur", "colour")
    chosen = QuantConfig(8, 8, "auto").resolved()
    assert (chosen.observer, chosen.rotate, chosen.compensate, chosen.fill) == ("mse", False, False, False)
    assert chosen.augment == ()
    assert QuantConfig(4, 4, "auto", augment=()).resolved().augment == ()
    assert QuantConfig(4, 4, "auto", rotate=False, fill=False).resolved().observer == "repq"
    assert QuantConfig(4, 8, "auto", rotate=False).resolved().observer == "heads"
    assert QuantConfig(4, 4).method == "minmax"


def test_other_observers_do_nothing_that_was_not_asked_for():
    chosen = QuantConfig(3, 3, "mse").resolved()
    assert (chosen.observer, chosen.rotate, chosen.compensate, chosen.fill) == ("mse", False, False, False)
    assert chosen.augment == ()
    assert QuantConfig(3, 3, "mse", rotate=True).resolved().rotate


@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_is_calibrated_on_changed_images_where_that_is_asked_for(vit, images, sparse):
    """Ranges are those of the images after all changes, filled before, drawn by the configuration's seed."""
    if sparse:
        images = SparseImages(images.patches[:, 3:9], images.positions[:, 3:9], images.labels)
    asked = QuantConfig(4, 4, "mse", augment=("colour", "crop"), fill=sparse, seed=3)
    changed = augmented(images.filled(vit.grid), vit.grid, ("colour", "crop"), torch.Generator().manual_seed(3))
    given = images.patches.clone()
    found, expected, plain = (
        quantizers(quantize(vit, seen, config))
        for seen, config in (
            (images, asked),
            (changed, QuantConfig(4, 4, "mse")),
            (images, replace(asked, augment=None)),
        )
    )
    assert torch.equal(images.patches, given)
    for name, quantizer in found.items():
        torch.testing.assert_close(quantizer.scale, expected[name].scale)
    assert found["patch_proj.quantizer"].scale != plain["patch_proj.quantizer"].scale


@pytest.mark.parametrize(
    ("keep", "wide"),
    [
        (("first",), {"patch_proj"}),
        (("head",), {"head.head"}),
        (("last",), {f"blocks.1.{name}" for name in ("qkv", "proj", "mlp.fc1", "mlp.fc2")}),
        (("first", "fc2"), {"patch_proj", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}),
    ],
    ids=lambda names: " ".join(sorted(names)),
)
def test_kept_layers_have_eight_bits(vit, images, keep, wide):
    _, quantized = calibrated(vit, images, QuantConfig(3, 4, "repq", keep=keep))
    for name, quantizer in quantizers(quantized).items():
        layer = name.removesuffix(".quantizer")
        kept = layer in wide or ("last" in keep and layer.startswith("blocks.1.tap_"))
        assert quantizer.bits == (8 if kept else 4), name
        if "tap_" not in name:
            assert quantized.get_submodule(layer).w_bit == (8 if kept else 3), name


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"observer": "median"}, "--observer median"),
        ({"a_bit": 32, "observer": "repq"}, "--observer repq.*--a_bit 32"),
        ({"a_bit": 32, "observer": "percentile"}, "--observer percentile.*--a_bit 32"),
        ({"w_bit": 32, "reconstruct": True}, "--reconstruct.*--w_bit 32"),
        ({"w_bit": 32, "a_bit": 32, "bias_correction": True}, "--bias_correction"),
        ({"w_bit": 32, "a_bit": 32, "fill": True}, "--fill"),
        ({"w_bit": 32, "a_bit": 32, "rotate": True}, "--rotate"),
        ({"w_bit": 32, "a_bit": 32, "compensate": True}, "--compensate"),
        ({"w_bit": 32, "a_bit": 32, "hadamard": True}, "--hadamard"),
        ({"w_bit": 4, "reconstruct_loss": "global"}, "--reconstruct_loss.*--reconstruct"),
        ({"w_bit": 4, "reconstruct": True, "reconstruct_loss": "l1"}, "--reconstruct_loss l1"),
        ({"w_bit": 4, "reconstruct_seconds": 9.0}, "--reconstruct_seconds"),
        ({"w_bit": 8, "a_bit": 8, "keep": ("first",)}, "--keep"),
        ({"w_bit": 4, "keep": ("blocks.7.",)}, "--keep blocks.7"),
        ({"w_bit": 4, "keep": ("",)}, "--keep"),
    ],
    ids=str,
)
def test_what_cannot_go_together_is_refused(vit, images, arguments, why):
    with pytest.raises(UserError, match=why):
        quantize(vit, images, QuantConfig(**arguments))


@pytest.mark.parametrize("norm", [nn.RMSNorm(32), nn.LayerNorm(32, bias=False)], ids=["RMS", "no offset"])
def test_a_norm_without_offset_gets_a_scale_alone(vit, images, norm):
    """Its channels differ a thousandfold; one range for the tensor then holds them all as well as each its own."""
    nn.init.uniform_(norm.weight, 0.5, 2)
    norm.weight.data[:4] *= 1000
    vit.blocks[1].norm2 = norm
    for layer in (vit.blocks[1].mlp.fc1, vit.blocks[1].mlp.fc2):
        nn.init.normal_(layer.weight, std=0.3)
    vit.blocks[1].mlp.fc1.weight.data[:, :4] /= 1000
    with torch.no_grad():
        wanted = vit(images.patches, images.positions).logits
        found = {name: quantize(vit, images, QuantConfig(32, 8, name)) for name in ("mse", "repq")}
        errors = {name: (each(images.patches, images.positions).logits - wanted).norm() for name, each in found.items()}
        reference, _ = calibrated(vit, images, QuantConfig(32, 8, "repq"))
        torch.testing.assert_close(reference(images.patches, images.positions).logits, wanted, rtol=1e-4, atol=1e-4)
    assert errors["repq"] < 0.1 * min(wanted.norm(), errors["mse"])


def test_a_norm_without_scale_is_observed_like_any_other_tensor(vit, images):
    vit.blocks[1].norm2 = nn.LayerNorm(32, elementwise_affine=False)
    _, quantized = calibrated(vit, images, QuantConfig(8, 8, "repq"))
    seen = []
    vit.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        wanted, found = (each(images.patches, images.positions).logits for each in (vit, quantized))
    quantizer = quantized.blocks[1].mlp.fc1.quantizer
    assert quantizer.scale.item() == pytest.approx((seen[0].max() - seen[0].min()).item() / 255, rel=0.2)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_classifier_behind_a_mean_gets_the_range_of_the_mean(images):
    """Means of tokens have a much smaller range than the tokens that the norm puts out."""
    vit = SparseViT(tiny_vit(global_pool="avg", fc_norm=False)).requires_grad_(False)
    seen = quantizers(quantize(vit, images, QuantConfig(4, 4, "repq")))["head.head.quantizer"]
    read = []
    vit.head.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    vit(images.patches, images.positions)
    assert seen.scale * seen.high < 1.5 * (read[0].max() - read[0].min())


def test_a_range_for_each_head_is_that_of_the_head_alone(vit, images):
    """The second head of q, k and v is forty times as large: one range for both would leave the first few codes."""
    block = vit.blocks[0]
    for parameter in (block.qkv.weight, block.qkv.bias):
        parameter.data.unflatten(0, (3, 2, -1))[:, 1] *= 40
    taken = {}
    block.tap_v.register_forward_hook(lambda _, __, out: taken.update(v=out))
    vit(images.patches, images.positions)
    quantized = quantize(vit, images, QuantConfig(32, 4, "heads"))
    quantizer = quantized.blocks[0].tap_v
    assert quantizer.scale.shape == (2,) and quantizer.scale[1] > 20 * quantizer.scale[0]
    with torch.no_grad():
        v = taken["v"]
        found = quantizer(v)
        for head in range(2):
            scale, zero_point = quantizer.scale[head], quantizer.zero_point[head]
            codes = ((v[:, head] / scale).round() + zero_point).clamp(0, 15)
            torch.testing.assert_close(found[:, head], (codes - zero_point) * scale)
        assert (found[:, 0] - v[:, 0]).norm() < 0.2 * v[:, 0].norm()


@pytest.mark.parametrize(("bits", "wide"), [(3, 8), (8, 8), (32, None)])
def test_the_input_of_the_patch_projection_has_the_bits_of_pixels(vit, images, bits, wide):
    quantized = quantize(vit, images, QuantConfig(4, bits, "heads"))
    assert getattr(quantized.patch_proj.quantizer, "bits", None) == wide
    assert quantized.patch_proj.w_bit == 4
