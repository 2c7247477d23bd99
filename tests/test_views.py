"""Views: what the model is fed, against plain code on full images; gradients, chance and settings."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import inversion.views
from inversion import VIEWS, InversionConfig, Inverter
from inversion.canvas import Jitter, PatchCanvas, draw_jitters
from inversion.capture import EAGER_STEPS
from inversion.views import NOISE_PATCHES, SEEN, Crop, Draw, Seen, Views, canonical_views
from models import DEFAULT_MODEL, PatchGrid, load_model
from tests.conftest import tiny_model
from tests.test_canvas import GRIDS, random_canvas
from tests.test_capture import TapedInverter
from utils.errors import UserError

CPU = torch.device("cpu")
BATCH = 3
WIDE = {"crop": "crop:area=0.1"}
ALL = tuple(WIDE.get(name, name) for name in VIEWS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the same in plain code, on full images


def overlap(start: float, end: float, cell: int) -> float:
    return max(0.0, min(end, cell + 1) - max(start, cell))


def coverage(grid: PatchGrid, kept: list[int], side: float, y: float, x: float) -> list[float]:
    """Share of every patch of a crop that shows kept patches."""
    shares = []
    for row, col in itertools.product(range(grid.rows), range(grid.cols)):
        top, left = (1 - side) * y * grid.rows + row * side, (1 - side) * x * grid.cols + col * side
        seen = (
            overlap(top, top + side, one // grid.cols) * overlap(left, left + side, one % grid.cols) for one in kept
        )
        shares.append(sum(seen) / side**2)
    return shares


def widened(grid: PatchGrid, kept: list[int], side: float, y: float, x: float) -> tuple[float, list[float]]:
    """The side of a crop that is enlarged towards the whole image until it covers as many places as are kept."""
    for third in range(4):
        tried = side + (1 - side) * third / 3
        shares = coverage(grid, kept, tried, y, x)
        if sum(share > SEEN for share in shares) >= len(kept):
            return tried, shares
    raise AssertionError("the whole image shows all kept patches")


def bilinear(image: torch.Tensor, side: float, y: float, x: float) -> torch.Tensor:
    """A crop (C, H, W) of an image, as large as the image, pixel by pixel."""
    for dim, place in ((1, y), (2, x)):
        size, parts = image.shape[dim], []
        for line in range(size):
            at = min(max((1 - side) * place * size + (line + 0.5) * side - 0.5, 0.0), size - 1.0)
            low = int(at)
            high = min(low + 1, size - 1)
            parts.append(image.select(dim, low) * (1 - at + low) + image.select(dim, high) * (at - low))
        image = torch.stack(parts, dim=dim)
    return image


def zero_filled(canvas: PatchCanvas) -> torch.Tensor:
    grid, pixels = canvas.grid, canvas.pixels
    images = torch.zeros(len(pixels), grid.channels, *grid.image_size, dtype=pixels.dtype)
    for image, places in enumerate(canvas.positions.tolist()):
        for index, place in enumerate(places):
            top, left = place // grid.cols * grid.height, place % grid.cols * grid.width
            images[image, :, top : top + grid.height, left : left + grid.width] = pixels[image, index]
    return images


def at(images: torch.Tensor, grid: PatchGrid, positions: torch.Tensor) -> torch.Tensor:
    def patch(image: torch.Tensor, place: int) -> torch.Tensor:
        top, left = place // grid.cols * grid.height, place % grid.cols * grid.width
        return image[:, top : top + grid.height, left : left + grid.width]

    rows = zip(images, positions.tolist(), strict=True)
    return torch.stack([torch.stack([patch(image, place) for place in places]) for image, places in rows])


def plain_look(names: tuple[str, ...], canvas: PatchCanvas, draw: Draw, positions: torch.Tensor) -> torch.Tensor:
    """What is fed at `positions` (B, n): one view after another, of the whole image with zeros where nothing is fed."""
    grid, images, columns = canvas.grid, zero_filled(canvas), iter(draw.numbers.double().unbind(1))
    if "roll" in names:
        images = images.roll((draw.jitter.dy, draw.jitter.dx), dims=(2, 3))
    unmirrored = positions
    if "flip" in names and draw.jitter.flip:
        unmirrored = positions // grid.cols * grid.cols + grid.cols - 1 - positions % grid.cols
    if "crop" in names:
        area, y, x = 0.1 + 0.9 * next(columns), next(columns), next(columns)
        parts = []
        for image, crop in enumerate(zip(area.sqrt().tolist(), y.tolist(), x.tolist(), strict=True)):
            kept = moved(canvas.positions[image], grid, draw.jitter)
            rolled = at(images[image : image + 1], grid, torch.tensor([kept]))
            before = zero_filled(PatchCanvas(grid, rolled, torch.tensor([kept])))[0]  # what was fed without the crop
            side, shares = crop[0], [1.0] * grid.count
            if len(kept) < grid.count:
                side, shares = widened(grid, kept, *crop)
            fed = [shares[place] for place in unmirrored[image].tolist()]
            assert min(fed) > SEEN  # nothing is fed at a place where nothing lands
            assert sum(fed) == pytest.approx(sum(sorted(shares)[-len(kept) :]), rel=1e-5)
            parts.append(bilinear(before, side, *crop[1:]))
        images = torch.stack(parts)
    if "colour" in names:
        numbers = torch.stack([next(columns) for _ in range(6)], dim=1)
        scale, shift = ((2 * numbers[:, :3] - 1) * 0.5).exp(), (2 * numbers[:, 3:] - 1) * 0.5
        images = images * scale[:, :, None, None] + shift[:, :, None, None]
    if "contrast" in names:
        images = images * ((2 * next(columns) - 1) * 0.5).exp()[:, None, None, None]
    patches = at(images, grid, unmirrored)
    if "noise" in names:
        deviation, start = 0.3 * next(columns), (next(columns) * NOISE_PATCHES).long()
        noise = torch.randn(NOISE_PATCHES, grid.pixels, generator=generator())
        for image, first in enumerate(start.tolist()):
            rows = [(first + index) % NOISE_PATCHES for index in range(positions.shape[1])]
            patches[image] += deviation[image] * noise[rows].double().view(patches[image].shape)
    return patches


def moved(positions: torch.Tensor, grid: PatchGrid, jitter: Jitter) -> list[int]:
    """Where patches are whose corners were rolled to the nearest place."""
    places = []
    for one in positions.tolist():
        row = (one // grid.cols + math.floor(jitter.dy / grid.height + 0.5)) % grid.rows
        col = (one % grid.cols + math.floor(jitter.dx / grid.width + 0.5)) % grid.cols
        places.append(row * grid.cols + col)
    return places


def canvas_of(canvas: PatchCanvas, pixels: torch.Tensor, plain: bool = False) -> PatchCanvas:
    return PatchCanvas(canvas.grid, pixels, canvas.positions, plain)


SETS = [(name,) for name in VIEWS] + [("roll", "flip", "crop"), ("crop", "colour"), tuple(VIEWS)]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("names", SETS, ids="-".join)
@pytest.mark.parametrize("grid", GRIDS[:3])
def test_what_is_fed_is_the_view_of_the_whole_image_with_zeros_where_patches_stopped(grid, names, plain):
    views = Views([WIDE.get(name, name) for name in names], grid, CPU, plain)
    for kept in (1, grid.count // 3, grid.count - 1, grid.count):
        canvas = random_canvas(grid, kept)
        canvas = canvas_of(canvas, canvas.pixels.detach(), plain)
        for draw in views.draws(3, BATCH, generator(kept)):
            seen = views.look(canvas, draw, torch.float64)
            assert seen.positions.shape == (BATCH, kept)  # whatever the draw is
            assert all(len({*row}) == kept for row in seen.positions.tolist())
            with torch.no_grad():
                expected = plain_look(names, canvas, draw, seen.positions)
            torch.testing.assert_close(seen.patches.detach(), expected, rtol=1e-5, atol=2e-5)
            assert seen.mirrored == ("flip" in names and draw.jitter.flip)


def test_a_crop_of_whole_pixels_is_a_part_of_the_enlarged_image():
    grid = GRIDS[3]
    canvas, views = random_canvas(grid, grid.count), Views(["crop:area=0.1"], grid, CPU)
    numbers = torch.tensor([[(0.25 - 0.1) / 0.9, y / 16, x / 16] for y, x in ((0, 3), (8, 16), (5, 0))])
    seen = views.look(canvas, Draw(Jitter(0, 0, False), numbers), torch.float64)
    found = grid.unpatchify(seen.patches.detach(), seen.positions)
    double = F.interpolate(zero_filled(canvas).detach(), scale_factor=2, mode="bilinear", align_corners=False)
    for image, (y, x) in enumerate(((0, 3), (8, 16), (5, 0))):
        expected = double[image, :, 2 * y : 2 * y + 32, 2 * x : 2 * x + 32]
        torch.testing.assert_close(found[image], expected, rtol=0, atol=1e-5)


def test_a_crop_feeds_kept_patches_alone():
    """One patch, and patches in a corner: a crop that misses them is enlarged until it does not."""
    grid = PatchGrid(4, 4, 4, 4)
    views = Views(["crop:area=0.01"], grid, CPU)
    for places in ([0], [15], [0, 1, 4, 5], [3, 12], [0, 3, 12, 15]):
        positions = torch.tensor([places] * 200)
        canvas = PatchCanvas(grid, torch.ones(200, len(places), 3, 4, 4), positions)
        seen = views.look(canvas, views.draws(1, 200, generator())[0], torch.float32)
        assert seen.patches.shape[:2] == positions.shape
        assert (seen.patches.detach().amax(dim=(2, 3, 4)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_crops_by_points_are_crops_by_weights(monkeypatch, dtype):
    """The fast reading against the one that a GPU has, values and gradients."""
    used, by_points = [], inversion.views._by_points
    monkeypatch.setattr(inversion.views, "_by_points", lambda *args: used.append(1) or by_points(*args))
    for grid, kept in ((GRIDS[0], 7), (GRIDS[1], 9), (GRIDS[3], 64), (GRIDS[3], 1)):
        start, found = random_canvas(grid, kept, dtype), []
        draw = Views(["crop:area=0.1"], grid, CPU).draws(1, BATCH, generator())[0]
        for plain in (False, True):
            views, canvas = Views(["crop:area=0.1"], grid, CPU, plain), canvas_of(start, start.pixels.detach(), plain)
            seen = views.look(canvas, draw, dtype)
            (seen.patches * torch.randn(seen.patches.shape, generator=generator())).sum().backward()
            found.append((seen.patches, seen.positions, canvas.pixels.grad))
        (fast, fed, fast_grad), (plain, also_fed, plain_grad) = found
        assert torch.equal(fed, also_fed)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(fast, plain, **close)
        torch.testing.assert_close(fast_grad, plain_grad, **close)
    assert len(used) == 4


def test_crops_of_a_gpu_are_the_same_with_gradients_written_out():
    grid, start = GRIDS[0], random_canvas(GRIDS[0], 7)
    u = torch.rand(BATCH, 3, generator=generator())
    _, chosen = Crop()(start.pixels.detach(), start.positions, u, grid, True)
    lines = [torch.rand(BATCH, size, generator=generator()).double() * (size - 1) for size in grid.image_size]
    found = []
    for plain in (False, True):
        leaf = start.pixels.detach().clone().requires_grad_()
        read = inversion.views._by_weights(leaf, start.positions, *lines, chosen, grid, plain)
        (read * torch.randn(read.shape, generator=generator())).sum().backward()
        found.append((read, leaf.grad))
    for fast, expected in zip(*found, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("names", [*[(name,) for name in VIEWS], tuple(VIEWS)], ids="-".join)
def test_gradients_are_finite_differences(names, plain):
    """To kept patches, whatever was done to the image."""
    grid = PatchGrid(2, 3, 2, 2)
    views, kept = Views([WIDE.get(name, name) for name in names], grid, CPU, plain), random_canvas(grid, 3)
    draw = views.draws(1, BATCH, generator())[0]
    draw = draw._replace(jitter=Jitter(1 if "roll" in names else 0, -1 if "roll" in names else 0, "flip" in names))

    def fed(pixels: torch.Tensor) -> torch.Tensor:
        return views.look(canvas_of(kept, pixels, plain), draw, torch.float64).patches.sin()

    assert torch.autograd.gradcheck(fed, kept.pixels.detach().requires_grad_())


def test_a_crop_of_a_mirrored_image_is_the_mirrored_crop():
    """The crop comes first: what the model sees is the crop from right to left."""
    grid, views = PatchGrid(3, 4, 4, 4), Views(["flip", "crop:area=0.2"], PatchGrid(3, 4, 4, 4), CPU)
    canvas = random_canvas(grid, 5)
    draw = views.draws(1, BATCH, generator())[0]
    shown = []
    for mirrored in (False, True):
        seen = views.look(canvas, Draw(Jitter(0, 0, mirrored), draw.numbers), torch.float64)
        patches = seen.patches.flip(-1) if seen.mirrored else seen.patches  # what the model's projection does
        shown.append(grid.unpatchify(patches.detach(), seen.positions))
    assert torch.equal(shown[1], shown[0].flip(-1))
    assert not torch.equal(shown[1], shown[0])


def test_images_in_lower_precision_are_fed_in_it():
    grid = GRIDS[0]
    canvas, views = random_canvas(grid, 7, torch.float32), Views(ALL, grid, CPU)
    draw = views.draws(1, BATCH, generator())[0]
    exact, low = (views.look(canvas, draw, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert low.patches.dtype == torch.bfloat16
    assert torch.equal(exact.positions, low.positions)
    torch.testing.assert_close(low.patches.float(), exact.patches, rtol=0.02, atol=0.05)


# ---- chance


def test_every_image_and_every_step_has_a_draw_of_its_own_and_a_seed_always_the_same():
    grid = PatchGrid(4, 4, 4, 4)
    views = Views(ALL, grid, CPU)
    first, again, other = (views.draws(5, 4, generator(seed)) for seed in (0, 0, 1))
    rows = torch.cat([draw.numbers for draw in first])
    assert rows.shape == (20, views.numbers)
    assert len({*map(tuple, rows.tolist())}) == 20
    assert all(torch.equal(a.numbers, b.numbers) and a.jitter == b.jitter for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.numbers, b.numbers) for a, b in zip(first, other, strict=True))
    same = PatchCanvas(grid, torch.randn(1, 9, 3, 4, 4).expand(4, -1, -1, -1, -1), torch.arange(9).expand(4, -1))
    for name in ("crop", "colour", "contrast", "noise"):
        one = Views([name], grid, CPU)
        looks = [one.look(same, draw, torch.float32).patches.detach() for draw in one.draws(2, 4, generator())]
        shown = [image for look in looks for image in look]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(shown, 2)), name


@pytest.mark.parametrize("views", [("roll", "flip"), ("roll",), ("roll:share=0.3", "flip")])
def test_the_published_draws_are_what_they_were(views):
    """Labels, noise, jitter, then what the terms draw: pools of the published method have the same bytes."""
    share = {"roll:share=0.3": 0.3}.get(views[0], 1 / 8)
    ours, theirs = generator(3), generator(3)
    drawn = Views(views, GRIDS[3], CPU).draws(6, BATCH, ours)
    assert [draw.jitter for draw in drawn] == draw_jitters(6, GRIDS[3], theirs, "flip" in views, share)
    assert all(draw.numbers.shape == (BATCH, 0) for draw in drawn)
    assert torch.equal(ours.get_state(), theirs.get_state())


def drawn(text: str, grid: PatchGrid, patches: torch.Tensor, positions: torch.Tensor) -> Seen:
    """One look at each of (B, n, C, h, w)."""
    views = Views([text], grid, CPU)
    (draw,) = views.draws(1, len(patches), generator())
    return views.look(PatchCanvas(grid, patches, positions), draw, torch.float64)


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """Each tenth of the range has about a tenth of the values, and nothing is outside."""
    counts = torch.histc(values, 10, low, high) / values.numel()
    assert counts.sum() == pytest.approx(1)
    assert counts.min() > 0.07
    assert counts.max() < 0.13


def test_rolls_reach_as_far_as_they_say():
    grid, reached = PatchGrid(4, 5, 6, 4), set()
    for draw in Views(["roll:share=0.25"], grid, CPU).draws(2000, 1, generator()):
        reached.add((draw.jitter.dy, draw.jitter.dx))
        assert not draw.jitter.flip
    assert {dy for dy, _ in reached} == {*range(-6, 7)}
    assert {dx for _, dx in reached} == {*range(-5, 6)}
    still = Views(["flip"], grid, CPU).draws(100, 1, generator())
    assert {(draw.jitter.dy, draw.jitter.dx) for draw in still} == {(0, 0)}
    assert {draw.jitter.flip for draw in still} == {False, True}


def test_colours_are_drawn_for_each_channel():
    grid = PatchGrid(1, 1, 1, 2)
    pixels = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 1, 2).expand(3000, 1, 3, 1, 2)
    seen = drawn("colour:scale=1,shift=0.4", grid, pixels, torch.zeros(3000, 1, dtype=torch.long)).patches
    shift, scale = seen[..., 0].flatten(1).detach(), (seen[..., 1] - seen[..., 0]).flatten(1).detach().log()
    for channel in range(3):
        assert_uniform(shift[:, channel], -0.4, 0.4)
        assert_uniform(scale[:, channel], -1, 1)
    together = torch.corrcoef(torch.cat([shift, scale], dim=1).t()) - torch.eye(6)
    assert together.abs().max() < 0.08


def test_contrast_is_one_for_all_channels():
    grid = PatchGrid(1, 1, 1, 1)
    seen = drawn("contrast:scale=0.8", grid, torch.ones(3000, 1, 3, 1, 1).double(), torch.zeros(3000, 1).long())
    scale = seen.patches.detach().flatten(1).log()
    assert torch.equal(scale, scale[:, :1].expand_as(scale))
    assert_uniform(scale[:, 0], -0.8, 0.8)


def test_noise_is_normal_and_as_strong_as_was_drawn():
    grid = PatchGrid(3, 3, 8, 8)
    seen = drawn("noise:deviation=2", grid, torch.zeros(1500, 9, 3, 8, 8), torch.arange(9).expand(1500, -1)).patches
    noise = seen.detach().flatten(1)
    deviation = noise.std(dim=1)
    assert deviation.max() < 2.1
    assert_uniform(deviation.clamp(max=2), 0, 2)
    normal = noise[deviation > 0.2] / deviation[deviation > 0.2, None]
    assert normal.mean().abs() < 0.01
    assert normal.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    patches = normal.view(len(normal), 9, -1)
    assert (patches[:, 0] * patches[:, 1]).mean().abs() < 0.01  # no patch has another one's


def test_crops_are_uniform_in_area_and_place():
    """Read off an image whose pixels are their own coordinates."""
    grid = PatchGrid(1, 1, 32, 32)
    line = torch.arange(32.0, dtype=torch.float64)
    image = torch.stack([line[:, None].expand(32, 32), line.expand(32, 32), torch.zeros(32, 32).double()])
    seen = drawn("crop:area=0.3", grid, image.expand(3000, 1, 3, 32, 32), torch.zeros(3000, 1).long())
    rows, cols = seen.patches[:, 0, 0, :, 16].detach(), seen.patches[:, 0, 1, 16].detach()
    side = rows[:, 20] - rows[:, 19]
    torch.testing.assert_close(cols[:, 20] - cols[:, 19], side, rtol=0, atol=1e-4)  # as high as it is wide
    assert_uniform(side.square().clamp(0.3, 1), 0.3, 1)
    small = side < 0.9
    for read in (rows, cols):
        start = read[:, 16] + 0.5 - 16.5 * side
        assert_uniform((start / (1 - side) / 32)[small].clamp(0, 1), 0, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_draw_survives_being_one_row(batch):
    grid = PatchGrid(4, 5, 6, 4)
    views, canvas = Views(ALL, grid, CPU), random_canvas(grid, 9, torch.float32)
    few = PatchCanvas(grid, canvas.pixels.detach()[:batch], canvas.positions[:batch])
    for draw in views.draws(8, batch, generator()):
        row = draw.packed()
        assert row.shape == (3 + batch * views.numbers,)
        found = Draw.unpacked(row, batch)
        assert [int(value) for value in found.jitter] == [int(value) for value in draw.jitter]
        assert torch.equal(found.numbers, draw.numbers)
        seen, expected = (views.look(few, one, torch.float32) for one in (found, draw))
        assert torch.equal(seen.positions, expected.positions)
        assert bool(seen.mirrored) == expected.mirrored
        torch.testing.assert_close(seen.patches, expected.patches)


def test_numbers_of_one_are_seen_as_well():
    every, grid = Views(ALL, PatchGrid(4, 4, 4, 4), CPU), PatchGrid(4, 4, 4, 4)
    ones = Draw(Jitter(0, 0, False), torch.ones(BATCH, every.numbers))
    seen = every.look(random_canvas(grid, 5), ones, torch.float64)
    assert seen.patches.isfinite().all()


# ---- settings


def test_settings_that_are_the_defaults_and_the_order_do_not_matter():
    asked = ["noise:deviation=0.3", "colour:scale=0.5,shift=0.2", "crop:area=0.35", "flip", "roll:share=0.125"]
    for order in (asked, asked[::-1]):
        assert canonical_views(order) == ("roll", "flip", "crop", "colour:shift=0.2", "noise")
    assert canonical_views(["crop:"]) == ("crop",)
    assert canonical_views([]) == ()


def test_a_configuration_names_its_views_where_they_are_not_the_published_ones():
    def named(**fields) -> list | None:
        config = InversionConfig(**fields)
        again = InversionConfig.from_settings(config.settings())
        assert again.settings() == config.settings()
        return config.settings().get("views")

    assert named() is None
    assert named(flip=False) is None
    assert named(views=("flip", "roll:share=0.125")) is None
    assert named(views=("roll",)) is None
    assert InversionConfig(views=("roll",)).settings() == InversionConfig(flip=False).settings()
    assert named(views=("flip",)) == ["flip"]
    assert named(views=("flip",), flip=False) == []
    assert named(views=("roll:share=0.2", "flip")) == ["roll:share=0.2", "flip"]
    assert named(views=("noise", "roll", "flip")) == ["roll", "flip", "noise"]
    assert named(views=("roll", "flip", "crop:area=0.5")) == ["roll", "flip", "crop:area=0.5"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("zoom", "--views zoom is unknown; there are roll, flip, crop, colour, contrast, noise"),
        ("crop:area=0", "--views crop: area 0 is not in"),
        ("crop:area=nan", "--views crop: area nan"),
        ("crop:side=0.5", "--views crop:side=0.5: .* like area=0.35"),
        ("crop:area", "like area=0.35"),
        ("flip:share=1", "--views flip:share=1: it has no settings"),
        ("roll:share=1.5", r"--views roll: share 1.5 is not in \[0, 1\]"),
        ("colour:shift=-1", "--views colour: shift -1"),
        ("contrast:scale=inf", "--views contrast: scale inf"),
        ("noise:deviation=x", "like deviation=0.3"),
    ],
)
def test_wrong_views(text, why):
    with pytest.raises(UserError, match=why):
        InversionConfig(views=(text,))


def test_no_view_twice():
    with pytest.raises(UserError, match="--views has crop twice"):
        InversionConfig(views=("crop", "crop:area=0.5"))


# ---- in an inversion


def still(start) -> None:
    """Pixels where clamping leaves them, so that nothing moves at a tiny learning rate."""
    start.canvas.pixels.detach().clamp_(-1, 1)


def test_a_step_of_several_copies_is_the_mean_over_as_many_looks():
    """The same draws one at a time: pixels stand still, so a loss is one of its look alone."""
    model = load_model(DEFAULT_MODEL)
    how = {"batch_size": BATCH, "lr": 1e-20, "views": ALL, "weights": {"oh": 1.0}}
    single, several = (
        Inverter(model, InversionConfig(iterations=6 // copies, copies=copies, **how), CPU).invert(0, on_stage=still)
        for copies in (1, 3)
    )
    assert single.losses.std() > 1e-3
    torch.testing.assert_close(several.losses, single.losses.view(2, 3).mean(dim=1), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_several_copies_is_the_mean_of_theirs():
    inverter = Inverter(load_model(DEFAULT_MODEL), InversionConfig(batch_size=BATCH, views=ALL, copies=2), CPU)
    draws, targets = inverter.spans[0].views.draws(2, BATCH, generator()), torch.eye(10)[:BATCH]
    start, grads = random_canvas(inverter.vit.grid, 9, torch.float32), []
    for chosen in ((draws[0],), (draws[1],), tuple(draws)):
        canvas = PatchCanvas(start.grid, start.pixels.detach().clone(), start.positions, limits=inverter.limits)
        inverter._step(canvas, inverter.adam(canvas), targets, chosen)
        grads.append(canvas.pixels.grad)
    torch.testing.assert_close(grads[2], (grads[0] + grads[1]) / 2, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(grads[0], grads[1], rtol=0.1, atol=1e-4)


SPARSE = {"iterations": 8, "prune_it": (2, 5), "prune_ratio": (0.5, 0.3), "batch_size": BATCH}


@pytest.mark.parametrize("canvas", ["pixels", "spectral"])
def test_all_views_at_once_in_recordings(model, canvas):
    """Replays read the draws of their own step, those of all copies, and count for every coefficient."""
    how = {
        "views": ALL,
        "copies": 2,
        "canvas": canvas,
        **SPARSE,
        "iterations": 12,
        "prune_it": (6,),
        "prune_ratio": (0.5,),
    }
    recorded, launched = TapedInverter(model, **how), TapedInverter(model, **how)
    batch = recorded.invert(0)
    assert recorded.recorder.agrees is True
    assert recorded.recorder.replays == 1 + 12 - 2 * EAGER_STEPS
    launched.recorder.agrees = False  # so that nothing is recorded
    wanted = launched.invert(0)
    torch.testing.assert_close(batch.losses, wanted.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.images.patches, wanted.images.patches, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("canvas", ["pixels", "spectral"])
def test_all_views_at_once_with_and_without_what_is_fast(model, canvas):
    config = InversionConfig(views=ALL, copies=2, canvas=canvas, **SPARSE)
    batches = [kind.invert(0) for kind in (Inverter(model, config, CPU), Inverter(model, config, CPU, eager=True))]
    torch.testing.assert_close(batches[0].losses, batches[1].losses, rtol=1e-3, atol=1e-3)
    assert batches[0].images.positions.shape == (BATCH, 5)


def test_the_order_of_names_gives_the_same_images():
    made = [
        Inverter(tiny_model(), InversionConfig(views=views, **SPARSE), CPU).invert(0).images.patches
        for views in (ALL, ALL[::-1], ("roll", "flip"))
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
