"""The spectral canvas: coefficients that stand for pixels, and pools that show stopped patches as they were."""

import json

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from inversion import CANVASES, ImagePool, InversionConfig, Inverter, configured, synthesize
from inversion.engine import batch_generator
from inversion.projections import LowPass
from inversion.spectral import EDGE, SpectralCanvas, spectrum
from inversion.targets import draw_labels
from models import PatchGrid, SparseViT
from tests.conftest import tiny_model
from tests.test_pool import contents

CPU = torch.device("cpu")
GRID = PatchGrid(3, 4, 4, 2)
LIMITS = torch.tensor([-2.0, -1.5, -1.0]).view(3, 1, 1), torch.tensor([2.5, 2.0, 1.0]).view(3, 1, 1)
SPARSE = {"canvas": "spectral", "iterations": 12, "prune_it": (4, 8), "prune_ratio": (0.5, 0.5), "batch_size": 3}
HALF_STEP = 0.51 / 255
"""Of 8 bits."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def canvas_of(grid: PatchGrid = GRID, batch: int = 2, dtype=torch.float32) -> SpectralCanvas:
    noise = torch.randn(batch, 3, *grid.image_size, generator=generator(), dtype=dtype)
    return SpectralCanvas.start(grid, noise, tuple(limit.to(dtype) for limit in LIMITS), False, None)


# ---- coefficients and pixels


@pytest.mark.parametrize("size", [(32, 32), (31, 48), (48, 31), (16, 64)])
def test_white_coefficients_are_pink_pixels_of_variance_1(size):
    scale = spectrum(size, CPU)
    white = torch.fft.rfft2(torch.randn(2000, *size, generator=generator()), norm="ortho")
    pixels = torch.fft.irfft2(white * scale, s=size, norm="ortho")
    beyond = scale.roll(-1, 0).flip(0).flip(1)[:, 1 - size[1] % 2 : -1]  # frequencies of the opposite sign
    assert torch.cat([scale, beyond], dim=1).square().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.cat([scale, beyond], dim=1).shape == size
    assert pixels.square().mean().item() == pytest.approx(1, abs=0.05)
    power = torch.fft.fft2(pixels).abs().square().mean(dim=0)
    for low, high in ((3, 6), (5, 10)):
        for one, two, length in ((power[0, low], power[0, high], size[1]), (power[low, 0], power[high, 0], size[0])):
            if high < length / 2:
                assert (one / two).item() == pytest.approx(4, rel=0.15)


def test_amplitudes_fall_as_1_over_f_down_to_the_lowest_frequency():
    scale = spectrum((20, 40), CPU)
    assert scale.shape == (20, 21)
    assert (scale[0, 1] / scale[0, 5]).item() == pytest.approx(5)
    assert (scale[0, 5] / scale[3, 4]).item() == pytest.approx((0.15**2 + 0.1**2) ** 0.5 / 0.125)
    assert (scale[2, 0] / scale[4, 0]).item() == pytest.approx(2)
    assert scale[18, 7] == scale[2, 7]  # -2 and 2
    assert scale[0, 0] == scale[0, 1]  # the mean counts as 1 / side
    assert scale[1, 0] == pytest.approx((scale[0, 2]).item())


@pytest.mark.parametrize("grid", [GRID, PatchGrid(3, 3, 5, 5), PatchGrid(2, 3, 5, 7)])
def test_the_noise_it_starts_from_goes_into_the_sigmoid(grid):
    noise = torch.randn(2, 3, *grid.image_size, generator=generator())
    black, white = LIMITS
    canvas = SpectralCanvas.start(grid, noise, LIMITS, False, None)
    patches = canvas.patches()
    found = grid.unpatchify(patches.pixels.detach(), patches.positions)
    torch.testing.assert_close(found, black + (white - black) / (1 + (-noise).exp()), rtol=0, atol=1e-5)
    first = torch.tensor([1, 3])
    part = SpectralCanvas.start(grid, noise, LIMITS, False, first).patches()
    assert part.positions.tolist() == [[1, 3]] * 2
    torch.testing.assert_close(part.pixels, patches.pixels[:, first])


def test_an_inversion_starts_from_pink_noise_of_variance_1(model):
    seen = {}
    config = InversionConfig(canvas="spectral", iterations=1, batch_size=200)
    inverter = Inverter(model, config, CPU)
    inverter._invert(0, None, lambda start: seen.update(pixels=start.canvas.pixels.detach().clone()))
    black, white = inverter.limits
    noise = ((seen["pixels"] - black) / (white - black)).logit()
    assert noise.square().mean().item() == pytest.approx(1, abs=0.1)
    assert noise.mean(dim=(1, 2, 3, 4)).std() > 0.15


@pytest.mark.parametrize("kept", [1, 4, None])
@pytest.mark.parametrize("grid", [PatchGrid(2, 3, 2, 2), PatchGrid(3, 3, 1, 1)])
def test_gradients_are_finite_differences(grid, kept):
    """Through `patches()` of kept patches alone: sizes even and odd."""
    canvas = canvas_of(grid, dtype=torch.float64)
    kept = kept or grid.count
    order = (torch.randperm(grid.count, generator=generator(image)) for image in range(2))
    places = torch.stack([one[:kept].sort().values for one in order])

    def pixels(coefficients: torch.Tensor) -> torch.Tensor:
        return SpectralCanvas(grid, coefficients, places, tuple(map(torch.Tensor.double, LIMITS))).patches().pixels

    assert pixels(canvas.parameter).shape == (2, kept, 3, grid.height, grid.width)
    assert torch.autograd.gradcheck(pixels, canvas.parameter.detach().requires_grad_())


def test_kept_patches_are_those_of_the_whole_image_and_stopped_ones_have_no_say():
    canvas = canvas_of()
    kept = torch.tensor([[0, 5, 11], [1, 2, 3]])
    smaller = canvas.with_patches(kept)
    assert smaller.parameter is canvas.parameter
    whole = canvas.patches().pixels.detach()
    assert torch.equal(smaller.patches().pixels.detach(), whole[torch.arange(2)[:, None], kept])
    assert smaller.patches().positions.tolist() == kept.tolist()
    again = smaller.with_patches(torch.tensor([[1, 2], [0, 2]]))
    assert again.positions.tolist() == [[5, 11], [1, 3]]
    again.patches().pixels.sum().backward()
    other = canvas_of()
    mask = torch.zeros(2, 12, 1, 1, 1)
    mask[0, [5, 11]] = mask[1, [1, 3]] = 1
    (other.patches().pixels * mask).sum().backward()
    torch.testing.assert_close(canvas.parameter.grad, other.parameter.grad, rtol=1e-4, atol=1e-5)


def test_patches_that_begin_are_as_their_coefficients_have_them():
    canvas = canvas_of()
    part = SpectralCanvas(GRID, canvas.parameter, torch.tensor([[2, 9], [4, 5]]), LIMITS)
    more = part.with_more(torch.tensor([7, 3]))
    assert more.parameter is canvas.parameter
    assert more.positions.tolist() == [[2, 3, 7, 9], [3, 4, 5, 7]]
    whole = canvas.patches().pixels.detach()
    assert torch.equal(more.patches().pixels.detach(), whole[torch.arange(2)[:, None], more.positions])


@pytest.mark.parametrize("grid", [GRID, PatchGrid(3, 3, 5, 5)])
def test_pixels_that_were_changed_outside_reach_the_coefficients(grid):
    """Of kept patches; the others stay as they are."""
    canvas, before = canvas_of(grid), canvas_of(grid).patches().pixels.detach()
    kept = torch.tensor([[0, 4, 5], [1, 2, 8]])
    rows, (black, white) = torch.arange(2)[:, None], LIMITS
    smaller = canvas.with_patches(kept)
    patches = smaller.patches()
    share = torch.rand(patches.pixels.shape, generator=generator()) * (1 - 2 * EDGE) + EDGE
    patches.pixels.detach().copy_(black + (white - black) * share)
    smaller.overwrite(patches)
    found = canvas.patches().pixels.detach()
    torch.testing.assert_close(found[rows, kept], patches.pixels.detach(), rtol=0, atol=1e-4)
    before[rows, kept] = patches.pixels.detach()
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)


def test_black_and_white_given_from_outside_are_nearly_that():
    canvas, (black, white) = canvas_of(), LIMITS
    patches = canvas.patches()
    patches.pixels.detach()[:, ::2] = black
    patches.pixels.detach()[:, 1::2] = 5 * white  # beyond it
    canvas.overwrite(patches)
    found = canvas.patches().pixels.detach()
    assert (found[:, ::2] - black).abs().max() < 1.1 * EDGE * 4.5
    assert (white - found[:, 1::2]).abs().max() < 1.1 * EDGE * 4.5
    assert canvas.parameter.isfinite().all()


# ---- in an inversion


@pytest.mark.parametrize("canvas", CANVASES)
def test_pixels_never_leave_the_limits(model, canvas):
    config = InversionConfig(**{**SPARSE, "lr": 20.0, "canvas": canvas})
    batch = Inverter(model, config, CPU).invert(0)
    for images in filter(None, (batch.images, batch.images.stopped)):
        pixels = model.preprocessing.denormalize(images.patches)
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
    moved = model.preprocessing.denormalize(batch.images.patches)
    assert moved.min() < 0.02
    assert moved.max() > 0.98


def test_all_coefficients_go_on_when_patches_stop_with_the_moments_that_they_have(model, monkeypatch):
    seen, stepper = [], Inverter.stepper

    def spy(self, canvas, optimizer, *rest):
        state = optimizer.state.get(canvas.parameter, {})
        steps = int(state["step"]) if state else 0
        seen.append((canvas.parameter, canvas.parameter.detach().clone(), steps, optimizer))
        return stepper(self, canvas, optimizer, *rest)

    monkeypatch.setattr(Inverter, "stepper", spy)
    Inverter(model, InversionConfig(**SPARSE), CPU).invert(0)
    assert [steps for _, _, steps, _ in seen] == [0, 4, 8]
    assert len({id(parameter) for parameter, *_ in seen}) == len({id(optimizer) for *_, optimizer in seen}) == 1
    width = 32 // 2 + 1
    change = (seen[0][0].detach() - seen[2][1]).abs().amax(dim=(0, 1))
    change[:, [0, width - 1], 1] = 1  # of what a real image has no imaginary part
    assert (change > 0).all()


def test_a_projection_and_a_callback_change_what_is_optimized(model):
    """At a tiny learning rate nothing else does."""
    how = {**SPARSE, "lr": 1e-12}

    def grey(start) -> None:
        start.canvas.pixels.detach()[:, :, 1] = 0.25

    def shift(start) -> None:
        if start.number == 1:
            start.canvas.pixels.detach().copy_(start.canvas.pixels.detach() * 0.5)

    plain = Inverter(model, InversionConfig(**how), CPU).invert(0)
    for change, expected in (
        (grey, lambda pixels: pixels.index_fill(2, torch.tensor([1]), 0.25)),
        (shift, lambda pixels: pixels * 0.5),
    ):
        changed = Inverter(model, InversionConfig(**how), CPU).invert(0, on_stage=change)
        start = plain.images.shown()
        whole = torch.zeros(3, 16, 3, 8, 8)
        whole[torch.arange(3)[:, None], start.positions] = start.patches
        wanted = expected(whole)[torch.arange(3)[:, None], changed.images.positions]
        torch.testing.assert_close(changed.images.patches, wanted, rtol=0, atol=1e-3)
    dense = {"canvas": "spectral", "iterations": 2, "batch_size": 3, "lr": 1e-12}
    rough, smooth = (
        Inverter(model, InversionConfig(projections=names, **dense), CPU).invert(0).images
        for names in (("clamp",), ("lowpass:cutoff=0.3,every=2",))
    )
    canvas = Inverter(model, InversionConfig(**dense), CPU)._noise(3, generator()).patches()
    with torch.no_grad():
        canvas.pixels.copy_(rough.patches)
        LowPass(cutoff=0.3)(canvas)
    black, white = Inverter(model, InversionConfig(**dense), CPU).limits
    margin = EDGE * (white - black)
    wanted = canvas.pixels.detach().clamp(black + margin, white - margin)
    torch.testing.assert_close(smooth.patches, wanted, rtol=0, atol=0.02)
    assert (smooth.patches - rough.patches).abs().max() > 0.3


def test_a_canvas_that_nobody_changes_is_left_as_it_is(model, monkeypatch):
    """A look at every stage is no change: coefficients are not worked out of pixels again."""
    monkeypatch.setattr(SpectralCanvas, "overwrite", lambda *args: pytest.fail("overwritten"))
    Inverter(model, InversionConfig(**SPARSE), CPU).invert(0, on_stage=lambda start: start.canvas.pixels.mean())


def test_images_get_what_they_are_asked_for(model):
    batch = Inverter(model, InversionConfig(canvas="spectral", iterations=60, batch_size=4), CPU).invert(0)
    assert batch.losses[-5:].mean() < batch.losses[:5].mean() - 0.02
    assert batch.images.stopped is None


# ---- in a pool


def stops(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What the canvas showed whenever patches stopped: pixels, positions and which of them stopped."""
    seen, split = [], Inverter._split

    def spy(self, canvas, *args):
        kept, gone = split(self, canvas, *args)
        patches = canvas.patches()
        seen.append((patches.pixels.detach().clone(), patches.positions.clone(), gone))
        return kept, gone

    monkeypatch.setattr(Inverter, "_split", spy)
    return seen


def pictures(pool: ImagePool) -> torch.Tensor:
    """All patches (B, N, C, h, w) in [0, 1], by the numbers of the images."""
    files = sorted((pool.path / "images").rglob("*.png"), key=lambda file: int(file.stem))
    return pool.grid.patchify(torch.stack([pil_to_tensor(Image.open(file)) for file in files]) / 255)


def test_a_stopped_patch_is_frozen_as_it_was_when_it_stopped(tmp_path, model, monkeypatch):
    seen = stops(monkeypatch)
    pool = ImagePool(tmp_path, model, InversionConfig(**SPARSE))
    synthesize(pool, 3, CPU)
    shown, colour = pictures(pool), model.preprocessing.denormalize
    assert [gone.shape for *_, gone in seen] == [(3, 8), (3, 4)]
    rows, frozen = torch.arange(3)[:, None], []
    for pixels, positions, gone in seen:
        places = positions[rows, gone]
        frozen.append(places)
        assert (shown[rows, places] - colour(pixels[rows, gone])).abs().max() <= HALF_STEP
    final = Inverter(model, pool.config, CPU).invert(0)
    read = pool.read(3)
    assert torch.equal(read.positions, final.images.positions)
    assert torch.equal(torch.cat([*frozen, read.positions], dim=1).sort(dim=1).values, pool.grid.all_positions(3))
    assert (colour(read.patches) - colour(final.images.patches)).abs().max() <= HALF_STEP
    assert (shown[rows, read.positions] - colour(final.images.patches)).abs().max() <= HALF_STEP
    first_stop, second_stop = (colour(pixels) for pixels, *_ in seen[:2])
    kept_on = seen[1][1]
    assert (first_stop[rows, kept_on] - second_stop).abs().max() > 5 * HALF_STEP  # so that "when" matters


def test_stopped_patches_are_seen_in_pictures_and_fed_to_nothing(tmp_path, model):
    pool = ImagePool(tmp_path, model, InversionConfig(**SPARSE))
    synthesize(pool, 6, CPU)
    read, whole = pool.read(6), pool.read(6).filled(pool.grid)
    assert read.patches.shape == (6, 4, 3, 8, 8)
    assert whole.patches.shape == (6, 16, 3, 8, 8)
    assert torch.equal(whole.positions, pool.grid.all_positions(6))
    torch.testing.assert_close(model.preprocessing.denormalize(whole.patches), pictures(pool), rtol=0, atol=1e-5)
    assert torch.equal(whole.patches[torch.arange(6)[:, None], read.positions], read.patches)
    assert torch.equal(whole.labels, read.labels)
    assert (pictures(pool).flatten(2).amax(dim=2) > 0).all()
    record = json.loads((pool.path / "batches" / "000000.json").read_text())
    assert len(record["kept_positions"][0]) == 4
    part = pool.read(5, first=2).filled(pool.grid)
    assert torch.equal(part.patches, whole.patches[2:5])


def test_a_pool_of_pixels_is_pictured_as_it_is_read(tmp_path, model):
    pool = ImagePool(tmp_path, model, InversionConfig(**{**SPARSE, "canvas": "pixels"}))
    synthesize(pool, 3, CPU)
    read, shown = pool.read(3), pool.read(3).shown()
    assert torch.equal(read.patches, shown.patches)
    assert torch.equal(read.positions, shown.positions)
    assert (pictures(pool).flatten(2).amax(dim=2) == 0).sum(dim=1).tolist() == [12] * 3


def test_patches_that_left_as_an_image_are_not_in_the_next_ones_picture(tmp_path, model):
    config = InversionConfig(canvas="spectral", strategy="pri", pri_division=4, iterations=8, batch_size=8)
    pool = ImagePool(tmp_path, model, config)
    synthesize(pool, 8, CPU)
    assert (pictures(pool).flatten(2).amax(dim=2) > 0).sum(dim=1).tolist() == [4] * 8
    assert torch.equal(pool.read(8).shown().positions, pool.read(8).positions)
    positions = pool.read(8).positions.view(2, 16).sort(dim=1).values
    assert torch.equal(positions, pool.grid.all_positions(2))


def test_a_pool_says_what_was_optimized_and_seen_how(tmp_path, model):
    views = ("roll", "crop:area=0.5", "colour")
    settings = {**SPARSE, "views": views, "copies": 2}
    pool = ImagePool(tmp_path, model, InversionConfig(**settings))
    synthesize(pool, 3, CPU)
    said = json.loads((pool.path / "pool.json").read_text())["inversion"]
    assert (said["canvas"], said["views"], said["copies"]) == ("spectral", list(views), 2)
    assert (said["lr"], said["lr_schedule"], said["init"]) == (0.3, "cosine", "pink")
    found = ImagePool.existing(pool.path, model)
    assert found.config.settings() == pool.config.settings()
    assert torch.equal(found.read(3).shown().patches, pool.read(3).shown().patches)
    others = ({"canvas": "pixels"}, {"views": ("roll", "crop", "colour")}, {"copies": 1}, {"init": "white"})
    paths = {ImagePool(tmp_path, model, InversionConfig(**{**settings, **other})).path for other in others}
    assert len(paths | {pool.path}) == 5


VIEWED = {"views": ("roll", "flip", "crop", "colour", "contrast", "noise"), "copies": 2, "importance": "all"}
GROWING = {"strategy": "grow", "iterations": 14, "prune_it": (9,), "prune_ratio": (0.5,), "batch_size": 3}


@pytest.mark.parametrize(
    "settings",
    [SPARSE, {**SPARSE, **VIEWED}, {**GROWING, **VIEWED, "canvas": "spectral"}, {**GROWING, **VIEWED}],
    ids=["spectral", "views", "grow", "grow pixels"],
)
def test_killed_between_batches_and_started_again_it_ends_the_same(tmp_path, model, monkeypatch, settings):
    config, invert = InversionConfig(**settings), Inverter.invert

    def killed(self, batch, *args):
        if batch == 1:
            raise KeyboardInterrupt
        return invert(self, batch, *args)

    pools = [ImagePool(tmp_path / name, model, config) for name in ("whole", "killed")]
    synthesize(pools[0], 6, CPU)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Inverter, "invert", killed)
        synthesize(pools[1], 6, CPU)
    assert pools[1].batches() == 1
    synthesize(pools[1], 6, CPU)
    assert contents(pools[1].path) == contents(pools[0].path)
    assert len(contents(pools[0].path)) == 1 + 6 + 2


# ---- settings


def test_settings_of_what_was_there_before_are_what_they_were():
    published = {
        "iterations": 4000,
        "lr": 0.25,
        "betas": [0.5, 0.99],
        "lr_schedule": "constant",
        "warmup": 0,
        "weights": {"oh": 1.0, "tv2": 0.0001},
        "options": {"bn_source": "resnet50"},
        "strategy": "dense",
        "importance": "cls",
        "prune_it": [-1],
        "prune_ratio": [0.0],
        "targets": ["uniform"],
        "soft_label": 0.0,
        "projections": ["clamp"],
        "flip": True,
        "snapshots": [],
        "student": None,
        "batch_size": 32,
        "seed": 0,
        "dtype": "float32",
    }
    sparse = {"strategy": "smi", "prune_it": [50, 100, 200, 300], "prune_ratio": [0.3] * 4}

    vit = SparseViT(tiny_model().vit)

    def text(settings: dict | InversionConfig) -> str:
        settings = settings.of(vit).settings() if isinstance(settings, InversionConfig) else settings
        return json.dumps(settings, sort_keys=True)

    assert text(InversionConfig()) == text(published)
    assert text(configured("smi")) == text({**published, **sparse})
    assert text(InversionConfig(flip=False)) == text({**published, "flip": False})
    pink = configured("smi", init="pink", lr_schedule="cosine", iterations=400)
    wanted = {**published, **sparse, "init": "pink", "lr_schedule": "cosine", "iterations": 400}
    assert text(pink) == text(wanted)


def test_every_canvas_has_its_own_defaults_and_what_is_given_wins():
    def chosen(config: InversionConfig) -> tuple:
        return config.lr, config.lr_schedule, config.init

    assert chosen(InversionConfig()) == (0.25, "constant", "white")
    assert chosen(InversionConfig(canvas="spectral")) == (0.3, "cosine", "pink")
    assert chosen(configured("smi", canvas="spectral")) == (0.3, "cosine", "pink")
    assert chosen(configured("smi", canvas="pixels")) == (0.25, "constant", "white")
    assert configured("smi", canvas="spectral").iterations == 4000
    assert chosen(configured("smi", canvas="spectral", lr=0.3, init="white")) == (0.3, "cosine", "white")
    assert chosen(InversionConfig(canvas="spectral", lr_schedule="constant")) == (0.3, "constant", "pink")
    assert chosen(configured("psaq_vit")) == (0.2, "phases", "white")


@pytest.mark.parametrize("init", ["white", "pink"])
@pytest.mark.parametrize("canvas", CANVASES)
def test_settings_describe_the_configuration_they_are_of(canvas, init):
    config = InversionConfig(canvas=canvas, init=init, copies=3)
    again = InversionConfig.from_settings(config.settings())
    assert (again.canvas, again.init, again.lr, again.lr_schedule) == (canvas, init, config.lr, config.lr_schedule)
    assert again.settings() == config.settings()


def test_the_first_noise_is_drawn_behind_the_labels_on_every_canvas(model):
    """What comes out of the sigmoid is the same noise that pixels would start from."""
    config = InversionConfig(canvas="spectral", iterations=1, batch_size=3, init="white", targets=("0",))
    inverter, seen = Inverter(model, config, CPU), []
    inverter.invert(0, on_stage=lambda start: seen.append(start.canvas.pixels.detach().clone()))
    drawn = batch_generator(0, 0)
    draw_labels(("0",), 3, 5, drawn)
    noise = torch.randn(3, 3, 32, 32, generator=drawn)
    black, white = inverter.limits
    wanted = black + (white - black) * noise.sigmoid()
    torch.testing.assert_close(seen[0], SparseViT(model.vit).grid.patchify(wanted), rtol=0, atol=1e-4)


def test_reports_say_what_is_seen_of_stopped_patches(tmp_path, model):
    from dataclasses import asdict

    from utils.report_page import stopped

    seen = {}
    grown = {"canvas": "pixels", "strategy": "grow", "iterations": 14}
    for name, settings in {"spectral": SPARSE, "pixels": SPARSE | {"canvas": "pixels"}, "grown": grown}.items():
        pool = ImagePool(tmp_path, model, InversionConfig(**{**settings, "batch_size": 2}))
        seen[name] = stopped(asdict(synthesize(pool, 2, CPU)))
    assert "as they were" in seen["spectral"]
    assert "black" in seen["pixels"]
    assert seen["grown"] == ""
