"""Published methods from their descriptions: each formula written out slowly, each setting as it is stated.

What other files already hold against a plain formula is not here: tests/test_priors.py, test_published.py,
test_grow.py, test_views.py, test_observers.py, test_rotation.py, test_reconstruction.py, test_swin.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import functional

from inversion import InversionConfig, Inverter, configured
from inversion.canvas import Jitter, PatchCanvas
from inversion.entropy import similarity_entropy
from inversion.priors import LossInputs
from inversion.priors.deepinversion import MeanL2
from inversion.priors.psaq import TargetedVariation
from inversion.priors.sardfq import spots
from inversion.views import Seen, Views
from models import PatchGrid, SparseImages, SparseViT, load_model
from quant import QuantConfig, quantize, reconstruction
from quant.calibration import calibrated
from quant.losses import LOSSES, Fisher, Global
from quant.quantizers import ActivationQuantizer
from quant.reconstruction import AdaptiveRounding, LearnedQuantizer
from quant.rotation import orthogonal
from quant.stages import walk
from tests.conftest import lively, tiny_model, tiny_vit, whole_images
from utils.images import Stored, calibration_images

CPU = torch.device("cpu")
GRID = PatchGrid(4, 4, 8, 8)
IMAGENET = PatchGrid(14, 14, 16, 16)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def half_cosine(step: int, steps: int, high: float, low: float = 0.0) -> float:
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmed(step: int, steps: int, warmup: int, high: float) -> float:
    """Linear warm-up, then a half cosine to 0, as both DeepInversion and PSAQ-ViT have it."""
    return high * (step + 1) / warmup if step < warmup else half_cosine(step - warmup, steps - warmup, high)


def rolls_of(config: InversionConfig, count: int = 4000) -> list[list[Jitter]]:
    """Jitters of every phase of a configuration, of images of 224 pixels."""
    found = []
    for phase in config.phase_list():
        views = Views(phase.views(config.views), IMAGENET, CPU, coarse=phase.coarse)
        found.append([draw.jitter for draw in views.draws(count, 1, seeded())])
    return found


def four_differences(x: torch.Tensor) -> list[torch.Tensor]:
    """Right, down and both diagonals of images (B, C, H, W)."""
    return [
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    ]


def variation(x: torch.Tensor) -> torch.Tensor:
    """Sum of the four norms over the batch."""
    return sum(difference.square().sum().sqrt() for difference in four_differences(x))


def patch_entropy(heads_out: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """PSAQ-ViT's E of a block, attention output (B, H, T, d) with a class token in front."""
    patches = heads_out.mean(dim=1)[:, 1:]
    lengths = patches.square().sum(dim=2).sqrt()
    cosines = (patches[:, :, None] * patches[:, None]).sum(dim=3) / (lengths[:, :, None] * lengths[:, None])
    low, high = cosines.detach().min(), cosines.detach().max()
    points = [low + (high - low) * k / 9 for k in range(10)]
    each = []
    for image in cosines:
        normal = [torch.exp(-0.5 * ((p - image) / bandwidth) ** 2) / math.sqrt(2 * math.pi) for p in points]
        density = [kernels.mean() / bandwidth + 1e-4 for kernels in normal]
        heights = [-f * f.log() for f in density]
        each.append(sum((a + b) / 2 for a, b in zip(heights[1:], heights[:-1], strict=True)) * (high - low) / 9)
    return sum(each) / len(each)


class Watched:
    """An inversion of a tiny model in double precision, and what chance decided in it."""

    def __init__(self, config: InversionConfig) -> None:
        self.model = tiny_model()
        lively(self.model.vit)
        self.inverter = Inverter(self.model, config, CPU, eager=True)
        self.jitters: list[Jitter] = []
        step = self.inverter._step

        def watched(canvas, optimizer, targets, draws, **how):
            self.optimizer, self.targets = type(optimizer), targets
            self.jitters.append(draws[0].jitter)
            return step(canvas, optimizer, targets, draws, **how)

        def started(stage) -> None:
            self.start = GRID.unpatchify(stage.canvas.pixels.detach().clone(), stage.canvas.positions)

        self.inverter._step = watched
        images = self.inverter.invert(0, on_stage=started).images
        self.pixels = GRID.unpatchify(images.patches, images.positions)
        self.model.vit.double()

    def clip(self, x: torch.Tensor) -> None:
        black, white = self.inverter.limits
        x.data = torch.minimum(torch.maximum(x.data, black), white)

    def assert_ends_at(self, x: torch.Tensor) -> None:
        assert (self.pixels - self.start).abs().mean() > 0.1
        assert ((self.pixels - x.detach()).abs() > 1e-3).float().mean() < 2e-3  # whose gradient is next to nothing


# SMI: its quantizer, its evaluation


@torch.no_grad()
def test_smi_observes_every_kept_token_of_the_full_precision_model_in_the_last_block():
    """Ranges of sparse images: of class token and seven patches, each with its own position embedding."""
    vit = tiny_vit()
    pixels = torch.randn(6, 3, 32, 32, generator=seeded())
    kept = torch.stack([torch.randperm(16, generator=seeded(i))[:7] for i in range(6)])
    embedded = vit.patch_embed(pixels) + vit.pos_embed[:, 1:]
    x = torch.stack([embedded[i, kept[i]] for i in range(6)])
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(6, -1, -1), x], dim=1)
    for block in vit.blocks:
        x = block(x)
    images = SparseImages(GRID.taken(pixels, kept), kept, torch.zeros(6, dtype=torch.long))
    quantized = quantize(SparseViT(vit), images, QuantConfig(4, 8, "published", batch_size=4))
    width = x.max().clamp(min=0) - x.min().clamp(max=0)
    torch.testing.assert_close(quantized.blocks[-1].tap_mlp_sum.scale, width / 255)
    logits = vit.head(vit.norm(x)[:, 0])
    width = logits.max().clamp(min=0) - logits.min().clamp(max=0)
    torch.testing.assert_close(quantized.head.tap_logits.scale, width / 255)


def test_black_pixels_of_files_stay_black(tmp_path):
    """They are minus mean over deviation, not the mean colour."""
    model = tiny_model()
    half = Image.new("RGB", (64, 64), (0, 0, 0))
    half.paste((255, 255, 255), (32, 0, 64, 64))
    half.save(tmp_path / "half.png")
    (patches,) = calibration_images(model, Stored(tmp_path), 1).patches
    image = GRID.unpatchify(patches[None], GRID.all_positions(1))[0]
    for channel, (mean, deviation) in enumerate(zip((0.48, 0.45, 0.41), (0.23, 0.22, 0.21), strict=True)):
        torch.testing.assert_close(image[channel, :, :12], torch.full((32, 12), -mean / deviation))
        torch.testing.assert_close(image[channel, :, 20:], torch.full((32, 12), (1 - mean) / deviation))


@pytest.mark.parametrize("size", [(320, 480), (600, 300)])
def test_images_of_the_cifar_teachers_have_256_on_their_shorter_side_and_are_cropped_to_224(size):
    """Bicubic, from the centre."""
    how = load_model("deit_tiny_16_cifar10", random_weights=True).preprocessing
    image = Image.fromarray(torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=seeded()).numpy())
    plain = functional.resize(image, 256, functional.InterpolationMode.BICUBIC)
    plain = functional.to_tensor(functional.center_crop(plain, 224))
    torch.testing.assert_close(how.denormalize(how.eval_transform()(image)), plain, rtol=0, atol=2 / 255)


# PSAQ-ViT


def test_psaq_vit_is_twice_500_iterations_of_its_rates_rolls_and_weights():
    config = configured("psaq_vit")
    assert config.iterations == 1000
    assert {name: weight for name, weight in config.weights.items() if weight} == {"oh": 1, "pse": 1, "tvt": 0.05}
    for iteration in range(1000):
        assert config.lr_at(iteration) == pytest.approx(warmed(iteration % 500, 500, 100, 0.20))
    first, second = rolls_of(config)
    for jitters, most in ((first, 15), (second, 30)):
        assert {jitter.dy for jitter in jitters} == set(range(-most, most + 1))
        assert all(jitter.dy == jitter.dx for jitter in jitters)
        assert 0.45 < sum(jitter.flip for jitter in jitters) / len(jitters) < 0.55


def test_psaq_vit_is_a_plain_loop():
    """Cross-entropy, level of the jittered image's variation and entropies; one Adam through both halves."""
    how = {"iterations": 10, "warmup": 2, "batch_size": 3, "dtype": "float64"}
    run = Watched(configured("psaq_vit", **how))
    assert run.optimizer is torch.optim.Adam
    (level,) = (term.target for _, term in run.inverter.losses if isinstance(term, TargetedVariation))
    assert 2500 <= level <= 3000
    level *= math.sqrt(run.start.numel() / (32 * 3 * 224 * 224))  # there are fewer differences here
    vit, heads, seen = run.model.vit, run.model.vit.blocks[0].attn.num_heads, []
    for block in vit.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = run.start.clone().requires_grad_()
    adam = torch.optim.Adam([x], betas=(0.5, 0.9))
    for iteration, jitter in enumerate(run.jitters):
        adam.param_groups[0]["lr"] = warmed(iteration % 5, 5, 2, 0.20)
        shown = x.double().roll((jitter.dy, jitter.dx), (-2, -1))
        shown = shown.flip(-1) if jitter.flip else shown
        seen.clear()
        loss = F.cross_entropy(vit(shown), run.targets.double()) + 0.05 * (variation(shown) - level).abs()
        for out in seen:
            loss = loss - patch_entropy(out.unflatten(2, (heads, -1)).transpose(1, 2), 0.01)
        adam.zero_grad()
        loss.backward()
        adam.step()
        run.clip(x)
    run.assert_ends_at(x)


def test_the_level_is_of_32_images_of_224_pixels_and_drawn_once():
    term, generator = TargetedVariation(None), seeded()
    flat = torch.zeros(32, 196, 3, 16, 16)
    canvas = PatchCanvas(IMAGENET, flat, IMAGENET.all_positions(32).contiguous())
    inputs = LossInputs(None, None, canvas, Seen(flat, canvas.positions), IMAGENET)
    term.begin(None, generator, 32)
    levels = {term(inputs).item() for _ in range(2)}
    assert len(levels) == 1 and 2500 <= levels.pop() <= 3000
    one = PatchCanvas(GRID, torch.zeros(1, 16, 3, 8, 8), GRID.all_positions(1).contiguous())
    inputs, drawn = LossInputs(None, None, one, Seen(one.pixels.detach(), one.positions), GRID), []
    for _ in range(400):
        term.begin(None, generator, 1)
        drawn.append(term(inputs).item() / math.sqrt(3 * 32 * 32 / (32 * 3 * 224 * 224)))
    for share in (0.25, 0.5, 0.75):
        assert abs(sum(level < 2500 + 500 * share for level in drawn) / 400 - share) < 0.08


@pytest.mark.parametrize("plain", [False, True])
def test_no_gradient_flows_through_the_ends_of_the_entropys_points(plain):
    """By autograd, with the ends as constants; with them as functions of the images it would be another one."""
    tokens = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=seeded()).requires_grad_()
    expected = torch.autograd.grad(patch_entropy(tokens, 0.2), tokens)[0]
    vectors = tokens.mean(dim=1)[:, 1:]
    found = torch.autograd.grad(similarity_entropy(vectors, 0.2, plain=plain), tokens)[0]
    torch.testing.assert_close(found, expected)


# MimiQ


def test_mimiq_has_its_weights_optimizer_and_rolls_by_halves():
    config = configured("mimiq")
    assert {name: weight for name, weight in config.weights.items() if weight} == {"oh": 1, "ihs": 1, "tvd": 2.5e-5}
    assert (config.lr_at(0), config.betas) == (0.1, (0.9, 0.999))
    assert config.lr_at(999) == pytest.approx(0.001, rel=1e-2)
    halves = rolls_of(config)
    assert config.spans() == [(0, 500), (500, 1000)]
    for jitters, most in zip(halves, (8, 16), strict=True):
        assert {jitter.dy for jitter in jitters} == {jitter.dx for jitter in jitters} == set(range(-most, most + 1))
        assert not any(jitter.flip for jitter in jitters)
    inverter = Inverter(tiny_model(), config, CPU)
    optimizer = inverter.adam(inverter._noise(1, seeded()))
    assert type(optimizer) is torch.optim.AdamW
    assert (
        optimizer.defaults["weight_decay"] == torch.optim.AdamW([nn.Parameter(torch.ones(1))]).defaults["weight_decay"]
    )


# SARDFQ


def test_a_map_of_one_spot_is_a_gaussian_of_a_covariance_of_its_own():
    """Its logarithm is a quadratic of row and column; about one map in five is of one spot."""
    grid = PatchGrid(12, 12, 4, 4)
    maps = spots(150, 2, grid, seeded()).double().flatten(0, 1)
    rows, cols = torch.meshgrid(*[(torch.arange(12, dtype=torch.float64) + 0.5) / 12] * 2, indexing="ij")
    rows, cols = rows.flatten(), cols.flatten()
    basis = torch.stack([torch.ones_like(rows), rows, cols, rows**2, rows * cols, cols**2], dim=1)
    one, covariances = 0, []
    for values in maps:
        there = values > 1e-25
        fit = torch.linalg.lstsq(basis[there], values[there].log()[:, None]).solution
        if ((basis[there] @ fit)[:, 0] - values[there].log()).abs().max() < 1e-2:
            one += 1
            down, both, right = (-2 * fit[3]).item(), -fit[4].item(), (-2 * fit[5]).item()
            covariances.append(torch.linalg.inv(torch.tensor([[down, both], [both, right]])))
    assert 0.1 < one / len(maps) < 0.3
    found = torch.stack(covariances)
    correlations = found[:, 0, 1] / (found[:, 0, 0] * found[:, 1, 1]).sqrt()
    assert (torch.linalg.eigvalsh(found) > 0).all()
    assert correlations.min() < -0.4 and correlations.max() > 0.4
    assert found[:, 0, 0].std() > 0.2 * found[:, 0, 0].mean()


def test_sardfq_has_its_three_parts():
    config = configured("sardfq")
    assert {name: weight for name, weight in config.weights.items() if weight} == {"oh": 1, "ap": 1, "parts": 1}
    labels = torch.arange(5).repeat(20)
    targets = Inverter(tiny_model(), config, CPU).targets(labels, seeded())
    assert (targets.argmax(dim=1) == labels).float().mean() > 0.95
    others = targets.scatter(1, labels[:, None], 0)
    assert (targets > 0).all() and others.std(dim=0).min() > 0  # random ones, not a share for each


# CMI


def test_negatives_are_the_last_images_of_a_bank_of_40960():
    """By the features that timm's classifier reads, with the positive in the denominator."""
    assert configured("cmi").options["cmi_bank"] == 40960
    model = tiny_model()
    lively(model.vit)
    config = InversionConfig(weights={"cr": 1.0}, options={"cmi_bank": 4, "cmi_temperature": 0.3}, batch_size=3)
    inverter = Inverter(model, config, CPU)
    ((_, term),) = inverter.losses
    pixels = torch.randn(12, 3, 32, 32, generator=seeded())
    term.begin(SparseImages.whole(GRID, pixels[:9], torch.zeros(9)), seeded(), 3)
    canvas = PatchCanvas(GRID, GRID.patchify(pixels[9:]), GRID.all_positions(3).contiguous())
    seen = Seen(canvas.pixels.detach(), canvas.positions)
    # All of the image is a part of it, and mirrored.
    numbers = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(3, 4)
    found = term(LossInputs(inverter.vit(*seen), None, canvas, seen, GRID, numbers))

    def unit(images: torch.Tensor) -> torch.Tensor:
        features = model.vit.forward_head(model.vit.forward_features(images), pre_logits=True).detach()
        return features / features.norm(dim=1, keepdim=True)

    image, part, bank = unit(pixels[9:]), unit(pixels[9:].flip(-1)), unit(pixels[5:9])
    expected = 0.0
    for i in range(3):
        alike = math.exp(image[i] @ part[i] / 0.3)
        unlike = [math.exp(image[i] @ x / 0.3) for x in (*(image[j] for j in range(3) if j != i), *bank)]
        expected -= math.log(alike / (alike + sum(unlike))) / 3
    assert found.item() == pytest.approx(expected, rel=1e-4)


# Competition with the student


def test_competition_is_at_temperature_3():
    assert configured(prior=["adversarial"], student="a student").options["adv_temperature"] == 3


# DeepInversion


def test_l2_is_the_mean_of_the_norms_of_images():
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=seeded())
    canvas = PatchCanvas(GRID, GRID.patchify(pixels), GRID.all_positions(3).contiguous())
    expected = sum(math.sqrt(sum(v * v for v in image.flatten().tolist())) for image in pixels) / 3
    assert MeanL2(None)(LossInputs(None, None, canvas, None, GRID)).item() == pytest.approx(expected)


def test_deepinversion_is_2000_iterations_at_half_the_resolution_then_1000():
    config = configured("deepinversion")
    assert (config.iterations, config.betas, config.weight_decay) == (3000, (0.5, 0.9), 0)
    assert config.weights["l2_mean"] > 0 == config.weights["l2"]
    assert [phase.coarse for phase in config.phase_list()] == [2, 1]
    for iteration in range(0, 3000, 7):
        step, steps = (iteration, 2000) if iteration < 2000 else (iteration - 2000, 1000)
        assert config.lr_at(iteration) == pytest.approx(warmed(step, steps, 100, config.lr))


def test_deepinversion_is_a_plain_loop():
    """First the mean of every four pixels alone is looked at, and rolled; then every pixel, by an Adam of its own."""
    how = {"iterations": 9, "warmup": 2, "batch_size": 3, "dtype": "float64", "tv2": 0.02, "l2_mean": 0.1}
    run = Watched(configured("deepinversion", **how))
    x = run.start.clone().requires_grad_()
    for first, last, coarse in ((0, 6, 2), (6, 9, 1)):
        adam = torch.optim.Adam([x], betas=(0.5, 0.9))
        for step, jitter in enumerate(run.jitters[first:last]):
            adam.param_groups[0]["lr"] = warmed(step, last - first, 2, 0.25)
            image = F.avg_pool2d(x, coarse)
            shown = image.double().roll((jitter.dy, jitter.dx), (-2, -1))
            shown = F.interpolate(shown.flip(-1) if jitter.flip else shown, scale_factor=coarse, mode="nearest")
            loss = F.cross_entropy(run.model.vit(shown), run.targets.double())
            loss = loss + 0.02 * variation(image) + 0.1 * sum(one.norm() for one in image) / 3
            adam.zero_grad()
            loss.backward()
            adam.step()
            run.clip(x)
    run.assert_ends_at(x)


# Plug-In Inversion


def test_every_copy_has_a_colour_shift_of_its_own():
    """x * s + m in each channel, m from U(-1, 1), s = exp(u), u from U(-1, 1)."""
    config, grid = configured("plug_in"), PatchGrid(1, 1, 16, 16)
    views = Views([view for view in config.views if not view.startswith("roll")], grid, CPU)
    x = torch.randn(1, 1, 3, 16, 16, generator=seeded())
    canvas, shifts, scales = PatchCanvas(grid, x, torch.zeros(1, 1, dtype=torch.long)), [], []
    for draw in views.draws(20 * config.copies, 1, seeded()):
        seen = views.look(canvas, draw, torch.float32).patches.detach()
        for channel in range(3):
            a, b = seen[0, 0, channel].flatten(), x[0, 0, channel].flatten()
            scale = ((a - a.mean()) @ (b - b.mean()) / (b - b.mean()).square().sum()).item()
            shift = (a.mean() - scale * b.mean()).item()
            assert (a - scale * b - shift).abs().max() < 1e-4
            shifts.append(shift)
            scales.append(math.log(scale))
    for values in (shifts, scales):
        assert len({round(value, 4) for value in values}) > 0.95 * len(values)
        assert -1.001 < min(values) < -0.99 and 0.99 < max(values) < 1.001
        assert abs(sum(abs(value) < 0.5 for value in values) / len(values) - 0.5) < 0.05


# FIMA-Q and what it shares with QDrop and AdaRound


@pytest.mark.parametrize("steps", [50, 300])
def test_fisher_looks_at_five_evenly_spaced_moments(steps):
    """Of a block, a fifth of its steps apart; each time at what the block gives then."""
    behind = (lambda _, out, at: out.flatten(1) @ torch.randn(6, 5, generator=seeded()),)
    stage = reconstruction.Stage((), lambda: None, [], [], behind)
    loss = Fisher(stage, None, torch.randn(4, 3, 2), torch.zeros(4, 3, dtype=torch.long), batch_size=4)
    looked = []
    for step in range(steps):
        loss.look(step / steps, lambda n, step=step: looked.append(step) or torch.randn(n, 3, 2))
    assert looked == [0, steps // 5, 2 * steps // 5, 3 * steps // 5, 4 * steps // 5]


def test_fisher_sees_the_block_behind_those_that_are_quantized(monkeypatch):
    """Its gradients are of the divergence of the logits at temperature 20, by timm's own blocks behind the output."""
    vit, seen = lively(tiny_vit()), []

    class Watching(Fisher):
        def look(self, progress, outputs):
            super().look(progress, lambda n: seen.append((self, outputs(n))) or seen[-1][1])

    monkeypatch.setitem(LOSSES, "fisher", Watching)
    images = whole_images(6)
    config = QuantConfig(3, 32, "minmax", reconstruct=True, reconstruct_loss="fisher", reconstruct_steps=1)
    quantized = quantize(SparseViT(vit), images, config)
    _, (loss, out), _ = seen
    assert loss.stage.prefixes == ("blocks.0.",)
    pixels = GRID.unpatchify(images.patches, images.positions)
    with torch.no_grad():
        wanted = vit(pixels) / 20
        full, behind = vit._pos_embed(vit.patch_embed(pixels)), quantized.embed(images.patches, images.positions)
        assert (vit.blocks[0](behind) - out).norm() < 0.05 * (vit.blocks[0](behind) - vit.blocks[0](full)).norm()
    leaf = out.detach().requires_grad_()
    found = vit.head(vit.norm(vit.blocks[1](leaf))[:, 0]) / 20
    p, q = wanted.softmax(1), found.softmax(1)
    gradient = torch.autograd.grad((p * (p.log() - q.log())).sum(), leaf)[0].abs().mean(dim=0)
    torch.testing.assert_close(loss.gradients[0], gradient.flatten(), rtol=1e-3, atol=1e-5 * gradient.max().item())


def test_rounding_is_free_for_a_fifth_of_the_steps_then_decided_by_a_falling_exponent(monkeypatch):
    """AdaRound's regularizer: the sum of 1 - |2h - 1|^b, b from 20 to 2 along a line, with weight 0.01."""
    powers, undecided = [], AdaptiveRounding.undecided

    def watched(self, power):
        value, h = undecided(self, power), self.share().detach()
        torch.testing.assert_close(value, (1 - (2 * h - 1).abs() ** power).sum(), rtol=1e-4, atol=1e-3)
        powers.append(power)
        return value

    monkeypatch.setattr(AdaptiveRounding, "undecided", watched)
    vit = SparseViT(tiny_vit(depth=1))
    quantize(vit, whole_images(4), QuantConfig(3, 8, "minmax", reconstruct=True, reconstruct_steps=20))
    first = powers[: len(powers) // 6]  # one of six layers: those of a block share its steps
    assert len(powers) == 6 * 15 and first == [pytest.approx(20 - 18 * (k - 4) / 16) for k in range(5, 20)]
    assert reconstruction.ROUNDING_WEIGHT == 0.01


def test_half_of_the_activations_are_left_in_full_precision_anew_every_time():
    quantizer = ActivationQuantizer(2, None)
    quantizer.fix(torch.tensor(1.0), torch.tensor(2, dtype=torch.int32))
    learned, x = LearnedQuantizer(quantizer, seeded()), torch.full((40_000,), 0.3)
    first, second = (learned(x).detach() == x for _ in range(2))
    for left in (first, second):
        assert 0.48 < left.float().mean() < 0.52
    assert 0.48 < (first == second).float().mean() < 0.52
    mixed = reconstruction._mixed(x, torch.zeros_like(x), seeded())
    assert 0.48 < (mixed == x).float().mean() < 0.52


# GLF-Q


@torch.no_grad()
def test_the_global_loss_is_the_distance_of_penultimate_features_and_the_local_one():
    """Behind a block timm's own blocks run in full precision; the two count alike in the first step."""
    vit, images = tiny_vit(), whole_images(6)
    reference, quantized = calibrated(SparseViT(vit), images, QuantConfig(3, 8, "minmax"))
    stage = list(walk(reference, quantized, images, batch_size=4))[1]
    assert stage.prefixes == ("blocks.0.",)
    inputs = [torch.cat(parts) for parts in zip(*stage.inputs, strict=True)]
    target = stage.run(reference, *inputs)
    loss = Global(stage, reference, target, images.positions, batch_size=4)
    values, chosen = [], torch.tensor([4, 0, 3])
    outs = [target[chosen] + 0.1 * torch.randn(3, *target.shape[1:], generator=seeded(i)) for i in range(2)]
    for out in outs:
        local = sum(((a - b) ** 2).sum() for a, b in zip(out, target[chosen], strict=True)) / (3 * 17)
        features = [vit.norm(vit.blocks[1](x))[:, 0] for x in (out, target[chosen])]
        values.append((local, ((features[0] - features[1]) ** 2).sum() / 3))
    weight = values[0][0] / values[0][1]
    for out, (local, last) in zip(outs, values, strict=True):
        torch.testing.assert_close(loss(out, chosen), local + weight * last, rtol=1e-4, atol=1e-6)


# Rotation


def test_a_layer_norm_turns_with_what_it_reads():
    """LN(Q x) = Q LN(x) for an orthogonal Q that leaves the vector of ones where it is."""
    turned = orthogonal(24, seeded(), fixed=True)
    x = 3 + torch.randn(50, 24, dtype=torch.float64, generator=seeded())

    def norm(y: torch.Tensor) -> torch.Tensor:
        centred = y - y.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()

    torch.testing.assert_close(norm(x @ turned.T), norm(x) @ turned.T)
    assert (turned - torch.eye(24)).abs().max() > 0.1
