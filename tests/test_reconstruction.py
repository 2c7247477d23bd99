"""What mends the error that rounding leaves: reconstruction and bias correction; and what each layer costs."""

import tempfile
import time

import pytest
import torch

from models import SparseImages, SparseViT
from quant import QuantConfig, quantize, reconstruction, rows
from quant.calibration import calibrated
from quant.insert import QuantizedLinear, quantized_layers, quantizers
from quant.losses import LOSSES, Fisher
from quant.quantizers import ActivationQuantizer
from quant.reconstruction import AdaptiveRounding, FinishedStages, LearnedQuantizer
from quant.sensitivity import sensitivity
from quant.stages import Stage, stages, walk
from scripts.bench import bench_reconstruction
from tests.conftest import tiny_vit, whole_images
from utils.errors import UserError


@pytest.fixture
def vit() -> SparseViT:
    return SparseViT(tiny_vit())


@pytest.fixture
def images(vit) -> SparseImages:
    """Nine images of which seven patches are left."""
    positions = torch.stack([torch.randperm(16)[:7] for _ in range(9)])
    return SparseImages(torch.randn(9, 7, 3, 8, 8), positions, torch.zeros(9, dtype=torch.long))


def block_error(vit: SparseViT, quantized: SparseViT, images: SparseImages) -> float:
    """Squared error of the last block's output."""
    with torch.no_grad():
        outputs = []
        for model in (vit, quantized):
            x = model.embed(images.patches, images.positions)
            for block in model.blocks:
                x = block(x).tokens
            outputs.append(x)
    return (outputs[0] - outputs[1]).square().mean().item()


def test_stages_one_after_another_are_the_model(vit, images):
    tensors = images.patches, images.positions
    with torch.no_grad():
        for _, run in stages(vit):
            tensors = (run(vit, *tensors), images.positions)
        torch.testing.assert_close(tensors[0], vit(images.patches, images.positions).logits)


@pytest.mark.parametrize("observer", ["minmax", "repq"])
def test_reconstruction_lowers_the_error_on_images_it_has_not_seen(vit, observer):
    images = SparseImages.whole(vit.grid, torch.randn(32, 3, 32, 32), torch.zeros(32))
    config = {"w_bit": 3, "a_bit": 4, "observer": observer, "batch_size": 16}
    plain = quantize(vit, images, QuantConfig(**config))
    learned = quantize(vit, images, QuantConfig(**config, reconstruct=True, reconstruct_steps=150))
    unseen = SparseImages.whole(vit.grid, torch.randn(32, 3, 32, 32), torch.zeros(32))
    assert block_error(vit, learned, images) < 0.9 * block_error(vit, plain, images)
    assert block_error(vit, learned, unseen) < block_error(vit, plain, unseen)


def test_reconstructed_weights_are_neighbours_on_the_grid(vit, images):
    config = QuantConfig(3, 4, "mse", reconstruct=True, reconstruct_steps=40)
    reference, _ = calibrated(vit, images, config)
    learned = quantize(vit, images, config)
    originals, moved = quantized_layers(reference), 0
    for name, layer in quantized_layers(learned).items():
        units = originals[name].linear.weight / layer.weight_scale[:, None]
        assert torch.equal(layer.integers() * layer.weight_scale[:, None], layer.linear.weight)
        inside = (units > -4) & (units < 3)
        assert ((layer.integers() - units).abs() < 1 + 1e-4)[inside].all()
        moved += (layer.integers() != units.round().clamp(-4, 3)).sum().item()
    assert moved > 0
    assert not any(isinstance(m, AdaptiveRounding | LearnedQuantizer) for m in learned.modules())


def test_reconstruction_depends_on_the_seed_alone(vit, images):
    logits = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator is not what decides
        config = QuantConfig(3, 4, "mse", reconstruct=True, reconstruct_steps=10, seed=seed)
        logits.append(quantize(vit, images, config)(images.patches, images.positions).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_reconstruction_ends_in_time(vit, images):
    plain = quantize(vit, images, QuantConfig(3, 4, "mse"))
    start = time.monotonic()
    config = QuantConfig(3, 4, "mse", reconstruct=True, reconstruct_steps=10**6, reconstruct_seconds=2)
    limited = quantize(vit, images, config)
    assert time.monotonic() - start < 6
    assert block_error(vit, limited, images) < block_error(vit, plain, images)


def test_a_learned_scale_has_the_gradient_of_lsq():
    """Esser et al., eq. 3: round(x / s) - x / s inside the range, its ends outside."""
    quantizer = ActivationQuantizer(3, None)
    quantizer.fix(torch.tensor(0.5), torch.tensor(2, dtype=torch.int32))
    learned = LearnedQuantizer(quantizer, torch.Generator())
    x = torch.tensor([0.3, -0.4, 9.0, -9.0])
    level = x / 0.5
    expected = torch.where((level + 2).clamp(0, 7) == level + 2, level.round() - level, (level + 2).clamp(0, 7) - 2)
    learned.train()
    for value, gradient in zip(x, expected, strict=True):
        for _ in range(20):  # until this value is not among those left in full precision
            out = learned(value[None])
            if out != value:
                break
        (found,) = torch.autograd.grad(out.sum(), learned.log_scale)
        assert found.item() == pytest.approx(0.5 * gradient.item(), rel=1e-5)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_learned_quantizer_is_what_plain_code_computes(heads, symmetric):
    shape = () if heads is None else (heads,)
    quantizer = ActivationQuantizer(3, None, symmetric, heads)
    zero_point = torch.zeros(shape) if symmetric else torch.randint(1, 7, shape)
    quantizer.fix(0.3 + torch.rand(shape), zero_point.int())
    learned = LearnedQuantizer(quantizer, torch.Generator().manual_seed(5))
    x, weight = torch.randn(2, 3, 40, 8).mul(2).requires_grad_(), torch.randn(2, 3, 40, 8)
    out = learned(x)
    found = torch.autograd.grad((out * weight).sum(), [x, learned.log_scale])

    learned.generator.manual_seed(5)
    expected = bench_reconstruction.plain_quantizer(learned, x)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad((expected * weight).sum(), [x, learned.log_scale])
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-4)


def test_learned_rounding_is_what_plain_code_computes():
    layer = QuantizedLinear(torch.nn.Linear(9, 5), torch.nn.Identity(), 3, torch.full((5,), 0.1), rounded=False)
    rounding = AdaptiveRounding(layer, layer.linear)
    with torch.no_grad():
        rounding.raised.mul_(4)  # some are decided
    x, weight = torch.randn(4, 9), torch.randn(4, 5)
    found = torch.autograd.grad((rounding(x) * weight).sum() + rounding.undecided(7.0), rounding.raised)
    share = rounding.shared = bench_reconstruction.plain_share(rounding)
    assert 0 < (share % 1 == 0).float().mean() < 1
    out = torch.nn.functional.linear(x, (rounding.floor + share) * 0.1, layer.linear.bias)
    expected = (out * weight).sum() + bench_reconstruction.plain_undecided(rounding, 7.0)
    torch.testing.assert_close(found, torch.autograd.grad(expected, rounding.raised))


def test_bias_correction_restores_the_mean_of_every_layer(vit, images):
    config = QuantConfig(3, 4, "mse", bias_correction=True, batch_size=4)
    reference, plain = calibrated(vit, images, config)
    corrected = quantize(vit, images, config)
    names = list(quantized_layers(corrected))

    def deviations(model: SparseViT) -> dict[str, float]:
        means: dict[str, list] = {name: [] for name in names}
        for which in (reference, model):
            hooks = [
                layer.register_forward_hook(lambda _, __, out, name=name: means[name].append(out.flatten(0, -2)))
                for name, layer in quantized_layers(which).items()
            ]
            with torch.no_grad():
                which(images.patches, images.positions)
            for hook in hooks:
                hook.remove()
        return {name: (b.mean(dim=0) - a.mean(dim=0)).abs().max().item() for name, (a, b) in means.items()}

    before, after = deviations(plain), deviations(corrected)
    assert max(before.values()) > 0.04  # 40 times what may be left
    assert max(after.values()) < 1e-3


def test_a_bias_is_made_where_a_layer_has_none():
    vit = SparseViT(tiny_vit(qkv_bias=False))
    images = SparseImages.whole(vit.grid, torch.randn(4, 3, 32, 32), torch.zeros(4))
    quantized = quantize(vit, images, QuantConfig(3, 4, "mse", bias_correction=True))
    assert quantized.blocks[0].qkv.linear.bias.abs().max() > 0
    assert vit.blocks[0].qkv.bias is None


def test_sensitivity_quantizes_one_layer_at_a_time(vit, images):
    rows = sensitivity(vit, images, QuantConfig(3, 3, "mse", keep=("first",)))
    by_name = {row["layer"]: row for row in rows}
    reference, quantized = calibrated(vit, images, QuantConfig(3, 3, "mse", keep=("first",)))
    assert by_name.keys() == {name.removesuffix(".quantizer") for name in quantizers(quantized)}
    assert [row["divergence"] for row in rows] == sorted((row["divergence"] for row in rows), reverse=True)
    assert (by_name["patch_proj"]["w_bit"], by_name["patch_proj"]["a_bit"]) == (8, 8)
    assert by_name["patch_proj"]["divergence"] < by_name["blocks.0.mlp.fc1"]["divergence"]
    with torch.no_grad():
        expected = reference(images.patches, images.positions).logits.log_softmax(dim=1)
        layer = quantized.blocks[1].mlp.fc2
        assert isinstance(layer, QuantizedLinear)
        reference.set_submodule("blocks.1.mlp.fc2", layer)
        found = reference(images.patches, images.positions).logits.log_softmax(dim=1)
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()
    assert by_name["blocks.1.mlp.fc2"]["divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)


def test_the_walk_feeds_each_model_its_own_tensors(vit, images):
    reference, quantized = calibrated(vit, images, QuantConfig(4, 4, "mse"))
    found = list(walk(reference, quantized, images, batch_size=4))
    assert [len(stage.inputs) for stage in found] == [3] * 4
    assert torch.equal(found[0].inputs[0][0], found[0].quantized_inputs[0][0])
    with torch.no_grad():
        for index, model in enumerate((reference, quantized)):
            tokens = model.embed(images.patches[:4], images.positions[:4])
            stage = found[1].quantized_inputs if index else found[1].inputs
            torch.testing.assert_close(stage[0][0], tokens)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_too_large_for_memory_is_in_a_file_that_is_gone_afterwards(vit, images, loss, tmp_path, monkeypatch):
    """The model is the same; tensors of a pool are mapped, and nothing is left of them."""
    config = QuantConfig(3, 4, "mse", reconstruct=True, reconstruct_steps=6, reconstruct_loss=loss)
    wanted = quantize(vit, images, config).state_dict()
    made, empty = [], rows._empty
    monkeypatch.setattr(rows, "HELD", 64)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rows, "_empty", lambda *args: made.append(empty(*args)) or made[-1])
    found = quantize(vit, images, config).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert made
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_file_is_one_line(vit, images, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows, "HELD", 64)
    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"no room for .* GiB in .* \(No space left on device\); set TMPDIR"):
        quantize(vit, images, QuantConfig(3, 4, "mse", reconstruct=True, reconstruct_steps=2))


def test_a_reconstruction_that_was_stopped_goes_on_behind_its_finished_stages(vit, images, tmp_path, monkeypatch):
    """Stopped in the third of four stages; the model is that of a run which was not, and finished stages are kept."""
    config = QuantConfig(3, 4, "auto", reconstruct=True, reconstruct_steps=15)
    wanted, learned, learn = quantize(vit, images, config), [], reconstruction._reconstruct_stage

    def stopped(stage, *args):
        learned.append(stage.prefixes)
        if len(learned) == 3:
            raise KeyboardInterrupt
        learn(stage, *args)

    finished = FinishedStages(tmp_path / "stages")
    monkeypatch.setattr(reconstruction, "_reconstruct_stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(vit, images, config, finished=finished)
    assert len(list(finished.folder.iterdir())) == 2
    found = quantize(vit, images, config, finished=finished)
    assert len(learned) == 5 and learned[2] == learned[3]
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    finished._file(0).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"stage-000\.safetensors is damaged"):
        quantize(vit, images, config, finished=finished)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_brings_the_predictions_nearer(vit, loss):
    images, unseen = whole_images(32), whole_images(32, seed=1)
    config = {"w_bit": 3, "a_bit": 4, "observer": "mse"}
    plain = quantize(vit, images, QuantConfig(**config))
    learned = quantize(
        vit, images, QuantConfig(**config, reconstruct=True, reconstruct_loss=loss, reconstruct_steps=100)
    )
    models = (vit, plain, learned)
    wanted, *found = (model(unseen.patches, unseen.positions).logits.log_softmax(dim=1) for model in models)
    assert (found[1] - wanted).norm() < (found[0] - wanted).norm()


def test_the_fisher_loss_is_the_formula():
    """Diagonal and low rank of FIMA-Q by loops over images, from gradients that are looked at twice."""
    generator = torch.Generator().manual_seed(0)
    target, classifier = torch.randn(4, 3, 2, generator=generator), torch.randn(6, 5, generator=generator)
    behind = (lambda _, out, at: out.flatten(1) @ classifier,)
    stage = Stage((), lambda: None, [], [], behind)
    loss = Fisher(stage, None, target, torch.zeros(4, 3, dtype=torch.long), batch_size=3)
    outputs = [target + torch.randn(4, 3, 2, generator=generator) for _ in range(2)]
    wanted = (target.flatten(1) @ classifier / 20).log_softmax(dim=1)
    gradients, errors = [], []
    for number, out in enumerate(outputs):
        loss.look(number / 5, lambda n, out=out: out[:n])
        logits = out.flatten(1) @ classifier / 20
        by_image = (logits.softmax(dim=1) - wanted.exp()) @ classifier.T / 20
        gradients.append(by_image.abs().mean(dim=0))
        errors.append((out - target).flatten(1).abs().mean(dim=0))
    g, d = torch.stack(gradients), torch.stack(errors)

    def parts(out):
        e = (out - target).flatten(1).abs()
        low = torch.stack([(row @ g.T) @ torch.linalg.inv(d @ d.T) @ (row @ g.T) for row in e]).mean()
        return torch.stack([low, (e.square() * g.mean(dim=0)).mean()])

    first = loss(outputs[0], torch.arange(4))
    torch.testing.assert_close(first, (outputs[0] - target).square().sum(dim=-1).mean())
    second = loss(outputs[1], torch.arange(4))
    torch.testing.assert_close(second, first / 2 * (parts(outputs[1]) / parts(outputs[0])).sum(), rtol=1e-3, atol=0)
