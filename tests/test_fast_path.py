"""The engine's fast path against plain float32 autograd on full images: same loss, same gradient to the pixels."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import models.attention
from inversion import InversionConfig, Inverter
from inversion.canvas import Jitter, PatchCanvas
from inversion.targets import distributions
from inversion.views import Draw
from models import DEFAULT_MODEL, LoadedModel, SparseViT, load_model, pack_blocks
from models.blocks import SparseBlock
from models.packed import PackedBlock
from tests.conftest import tiny_model
from tests.families import family_vit
from tests.test_canvas import jittered_positions, plain_tv

CPU = torch.device("cpu")
WEIGHTS = {"oh": 1.0, "tv1": 0.3, "tv2": 0.01, "l2": 0.01}
JITTERS = [Jitter(0, 0, False), Jitter(3, -2, True), Jitter(-4, 4, False)]
OPTIONS = [{}, {"init_values": 0.3}, {"qk_norm": True}, {"global_pool": "avg"}, {"reg_tokens": 2}, {"qkv_bias": False}]
PADDING = [1, 2, 16]


def plain_step(model: LoadedModel, pixels, positions, labels, jitter) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and pixel gradient of one iteration in plain code: timm's modules, full images, autograd, float32."""
    grid = Inverter(model, InversionConfig(), CPU).vit.grid
    leaf = pixels.detach().clone().requires_grad_()
    image = grid.unpatchify(leaf, positions).roll((jitter.dy, jitter.dx), dims=(-2, -1))
    image = image.flip(-1) if jitter.flip else image
    vit, target = model.vit, jittered_positions(positions, grid, jitter)
    tokens = vit._pos_embed(vit.patch_embed(image))
    rows, prefix = torch.arange(len(tokens))[:, None], vit.num_prefix_tokens
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:][rows, target]], dim=1)
    logits = vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(tokens))))
    canvas = type("Canvas", (), {"grid": grid, "positions": positions})
    loss = F.cross_entropy(logits, labels) + 0.3 * plain_tv(leaf, canvas, 1) + 0.01 * plain_tv(leaf, canvas, 2)
    loss = loss + 0.01 * leaf.norm()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def engine_step(inverter: Inverter, pixels, positions, labels, jitter) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the engine; the gradient is what it left for the optimizer."""
    canvas = PatchCanvas(inverter.vit.grid, pixels.clone(), positions)
    targets = distributions(labels, inverter.vit.num_classes, 0.0)
    canvas.limits = inverter.limits
    draw = Draw(jitter, torch.zeros(len(positions), 0))
    loss = inverter._step(canvas, inverter.adam(canvas), targets, (draw,))
    return loss, canvas.pixels.grad


def stages_of(model: LoadedModel, dtype: str):
    """An inverter with a schedule, and pixels, positions, labels and a jitter for each of its stages."""
    schedule = {"iterations": 40, "prune_it": (10, 20, 30), "prune_ratio": (0.3, 0.3, 0.3)}
    inverter = Inverter(model, InversionConfig(batch_size=3, weights=WEIGHTS, dtype=dtype, **schedule), CPU)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(inverter.vit.num_classes, (3,), generator=generator)
    grid = inverter.vit.grid
    for stage in inverter.stages:
        drawn = [torch.randperm(grid.count, generator=generator)[: stage.patches].sort().values for _ in range(3)]
        pixels = torch.randn(3, stage.patches, grid.channels, grid.height, grid.width, generator=generator)
        for jitter in JITTERS:
            yield inverter, (pixels, torch.stack(drawn), labels, jitter)


def assert_agree(model: LoadedModel, dtype: str) -> None:
    for inverter, step in stages_of(model, dtype):
        loss, grad = engine_step(inverter, *step)
        expected_loss, expected = plain_step(model, *step)
        if dtype == "float32":
            assert abs(loss - expected_loss) < 1e-4 * abs(expected_loss)
            assert (grad - expected).norm() < 1e-4 * expected.norm()
        else:
            assert abs(loss - expected_loss) < 2e-2 * abs(expected_loss)
            assert F.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("multiple", PADDING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_stage_agrees_with_plain_autograd(options, dtype, multiple, monkeypatch):
    monkeypatch.setattr(models.attention, "PADDED_MULTIPLE", multiple)
    assert_agree(tiny_model(**options), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_agrees_on_trained_weights(dtype):
    assert_agree(load_model(DEFAULT_MODEL), dtype)


PACKED = [
    "eva_large_patch14_196",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_448",
    "eva02_base_patch16_clip_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_srelpos_small_patch16_224",
]


@pytest.mark.parametrize("multiple", PADDING)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_blocks_of_other_families_are_their_plain_ones(name, dtype, multiple, monkeypatch):
    """Logits, what attention puts out, and gradients of both, on kept patches that differ from image to image."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies no bfloat16 on this CPU, so blocks stay plain")
    monkeypatch.setattr(models.attention, "PADDED_MULTIPLE", multiple)
    vit = SparseViT(family_vit(name).requires_grad_(False))
    packed, kind, generator = copy.deepcopy(vit), getattr(torch, dtype), torch.Generator().manual_seed(0)
    pack_blocks(packed, kind)
    packed = packed.to(kind)
    assert type(packed.blocks[0]) is PackedBlock
    grid = vit.grid
    patches = torch.randn(3, 7, grid.channels, grid.height, grid.width, generator=generator).requires_grad_()
    positions = torch.stack([torch.randperm(grid.count, generator=generator)[:7] for _ in range(3)])
    outcomes = []
    for model, fed in ((packed, patches.to(kind)), (vit.plainly(), patches)):
        out = model(fed, positions, return_inside=True)
        inside = out.inside[0]
        scale = 1.0 if model is packed else model.blocks[0].scale
        queries = scale * inside.queries.float()
        parts = [out.logits.float(), inside.attended.float(), queries, inside.keys.float(), inside.weights(2).float()]
        wanted = [part.square().sum() for part in parts]
        outcomes.append([*parts, *(torch.autograd.grad(value, patches, retain_graph=True)[0] for value in wanted)])
        weights = model.attention_weights(fed, positions)[0].float()
        outcomes[-1].append(weights)
    for found, expected in zip(*outcomes, strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == "float32" else 5e-2)


def test_plain_blocks_are_packed_and_others_are_not():
    """So that the tests above test what they say."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    kinds = {}
    for options in ({}, {"init_values": 0.3}, {"qk_norm": True}):
        blocks = Inverter(tiny_model(**options), InversionConfig(), CPU).vit.blocks
        kinds[str(options)] = [type(block) for block in blocks]
    assert list(kinds.values()) == [[PackedBlock, SparseBlock]] * 2 + [[SparseBlock, SparseBlock]]


@pytest.mark.parametrize("count", [5, 16])
def test_a_jitter_of_tensors_is_a_jitter_of_numbers(model, count):
    """What a CUDA graph records reads the jitter from the device; it must do the same."""
    inverter = Inverter(model, InversionConfig(batch_size=2, weights=WEIGHTS), CPU)
    generator = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.randperm(16, generator=generator)[:count].sort().values for _ in range(2)])
    pixels, labels = torch.randn(2, count, 3, 8, 8, generator=generator), torch.tensor([0, 3])
    for jitter in (Jitter(dy, dx, flip) for dy in (-4, -1, 0, 3) for dx in (-3, 0, 4) for flip in (False, True)):
        run = partial(engine_step, inverter, pixels, positions, labels)
        (loss, grad), (same_loss, same_grad) = run(jitter), run(Jitter(*torch.tensor(jitter)))
        assert torch.equal(loss, same_loss)
        torch.testing.assert_close(grad, same_grad, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
def test_a_recorded_inversion_is_the_one_that_was_not(model, monkeypatch):
    """The same pixels, stage by stage, whether every kernel is launched or a CUDA graph is replayed."""
    config = InversionConfig(iterations=40, prune_it=(10, 20), prune_ratio=(0.3, 0.3), batch_size=4)
    recorded = Inverter(model, config, torch.device("cuda")).invert(0)
    monkeypatch.setattr("inversion.capture.EAGER_STEPS", 10**9)
    eager = Inverter(model, config, torch.device("cuda")).invert(0)
    torch.testing.assert_close(recorded.losses, eager.losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(recorded.images.positions, eager.images.positions)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_number_formats_run_by_plain_code(dtype):
    losses = []
    for each in (dtype, "float32"):
        config = InversionConfig(iterations=3, batch_size=2, dtype=each)
        losses.append(Inverter(tiny_model(), config, torch.device("cpu")).invert(0).losses)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
