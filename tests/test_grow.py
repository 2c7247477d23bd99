"""Patches that begin instead of stop: the growing centre of Plug-In Inversion, with and without patches that stop."""

import itertools
import math

import pytest
import torch

from inversion import ImagePool, InversionConfig, Inverter, configured, synthesize
from inversion.canvas import PatchCanvas
from inversion.engine import trajectory_bytes
from inversion.schedule import Stage
from inversion.strategies import Grow, central_patches, highest
from inversion.total_variation import total_variation
from inversion.views import Views
from models import DEFAULT_MODEL, PatchGrid, SparseViT, load_model
from tests.conftest import tiny_model
from utils.errors import UserError

CPU = torch.device("cpu")
CANVASES = ["pixels", "spectral"]
SEVEN = ("1",) * 7
DENSE = {"strategy": "grow", "iterations": 14, "batch_size": 3}
STOPPING = {**DENSE, "prune_it": (7, 10), "prune_ratio": (0.5, 0.25)}


def stages(iterations: int, grid: PatchGrid, prune_it=(-1,), prune_ratio=(0.0,)) -> tuple[Stage, ...]:
    return Grow(prune_it, prune_ratio).stages(iterations, grid)


def square(grid: PatchGrid, rows: range, cols: range) -> set[int]:
    return {row * grid.cols + col for row in rows for col in cols}


# ---- which patches begin when


def test_the_middle_grows_by_an_eighth_of_the_side_in_seven_phases():
    grid = PatchGrid(8, 8, 4, 4)
    found, seen = stages(70, grid), set()
    assert [(stage.start, stage.stop) for stage in found] == [(10 * k, 10 * k + 10) for k in range(7)]
    assert [stage.patches for stage in found] == [4, 9, 16, 25, 36, 49, 64]
    for size, stage in zip(range(2, 9), found, strict=True):
        assert list(stage.begins) == sorted(stage.begins)
        assert not seen & {*stage.begins}
        seen |= {*stage.begins}
        middle = range((8 - size) // 2, (8 - size) // 2 + size)
        assert seen == square(grid, middle, middle)


@pytest.mark.parametrize(
    "grid", [PatchGrid(4, 4, 8, 8), PatchGrid(3, 5, 2, 2), PatchGrid(14, 14, 2, 2), PatchGrid(1, 1, 4, 4)]
)
@pytest.mark.parametrize("iterations", [1, 3, 7, 50])
def test_on_every_grid_all_patches_begin_once(grid, iterations):
    found = stages(iterations, grid)
    begins = [place for stage in found for place in stage.begins]
    assert sorted(begins) == list(range(grid.count))
    assert found[0].start == 0
    assert found[-1].stop == iterations
    assert all(earlier.stop == later.start for earlier, later in itertools.pairwise(found))
    assert all(stage.iterations > 0 and stage.begins for stage in found)
    starts = {phase * iterations // 7 for phase in range(7)}
    assert {stage.start for stage in found} <= starts


def test_central_parts_are_in_the_middle_and_at_least_a_patch():
    grid = PatchGrid(4, 7, 2, 2)
    assert central_patches(grid, 0.01) == {1 * 7 + 3}
    assert central_patches(grid, 0.5) == square(grid, range(1, 3), range(1, 5))
    assert central_patches(grid, 1.0) == set(range(28))


def test_patches_that_stop_are_counted_among_those_that_have_begun():
    """At 40 sixteen, twenty-five and so on have begun; the first stop comes before the phase, the second within one."""
    found = stages(70, PatchGrid(8, 8, 4, 4), (0, 20, 55), (0.9, 0.5, 0.25))
    assert [(stage.start, stage.patches) for stage in found] == [
        (0, 4),  # none had begun that could have stopped
        (10, 9),
        (20, 4 + 7),  # half of nine stop, then seven begin
        (30, 20),
        (40, 31),
        (50, 44),
        (55, 33),
        (60, 48),
    ]
    assert found[6].begins == ()


@pytest.mark.parametrize(
    ("schedule", "why"),
    [(((5,), (0.999,)), "leaves none of 4"), (((70,), (0.5,)), "past the last"), (((5, 3), (0.1, 0.1)), "must rise")],
)
def test_impossible_schedules(schedule, why):
    with pytest.raises(UserError, match=why):
        stages(70, PatchGrid(8, 8, 4, 4), *schedule)


# ---- in an inversion


def run(model, canvas: str = "pixels", **settings):
    """An inversion, with each stage's canvas as it was at its start."""
    seen, inverter = [], Inverter(model, InversionConfig(canvas=canvas, **{**DENSE, **settings}), CPU)

    def keep(start) -> None:
        canvas = start.canvas
        seen.append((start.stage, canvas.positions, canvas.pixels.detach().clone(), canvas))

    batch = inverter.invert(0, on_stage=keep)
    return inverter, batch, seen


def starting_noise(model, **settings) -> torch.Tensor:
    """All patches (B, N, C, h, w) of the same seed before the first iteration."""
    seen = []
    config = InversionConfig(**{**DENSE, "iterations": 1, **settings, "strategy": "dense"})
    Inverter(model, config, CPU).invert(0, on_stage=lambda start: seen.append(start.canvas.pixels.detach().clone()))
    return seen[0]


def test_an_image_of_eight_by_eight_patches_grows_to_all_of_it():
    config = InversionConfig(strategy="grow", iterations=7, batch_size=2)
    inverter, seen = Inverter(load_model(DEFAULT_MODEL), config, CPU), []
    batch = inverter.invert(0, on_stage=lambda start: seen.append(start.canvas.positions))
    assert [positions.shape[1] for positions in seen] == [4, 9, 16, 25, 36, 49, 64]
    assert seen[0].tolist() == [[27, 28, 35, 36]] * 2
    assert torch.equal(batch.images.positions, inverter.vit.grid.all_positions(2))
    assert batch.images.stopped is None


@pytest.mark.parametrize("init", ["white", "pink"])
def test_patches_go_on_as_they_are_and_new_ones_begin_as_the_noise(model, init):
    """Pixels: those of the stage before, at their last step, and what the whole image started from."""
    _, batch, seen = run(model, init=init)
    noise = starting_noise(model, init=init)
    assert [positions.shape[1] for _, positions, *_ in seen] == [1, 4, 9, 16]
    old = set()
    for number, (stage, positions, pixels, _) in enumerate(seen):
        for index, place in enumerate(positions[0].tolist()):
            if place in stage.begins:
                assert torch.equal(pixels[:, index], noise[:, place])
            else:
                before = seen[number - 1]
                last = before[3].pixels.detach()[:, before[1][0].tolist().index(place)]
                assert torch.equal(pixels[:, index], last)
                assert not torch.equal(last, noise[:, place])
        assert {*positions[0].tolist()} == old | {*stage.begins}
        assert torch.equal(positions, positions.sort(dim=1).values)
        old |= {*stage.begins}
    assert torch.equal(batch.images.patches, seen[-1][3].pixels.detach())


def test_patches_of_a_spectral_canvas_begin_as_their_coefficients_have_them(model):
    """Which have moved by then, for they belong to all of the image; those that have begun go on as they are."""
    _, batch, seen = run(model, "spectral", snapshots=tuple(range(15)))
    noise = starting_noise(model, canvas="spectral")
    torch.testing.assert_close(seen[0][2], noise[:, list(seen[0][0].begins)], rtol=0, atol=1e-5)
    moved = 0.0
    for stage, positions, pixels, _ in seen:
        assert torch.equal(batch.snapshots[stage.start].pixels, pixels)
        fresh = [index for index, place in enumerate(positions[0].tolist()) if place in stage.begins]
        moved = max(moved, (pixels[:, fresh] - noise[:, list(stage.begins)]).abs().max().item())
    assert moved > 0.01


@pytest.mark.parametrize("canvas", CANVASES)
def test_adam_is_a_fresh_one_whenever_patches_begin(model, monkeypatch, canvas):
    seen, stepper = [], Inverter.stepper

    def spy(self, canvas, optimizer, *rest):
        state = optimizer.state.get(canvas.parameter, {})
        assert optimizer.param_groups[0]["params"][0] is canvas.parameter
        seen.append(int(state["step"]) if state else 0)
        return stepper(self, canvas, optimizer, *rest)

    monkeypatch.setattr(Inverter, "stepper", spy)
    _, _, started = run(model, canvas, prune_it=(9,), prune_ratio=(0.5,))
    begins = [stage.start for stage, *_ in started if stage.begins]
    wanted = [0 if stage.begins else stage.start - max(b for b in begins if b < stage.start) for stage, *_ in started]
    assert seen == wanted
    assert max(seen) > 0  # what goes on where patches only stop


@pytest.mark.parametrize("canvas", CANVASES)
def test_the_least_important_of_what_has_begun_stops_and_never_begins_again(model, canvas):
    inverter, batch, seen = run(model, canvas, **STOPPING)
    stopped = [set() for _ in range(3)]
    for before, after in itertools.pairwise(seen):
        staying = after[0].patches - len(after[0].begins)
        now = [{*row} for row in after[1].tolist()]
        if staying < before[0].patches and canvas == "pixels":
            pixels = before[3].pixels.detach()
            with torch.no_grad():
                attention = inverter.vit.class_attention(pixels, before[1])
            kept = before[1].gather(1, highest(attention, staying))
            assert all({*row} | {*after[0].begins} == places for row, places in zip(kept.tolist(), now, strict=True))
        for image, (earlier, places) in enumerate(zip(before[1].tolist(), now, strict=True)):
            stopped[image] |= {*earlier} - places
            assert not stopped[image] & places
    left = [stage.patches for stage, *_ in seen]
    assert left[-1] == batch.images.positions.shape[1] == inverter.config.kept(inverter.vit.grid)
    assert all(len(gone) == 16 - left[-1] > 0 for gone in stopped)
    if canvas == "pixels":
        assert batch.images.stopped is None
    else:
        assert [{*row} for row in batch.images.stopped.positions.tolist()] == stopped


@pytest.mark.parametrize("canvas", CANVASES)
def test_a_pool_of_images_that_grew(tmp_path, model, canvas):
    for settings, kept in ((DENSE, 16), (STOPPING, None)):
        config = InversionConfig(canvas=canvas, **settings)
        pool = ImagePool(tmp_path, model, config)
        report = synthesize(pool, 3, CPU)
        count = config.kept(pool.grid)
        assert kept in (None, count)
        assert pool.read(3).positions.shape == (3, count)
        assert pool.read(3).shown().positions.shape == (3, 16 if canvas == "spectral" else count)
        assert report.patches_per_stage[-1] == count
        assert pool.losses(3).shape == (1, 14)
        assert "-grow-s0-" in pool.path.name


def test_what_grew_is_what_the_model_is_asked_for():
    model = load_model(DEFAULT_MODEL)
    config = InversionConfig(strategy="grow", iterations=42, batch_size=4, views=("roll",))
    inverter = Inverter(model, config, CPU)
    batch = inverter.invert(0)
    with torch.no_grad():
        logits = inverter.vit(batch.images.patches, batch.images.positions).logits
    assert (logits.argmax(dim=1) == batch.images.labels).float().mean() >= 0.75


def test_total_variation_is_of_what_has_begun(model):
    """No pair with a patch that has not begun."""
    losses = []
    for weight in (0.0, 1.0):
        _, batch, seen = run(model, weights={"oh": 1.0, "tv2": weight}, iterations=7)
        losses.append(batch.losses[0].item())
    canvas = PatchCanvas(SparseViT(model.vit).grid, seen[0][2], seen[0][1])
    assert losses[1] - losses[0] == pytest.approx(total_variation(canvas, 2).item(), rel=1e-3)


def test_work_is_counted_for_what_runs(model):
    """Nothing is ranked where patches only begin, and every look costs its own."""
    vit = SparseViT(model.vit)

    def flops(**settings) -> int:
        return Inverter(model, InversionConfig(**{**DENSE, **settings}), CPU).total_flops()

    grown = stages(14, vit.grid)
    assert flops() == 3 * sum(stage.iterations * vit.step_flops(stage.patches) for stage in grown)
    assert flops(copies=4) == 4 * flops()
    stopping = stages(14, vit.grid, (9,), (0.5,))
    steps = 3 * sum(stage.iterations * vit.step_flops(stage.patches) for stage in stopping)
    ranked = next(before for before, after in itertools.pairwise(stopping) if after.start == 9)
    assert flops(prune_it=(9,), prune_ratio=(0.5,)) == steps + 3 * vit.forward_flops(ranked.patches)


def test_looks_take_their_memory_one_after_another(model):
    vit = SparseViT(model.vit)
    one, four = (trajectory_bytes(vit, InversionConfig(copies=copies), CPU) for copies in (1, 4))
    assert four == one


def test_a_model_without_class_token_grows_where_nothing_is_ranked():
    model = tiny_model(class_token=False, global_pool="avg")
    batch = Inverter(model, InversionConfig(**DENSE), CPU).invert(0)
    assert batch.images.positions.shape == (3, 16)
    with pytest.raises(UserError, match=r"no class token.*--importance cls"):
        Inverter(model, InversionConfig(importance="cls", **STOPPING), CPU)
    assert Inverter(model, InversionConfig(**STOPPING), CPU).invert(0).images.positions.shape[1] < 16


# ---- settings


def test_the_learning_rate_falls_in_every_phase():
    config = InversionConfig(strategy="grow", iterations=70, lr=0.01, lr_schedule="phases", phases=SEVEN)
    for phase in range(7):
        for step in range(10):
            wanted = 0.01 * (1 + math.cos(math.pi * step / 10)) / 2
            assert config.lr_at(10 * phase + step) == pytest.approx(wanted)
    short = InversionConfig(strategy="grow", iterations=3, lr=0.5, lr_schedule="phases", phases=SEVEN)
    assert [short.lr_at(iteration) for iteration in range(3)] == [0.5] * 3
    uneven = InversionConfig(strategy="grow", iterations=10, lr=1.0, lr_schedule="phases", phases=SEVEN)
    starts = [stage.start for stage in stages(10, PatchGrid(8, 8, 4, 4))]
    assert starts == [iteration for iteration in range(10) if uneven.lr_at(iteration) == 1.0]
    warm = InversionConfig(strategy="grow", iterations=70, lr=1.0, lr_schedule="phases", phases=SEVEN, warmup=4)
    assert [warm.lr_at(iteration) for iteration in (0, 3)] == [0.25, 1.0]
    assert [warm.lr_at(iteration) for iteration in (10, 13)] == [0.25, 1.0]
    assert InversionConfig(strategy="grow", lr_schedule="phases").phases == SEVEN  # those in which it grows
    assert InversionConfig(strategy="grow", lr_schedule="cosine").phases == ()


def test_the_preset_is_the_paper():
    """Cross-entropy alone, 7 phases of 400 steps, 32 copies, rolls of up to 32 of 224 px, colour shift of 1."""
    config = configured("plug_in")
    assert config.strategy == "grow"
    assert {name: weight for name, weight in config.weights.items() if weight} == {"oh": 1.0}
    assert config.iterations == 7 * 400
    assert (config.lr, config.lr_schedule, config.warmup, config.betas) == (0.01, "phases", 0, (0.5, 0.99))
    assert config.spans() == [(400 * phase, 400 * phase + 400) for phase in range(7)]
    assert config.copies == 32
    assert (config.canvas, config.init, config.prune_it) == ("pixels", "white", (-1,))
    assert [view.partition(":")[0] for view in config.views] == ["roll", "colour"]
    views = Views(config.views, PatchGrid(14, 14, 16, 16), CPU)
    reached = {draw.jitter.dy for draw in views.draws(4000, 1, torch.Generator().manual_seed(0))}
    assert (min(reached), max(reached)) == (-32, 32)
    (colour,) = views.others
    assert (colour.scale, colour.shift) == (1, 1)
    stages_found = config.strategy_object().stages(config.iterations, PatchGrid(8, 8, 4, 4))
    assert [stage.start for stage in stages_found] == [400 * phase for phase in range(7)]


def test_the_preset_with_a_schedule_grows_and_stops():
    config = configured("plug_in", prune_it=[400, 800], prune_ratio=[0.3, 0.3])
    assert (config.strategy, config.prune_it, config.phases) == ("grow", (400, 800), SEVEN)
    assert configured("plug_in", prune_it=[-1]).settings() == configured("plug_in").settings()
    assert configured("plug_in", canvas="spectral").lr_schedule == "cosine"
    assert configured("smi", prune_it=[-1]).strategy == "dense"  # where a schedule is what a preset's strategy is


def test_the_preset_runs(model):
    config = configured("plug_in", iterations=14, copies=2, batch_size=3)
    batch = Inverter(model, config, CPU).invert(0)
    assert batch.images.positions.shape == (3, 16)
    assert batch.losses.isfinite().all()


def test_another_strategy_than_the_presets_keeps_its_phases():
    config = configured("plug_in", strategy="dense")
    assert (config.strategy, config.lr_schedule, config.lr, config.phases) == ("dense", "phases", 0.01, SEVEN)


def test_a_canvas_that_is_given_has_its_own_rate_and_start_beside_a_preset():
    config = configured("smi", canvas="spectral")
    assert (config.lr, config.lr_schedule, config.init) == (0.3, "cosine", "pink")
    assert configured("smi", canvas="spectral", lr=0.1).lr == 0.1
    assert configured("readable").lr == 0.3
    assert configured("readable", canvas="pixels").lr == 0.25
    assert configured("transfer", canvas="spectral").lr_schedule == "cosine"
