"""Phases: learning rates that start anew, views that change, resolutions, and an optimizer that is kept or not."""

import math

import pytest
import torch
import torch.nn.functional as F

from inversion import ImagePool, InversionConfig, Inverter, configured, synthesize
from inversion.canvas import PatchCanvas
from inversion.phases import Phase, spans
from inversion.priors import Loss, Prior, Term
from inversion.views import Views
from models import PatchGrid
from tests.conftest import tiny_model
from tests.test_canvas import random_canvas
from utils.errors import UserError

CPU = torch.device("cpu")
GRID = PatchGrid(4, 4, 8, 8)


def test_shares_are_cut_exactly():
    assert spans([Phase(2), Phase(1)], 3000) == [(0, 2000), (2000, 3000)]
    assert spans([Phase(1)] * 7, 10) == [(10 * k // 7, 10 * (k + 1) // 7) for k in range(7)]
    assert spans([Phase(0.1), Phase(0.2)], 3) == [(0, 1), (1, 3)]  # as decimals, not as floats
    assert spans([Phase(1)] * 3, 2) == [(0, 0), (0, 1), (1, 2)]


def test_shares_are_as_they_are_given():
    """Whatever number of digits they have."""
    config = InversionConfig(iterations=1234567, phases=("1234560", "7.0"))
    assert config.phases == ("1234560", "7")
    assert config.spans() == [(0, 1234560), (1234560, 1234567)]


def test_more_phases_than_iterations_leave_some_out():
    config = InversionConfig(iterations=2, lr=0.5, lr_schedule="phases", phases=("1:coarse=2", "1", "1"), batch_size=2)
    assert [config.lr_at(iteration) for iteration in range(2)] == [0.5] * 2
    assert len(Inverter(tiny_model(), config, CPU).invert(0).losses) == 2


@pytest.mark.parametrize("text", ["1", "2:coarse=2,fresh=1", "0.5:noise.deviation=0.0,roll.share=0.1"])
def test_a_phase_is_written_as_it_is_read(text):
    assert Phase.parse(text).text() == text


def test_what_means_the_same_is_the_same_configuration():
    one = InversionConfig(phases=("1.0:coarse=1", "2.0:roll.share=0.10"))
    assert one.settings() == InversionConfig(phases=("1", "2:roll.share=0.1,fresh=0")).settings()
    assert "phases" not in InversionConfig().settings()
    assert InversionConfig(phases=("3:coarse=1",)).settings() == InversionConfig().settings()
    assert InversionConfig.from_settings(one.settings()).settings() == one.settings()


def test_a_cosine_falls_once_whatever_phases_there_are():
    how = {"iterations": 30, "lr": 0.2, "lr_end": 0.02, "lr_schedule": "cosine", "warmup": 4}
    one, two = InversionConfig(**how), InversionConfig(**how, phases=("1", "9"))
    assert [one.lr_at(k) for k in range(30)] == [two.lr_at(k) for k in range(30)]
    assert [InversionConfig(**how | {"lr_schedule": "phases"}).lr_at(k) for k in (0, 9, 29)] == [
        one.lr_at(k) for k in (0, 9, 29)
    ]
    constant = InversionConfig(**how | {"lr_schedule": "constant"}, phases=("1", "1"))
    assert [constant.lr_at(k) for k in (0, 3, 4, 15, 29)] == pytest.approx([0.05, 0.2, 0.2, 0.2, 0.2])


def test_rates_warm_up_and_fall_in_each_phase_to_an_end():
    how = {"lr": 0.2, "lr_end": 0.02, "lr_schedule": "phases", "warmup": 4}
    config = InversionConfig(iterations=30, phases=("1", "2"), **how)
    for start, length in ((0, 10), (10, 20)):
        for step in range(4):
            assert config.lr_at(start + step) == pytest.approx(0.2 * (step + 1) / 4)
        for step in range(4, length):
            fallen = (1 + math.cos(math.pi * (step - 4) / (length - 4))) / 2
            assert config.lr_at(start + step) == pytest.approx(0.02 + 0.18 * fallen)


def test_views_of_a_phase_replace_settings_alone():
    phase = Phase.parse("1:roll.share=0.25,crop.area=0.5")
    assert phase.views(("flip", "crop", "roll:diagonal=1")) == ("roll:share=0.25,diagonal=1.0", "flip", "crop:area=0.5")
    assert phase.beside(["roll"]).text() == "1:roll.share=0.25"


def test_views_that_are_given_win_over_the_phases_of_a_preset():
    """What is left out of them stays as the preset has it."""
    config = configured("psaq_vit", views=["roll:share=0.125", "noise"])
    assert (config.views, config.phases) == (("roll", "noise"), ("1", "1"))
    config = configured("psaq_vit", views=["roll:diagonal=1"])
    assert config.phases == configured("psaq_vit").phases == ("1:roll.share=0.067", "1:roll.share=0.134")


def test_rolls_grow_from_phase_to_phase(monkeypatch):
    """Up to 2 and 8 of 32 pixels; on the diagonal, both axes by the same."""
    config = InversionConfig(
        iterations=200, phases=("1:roll.share=0.0625", "1:roll.share=0.25"), views=("roll:diagonal=1",), batch_size=1
    )
    inverter = Inverter(tiny_model(), config, CPU)
    generator = torch.Generator().manual_seed(0)
    for span, most in zip(inverter.spans, (2, 8), strict=True):
        jitters = [draw.jitter for draw in span.views.draws(span.stop - span.start, 1, generator)]
        assert {jitter.dy for jitter in jitters} == set(range(-most, most + 1))
        assert all(jitter.dy == jitter.dx for jitter in jitters)


@pytest.mark.parametrize("kept", [16, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_coarse_image_is_pooled_rolled_and_shown_as_squares(kept, dtype):
    canvas = random_canvas(GRID, kept, dtype)
    views = Views(["roll", "flip"], GRID, CPU, coarse=2)
    image = GRID.unpatchify(canvas.pixels, canvas.positions)
    for draw in views.draws(6, 3, torch.Generator().manual_seed(1)):
        seen = views.look(canvas.coarser(2), draw, dtype)
        patches = seen.patches.flip(-1) if seen.mirrored else seen.patches
        small = F.avg_pool2d(image, 2).roll((draw.jitter.dy, draw.jitter.dx), (-2, -1))
        assert max(abs(draw.jitter.dy), abs(draw.jitter.dx)) <= 2  # an eighth of 16 pixels
        whole = F.interpolate(small.flip(-1) if draw.jitter.flip else small, scale_factor=2.0, mode="nearest")
        torch.testing.assert_close(patches, GRID.taken(whole.contiguous(), seen.positions))
    ((gradient,), (expected,)) = (
        torch.autograd.grad(value.square().sum(), canvas.pixels)
        for value in (canvas.coarser(2).pixels, F.avg_pool2d(image, 2))
    )
    torch.testing.assert_close(gradient, expected)


def test_image_terms_see_the_coarse_image(monkeypatch):
    sizes = []

    class Size(Loss):
        def __call__(self, inputs):
            sizes.append((inputs.canvas.grid.height, inputs.seen.patches.shape[-1], inputs.image().shape[-1]))
            return inputs.canvas.pixels.square().mean()

    monkeypatch.setitem(__import__("inversion").PRIORS, "size", Prior({"size": Term(Size, 1.0, "size")}))
    config = InversionConfig(iterations=3, phases=("2:coarse=4", "1"), weights={"size": 1.0}, batch_size=2)
    Inverter(tiny_model(), config, CPU).invert(0)
    assert sizes == [(2, 8, 32)] * 2 + [(8, 8, 32)]


def moments(config: InversionConfig, at: int) -> tuple[int, float]:
    """Adam's step count and largest moment when iteration `at` begins."""
    inverter, found, seen = Inverter(tiny_model(), config, CPU), [], []
    step = inverter._step

    def spy(canvas, optimizer, *rest, **how):
        if len(seen) == at:
            state = optimizer.state[canvas.parameter]
            found.append((int(state["step"]), float(state["exp_avg"].abs().max())) if state else (0, 0.0))
        seen.append(1)
        return step(canvas, optimizer, *rest, **how)

    inverter._step = spy
    inverter.invert(0)
    return found[0]


def test_adam_goes_on_from_phase_to_phase_unless_it_shall_begin_anew():
    assert moments(InversionConfig(iterations=8, phases=("1", "1"), batch_size=2), 4)[0] == 4
    assert moments(InversionConfig(iterations=8, phases=("1", "1:fresh=1"), batch_size=2), 4) == (0, 0.0)
    assert moments(InversionConfig(iterations=8, phases=("1:fresh=1", "1"), batch_size=2), 4)[0] == 4


def test_weight_decay_is_decoupled():
    """As of AdamW: pixels shrink by the learning rate times it, beside the step."""
    pixels = {}
    for decay in (0.0, 0.5):
        config = InversionConfig(iterations=1, lr=0.1, weight_decay=decay, views=(), init="white", batch_size=2)
        start = []
        inverter = Inverter(tiny_model(), config, CPU)
        batch = inverter.invert(
            0, on_stage=lambda stage, start=start: start.append(stage.canvas.pixels.detach().clone())
        )
        pixels[decay] = batch.images.patches
    inside = (pixels[0.0].abs() < 1) & (start[0].abs() < 1)
    torch.testing.assert_close(
        (pixels[0.0] - pixels[0.5])[inside], (0.1 * 0.5 * start[0])[inside], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("canvas", ["pixels", "spectral"])
@pytest.mark.parametrize("strategy", [{}, {"prune_it": (3, 6), "prune_ratio": (0.3, 0.3)}, {"strategy": "pri"}])
def test_phases_with_stages_and_canvases_stop_and_go_on_to_the_same_bytes(canvas, strategy, tmp_path):
    phases = ("2:coarse=2,crop.area=0.9", "1:fresh=1", "1:roll.share=0.3")
    views = ("roll", "crop", "flip")
    config = InversionConfig(iterations=9, canvas=canvas, phases=phases, views=views, batch_size=4, **strategy)
    pools = []
    for name in ("whole", "stopped"):
        pool = ImagePool(tmp_path / name, tiny_model(), config)
        if name == "stopped":
            synthesize(pool, 4, CPU, tmp_path / "log")
        synthesize(pool, 8, CPU, tmp_path / "log")
        pools.append({file.relative_to(tmp_path / name): file.read_bytes() for file in pool.path.rglob("*.*g")})
    assert pools[0] == pools[1]
    plain, fast = (Inverter(tiny_model(), config, CPU, eager=eager).invert(0) for eager in (True, False))
    assert torch.isfinite(fast.losses).all()
    torch.testing.assert_close(fast.losses, plain.losses, rtol=1e-3, atol=1e-3)


def test_patches_that_cannot_be_averaged_are_refused_before_a_pool_is_made(tmp_path):
    config = InversionConfig(iterations=4, phases=("1:coarse=3",))
    for refused in (lambda: Inverter(tiny_model(), config, CPU), lambda: ImagePool(tmp_path, tiny_model(), config)):
        with pytest.raises(UserError, match="8x8 pixels cannot be averaged over 3x3"):
            refused()
    assert not list(tmp_path.iterdir())


def test_stopped_patches_are_kept_where_they_shall_be(tmp_path):
    """As they were when they stopped: in the pool, its pictures, and what `filled` fills in."""
    how = {"iterations": 6, "prune_it": (2, 4), "prune_ratio": (0.5, 0.5), "batch_size": 2}
    black, kept = (Inverter(tiny_model(), InversionConfig(**how, stopped=s), CPU).invert(0) for s in ("black", "kept"))
    assert torch.equal(black.images.patches, kept.images.patches)
    assert black.images.stopped is None
    assert kept.images.stopped.positions.shape == (2, 12)
    pool = ImagePool(tmp_path, tiny_model(), InversionConfig(**how, stopped="kept"))
    synthesize(pool, 2, CPU, tmp_path / "log")
    whole = pool.read(2).filled(GRID)
    torch.testing.assert_close(
        GRID.taken(GRID.unpatchify(whole.patches, whole.positions), kept.images.stopped.positions),
        kept.images.stopped.patches,
        rtol=0,
        atol=0.02,  # eight bits
    )


def test_soft_labels_of_random_logits():
    """A softmax of normal logits, the label's so much higher; drawn for the batch."""
    inverter = Inverter(tiny_model(), InversionConfig(soft_logits=4.0), CPU)
    labels = torch.arange(5).repeat(400)
    targets = inverter.targets(labels, torch.Generator().manual_seed(0))
    logits = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(2000), labels] += 4.0
    torch.testing.assert_close(targets, logits.softmax(dim=1))


def test_published_multi_resolution_is_a_preset():
    config = configured("deepinversion", iterations=30, warmup=2, batch_size=2)
    assert [(span.phase.coarse, span.start, span.stop) for span in Inverter(tiny_model(), config, CPU).spans] == [
        (2, 0, 20),
        (1, 20, 30),
    ]


def test_a_canvas_of_one_resolution_is_itself():
    canvas = random_canvas(GRID, 16)
    assert canvas.coarser(1) is canvas
    assert isinstance(canvas.coarser(2), PatchCanvas)


def are_squares(patches: torch.Tensor, side: int = 2) -> bool:
    """Whether pixels of every square are the same."""
    small = patches[..., ::side, ::side]
    return torch.equal(small.repeat_interleave(side, -1).repeat_interleave(side, -2), patches)


@pytest.mark.parametrize("canvas", ["pixels", "spectral"])
def test_what_is_done_in_a_coarse_phase_is_as_the_model_saw_it(canvas):
    """The images of `pri` that leave in it, stopped patches that are kept, snapshots, and the last image."""
    how = {"canvas": canvas, "iterations": 8, "batch_size": 4}
    coarse = {**how, "phases": ("1:coarse=2", "1")}
    of_pri = Inverter(tiny_model(), InversionConfig(**coarse, strategy="pri"), CPU).invert(0).images.patches
    assert [are_squares(images) for images in of_pri] == [True, True, False, False]  # of iterations 2, 4, 6 and 8
    schedule = {"prune_it": (2, 6), "prune_ratio": (0.5, 0.5), "stopped": "kept"}
    batch = Inverter(tiny_model(), InversionConfig(**coarse, **schedule, snapshots=(3, 5)), CPU).invert(0)
    assert are_squares(batch.images.stopped.patches[:, :8])
    assert not are_squares(batch.images.stopped.patches[:, 8:])
    assert [are_squares(snapshot.pixels) for snapshot in batch.snapshots] == [True, False]
    assert are_squares(
        Inverter(tiny_model(), InversionConfig(**how, phases=("1:coarse=2",)), CPU).invert(0).images.patches
    )


def test_patches_are_ranked_as_the_model_sees_them(monkeypatch):
    seen = []
    config = InversionConfig(
        iterations=8, phases=("1:coarse=2", "1"), prune_it=(0, 2, 4, 6), prune_ratio=(0.2,) * 4, batch_size=2
    )
    inverter = Inverter(tiny_model(), config, CPU)
    attention = inverter.vit.class_attention
    monkeypatch.setattr(
        inverter.vit, "class_attention", lambda x, *rest: seen.append(are_squares(x)) or attention(x, *rest)
    )
    inverter.invert(0)
    assert seen == [True, True, True, False]
