"""Which patches stop: strategies, what ranks the patches, targets, projections, snapshots, callbacks."""

import pytest
import torch
import torch.nn.functional as F

from inversion import STRATEGIES, ImagePool, InversionConfig, Inverter, synthesize
from inversion.canvas import PatchCanvas
from inversion.importance import IMPORTANCES
from inversion.projections import LowPass
from inversion.schedule import stages_of
from inversion.strategies import PatchRebirth, highest
from inversion.targets import draw_labels
from models import DEFAULT_MODEL, PatchGrid, SparseViT, load_model
from tests.conftest import tiny_model
from utils.errors import UserError

CPU = torch.device("cpu")
SCHEDULE = {"iterations": 12, "prune_it": (4, 8), "prune_ratio": (0.5, 0.5), "batch_size": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Patch Rebirth Inversion


@pytest.mark.parametrize(("division", "patches", "expected"), [(2, 196, (196, 98)), (4, 196, (196, 147, 98, 49))])
def test_pri_detaches_an_equal_share_at_equal_intervals(division, patches, expected):
    stages = PatchRebirth(division).stages(4000, PatchGrid(2, patches // 2, 4, 4))
    assert tuple(stage.patches for stage in stages) == expected
    assert [stage.start for stage in stages] == [k * (4000 // division) for k in range(division)]
    assert stages[-1].stop == 4000


@pytest.mark.parametrize("division", [2, 3, 4, 7])
def test_pri_images_of_a_trajectory_share_no_patch(model, division):
    """16 patches: where the division leaves a rest, the rest is dropped."""
    config = InversionConfig(iterations=14, strategy="pri", pri_division=division, batch_size=2 * division)
    inverter = Inverter(model, config, CPU)
    assert inverter.trajectories == 2
    images = inverter.invert(0).images
    assert images.positions.shape == (2 * division, 16 // division)
    for trajectory in range(2):
        mine = slice(trajectory * division, (trajectory + 1) * division)
        assert len(set(images.positions[mine].flatten().tolist())) == division * (16 // division)
        assert images.labels[mine].unique().numel() == 1


def test_pri_detaches_the_patches_with_the_most_attention_as_they_are(model):
    config = InversionConfig(iterations=12, strategy="pri", pri_division=4, batch_size=8)
    inverter, seen = Inverter(model, config, CPU), []
    images = inverter.invert(0, on_stage=lambda s: seen.append((s.canvas, s.canvas.pixels.detach().clone()))).images
    first = seen[0][0]  # the canvas of the first stage holds its last pixels still
    with torch.no_grad():
        attention = inverter.vit.class_attention(first.pixels, first.positions)
    top = attention.topk(4, dim=1).indices.sort(dim=1).values
    assert torch.equal(images.positions[::4], top)
    assert torch.equal(images.patches[::4], first.pixels.detach()[torch.arange(2)[:, None], top])


def test_pri_makes_as_many_images_as_were_asked_for(model):
    """5 images at 4 a trajectory are 2 trajectories, of which 3 images are not kept."""
    config = InversionConfig(iterations=8, strategy="pri", pri_division=4, batch_size=5)
    inverter = Inverter(model, config, CPU)
    assert (inverter.trajectories, len(inverter.invert(0).images)) == (2, 5)


def test_pri_work_per_image_falls():
    dense, pri = (
        Inverter(tiny_model(), InversionConfig(iterations=40, batch_size=8, **kind), CPU).total_flops()
        for kind in ({}, {"strategy": "pri", "pri_division": 4})
    )
    assert pri < 0.3 * dense


def test_pri_needs_patches_and_iterations_to_divide(model):
    for config in ({"iterations": 3}, {"iterations": 40, "pri_division": 17}):
        with pytest.raises(UserError, match="--pri_division"):
            Inverter(model, InversionConfig(strategy="pri", **config), CPU)


# Controls


def test_controls_stop_what_they_say(model):
    first = {}
    for name in ("smi", "lowest", "highest", "random"):
        inverter, seen = Inverter(model, InversionConfig(strategy=name, **SCHEDULE), CPU), []
        images = inverter.invert(0, on_stage=lambda s, seen=seen: seen.append(s.canvas)).images
        assert images.positions.shape == (3, 4)
        with torch.no_grad():
            first[name] = inverter.vit.class_attention(seen[0].pixels, seen[0].positions), seen[1].positions
    attention, kept = first["smi"]
    assert torch.equal(kept, highest(attention, 8))
    assert torch.equal(first["lowest"][1], kept)
    assert torch.equal(first["highest"][1], highest(-attention, 8))
    assert len({str(positions.tolist()) for _, positions in first.values()}) == 3


def test_random_stops_are_those_of_the_seed(model):
    runs = [
        Inverter(model, InversionConfig(strategy="random", seed=seed, **SCHEDULE), CPU).invert(0).images.positions
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_strategy_from_outside_is_a_row(model, monkeypatch):
    class FirstRows:
        """The upper half of the image goes on after half of the iterations."""

        detaches = False

        def stages(self, iterations, grid):
            return stages_of(iterations, grid.count, [iterations // 2], [0.5])

        def keep(self, importance, count, generator):
            return torch.arange(count).expand(len(importance), -1)

    monkeypatch.setitem(STRATEGIES, "toy", lambda config: FirstRows())
    images = Inverter(model, InversionConfig(iterations=6, strategy="toy", batch_size=2), CPU).invert(0).images
    assert images.positions.tolist() == [list(range(8))] * 2


# What ranks the patches


def attention_maps(vit, images: torch.Tensor) -> list[torch.Tensor]:
    """Softmax of every block of a timm model (B, heads, T, T)."""
    maps = []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(out.detach()))
    vit(images)
    return maps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in IMPORTANCES if name != "pool"])
def test_importance_against_plain_formulas(name, dtype):
    model = tiny_model(depth=3)
    inverter = Inverter(model, InversionConfig(dtype=dtype), CPU)
    grid = inverter.vit.grid
    images = torch.randn(2, 3, 32, 32, generator=generator())
    canvas = PatchCanvas(grid, grid.patchify(images), grid.all_positions(2).contiguous())
    targets = F.one_hot(torch.tensor([1, 4]), 5).float()
    found = IMPORTANCES[name](inverter.vit, canvas, targets).float()
    maps = attention_maps(model.vit, images)
    if name == "cls":
        expected = maps[-1].mean(dim=1)[:, 0, 1:]
    elif name == "all":
        expected = torch.stack([maps[-1][:, :, t, 1:].mean(dim=1) for t in range(17)]).mean(dim=0)
    elif name == "rollout":
        rolled = torch.eye(17)
        for weights in maps:
            rolled = (0.5 * weights.mean(dim=1) + 0.5 * torch.eye(17)) @ rolled
        expected = rolled[:, 0, 1:]
    else:
        leaf = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model.vit(leaf), targets), leaf)
        corners = [(row, col) for row in range(0, 32, 8) for col in range(0, 32, 8)]
        norms = [grad[:, :, row : row + 8, col : col + 8].flatten(1).norm(dim=1) for row, col in corners]
        expected = torch.stack(norms, dim=1)
    if dtype == "float32":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    else:
        assert F.cosine_similarity(found, expected, dim=1).min() > 0.98


def test_a_model_without_class_token_is_inverted_by_other_rankings():
    model = tiny_model(class_token=False, global_pool="avg")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(SparseViT(model.vit).forward_images(images), model.vit(images), rtol=1e-4, atol=1e-5)
    for importance in ("auto", "all", "gradient"):
        batch = Inverter(model, InversionConfig(importance=importance, **SCHEDULE), CPU).invert(0)
        assert batch.images.positions.shape == (3, 4)
    assert Inverter(model, InversionConfig(iterations=3, snapshots=(3,)), CPU).invert(0).snapshots[0].attention is None
    for importance in ("cls", "rollout"):
        with pytest.raises(UserError, match=f"no class token.*--importance {importance}.*--importance all or gradient"):
            Inverter(model, InversionConfig(importance=importance, **SCHEDULE), CPU)
    with pytest.raises(UserError, match=r"no pool with a latent token.*--importance pool.*--importance all"):
        Inverter(model, InversionConfig(importance="pool", **SCHEDULE), CPU)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_pool_of_attention_ranks_by_its_latent_token(registers):
    """Against the weights by which timm's pool puts values together, read off by values that are one token each."""
    model = tiny_model(class_token=False, global_pool="map", reg_tokens=registers)
    inverter = Inverter(model, InversionConfig(**SCHEDULE), CPU)
    assert inverter.config.importance == "pool" and inverter.invert(0).images.positions.shape == (3, 4)
    grid, vit, pool = inverter.vit.grid, model.vit, model.vit.attn_pool
    images = torch.randn(2, 3, 32, 32, generator=generator())
    canvas = PatchCanvas(grid, grid.patchify(images), grid.all_positions(2).contiguous())
    found = IMPORTANCES["pool"](SparseViT(vit), canvas, torch.zeros(2, 5))
    tokens = vit.forward_features(images)
    tokens = tokens if vit.pool_include_prefix else tokens[:, registers:]
    q = pool.q(pool.latent).view(1, 1, pool.num_heads, -1).transpose(1, 2)
    k = pool.kv(tokens).view(2, tokens.shape[1], 2, pool.num_heads, -1)[:, :, 0].transpose(1, 2)
    one_hot = torch.eye(tokens.shape[1]).expand(2, pool.num_heads, -1, -1)
    weights = F.scaled_dot_product_attention(q.expand(2, -1, -1, -1), k, one_hot)[:, :, 0].mean(dim=1)
    torch.testing.assert_close(found, weights[:, -grid.count :])


# Targets


def test_targets():
    assert draw_labels(("balanced",), 25, 10, generator()).bincount().tolist().count(2) == 5
    assert draw_labels(("balanced",), 25, 10, generator()).bincount(minlength=10).min() == 2
    assert draw_labels(("class:7",), 3, 10, generator()).tolist() == [7, 7, 7]
    assert draw_labels(("4", "1", "1"), 5, 10, generator()).tolist() == [1, 1, 1, 4, 4]
    uniform = draw_labels(("uniform",), 5000, 10, generator())
    assert torch.equal(uniform, uniform.sort().values)
    assert uniform.bincount().min() > 400
    with pytest.raises(UserError, match="no class 10, the model has 0 to 9"):
        draw_labels(("3", "10"), 4, 10, generator())


def test_soft_labels_leave_images_less_sure():
    model, confidence = load_model(DEFAULT_MODEL), {}
    for softness in (0.0, 0.5):
        inverter = Inverter(model, InversionConfig(iterations=30, batch_size=4, soft_label=softness), CPU)
        images = inverter.invert(0).images
        logits = inverter.vit(images.patches, images.positions).logits
        confidence[softness] = logits.softmax(dim=1).gather(1, images.labels[:, None]).mean().item()
    assert confidence[0.5] < confidence[0.0] - 0.1


# Projections


def test_low_pass_drops_what_oscillates_fast_and_keeps_the_rest():
    grid = PatchGrid(2, 2, 8, 8)
    row = torch.arange(16) / 16 * 2 * torch.pi
    slow, fast = torch.cos(2 * row).expand(1, 3, 16, 16), torch.cos(7 * row).expand(1, 3, 16, 16)
    canvas = PatchCanvas(grid, grid.patchify(slow + fast), grid.all_positions(1).contiguous())
    with torch.no_grad():
        LowPass(cutoff=0.5)(canvas)
    torch.testing.assert_close(
        grid.unpatchify(canvas.pixels.detach(), canvas.positions), slow.clone(), atol=1e-5, rtol=0
    )
    kept = PatchCanvas(grid, grid.patchify(slow + fast)[:, [0, 3]], torch.tensor([[0, 3]]))
    whole = torch.fft.fft2(grid.unpatchify(kept.pixels.detach(), kept.positions))
    frequency = torch.fft.fftfreq(16).abs()
    whole[..., (frequency > 0.25)[:, None] | (frequency > 0.25)] = 0
    with torch.no_grad():
        LowPass(cutoff=0.5)(kept)
    expected = grid.patchify(torch.fft.ifft2(whole).real)[:, [0, 3]]
    torch.testing.assert_close(kept.pixels.detach(), expected, atol=1e-5, rtol=0)


def test_projections_act_at_their_iterations_and_pixels_stay_valid(model):
    calls, plain = [], LowPass.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowPass, "__call__", lambda self, canvas: (calls.append(1), plain(self, canvas))[1])
        config = InversionConfig(iterations=10, batch_size=2, projections=("clamp", "lowpass:cutoff=0.5,every=3"))
        images = Inverter(model, config, CPU).invert(0).images
    assert len(calls) == 3
    pixels = model.preprocessing.denormalize(images.patches)
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


# Callbacks and snapshots


def test_a_stage_callback_may_change_the_pixels(model):
    seen = []

    def blacken(start):
        seen.append(start.stage.patches)
        if start.number == 2:
            start.canvas.pixels.detach().fill_(0)

    config = InversionConfig(**{**SCHEDULE, "lr": 1e-6})
    images = Inverter(model, config, CPU).invert(0, on_stage=blacken).images
    assert seen == [16, 8, 4]
    assert images.patches.abs().max() < 1e-3


def test_snapshots_are_the_batch_as_it_was(model, tmp_path):
    config = InversionConfig(snapshots=(0, 4, 6, 12), **SCHEDULE)
    plain = Inverter(model, InversionConfig(**SCHEDULE), CPU).invert(0)
    pool = ImagePool(tmp_path, model, config)
    synthesize(pool, 3, CPU, tmp_path / "log")
    snapshots = pool.snapshots(0)
    assert [s.iteration for s in snapshots] == [0, 4, 6, 12]
    assert [s.positions.shape[1] for s in snapshots] == [16, 8, 8, 4]
    assert torch.equal(snapshots[-1].pixels, plain.images.patches)
    assert all(s.attention.shape == s.positions.shape for s in snapshots)
    with pytest.raises(UserError, match="--snapshots"):
        pool.snapshots(1)


def test_tensorboard_gets_every_iteration(model, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pool = ImagePool(tmp_path / "pool", model, InversionConfig(**SCHEDULE))
    synthesize(pool, 6, CPU, tmp_path / "log", tensorboard=tmp_path / "events")
    for batch in range(2):
        events = accumulator.EventAccumulator(str(tmp_path / "events" / f"batch-{batch:06d}")).Reload()
        losses = [event.value for event in events.Scalars("inversion/loss")]
        assert losses == pytest.approx(pool.losses(6)[batch].tolist(), rel=1e-5)
        assert [event.value for event in events.Scalars("inversion/patches")] == [16, 16, 8, 8, 4, 4]
