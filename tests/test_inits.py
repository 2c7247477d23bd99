"""What pixels are at first."""

from __future__ import annotations

import pytest
import torch

from inversion import ImagePool, InversionConfig, Inverter
from inversion.inits import INITS
from tests.conftest import tiny_model
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(32, 32), (31, 48)])
def test_pink_noise_has_the_spectrum_and_the_brightness_of_natural_images(size):
    """Amplitude 1 / frequency, so power in an octave above is a quarter; variance 1; images differ in their mean."""
    images = INITS["pink"]((256, 3, *size), torch.Generator().manual_seed(0))
    assert images.shape == (256, 3, *size)
    assert images.square().mean().item() == pytest.approx(1, abs=0.1)
    assert images.mean(dim=(2, 3)).std() > 0.15  # of white noise about 1 / 32
    power = torch.fft.fft2(images[:, 0]).abs().square().mean(dim=0)
    for low, high in ((2, 4), (3, 6), (5, 10)):
        assert (power[0, low] / power[0, high]).item() == pytest.approx(4, rel=0.4)
        assert (power[low, 0] / power[high, 0]).item() == pytest.approx(4, rel=0.4)
    channels = torch.corrcoef(images.transpose(0, 1).flatten(1))
    assert channels[0, 1].item() == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("start", ["leaves", "scenes"])
@pytest.mark.parametrize(("channels", "size"), [(3, (64, 64)), (1, (31, 48))])
def test_dead_leaves_and_scenes_have_things_and_grounds(channels, size, start):
    """Edges between flat areas: few large differences of neighbours and many small ones, where noise has neither."""
    made, noise = (INITS[name]((64, channels, *size), torch.Generator().manual_seed(0)) for name in (start, "pink"))
    assert made.shape == noise.shape and made.isfinite().all()
    assert abs(made.mean()) < 0.2 and 0.4 < made.var() < 1.6
    heavy_tails = {}
    for name, images in ((start, made), ("pink", noise)):
        differences = images.diff(dim=-1).flatten(1)
        heavy_tails[name] = (differences.pow(4).mean(dim=1) / differences.square().mean(dim=1).square()).median()
    assert heavy_tails[start] > 3.5 > 3.2 > heavy_tails["pink"]  # 3 of a normal distribution
    again = INITS[start]((64, channels, *size), torch.Generator().manual_seed(0))
    assert torch.equal(made, again)
    assert len({image.mean().item() for image in made}) == 64


def test_scenes_have_a_ground_of_two_parts_and_a_thing_near_the_middle():
    """Above differs from below more than left from right, and the middle from its sides more than these do."""
    apart = {}
    for name in ("leaves", "scenes"):
        images = INITS[name]((1024, 1, 64, 64), torch.Generator().manual_seed(0))
        rows, cols = images.mean(dim=(1, 3)), images.mean(dim=(1, 2))
        top, bottom, left, right = rows[:, :16], rows[:, -16:], cols[:, :16], cols[:, -16:]
        upright, level = ((a.mean(dim=1) - b.mean(dim=1)).std() for a, b in ((bottom, top), (right, left)))
        one, middle, other = (images[..., 24:40, first : first + 8].mean(dim=(1, 2, 3)) for first in (0, 28, 56))
        apart[name] = (upright / level).item(), ((middle - (one + other) / 2).std() / (one - other).std()).item()
    assert apart["leaves"] == pytest.approx((1, 0.75**0.5), abs=0.1)  # as if all places were independent
    assert apart["scenes"][0] > 1.5 and apart["scenes"][1] > 0.75**0.5 + 0.1


@pytest.mark.parametrize("start", ["leaves", "scenes"])
@pytest.mark.parametrize("size", [(64, 64), (31, 48)])
def test_a_leaf_is_painted_where_it_reaches_and_nothing_else_of_it_would_be_seen(size, start, monkeypatch):
    """As if every leaf were painted on the whole image, to a seventeenth of a step of 8 bits (1 / 255 / 0.23)."""
    made = INITS[start]((32, 3, *size), torch.Generator().manual_seed(0))
    monkeypatch.setattr("inversion.inits.CLEAR", 1000)
    whole = INITS[start]((32, 3, *size), torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, whole, rtol=0, atol=0.001)


def test_images_start_from_the_noise_that_was_asked_for():
    shown = {}
    for name in INITS:
        config = InversionConfig(iterations=1, batch_size=16, init=name)
        Inverter(tiny_model(), config, CPU).invert(0, on_stage=lambda start, name=name: shown.update({name: start}))
    spread = {name: start.canvas.pixels.mean(dim=(1, 2, 3, 4)).std().item() for name, start in shown.items()}
    assert spread["pink"] > 5 * spread["white"]


def test_another_start_is_another_pool_and_the_published_one_is_where_it_was(tmp_path):
    model = tiny_model()
    white, pink = (ImagePool(tmp_path, model, InversionConfig(iterations=2, init=name)) for name in ("white", "pink"))
    assert white.path != pink.path
    assert "init" not in white.config.settings()  # so that pools made before there was a choice are found
    for config in (white.config, pink.config):
        assert InversionConfig.from_settings(config.settings()).settings() == config.settings()


def test_unknown_start():
    with pytest.raises(UserError, match="--init brown is unknown; there are white, pink"):
        InversionConfig(init="brown")
