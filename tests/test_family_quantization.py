"""Quantization of every kind of architecture: near full precision, rotated exactly, saved as it is; and students."""

import copy
import dataclasses
import functools

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from models import SparseViT, load_model
from models.registry import bare_model, save_local_dir
from quant import QuantConfig, fitting, load_quantized, quantize, save_quantized
from quant.calibration import calibrated
from quant.hadamard import Hadamard, can_mix, unmixed, with_hadamard
from quant.insert import places, quantized_layers, quantizers
from quant.integers import with_integer_products
from quant.observers import OBSERVERS
from quant.quantizers import ActivationQuantizer, LogSqrt2Quantizer
from quant.rotation import rotated, rotations
from quant.sensitivity import sensitivity
from tests.families import FAMILIES, LATE_NAMES, family_model, family_vit, images_of

PARALLEL, THINGS, CAIT = "vit_pwee_patch16_reg1_gap_256", "vit_small_patch16_18x2_224", "cait_xxs24_224"
OPTIONS = [
    (CAIT, {"global_pool": "avg", "qkv_bias": False}),
    (PARALLEL, {"qkv_bias": False, "global_pool": "token", "class_token": True, "qk_norm": True}),
    ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm", "mlp_layer": timm.layers.SwiGLU}),
    ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLUPacked, "init_values": 0.3}),
]
LATE_OPTIONS = [
    (THINGS, {"attn_layer": "diff"}),
    ("vit_tiny_patch16_224", {"attn_layer": "diff", "scale_attn_norm": True, "qk_norm": True}),
]
ALL = [*((name, {}) for name in FAMILIES), *OPTIONS, *(LATE_OPTIONS if timm.is_model(LATE_NAMES[0]) else [])]
every = pytest.mark.parametrize(("name", "options"), ALL, ids=str)
METHODS = {
    "minmax": {"observer": "minmax"},
    "mse": {"observer": "mse"},
    "heads": {"observer": "heads"},
    "output": {"observer": "output"},
    "repq": {"observer": "repq"},
    "symmetric repq": {"observer": "repq", "symmetric": True},
    "auto": {"observer": "auto", "compensate": True, "rotate": True},
    "mixed": {"observer": "mse", "hadamard": True},
    "bias correction": {"observer": "mse", "bias_correction": True},
    "reconstruction": {"observer": "mse", "reconstruct": True, "reconstruct_steps": 5},
}
BEHIND, SCALED = "they are normalized before the projection", "a LayerNorm scales the channels that a block adds to it"
TURNED = "they are turned by where their tokens are"
NORMALIZED = "they are normalized"
REFUSED = {
    "vit_base_patch16_rpn_224": (SCALED, None, None),
    "eva02_enormous_patch14_clip_224": (SCALED, None, None),
    "vit_relpos_medium_patch16_rpn_224": (SCALED, None, None),
    "eva02_tiny_patch14_224": (None, TURNED, None),
    "vit_small_patch16_dinov3": (None, TURNED, None),
    "vit_small_patch16_rope_mixed_224": (None, TURNED, None),
    "vit_pe_core_tiny_patch16_384": ("norm_pre scales the channels of the embedding", TURNED, None),
    "vit_dwee_patch16_reg1_gap_256": (None, None, BEHIND),
    "vit_dpwee_patch16_reg1_gap_256": (None, None, BEHIND),
}

UNMIXED = {"eva02_enormous_patch14_clip_224"}
"""Whose MLPs, as narrow as they are here, have a width that no group divides."""


@functools.cache
def drawn(name: str, options: tuple) -> SparseViT:
    return SparseViT(family_vit(name, **dict(options))).requires_grad_(False)


def vit_of(name: str, options: dict) -> SparseViT:
    return drawn(name, tuple(options.items()))


@torch.no_grad()
def logits(vit: SparseViT, images) -> torch.Tensor:
    return vit(images.patches, images.positions).logits


def errors(quantized: SparseViT, vit: SparseViT, images) -> tuple[float, float]:
    """Of the logits, relative to their size, and to how far they are from their mean: what tells the images apart."""
    wanted = logits(vit, images)
    error = (logits(quantized, images) - wanted).norm()
    return (error / wanted.norm()).item(), (error / (wanted - wanted.mean(dim=0)).norm()).item()


@every
@pytest.mark.parametrize("method", METHODS)
def test_logits_at_eight_bits_are_near_full_precision(name, options, method):
    vit = vit_of(name, options)
    if method == "mixed" and not can_mix(vit):
        pytest.skip(f"nothing is mixed: {unmixed(vit)[0]}")
    images = images_of(vit, 8)
    of_all, of_differences = errors(quantize(vit, images, QuantConfig(8, 8, **METHODS[method])), vit, images)
    if method == "minmax":  # a range for every tensor, scores and sums among them, with all that is far out
        assert 0 < of_all < 0.2
    else:
        assert 0 < of_all < 0.1 and of_differences < 0.2


@every
def test_compensation_and_auto_mend_most_of_what_four_bits_lose(name, options):
    vit = vit_of(name, options)
    images = images_of(vit, 8)
    ways = (
        QuantConfig(4, 4, "mse"),
        QuantConfig(4, 4, "mse", compensate=True),
        QuantConfig(4, 4, "auto", augment=()),  # noise is held against itself, and changed noise is something else
    )
    plain, compensated, auto = (errors(quantize(vit, images, way), vit, images)[0] for way in ways)
    assert compensated < 0.8 * plain and auto < 0.8 * plain


@every
def test_a_rotated_model_computes_the_same(name, options):
    vit = vit_of(name, options)
    found, images = rotations(vit), images_of(vit, 3, kept=7)
    if not options:
        assert (found.stream, found.scores, found.values) == REFUSED.get(name, (None, None, None))
    turned = rotated(vit, seed=1)
    wanted = logits(vit, images)
    assert (logits(turned, images) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    changed = [not torch.equal(a, b) for a, b in zip(vit.parameters(), turned.parameters(), strict=False)]
    assert any(changed)


@every
def test_a_mixed_model_computes_the_same(name, options):
    vit = vit_of(name, options)
    images, turned = images_of(vit, 3, kept=7), with_hadamard(vit)
    wanted = logits(vit, images)
    assert (logits(turned, images) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    mixed = [isinstance(module, Hadamard) for module in turned.modules()]
    assert any(mixed) == can_mix(vit) and bool(unmixed(vit)) == (name in UNMIXED)


@pytest.mark.usefixtures("coarse")
@every
def test_reparameterized_weights_compute_the_same(name, options):
    """What `calibrated` compares with, after scales and offsets have moved; the patches are others than it saw."""
    vit = vit_of(name, options)
    reference, _ = calibrated(vit, images_of(vit, 8), QuantConfig(6, 6, "repq"))
    images = images_of(vit, 3, kept=7)
    wanted = logits(vit, images)
    assert (logits(reference, images) - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.usefixtures("coarse")
@every
@pytest.mark.parametrize(
    "config",
    [QuantConfig(4, 4, "auto"), QuantConfig(8, 6, "repq", bias_correction=True), QuantConfig(8, 8)],
    ids=lambda config: config.observer,
)
def test_a_saved_model_is_the_same_to_the_byte(tmp_path, name, options, config):
    if any(callable(value) for value in options.values()):
        pytest.skip("no file can tell what kind of layer that is")
    model = family_model(name, **options)
    vit = SparseViT(model.vit)
    images = images_of(vit, 4)
    quantized, classes = quantize(vit, images, config), [str(number) for number in range(10)]
    save_quantized(tmp_path / "first", quantized, model, config, classes)
    loaded = load_quantized(tmp_path / "first")
    assert torch.equal(logits(loaded, images), logits(quantized, images))
    save_quantized(tmp_path / "second", loaded, model, config, classes)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second"))
    assert first == second


@pytest.mark.usefixtures("coarse")
@every
def test_first_last_and_head_are_kept(name, options):
    vit = vit_of(name, options)
    keep = ("first", "last", "head")
    _, quantized = calibrated(vit, images_of(vit, 2), QuantConfig(4, 4, "mse", keep=keep))
    last = f"blocks.{len(vit.blocks) - 1}."
    for found, layer in quantized_layers(quantized).items():
        kept = found.startswith(("patch_proj", "head.", last))
        assert (layer.w_bit, layer.quantizer.bits) == ((8, 8) if kept else (4, 4)), found


@pytest.mark.usefixtures("coarse")
@every
def test_every_layer_that_reads_tokens_is_quantized(name, options):
    """By hooks: what a linear layer computes in a forward pass, where it is no part of what knows positions."""
    vit, ran = copy.deepcopy(vit_of(name, options)).plainly(), set()
    images = images_of(vit, 2)
    quantized = quantize(vit, images, QuantConfig(8, 8, "heads"))
    for layer, module in vit.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, ___, layer=layer: ran.add(layer))
    logits(vit, images)
    read = {layer for layer in ran if not {"position", "places"} & {*layer.split(".")}}
    assert {*quantized_layers(quantized)} == read | {"patch_proj"}
    taps = {found.rpartition(".")[2] for found in quantizers(quantized) if "tap_" in found}
    assert taps == {"tap_q", "tap_k", "tap_v", "tap_probs"}


@pytest.mark.usefixtures("coarse")
def test_what_a_softmax_puts_out_is_in_powers_and_what_heads_have_mixed_is_not():
    for name in FAMILIES:
        vit = vit_of(name, {})
        quantized = quantize(vit, images_of(vit, 2), QuantConfig(8, 8, "repq"))
        kinds = {type(each) for found, each in quantizers(quantized).items() if found.endswith("tap_probs")}
        expected = {LogSqrt2Quantizer}
        if name == CAIT:
            first, last = (quantized.get_submodule(f"blocks.{index}.tap_probs") for index in (0, 3))
            assert type(first) is ActivationQuantizer and first.zero_point > 0 and type(last) is LogSqrt2Quantizer
        else:
            assert kinds == expected


@pytest.mark.parametrize("name", [CAIT, THINGS, PARALLEL])
@pytest.mark.parametrize("loss", ["fisher", "global"])
def test_reconstruction_asks_for_what_any_loss_does(name, loss):
    vit = vit_of(name, {})
    images = images_of(vit, 8)
    config = QuantConfig(4, 32, "mse")
    learned = dataclasses.replace(config, reconstruct=True, reconstruct_loss=loss, reconstruct_steps=60)
    plain, found = (errors(quantize(vit, images, each), vit, images)[0] for each in (config, learned))
    assert found < plain


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", [CAIT, THINGS, PARALLEL])
def test_sensitivity_has_a_row_for_every_place(name):
    vit = vit_of(name, {})
    config = QuantConfig(4, 4, "mse")
    rows = sensitivity(vit, images_of(vit, 4), config)
    assert {row["layer"] for row in rows} == {*places(vit, OBSERVERS["mse"])}
    assert all(row["divergence"] > 0 for row in rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_integer_products_give_what_simulated_ones_do(name):
    vit = vit_of(name, {})
    images = images_of(vit, 8)
    quantized = quantize(vit, images, QuantConfig(8, 8, "mse"))
    integer = with_integer_products(quantized, vit.grid.unpatchify(images.patches, images.positions))
    of_all, _ = errors(integer, quantized, images)
    assert of_all < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_takes_what_can_be_rotated(name):
    chosen = fitting(vit_of(name, {}), QuantConfig(4, 4, "auto"))
    assert (chosen.observer, chosen.rotate, chosen.compensate) == ("heads", True, True)


@every
def test_a_student_learns_what_timm_learns_in_its_place(tmp_path, name, options):
    """Some steps on whole images, with a weight decay, by two copies of a model: one trained as timm runs it.

    Halfway a second `SparseViT` is made of the student, which goes on in its place.
    """
    model = family_model(name, **options)
    student, reference = (copy.deepcopy(model.vit).requires_grad_() for _ in range(2))
    images = torch.randn(4, 3, *student.patch_embed.img_size)
    start = {key: value.clone() for key, value in student.state_dict().items()}

    def train(vit: torch.nn.Module, run) -> None:
        optimizer = torch.optim.SGD(vit.parameters(), lr=1e-4, momentum=0.5, weight_decay=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(run(images), torch.arange(4)).backward()
            optimizer.step()

    for _ in range(2):
        sparse = SparseViT(student)
        train(sparse, sparse.forward_images)
        train(reference, reference)
    learned, expected = student.state_dict(), reference.state_dict()
    for key, value in expected.items():
        assert torch.allclose(learned[key], value, rtol=1e-3, atol=1e-5), key
    assert all(not torch.equal(learned[key], start[key]) for key, _ in reference.named_parameters())
    with torch.no_grad():
        wanted = sparse.forward_images(images)
        torch.testing.assert_close(student(images), wanted, rtol=1e-4, atol=1e-4)
        if any(callable(value) for value in options.values()):  # which no file can tell
            return
        save_local_dir(dataclasses.replace(model, vit=student), tmp_path, "student")
        again = bare_model(*model.architecture).eval()
        again.load_state_dict(load_file(tmp_path / "model.safetensors"))
        torch.testing.assert_close(again(images), wanted, rtol=1e-4, atol=1e-4)
        if isinstance(again, VisionTransformer):
            found = load_model(f"local-dir:{tmp_path}").sparse().forward_images(images)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
