"""Every prior against a slow, plain formula, and its gradient by finite differences in float64."""

import itertools
import math

import pytest
import torch
import torchvision
from torch import nn

from inversion import PRIORS, ImagePool, InversionConfig, Inverter, synthesize
from inversion.canvas import Jitter, PatchCanvas
from inversion.entropy import GRID_POINTS, entropy
from inversion.priors import CrossEntropy, Loss, LossInputs, Prior, Term
from inversion.priors.adversarial import disagreement
from inversion.priors.cmi import contrast, unit
from inversion.priors.deepinversion import load_cnn
from inversion.priors.psaq import TargetedVariation, pair_cosines
from inversion.targets import distributions
from inversion.views import Draw, Seen, Views
from models import DEFAULT_MODEL, PatchGrid, ViTOutput, load_model
from tests.conftest import tiny_model
from tests.test_canvas import jittered_positions, plain_tv, random_canvas
from utils.cli import Parser
from utils.errors import UserError
from utils.flags import add_inversion_arguments, inversion_config

CPU = torch.device("cpu")
GRID = PatchGrid(4, 4, 8, 8)
STILL = Jitter(0, 0, False)


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs_of(canvas: PatchCanvas, jitter: Jitter = STILL, **fields) -> LossInputs:
    dtype = canvas.pixels.dtype
    fields = {"output": None, "targets": None, **fields}
    views, draw = Views(("roll", "flip"), canvas.grid, CPU), Draw(jitter, torch.zeros(len(canvas.positions), 0))

    def look(draw: Draw) -> Seen:
        return views.look(canvas, draw, dtype)

    return LossInputs(canvas=canvas, seen=look(draw), opposite=lambda: look(views.opposite(draw)), **fields)


def parse(*flags: str) -> InversionConfig:
    parser = Parser("")
    add_inversion_arguments(parser)
    parser.set_defaults(seed=0, device="cpu", dtype="float32")
    return inversion_config(parser.parse_args(list(flags)), 4, "a student" if "--adv" in flags else None)


# Adversarial


def test_adversarial_is_one_minus_the_divergence():
    teacher, student = normal(2, 4, 6).unbind(0)
    p, q = teacher.softmax(1), student.softmax(1)
    m = (p + q) / 2
    divergence = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    torch.testing.assert_close(disagreement(teacher, student), 1 - divergence)
    assert disagreement(teacher, teacher) == pytest.approx(1)
    assert torch.autograd.gradcheck(disagreement, [teacher.requires_grad_(), student.requires_grad_()])


# Labels


def test_cross_entropy_with_soft_labels():
    logits, labels = normal(5, 7), torch.tensor([0, 6, 3, 3, 1])
    targets = distributions(labels, 7, 0.2)
    assert targets[1].tolist() == pytest.approx([0.2 / 7] * 6 + [0.8 + 0.2 / 7])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return CrossEntropy(None)(LossInputs(ViTOutput(logits, None), targets, None, None, None))

    plain = 0.0
    for row, label in zip(logits.softmax(1).tolist(), labels.tolist(), strict=True):
        plain -= sum((0.2 / 7 + 0.8 * (k == label)) * math.log(p) for k, p in enumerate(row)) / 5
    assert loss(logits).item() == pytest.approx(plain)
    assert torch.autograd.gradcheck(loss, [logits.requires_grad_()])


# PSAQ-ViT


def test_entropy_of_patch_similarities():
    """Cosines pair by pair, the kernel density point by point, the integral by hand."""
    x, h = normal(2, 5, 3), 0.3
    expected = []
    for image in x:
        pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
        cosines = [float(image[i] @ image[j] / image[i].norm() / image[j].norm()) for i, j in pairs]
        points = [-1 + 2 * k / (GRID_POINTS - 1) for k in range(GRID_POINTS)]
        kernels = [[math.exp(-(((p - c) / h) ** 2) / 2) / math.sqrt(2 * math.pi) for c in cosines] for p in points]
        density = [sum(row) / (len(cosines) * h) for row in kernels]
        heights = [-f * math.log(f) for f in density]
        expected.append(sum((a + b) / 2 * (2 / (GRID_POINTS - 1)) for a, b in itertools.pairwise(heights)))
    torch.testing.assert_close(entropy(pair_cosines(x), h), torch.tensor(expected, dtype=torch.float64))


def test_entropy_gradient_by_finite_differences():
    x = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy(pair_cosines(x), 0.3), [x])


def test_similar_patches_have_less_entropy_than_diverse_ones():
    alike = torch.ones(1, 30, 8) + 0.01 * normal(1, 30, 8)
    assert entropy(pair_cosines(alike), 0.05) < entropy(pair_cosines(normal(1, 30, 8)), 0.05) - 1


def test_targeted_variation_is_the_distance_to_the_drawn_level():
    canvas = random_canvas(GRID, 5)
    term = TargetedVariation(None)
    term.begin(None, torch.Generator().manual_seed(3))
    level = 2500 + 500 * torch.rand((), generator=torch.Generator().manual_seed(3)).item()
    scale = math.sqrt(3 * 5 * GRID.pixels / (32 * 3 * 224 * 224))
    value = term(inputs_of(canvas))
    assert value.item() == pytest.approx(abs(plain_tv(canvas.pixels, canvas, 2).item() - scale * level))
    direction, step = normal(*canvas.pixels.shape, seed=1), 1e-6
    value.backward()
    moved = [
        PatchCanvas(canvas.grid, canvas.pixels.detach() + sign * step * direction, canvas.positions) for sign in (1, -1)
    ]
    slope = (term(inputs_of(moved[0])) - term(inputs_of(moved[1]))).item() / (2 * step)
    assert (canvas.pixels.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_attention_puts_out_is_timms(dtype):
    """Of every block, packed or not: the input of timm's projection, and gradients flow through it."""
    model = tiny_model(depth=3)
    seen = []
    for block in model.vit.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inverter = Inverter(model, InversionConfig(weights={"pse": 1.0}, dtype=dtype, batch_size=2), CPU)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    leaves = [images.clone().requires_grad_() for _ in range(2)]
    model.vit(leaves[0])
    grid = inverter.vit.grid
    fed = grid.patchify(leaves[1]).to(inverter.dtype), grid.all_positions(2)
    found = inverter.vit(*fed, return_attended=True).attended
    seen = seen[: len(found)]  # the last block's projection is timm's own, and was called again
    assert len(found) == len(seen) == 3
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.1, "atol": 0.15}
    weights = [torch.randn(x[:, 1:].shape, generator=torch.Generator().manual_seed(1)) for x in seen]
    for ours, theirs in zip(found, seen, strict=True):
        torch.testing.assert_close(ours.float(), theirs[:, 1:], **tolerance)
    sum((w * x[:, 1:]).sum() for w, x in zip(weights, seen, strict=True)).backward()
    sum((w * x.float()).sum() for w, x in zip(weights, found, strict=True)).backward()
    a, b = leaves[0].grad.flatten(), leaves[1].grad.flatten()
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.99999 if dtype == "float32" else 0.98)


# CMI


def test_contrast_term():
    first, second, bank = unit(normal(3, 4)), unit(normal(3, 4, seed=1)), unit(normal(5, 4, seed=2))
    for others in (None, bank):
        expected = 0.0
        for i in range(3):
            unlike = [first[j] for j in range(3) if j != i] + ([] if others is None else list(others))
            total = sum(math.exp(float(first[i] @ other) / 0.2) for other in unlike)
            expected -= math.log(math.exp(float(first[i] @ second[i]) / 0.2) / total) / 3
        assert contrast(first, second, others, 0.2).item() == pytest.approx(expected)
    raw = [normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: contrast(unit(a), unit(b), bank, 0.2), raw)


def test_contrast_looks_at_earlier_batches_and_only_at_them(tmp_path):
    """Batch 1 depends on what the pool holds before it; the pool is the same however often the run is stopped."""
    model = tiny_model()
    pixels = {}
    for bank in (0, 64):
        config = InversionConfig(iterations=8, batch_size=3, weights={"oh": 1.0, "cr": 1.0}, options={"cmi_bank": bank})
        pool = ImagePool(tmp_path, model, config)
        synthesize(pool, 6, CPU, tmp_path / "log")
        pixels[bank] = pool.read(6).patches
        again = ImagePool(tmp_path / f"again{bank}", model, config)
        synthesize(again, 3, CPU, tmp_path / "log")
        synthesize(again, 6, CPU, tmp_path / "log")
        assert torch.equal(again.read(6).patches, pixels[bank])
    assert torch.equal(pixels[0][:3], pixels[64][:3])
    assert not torch.equal(pixels[0][3:], pixels[64][3:])


def test_contrast_makes_images_of_a_class_less_alike():
    model = load_model(DEFAULT_MODEL)
    alike = {}
    for weight in (0.0, 5.0):
        config = InversionConfig(iterations=30, batch_size=4, targets=("class:1",), weights={"oh": 1.0, "cr": weight})
        inverter = Inverter(model, config, CPU)
        images = inverter.invert(0).images
        features = unit(inverter.vit(images.patches, images.positions).features)
        alike[weight] = (features @ features.t()).triu(1).sum().item()
    assert alike[5.0] < alike[0.0] - 0.5


# Batch-norm statistics


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None, num_classes=3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    file = tmp_path_factory.mktemp("cnn") / "net.pth"
    torch.save(net.state_dict(), file)
    return net.eval(), f"resnet18={file}"


@pytest.mark.parametrize("jitter", [STILL, Jitter(3, -5, True)], ids=["still", "jittered"])
def test_batch_norm_statistics(resnet, jitter):
    """Every layer's input by a plain hook on the rolled, mirrored, zero-filled image; loops over channels."""
    net, source = resnet
    model = tiny_model()
    config = InversionConfig(weights={"bn": 1.0}, options={"bn_source": source}, batch_size=2)
    ((_, term),) = Inverter(model, config, CPU).losses
    canvas = random_canvas(GRID, 7, torch.float32)
    image = canvas.grid.unpatchify(canvas.pixels.detach(), canvas.positions).roll((jitter.dy, jitter.dx), (-2, -1))
    image, moved = image.flip(-1) if jitter.flip else image, jittered_positions(canvas.positions, GRID, jitter)
    image = canvas.grid.unpatchify(canvas.grid.patchify(image)[torch.arange(3)[:, None], moved], moved)
    pixels = model.preprocessing.denormalize(image)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = []
    handles = [
        m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    net((pixels - mean) / std)
    [handle.remove() for handle in handles]
    expected = 0.0
    for number, (norm, x) in enumerate(seen):
        means = [x[:, c].mean().item() - norm.running_mean[c].item() for c in range(x.shape[1])]
        variances = [
            ((x[:, c] - x[:, c].mean()) ** 2).mean().item() - norm.running_var[c].item() for c in range(x.shape[1])
        ]
        distance = math.sqrt(sum(m * m for m in means)) + math.sqrt(sum(v * v for v in variances))
        expected += distance * (10 if number == 0 else 1)
    assert term(inputs_of(canvas, jitter)).item() == pytest.approx(expected, rel=1e-4)


def test_batch_norm_gradient_by_finite_differences(resnet):
    model = tiny_model()
    config = InversionConfig(weights={"bn": 1.0}, options={"bn_source": resnet[1]}, batch_size=2)
    ((_, term),) = Inverter(model, config, CPU).losses
    term.cnn.double()
    canvas = random_canvas(GRID, 5)
    direction, step = normal(*canvas.pixels.shape, seed=1), 1e-5

    def value(sign: float) -> float:
        moved = PatchCanvas(canvas.grid, canvas.pixels.detach() + sign * step * direction, canvas.positions)
        return term(inputs_of(moved)).item()

    term(inputs_of(canvas)).backward()
    assert (canvas.pixels.grad * direction).sum().item() == pytest.approx((value(1) - value(-1)) / (2 * step), rel=1e-3)


@pytest.mark.parametrize(
    ("source", "why"),
    [("resnet999", "resnet999"), ("vit_b_16", "BatchNorm2d"), ("resnet18=/nowhere.pth", "/nowhere.pth")],
)
def test_cnns_that_cannot_be_had(source, why, monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: nn.Linear(1, 1))
    with pytest.raises(UserError, match=why):
        Inverter(tiny_model(), InversionConfig(weights={"bn": 1.0}, options={"bn_source": source}), CPU)


def test_without_network_the_cnn_asks_for_a_file(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    with pytest.raises(UserError, match=r"resnet50=FILE"):
        load_cnn("resnet50")


# All of them


@pytest.mark.parametrize(
    "strategy", [[], ["--prune_it", "3", "6", "--prune_ratio", "0.3", "0.3"], ["--strategy", "pri"]]
)
@pytest.mark.parametrize("prior", [["deepinversion"], ["psaq"], ["cmi"], ["psaq", "cmi", "deepinversion"]])
def test_every_prior_runs_with_every_strategy(model, prior, strategy):
    config = parse("--prior", *prior, *strategy, "--iterations", "12")
    batch = Inverter(model, config, CPU).invert(0)
    assert torch.isfinite(batch.losses).all()
    assert len(batch.images) == 4


def test_a_prior_sets_the_weights_of_its_terms():
    assert {k: v for k, v in parse().weights.items() if v} == {"oh": 1, "tv2": 1e-4}
    assert {k: v for k, v in parse("--prior", "psaq").weights.items() if v} == {"oh": 1, "pse": 1, "tvt": 0.05}
    both = parse("--prior", "psaq", "cmi", "--tvt", "0", "--cr", "0.3", "--tv2", "0.01").weights
    assert {k: v for k, v in both.items() if v} == {"oh": 1, "pse": 1, "cr": 0.3, "tv2": 0.01}


def test_presets_are_the_published_settings_and_given_flags_win():
    smi = parse("--preset", "smi")
    assert (smi.strategy, smi.prune_it, smi.prune_ratio) == ("smi", (50, 100, 200, 300), (0.3,) * 4)
    assert (smi.iterations, smi.lr) == (4000, 0.25)
    psaq = parse("--preset", "psaq_vit", "--lr_g", "0.2", "--prune_it", "50", "--prune_ratio", "0.3")
    assert (psaq.iterations, psaq.betas, psaq.lr_schedule, psaq.warmup) == (500, (0.5, 0.9), "cosine", 100)
    assert (psaq.strategy, psaq.lr, psaq.weights["pse"]) == ("smi", 0.2, 1.0)
    assert parse("--preset", "smi", "--strategy", "pri").strategy == "pri"
    assert parse("--preset", "smi", "--prune_it", "-1").strategy == "dense"
    assert parse("--preset", "cmi", "--oh", "2").weights["oh"] == 2
    assert parse("--preset", "deepinversion").weights["l2"] == 1e-5


def test_a_prior_from_outside_is_a_row_and_a_flag(model, monkeypatch):
    class Bright(Loss):
        """White images: minus the mean pixel."""

        def __call__(self, inputs: LossInputs) -> torch.Tensor:
            return -inputs.canvas.pixels.mean()

    monkeypatch.setitem(PRIORS, "toy", Prior({"bright": Term(Bright, 10.0, "weight of brightness")}))
    config = parse("--prior", "toy", "--oh", "0", "--iterations", "40")
    images = Inverter(model, config, CPU).invert(0).images
    assert model.preprocessing.denormalize(images.patches).min() > 0.99
    assert parse("--bright", "3").weights["bright"] == 3


def test_the_learning_rate_rises_and_falls():
    config = InversionConfig(iterations=110, lr=1.0, lr_schedule="cosine", warmup=10)
    rates = [config.lr_at(i) for i in range(110)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10] == pytest.approx(1)
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    assert InversionConfig(iterations=110, lr=1.0).lr_at(100) == 1
