"""Every prior against a slow, plain formula, and its gradient by finite differences in float64."""

import itertools
import math

import pytest
import torch
import torchvision
from torch import nn

import inversion.entropy
from inversion import PRIORS, ImagePool, InversionConfig, Inverter, synthesize
from inversion.canvas import Jitter, PatchCanvas
from inversion.entropy import similarity_entropy
from inversion.head_similarity import unlike
from inversion.inits import INITS, scenes
from inversion.priors import CrossEntropy, Loss, LossInputs, Prior, Term
from inversion.priors.adversarial import disagreement
from inversion.priors.cmi import contrast, unit
from inversion.priors.deepinversion import load_cnn
from inversion.priors.mimiq import ScaledTotalVariation
from inversion.priors.natural import moments, pooled
from inversion.priors.psaq import TargetedVariation
from inversion.priors.sardfq import spots
from inversion.priors.synq import HighFrequencies, SoftWhereUnsure
from inversion.targets import distributions
from inversion.views import Draw, Seen, Views
from kt import StudentConfig, load_student
from models import DEFAULT_MODEL, LoadedModel, PatchGrid, ViTOutput, load_model
from tests.conftest import lively, tiny_model
from tests.families import ALL_FAMILIES, family_model
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
    fields = {"output": None, "targets": None, "grid": canvas.grid, **fields}
    views, draw = Views(("roll", "flip"), canvas.grid, CPU), Draw(jitter, torch.zeros(len(canvas.positions), 0))

    def look(draw: Draw) -> Seen:
        return views.look(canvas, draw, dtype)

    return LossInputs(canvas=canvas, seen=look(draw), **fields)


def parse(*flags: str) -> InversionConfig:
    parser = Parser("")
    add_inversion_arguments(parser)
    parser.set_defaults(seed=0, device="cpu", dtype="float32")
    return inversion_config(parser.parse_args(list(flags)), 4, "a student" if "natural" in flags else None)


# Adversarial


def test_adversarial_is_one_minus_the_divergence():
    """At temperature 3, probabilities clamped to 0.01 .. 0.99."""
    teacher, student = (3 * normal(2, 4, 6)).unbind(0)
    p, q = ([[min(max(v, 0.01), 0.99) for v in row] for row in (x / 3).softmax(1).tolist()] for x in (teacher, student))
    divergence = 0.0
    for a, b in zip(p, q, strict=True):
        middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        for one in (a, b):
            divergence += sum(x * math.log(x / m) for x, m in zip(one, middle, strict=True)) / 2 / 4
    assert disagreement(teacher, student, 3.0).item() == pytest.approx(1 - divergence)
    assert disagreement(teacher, teacher, 3.0) == pytest.approx(1)
    fed = [teacher.requires_grad_(), student.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: disagreement(a, b, 3.0), fed)


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
    """Cosines pair by pair, each with itself too, between the batch's extremes; kernels and integral by hand."""
    x, h = normal(2, 5, 3), 0.3
    cosines = [[float(a @ b / a.norm() / b.norm()) for a in image for b in image] for image in x]
    low, high = min(map(min, cosines)), max(map(max, cosines))
    points = [low + (high - low) * k / 9 for k in range(10)]
    expected = []
    for values in cosines:
        kernels = [[math.exp(-(((p - c) / h) ** 2) / 2) / math.sqrt(2 * math.pi) for c in values] for p in points]
        density = [sum(row) / (len(values) * h) + 1e-4 for row in kernels]
        heights = [-f * math.log(f) for f in density]
        expected.append(sum((a + b) / 2 * (high - low) / 9 for a, b in itertools.pairwise(heights)))
    for plain in (False, True):
        assert similarity_entropy(x, h, plain=plain).item() == pytest.approx(sum(expected) / 2)


def at_fixed_points(monkeypatch):
    """The ends of the density's points carry no gradient; for differences they must not move either."""
    ends = torch.linspace(-1, 1, 10, dtype=torch.float64)
    monkeypatch.setattr(inversion.entropy, "_points", lambda cosines, there: ends)


def test_entropy_gradient_by_finite_differences(monkeypatch):
    at_fixed_points(monkeypatch)
    x, there = normal(3, 4, 3).requires_grad_(), torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    for plain, kept in itertools.product((False, True), (None, there)):
        assert torch.autograd.gradcheck(lambda x, p=plain, k=kept: similarity_entropy(x, 0.3, k, p), [x])


def test_entropy_is_of_vectors_that_count():
    x, there = normal(2, 6, 3), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    for plain in (False, True):
        found = similarity_entropy(x, 0.3, there, plain)
        torch.testing.assert_close(found, similarity_entropy(x[:1, :4], 0.3))


def test_entropy_is_of_the_mean_over_heads_in_every_block():
    model = tiny_model()
    inverter = Inverter(model, InversionConfig(weights={"pse": 1.0}, batch_size=2), CPU, eager=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fed = GRID.patchify(images), GRID.all_positions(2)
    inside = inverter.vit(*fed, return_inside=True).inside
    expected = 0.0
    for one in inside:
        heads = one.attended[:, 1:].chunk(one.heads, dim=-1)
        expected -= similarity_entropy(sum(heads) / one.heads, 0.01)
    ((_, term),) = inverter.losses
    canvas = PatchCanvas(GRID, fed[0], fed[1].contiguous())
    found = term(inputs_of(canvas, output=inverter.vit(*fed, return_inside=True)))
    torch.testing.assert_close(found, expected)


def test_similar_patches_have_less_entropy_than_diverse_ones():
    alike = torch.ones(1, 30, 8) + 0.01 * normal(1, 30, 8)
    assert similarity_entropy(alike, 0.05) < similarity_entropy(normal(1, 30, 8), 0.05)


def test_targeted_variation_is_the_distance_to_the_drawn_level():
    canvas = random_canvas(GRID, 5)
    term = TargetedVariation(None)
    term.begin(None, torch.Generator().manual_seed(3), 5)
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
    found = inverter.vit(*fed, return_inside=True).inside
    found = [inside.attended[:, 1:] for inside in found]
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
            alike = math.exp(float(first[i] @ second[i]) / 0.2)
            total = alike + sum(math.exp(float(first[i] @ other) / 0.2) for other in unlike)
            expected -= math.log(alike / total) / 3
        assert contrast(first, second, others, 0.2).item() == pytest.approx(expected)


def test_nothing_flows_to_what_an_image_is_unlike():
    first, second, bank = normal(3, 4), normal(3, 4, seed=1), unit(normal(5, 4, seed=2))
    one = [first[:1].clone().requires_grad_(), second[:1].clone().requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: contrast(unit(a), unit(b), bank, 0.2), one)
    a, b = unit(first).requires_grad_(), unit(second)
    (found,) = torch.autograd.grad(contrast(a, b, None, 0.2), a)
    for i in range(3):
        alone, others = a[i : i + 1].detach().requires_grad_(), a.detach()[[j for j in range(3) if j != i]]
        (expected,) = torch.autograd.grad(contrast(alone, b[i : i + 1], others, 0.2) / 3, alone)
        torch.testing.assert_close(found[i : i + 1], expected)


@pytest.mark.parametrize("views", [["roll", "flip"], ["roll"]])
def test_contrast_compares_the_image_with_a_part_of_it(views, monkeypatch):
    """At least a quarter of it, mirrored by a chance of its own where there are flips."""
    config = InversionConfig(weights={"cr": 1.0}, views=tuple(views), batch_size=3)
    inverter = Inverter(tiny_model(), config, CPU)
    ((_, term),) = inverter.losses
    parts, flips = [], set()
    monkeypatch.setattr(LossInputs, "part", lambda self, *args: parts.append(args) or self.seen)
    term.begin(None, torch.Generator(), 3)
    for draw in inverter.spans[0].views.draws(50, 3, torch.Generator().manual_seed(0)):
        canvas = random_canvas(GRID, 16, torch.float32)
        seen = inverter.spans[0].views.look(canvas, draw, torch.float32)
        term(LossInputs(inverter.vit(*seen), None, canvas, seen, GRID, draw.numbers))
        flips.add((seen.mirrored, bool(parts[-1][2])))
    assert len(flips) == (4 if "flip" in views else 1)
    shares = torch.stack([part[0] for part in parts]).square()
    assert 0.25 <= shares.min() < 0.3
    assert 0.95 < shares.max() <= 1


# MimiQ


def ssim(a: list[float], b: list[float]) -> float:
    """The global one, of two images in [0, 1]."""
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    var_a, var_b = sum((x - mean_a) ** 2 for x in a) / n, sum((x - mean_b) ** 2 for x in b) / n
    cov = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / n
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def test_heads_that_look_unlike():
    """Row by row, pair by pair; and of those that count alone."""
    q, k = normal(2, 3, 6, 4), normal(2, 3, 6, 4, seed=1)
    there = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    for kept in (None, there):
        found = []
        for b in range(2):
            places = list(range(6)) if kept is None else kept[b].nonzero()[:, 0].tolist()
            for query in places:
                rows = [[float(q[b, h, query] @ k[b, h, key]) for key in places] for h in range(3)]
                rows = [[(x - min(row)) / (max(row) - min(row)) for x in row] for row in rows]
                found += [sum(1 - ssim(rows[i], rows[j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))) / 3]
        for plain in (False, True):
            assert unlike(q, k, kept, plain).item() == pytest.approx(sum(found) / len(found))
    assert unlike(q[:, :1].expand(-1, 3, -1, -1), k[:, :1].expand(-1, 3, -1, -1)) == pytest.approx(0, abs=1e-9)


def test_head_similarity_gradient_by_finite_differences():
    fed = [normal(2, 2, 4, 3).requires_grad_(), normal(2, 2, 4, 3, seed=1).requires_grad_()]
    there = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    for plain, kept in itertools.product((False, True), (None, there)):
        assert torch.autograd.gradcheck(lambda q, k, p=plain, t=kept: unlike(q, k, t, p), fed)


def test_inter_head_similarity_is_of_timms_queries_and_keys():
    """Of patches alone, mean over all blocks; the scale of the scores does not matter."""
    model, seen = tiny_model(depth=3), []
    for block in model.vit.blocks:
        block.attn.qkv.register_forward_hook(lambda _, args, out: seen.append(out))
    inverter = Inverter(model, InversionConfig(weights={"ihs": 1.0}, batch_size=2), CPU)
    canvas = random_canvas(GRID, 16, torch.float32)
    model.vit(canvas.grid.unpatchify(canvas.pixels.detach(), canvas.positions))
    expected = []
    for out in seen[:3]:
        q, k, _ = out[:, 1:].unflatten(-1, (3, model.vit.blocks[0].attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        expected.append(unlike(q, k, plain=True).item())
    ((_, term),) = inverter.losses
    found = term(inputs_of(canvas, output=inverter.vit(canvas.pixels, canvas.positions, return_inside=True)))
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_a_model_with_one_head_has_none_to_compare():
    with pytest.raises(UserError, match="has two heads to compare"):
        Inverter(tiny_model(num_heads=1), InversionConfig(weights={"ihs": 1.0}), CPU)


def test_total_variation_with_diagonals_at_their_distance():
    canvas = random_canvas(GRID, 16)
    x = GRID.unpatchify(canvas.pixels.detach(), canvas.positions)
    straight = (x[..., 1:] - x[..., :-1]).norm() + (x[..., 1:, :] - x[..., :-1, :]).norm()
    diagonal = (x[..., 1:, 1:] - x[..., :-1, :-1]).norm() + (x[..., 1:, :-1] - x[..., :-1, 1:]).norm()
    found = ScaledTotalVariation(None)(inputs_of(canvas))
    torch.testing.assert_close(found, straight + diagonal / math.sqrt(2))
    plain = PatchCanvas(GRID, canvas.pixels.detach(), canvas.positions, plain=True)
    torch.testing.assert_close(ScaledTotalVariation(None)(inputs_of(plain)), found)
    (ours,), (theirs,) = (
        torch.autograd.grad(ScaledTotalVariation(None)(inputs_of(c)), [c.pixels]) for c in (canvas, plain)
    )
    torch.testing.assert_close(ours, theirs)


# SARDFQ


def test_maps_are_the_maximum_of_a_few_spots():
    maps = spots(40, 3, PatchGrid(9, 7, 4, 4), torch.Generator().manual_seed(0)).view(-1, 9, 7)
    assert maps.min() >= 0 and maps.max() <= 1
    inner = maps[:, 1:-1, 1:-1]
    around = torch.stack([maps[:, 1 + i : 8 + i, 1 + j : 6 + j] for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j])
    tops = (inner > around.amax(dim=0)).flatten(1).sum(dim=1)
    assert tops.max() in range(3, 6)  # of five, some lie under others or at the edge
    assert (tops <= 1).any()


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_prior(class_token):
    """Against timm's own attention of the later half of the blocks, image by image and head by head."""
    options = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model, seen = tiny_model(depth=4, **options), []
    for block in model.vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    inverter = Inverter(model, InversionConfig(weights={"ap": 1.0}, batch_size=3), CPU)
    ((_, term),) = inverter.losses
    term.begin(None, torch.Generator().manual_seed(1), 3)
    canvas = random_canvas(GRID, 16, torch.float32)
    model.vit(GRID.unpatchify(canvas.pixels.detach(), canvas.positions))
    found = term(inputs_of(canvas, output=inverter.vit(canvas.pixels, canvas.positions, return_inside=True)))
    expected, heads = [], model.vit.blocks[0].attn.num_heads
    for number, weights in enumerate(seen[2:4]):
        rows = weights[:, :, 0, 1:] if class_token else weights.mean(dim=2)
        for image in range(3):
            for head in range(heads):
                wanted = term.maps[number][image, head] / term.maps[number][image, head].sum()
                expected.append(((rows[image, head] - wanted) ** 2).sum().item())
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_maps_of_kept_patches_move_with_the_image():
    inverter = Inverter(tiny_model(depth=2), InversionConfig(weights={"ap": 1.0}, batch_size=3), CPU)
    ((_, term),) = inverter.losses
    term.begin(None, torch.Generator().manual_seed(1), 3)
    canvas = random_canvas(GRID, 7, torch.float32)
    rolled = inputs_of(canvas, Jitter(8, 0, False))
    output = inverter.vit(*rolled.seen, return_inside=True)
    found = term(inputs_of(canvas, Jitter(8, 0, False), output=output))
    rows = output.inside[1].weights(1)[:, :, 0, 1:]
    wanted = term.maps[0].gather(2, canvas.positions[:, None].expand(-1, rows.shape[1], -1))
    expected = (rows - wanted / wanted.sum(dim=2, keepdim=True)).square().sum(dim=2).mean()
    torch.testing.assert_close(found, expected)


def test_a_quarter_is_shown_enlarged_and_has_a_label_of_its_own(monkeypatch):
    model, fed = tiny_model(), []
    inverter = Inverter(model, InversionConfig(weights={"parts": 1.0}, batch_size=3), CPU)
    ((_, term),) = inverter.losses
    term.begin(None, torch.Generator().manual_seed(0), 3)
    canvas = random_canvas(GRID, 16, torch.float32)
    images = GRID.unpatchify(canvas.pixels.detach(), canvas.positions)
    targets, forward = torch.eye(5)[[0, 2, 4]], term.vit.forward
    monkeypatch.setattr(term.vit, "forward", lambda *seen: fed.append(seen) or forward(*seen))
    numbers = torch.rand(3, 1, generator=torch.Generator().manual_seed(2))
    found = term(inputs_of(canvas, targets=targets, numbers=numbers))
    expected = []
    for i, u in enumerate(numbers[:, 0].tolist()):
        quarter = int(term.order[i, int(u * int(term.counts[i]))])
        row, col = divmod(quarter, 2)
        part = images[i : i + 1, :, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
        # What lies outside is read at the quarter's edge, where torch's stretch has nothing but the edge.
        whole = torch.nn.functional.interpolate(part, size=(32, 32), mode="bilinear")
        shown = GRID.unpatchify(fed[0][0], fed[0][1])[i]
        torch.testing.assert_close(shown[:, 2:-2, 2:-2], whole[0, :, 2:-2, 2:-2], rtol=1e-4, atol=1e-4)
        logits = model.vit(shown[None])
        expected.append(-logits.log_softmax(1)[0, int(targets[term.labels[i, quarter]].argmax())].item())
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_at_least_one_quarter_counts_and_at_most_four():
    inverter = Inverter(tiny_model(), InversionConfig(weights={"parts": 1.0}, batch_size=3), CPU)
    ((_, term),) = inverter.losses
    term.begin(None, torch.Generator().manual_seed(0), 200)
    assert term.counts.unique().tolist() == [1, 2, 3, 4]
    assert all(sorted(row) == [0, 1, 2, 3] for row in term.order.tolist())


# SynQ


def test_high_frequencies_are_what_a_gaussian_takes_away():
    """Against the discrete Fourier transform written out."""
    grid = PatchGrid(2, 2, 3, 3, channels=1)
    canvas = random_canvas(grid, 4)
    term = HighFrequencies.__new__(HighFrequencies)
    term.cutoff = 0.4
    image = grid.unpatchify(canvas.pixels.detach(), canvas.positions)[0, 0]
    dft = torch.tensor(
        [[complex(math.cos(a), -math.sin(a)) for a in (math.tau * i * j / 6 for j in range(6))] for i in range(6)]
    )
    dft = dft.to(torch.complex128)
    shares = torch.tensor([min(k, 6 - k) / 3 for k in range(6)], dtype=torch.float64)
    passed = torch.exp(-(shares[:, None] ** 2 + shares**2) / (2 * 0.4**2))
    spectrum = dft @ image.to(torch.complex128) @ dft * (1 - passed)
    removed = (dft.conj() @ spectrum @ dft.conj() / 36).real
    one = PatchCanvas(grid, canvas.pixels.detach()[:1], canvas.positions[:1])
    torch.testing.assert_close(term(inputs_of(one)), removed.norm())
    term(inputs_of(canvas)).backward()
    direction, step = normal(*canvas.pixels.shape, seed=1), 1e-6
    ends = [
        term(inputs_of(PatchCanvas(grid, canvas.pixels.detach() + s * step * direction, canvas.positions))).item()
        for s in (1, -1)
    ]
    assert (canvas.pixels.grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_labels_are_soft_where_the_model_is_unsure():
    logits, targets = torch.tensor([[4.0, 0, 0], [0, 1, 0]], dtype=torch.float64), torch.eye(3)[[0, 0]].double()
    term = SoftWhereUnsure.__new__(SoftWhereUnsure)
    term.sure = 0.5
    p = logits.softmax(1)
    half = [(targets[1][k] + p[1][k]) / 2 for k in range(3)]
    expected = (-p[0][0].log() - sum(h * x.log() for h, x in zip(half, p[1], strict=True))) / 2
    output = ViTOutput(logits.requires_grad_(), None)
    found = term(LossInputs(output, targets, None, None, None))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient[1], (p[1] - torch.stack(half)) / 2)


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
        weights = {"oh": 1.0, "cr": weight}
        config = InversionConfig(iterations=30, batch_size=8, targets=("class:1",), weights=weights, flip=False)
        inverter = Inverter(model, config, CPU)
        images = inverter.invert(0).images
        features = unit(inverter.vit(images.patches, images.positions).features)
        alike[weight] = (features @ features.t()).triu(1).sum().item() / 28
    assert alike[5.0] < alike[0.0] - 0.2


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


# A second pair of eyes


def test_moments_are_of_the_places_that_there_are():
    x, present = normal(2, 3, 4), torch.tensor([[True, False, True], [True, True, False]])
    for given, rows in ((None, x.flatten(0, 1)), (present, x[present])):
        mean, variance = moments(x, given)
        torch.testing.assert_close(mean, rows.mean(0))
        torch.testing.assert_close(variance, rows.var(0, correction=0) + 1e-6)


def test_moments_of_parts_are_those_of_all():
    x = normal(6, 3, 4)
    ((mean, variance),) = pooled([[moments(x[:2])], [moments(x[2:])]], [2, 4])
    torch.testing.assert_close(mean, x.mean((0, 1)))
    torch.testing.assert_close(variance, x.var((0, 1), correction=0) + 1e-6)


def looks_natural(model: LoadedModel, student: LoadedModel, images: torch.Tensor) -> float:
    config = InversionConfig(weights={"natural": 1.0}, batch_size=2, student="a student")
    ((_, term),) = Inverter(model, config, CPU, student).losses
    term.begin(None, torch.Generator(), len(images))
    seen = Seen(model.grid.patchify(images), model.grid.all_positions(len(images), CPU))
    return term(LossInputs(None, None, None, seen, model.grid)).item()


def test_what_looks_natural_is_like_scenes_in_all_blocks_of_the_student():
    """Queries, keys and what attention puts out, of patches alone, by hooks on timm's modules."""
    model, student, found = tiny_model(), tiny_model(depth=3), {}
    lively(student.vit)
    grid, images = model.grid, normal(2, 3, 32, 32).float()
    drawn = scenes((64, 3, *grid.image_size), torch.Generator().manual_seed(0))
    for name, fed in (("drawn", drawn), ("fed", images)):
        seen = found[name] = []
        hooks = []
        for block in student.vit.blocks:
            hooks += [
                block.attn.qkv.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.chunk(3, 2)[:2])),
                block.attn.proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args)),
            ]
        student.vit(fed)
        for hook in hooks:
            hook.remove()
    expected = []
    for some, others in zip(found["fed"], found["drawn"], strict=True):
        for x, usual in zip(some, others, strict=True):
            (a, u), (b, v) = ((y[:, 1:].mean((0, 1)), y[:, 1:].var((0, 1), correction=0) + 1e-6) for y in (x, usual))
            expected.append(((a - b).square() / v).mean() + (u / v).log().square().mean())
    assert looks_natural(model, student, images) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-3)
    assert looks_natural(model, student, drawn) < 1e-6


def test_noise_does_not_look_natural_to_a_backbone_and_images_made_with_it_do_more():
    model = load_model(DEFAULT_MODEL)
    student = load_student(model, StudentConfig())
    shape = (64, 3, *model.grid.image_size)
    noise, others = (INITS[name](shape, torch.Generator().manual_seed(1)) for name in ("white", "scenes"))
    assert looks_natural(model, student, noise) > 5 * looks_natural(model, student, others)
    made = []
    for weight in ("0", "3"):
        config = parse(
            "--prior", "deepinversion", "natural", "--natural", weight, "--iterations", "40", "--init", "pink"
        )
        images = Inverter(model, config, CPU, student).invert(0).images
        made.append(looks_natural(model, student, model.grid.unpatchify(images.patches, images.positions)))
    assert made[1] < 0.7 * made[0]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_a_backbone_of_any_family_can_look(name):
    model = family_model(name)
    drawn = scenes((64, 3, *model.grid.image_size), torch.Generator().manual_seed(0))
    assert looks_natural(model, model, drawn) < 1e-6 < looks_natural(model, model, torch.randn(drawn.shape))


# All of them


@pytest.mark.parametrize("kept", [16, 7])
@pytest.mark.parametrize(
    "name", ["oh", "tv1", "tv2", "l2", "l2_mean", "pse", "tvt", "ihs", "tvd", "ap", "parts", "hf", "natural"]
)
def test_gradients_to_the_pixels_by_finite_differences(name, kept, monkeypatch):
    """Of every term that lets all of its gradient through, by way of views and the model, in float64."""
    at_fixed_points(monkeypatch)
    views = ("roll", "flip", "colour")
    options = {"psaq_bandwidth": 0.5}  # as wide as these points are apart
    fixed = {"batch_size": 3, "dtype": "float64", "views": views, "student": "a lively one"}
    config = InversionConfig(weights={name: 1.0}, options=options, **fixed)
    (model, student), generator = (tiny_model(depth=depth) for depth in (2, 3)), torch.Generator().manual_seed(0)
    for each in (model, student):
        lively(each.vit)
    inverter = Inverter(model, config, CPU, student)
    inverter.begin(0, generator, 3)
    draw, targets = inverter.spans[0].views.draws(1, 3, generator)[0], torch.eye(5)[[0, 2, 4]]
    canvas = random_canvas(GRID, kept)
    direction, step = normal(*canvas.pixels.shape, seed=1), 1e-6

    def value(moved: float) -> torch.Tensor:
        pixels = canvas.pixels.detach() + moved * direction
        here = PatchCanvas(GRID, pixels, canvas.positions)
        loss = inverter._loss(here, targets, inverter.spans[0].views, draw)
        return loss, here

    loss, here = value(0)
    loss.backward()
    slope = (value(step)[0] - value(-step)[0]).item() / (2 * step)
    assert abs(slope) > 1e-9
    assert (here.pixels.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    "strategy", [[], ["--prune_it", "3", "6", "--prune_ratio", "0.3", "0.3"], ["--strategy", "pri"]]
)
@pytest.mark.parametrize(
    "prior", [[name] for name in PRIORS if name != "adversarial"] + [["psaq", "cmi", "deepinversion"]]
)
def test_every_prior_runs_with_every_strategy(model, prior, strategy):
    config = parse("--prior", *prior, *strategy, "--iterations", "12")
    batch = Inverter(model, config, CPU, model).invert(0)
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
    psaq = parse("--preset", "psaq_vit", "--lr_g", "0.25", "--prune_it", "50", "--prune_ratio", "0.3")
    assert (psaq.iterations, psaq.betas, psaq.lr_schedule, psaq.warmup) == (1000, (0.5, 0.9), "phases", 100)
    assert (psaq.strategy, psaq.lr, psaq.weights["pse"]) == ("smi", 0.25, 1.0)
    assert parse("--preset", "smi", "--strategy", "pri").strategy == "pri"
    assert parse("--preset", "smi", "--prune_it", "-1").strategy == "dense"
    assert parse("--preset", "cmi", "--oh", "2").weights["oh"] == 2
    assert parse("--preset", "datafree").weights["l2"] == 1e-5
    assert (parse("--preset", "synq").weights["oh"], parse("--preset", "synq").weights["soft"]) == (0, 1)
    assert parse("--preset", "synq", "--prior", "psaq").weights["oh"] == 1
    assert parse("--preset", "cmi", "--prior", "cmi", "deepinversion").weights["oh"] == 0.5
    assert parse("--preset", "deepinversion").weights["l2_mean"] == 1e-5
    assert parse("--preset", "mimiq", "--views", "roll", "flip").phases == ("1:roll.share=0.036", "1:roll.share=0.0715")


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
