"""Jitter and total variation on kept patches against the plain full-image formulas."""

import pytest
import torch

from inversion.canvas import Jitter, PatchCanvas, draw_jitters, mirrored_positions, rolled_positions, split_roll
from inversion.total_variation import total_variation
from models import PatchGrid

GRIDS = [PatchGrid(4, 5, 6, 4), PatchGrid(3, 3, 7, 7), PatchGrid(2, 2, 4, 4), PatchGrid(8, 8, 4, 4)]


def random_canvas(grid: PatchGrid, kept: int, dtype=torch.float64) -> PatchCanvas:
    generator = torch.Generator().manual_seed(kept)
    positions = torch.stack([torch.randperm(grid.count, generator=generator)[:kept].sort().values for _ in range(3)])
    pixels = torch.randn(3, kept, grid.channels, grid.height, grid.width, generator=generator, dtype=dtype)
    return PatchCanvas(grid, pixels, positions)


def jittered_positions(positions: torch.Tensor, grid: PatchGrid, jitter: Jitter) -> torch.Tensor:
    """Where patches are after roll and flip."""
    return mirrored_positions(rolled_positions(positions, grid, jitter), grid, jitter)


def rolled(images: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    images = images.roll((jitter.dy, jitter.dx), dims=(-2, -1))
    return images.flip(-1) if jitter.flip else images


@pytest.mark.parametrize("grid", GRIDS)
def test_dense_windows_are_the_plain_roll_and_flip(grid):
    """An index image, rolled and flipped in full, equals what the windows of all patches show."""
    height, width = grid.image_size
    index = torch.arange(3 * height * width, dtype=torch.float32).view(1, 3, height, width)
    canvas = PatchCanvas(grid, grid.patchify(index), grid.all_positions(1))
    for dy in range(-height, height + 1, 3):
        for dx in range(-width, width + 1):
            for flip in (False, True):
                jitter = Jitter(dy, dx, flip)
                windows = canvas.windows(jitter).detach()
                shown = windows.flip(-1) if flip else windows
                image = grid.unpatchify(shown, jittered_positions(canvas.positions, grid, jitter))
                assert torch.equal(image, rolled(index, jitter)), jitter


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_sparse_windows_read_zero_where_patches_stopped(grid, share):
    """Windows and their gradient equal roll, flip and gather on the zero-filled image, by autograd."""
    canvas = random_canvas(grid, max(1, int(grid.count * share)))
    rows = torch.arange(3)[:, None]
    for jitter in draw_jitters(20, grid, torch.Generator().manual_seed(1)):
        target = jittered_positions(canvas.positions, grid, jitter)
        leaf = canvas.pixels.detach().clone().requires_grad_()
        full = rolled(grid.unpatchify(leaf, canvas.positions), jitter)
        expected = grid.patchify(full)[rows, target]
        windows = canvas.windows(jitter, torch.float64)
        shown = windows.flip(-1) if jitter.flip else windows
        assert torch.equal(shown, expected)
        weight = torch.randn_like(expected)
        canvas.pixels.grad = None
        (shown * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(canvas.pixels.grad, leaf.grad, rtol=1e-6, atol=1e-6)


def test_roll_is_split_to_the_nearest_patch():
    for patch in (4, 7, 14, 16):
        for roll in range(-3 * patch, 3 * patch):
            whole, rest = split_roll(roll, patch)
            assert whole * patch + rest == roll
            assert abs(rest) <= patch / 2


def test_jitter_covers_an_eighth_of_the_image_and_both_flips():
    draws = draw_jitters(3000, PatchGrid(14, 14, 16, 16), torch.Generator().manual_seed(0))
    assert {draw.dy for draw in draws} == set(range(-28, 29)) == {draw.dx for draw in draws}
    assert 0.4 < sum(draw.flip for draw in draws) / len(draws) < 0.6


def plain_tv(leaf: torch.Tensor, canvas: PatchCanvas, order: int) -> torch.Tensor:
    """Total variation on the full image; a mask of kept pixels says which pairs count."""
    image = canvas.grid.unpatchify(leaf, canvas.positions)
    mask = canvas.grid.unpatchify(torch.ones_like(leaf), canvas.positions)

    def pairs(x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (x[..., :, :-1], x[..., :, 1:]),
            (x[..., :-1, :], x[..., 1:, :]),
            (x[..., :-1, :-1], x[..., 1:, 1:]),
            (x[..., 1:, :-1], x[..., :-1, 1:]),
        ]

    total = 0
    for (a, b), (kept_a, kept_b) in zip(pairs(image), pairs(mask), strict=True):
        both = kept_a * kept_b
        difference = (a - b) * both
        total = total + (difference.norm() if order == 2 else difference.abs().sum() / both.sum().clamp(min=1))
    return total


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", [0.01, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_total_variation_counts_pairs_in_kept_patches_only(grid, share, order):
    """Value and gradient against the masked full-image formula; a stopped patch adds nothing."""
    canvas = random_canvas(grid, max(1, int(grid.count * share)))
    leaf = canvas.pixels.detach().clone().requires_grad_()
    expected = plain_tv(leaf, canvas, order)
    value = total_variation(canvas, order)
    torch.testing.assert_close(value, expected, check_dtype=False)
    (2 * value).backward()
    (2 * expected).backward()
    torch.testing.assert_close(canvas.pixels.grad, leaf.grad)


def test_total_variation_of_a_flat_image_has_zero_gradient():
    grid = PatchGrid(2, 3, 4, 4)
    canvas = PatchCanvas(grid, torch.full((1, 6, 3, 4, 4), 0.5), grid.all_positions(1))
    total_variation(canvas, 2).backward()
    assert torch.equal(canvas.pixels.grad, torch.zeros_like(canvas.pixels))
