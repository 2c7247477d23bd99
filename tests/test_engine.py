"""The inversion engine: that it inverts, and that it does not have the defects of earlier code."""

import copy
import itertools

import pytest
import torch

import inversion.canvas
from inversion import InversionConfig, Inverter
from inversion.canvas import Jitter, draw_jitters
from inversion.engine import batch_generator
from inversion.priors.adversarial import disagreement
from models import DEFAULT_MODEL, SparseViT, load_model
from tests.conftest import tiny_model
from tests.test_canvas import jittered_positions, plain_tv
from utils.errors import UserError

CPU = torch.device("cpu")
SPARSE = {"iterations": 30, "prune_it": (5, 12), "prune_ratio": (0.25, 0.5), "batch_size": 4}


def spied_inverter(model, **config) -> tuple[Inverter, list]:
    """An inverter that keeps a copy of the canvas before and after each step: (kept positions, pixels, pixels)."""
    inverter = Inverter(model, InversionConfig(**config), CPU)
    seen, step = [], inverter._step

    def spy(canvas, *args, **how):
        before = canvas.pixels.detach().clone()
        loss = step(canvas, *args, **how)
        seen.append((canvas.positions.clone(), before, canvas.pixels.detach().clone()))
        return loss

    inverter._step = spy
    return inverter, seen


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("dtype", "count"), [("float32", 16), ("bfloat16", 2)])  # slow where the CPU has none
def test_inverted_digits_are_classified_as_their_labels(dtype, count, sparse, monkeypatch):
    """Without jitter: the digits model was not trained on mirrored digits, so a flip asks for what it cannot give."""
    monkeypatch.setattr(inversion.canvas, "draw_jitters", lambda count, *_: [Jitter(0, 0, False)] * count)
    model = load_model(DEFAULT_MODEL)
    schedule = {"prune_it": (10, 20, 30), "prune_ratio": (0.3, 0.3, 0.3)} if sparse else {}
    batch = Inverter(model, InversionConfig(iterations=100, batch_size=count, dtype=dtype, **schedule), CPU).invert(0)
    assert batch.images.patches.dtype == torch.float32
    assert batch.images.positions.shape[1] == (21 if sparse else 64)
    with torch.no_grad():
        logits = SparseViT(model.vit)(batch.images.patches, batch.images.positions).logits
    assert (logits.argmax(dim=1) == batch.images.labels).float().mean() >= 0.9
    assert batch.losses[-10:].mean() < 0.5 * batch.losses[:10].mean()


def test_labels_are_sorted_and_pixels_valid(model):
    batch = Inverter(model, InversionConfig(**SPARSE), CPU).invert(3)
    assert torch.equal(batch.images.labels, batch.images.labels.sort().values)
    pixels = model.preprocessing.denormalize(batch.images.patches)
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_patches_left_follow_the_schedule_and_stay_a_subset(model):
    inverter, seen = spied_inverter(model, **SPARSE)
    batch = inverter.invert(0)
    assert [len(positions[0]) for positions, _, _ in seen] == [16] * 5 + [12] * 7 + [6] * 18
    for (before, _, _), (after, _, _) in itertools.pairwise(seen):
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(after, before, strict=True))
    assert batch.images.positions.shape == (4, 6)


def test_weights_never_get_gradients(model):
    """Defect: weights kept requires_grad, and every step accumulated gradients nobody used."""
    model.vit.requires_grad_(True)
    inverter = Inverter(model, InversionConfig(**SPARSE), CPU)
    inverter.invert(0)
    assert not any(p.requires_grad or p.grad is not None for p in inverter.vit.parameters())
    assert all(p.grad is None for p in model.vit.parameters())


def test_work_falls_with_the_patches(model):
    """Defect: patch embedding, TV, Adam and clamp ran over stopped patches. Every module sees kept patches alone."""
    inverter, _ = spied_inverter(model, **SPARSE)
    rows = []
    inverter.vit.patch_proj.register_forward_hook(lambda m, inputs, out: rows.append(inputs[0].shape[1]))
    inverter.vit.blocks[0].register_forward_hook(lambda m, inputs, out: rows.append(inputs[0].shape[1] - 1))
    optimizers, adam = [], inverter.adam
    inverter.adam = lambda canvas: optimizers.append(adam(canvas)) or optimizers[-1]
    inverter.invert(0)
    assert set(rows) == {16, 12, 6}
    final = optimizers[-1].param_groups[0]["params"][0]
    assert final.shape == (4, 6, 3, 8, 8)
    assert optimizers[-1].state[final]["exp_avg"].shape == final.shape
    flops = inverter.step_flops()
    assert flops[0] > flops[1] > flops[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_little_is_kept_for_the_backward_pass(dtype):
    """Defect: every block kept its attention matrices in float32, and what only weight gradients need."""
    model = load_model(DEFAULT_MODEL)
    inverter = Inverter(model, InversionConfig(batch_size=2, dtype=dtype), CPU)

    def bytes_kept_by(model, forward, images: torch.Tensor) -> int:
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor gets its address
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            assert forward(images.requires_grad_()).requires_grad
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    vit = copy.deepcopy(model.vit).requires_grad_(True)
    for block in vit.blocks:
        block.attn.fused_attn = False
    plain = bytes_kept_by(vit, vit, torch.randn(2, 3, 32, 32))
    ours = bytes_kept_by(inverter.vit, inverter.vit.forward_images, torch.randn(2, 3, 32, 32, dtype=inverter.dtype))
    assert ours < (0.6 if dtype == "float32" else 0.3) * plain


def test_optimizer_state_goes_on_with_the_kept_patches(model):
    inverter, _ = spied_inverter(model, **SPARSE)
    stops, stop = [], inverter._reduced

    def spy(canvas, optimizer, kept):
        state = copy.deepcopy(optimizer.state[canvas.pixels])
        smaller, reduced = stop(canvas, optimizer, kept)
        kept_state = copy.deepcopy(reduced.state[smaller.pixels])
        stops.append(
            (canvas.positions, canvas.pixels.clone(), state, smaller.positions, smaller.pixels.clone(), kept_state)
        )
        return smaller, reduced

    inverter._reduced = spy
    inverter.invert(0)
    assert len(stops) == 2
    for before, pixels, state, after, kept_pixels, kept_state in stops:
        for image in range(4):
            where = [before[image].tolist().index(position) for position in after[image].tolist()]
            assert torch.equal(kept_pixels[image], pixels[image, where])
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(kept_state[key][image], state[key][image, where])


def test_result_is_the_last_iterate_and_survives_the_next_batch(model):
    """Defect: the "best image" was an alias of the tensor being optimized."""
    inverter, seen = spied_inverter(model, **SPARSE)
    first = inverter.invert(0)
    kept = first.images.patches.clone()
    assert torch.equal(kept, seen[-1][2])
    inverter.invert(1)
    assert torch.equal(first.images.patches, kept)


def test_stored_positions_are_the_patches_that_survived(model):
    """Defect: the mask was recomputed at the end from a fresh dense pass with a token count that included CLS."""
    inverter, seen = spied_inverter(model, **SPARSE)
    images = inverter.invert(0).images
    assert torch.equal(images.positions, seen[-1][0])
    assert images.positions.min() >= 0
    assert images.positions.max() < 16


def test_the_patches_with_the_most_cls_attention_go_on(model):
    inverter, seen = spied_inverter(model, **SPARSE)
    inverter.invert(0)
    positions, _, pixels = seen[4]
    with torch.no_grad():
        attention = inverter.vit.class_attention(pixels, positions)
    top = attention.topk(12, dim=1).indices.sort(dim=1).values
    assert torch.equal(seen[5][0], positions.gather(1, top))


def test_sparse_step_is_plain_inversion_of_the_zero_filled_image(model):
    """One step of the engine against roll, flip, gather and autograd on full images in plain code."""
    weights = {"oh": 1.0, "tv1": 0.3, "tv2": 0.01, "l2": 0.01}
    inverter, seen = spied_inverter(model, **{**SPARSE, "weights": weights})
    batch = inverter.invert(0)
    # The same random numbers, drawn in the engine's order: labels, noise, jitter.
    generator = batch_generator(0, 0)
    labels = torch.randint(5, (4,), generator=generator).sort().values
    torch.randn(4, 3, 32, 32, generator=generator)
    jitters = draw_jitters(30, inverter.vit.grid, generator)
    rows = torch.arange(4)[:, None]
    for iteration in (0, 7, 20):
        positions, before, _ = seen[iteration]
        jitter = jitters[iteration]
        leaf = before.requires_grad_()
        canvas = type("Canvas", (), {"grid": inverter.vit.grid, "positions": positions})
        image = inverter.vit.grid.unpatchify(leaf, positions).roll((jitter.dy, jitter.dx), dims=(-2, -1))
        image = image.flip(-1) if jitter.flip else image
        target = jittered_positions(positions, inverter.vit.grid, jitter)
        logits = SparseViT(model.vit)(inverter.vit.grid.patchify(image)[rows, target], target).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss = loss + 0.3 * plain_tv(leaf, canvas, 1) + 0.01 * plain_tv(leaf, canvas, 2) + 0.01 * leaf.norm()
        torch.testing.assert_close(batch.losses[iteration], loss.detach(), rtol=1e-4, atol=1e-5)


def test_same_seed_same_images_and_batches_differ(model):
    config = InversionConfig(**SPARSE)
    first, again = (Inverter(model, config, CPU).invert(2) for _ in range(2))
    assert torch.equal(first.images.patches, again.images.patches)
    assert torch.equal(first.losses, again.losses)
    other = Inverter(model, config, CPU).invert(1)
    assert not torch.equal(first.images.patches, other.images.patches)


def test_nan_loss_is_one_clear_error():
    model = tiny_model()
    with torch.no_grad():
        model.vit.head.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"iteration 0.*lr_g"):
        Inverter(model, InversionConfig(**SPARSE), CPU).invert(0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weights": {"oh": 1.0, "no": 1.0}}, "term no is unknown; there are oh"),
        ({"strategy": "no"}, "--strategy no is unknown; there are dense, smi"),
        ({"strategy": "random"}, "needs a schedule"),
        ({"strategy": "pri", "prune_it": (5,), "prune_ratio": (0.5,)}, "has no schedule"),
        ({"importance": "no"}, "there are auto, cls, rollout"),
        ({"targets": ("cats",)}, "--targets cats"),
        ({"soft_label": 1.0}, "--soft_label"),
        ({"projections": ("lowpass:cutoff=2",)}, "cutoff 2.0"),
        ({"projections": ("lowpass:cut=1",)}, "cutoff=0.8,every=100"),
        ({"projections": ("blur",)}, "there are clamp, lowpass"),
        ({"lr_schedule": "no"}, "there are constant, cosine"),
        ({"iterations": 10, "warmup": 10}, "--warmup"),
        ({"iterations": 10, "snapshots": (11,)}, "--snapshots 11"),
        ({"betas": (0.5, 1.0)}, "--betas"),
        ({"weights": {"oh": 1.0, "adv": 1.0}}, "--adv"),
        ({"weights": {"oh": 0.0}}, "weight is 0"),
        ({"weights": {"oh": -1.0}}, "--oh"),
        ({"weights": {"oh": float("nan")}}, "--oh"),
        ({"lr": 0.0}, "--lr_g"),
        ({"iterations": 0}, "--iterations"),
        ({"iterations": 10, "prune_it": (10,), "prune_ratio": (0.3,)}, "past the last"),
    ],
)
def test_impossible_configurations_are_refused(change, why):
    with pytest.raises(UserError, match=why):
        InversionConfig(**change)


def test_adversarial_images_are_those_that_the_student_gets_wrong(monkeypatch):
    """The student is the teacher with a disturbed head."""
    monkeypatch.setattr(inversion.canvas, "draw_jitters", lambda count, *_: [Jitter(0, 0, False)] * count)
    teacher, student = load_model(DEFAULT_MODEL), load_model(DEFAULT_MODEL)
    with torch.no_grad():
        weight = student.vit.head.weight
        weight += weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for adv, described in ((0.0, None), (10.0, "disturbed")):
        config = InversionConfig(iterations=30, weights={"oh": 1.0, "adv": adv}, batch_size=8, student=described)
        images = Inverter(teacher, config, CPU, student).invert(0).images
        logits = (SparseViT(model.vit)(images.patches, images.positions).logits for model in (teacher, student))
        found[adv] = 1 - disagreement(*logits, 3.0).item()
    assert found[10.0] > 2 * found[0.0]


def test_without_flip_the_rolls_are_the_same(model):
    grid = Inverter(model, InversionConfig(), CPU).vit.grid
    both = [draw_jitters(50, grid, torch.Generator().manual_seed(3), flip) for flip in (True, False)]
    assert [draw[:2] for draw in both[0]] == [draw[:2] for draw in both[1]]
    assert any(draw.flip for draw in both[0])
    assert not any(draw.flip for draw in both[1])
