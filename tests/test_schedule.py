"""The schedule: which patches counts follow, and which lists are refused."""

import pytest

from inversion.schedule import Stage, patches_kept, stages_of
from utils.errors import UserError


def test_the_published_schedule_on_a_14x14_grid():
    stages = stages_of(4000, 196, [50, 100, 200, 300], [0.3] * 4)
    assert [stage.patches for stage in stages] == [196, 137, 95, 66, 46]
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 50), (50, 100), (100, 200), (200, 300), (300, 4000)]


def test_minus_one_is_dense():
    assert stages_of(10, 64, [-1], [0]) == (Stage(0, 10, 64),)


def test_kept_patches_are_exact_for_decimal_ratios():
    """10 * (1 - 0.9) is 0.99.. in binary floating point."""
    assert patches_kept(10, 0.9) == 1
    assert patches_kept(100, 0.29) == 71
    assert patches_kept(196, 0.3) == 137


def test_patches_can_stop_before_the_first_step():
    assert stages_of(10, 64, [0], [0.5]) == (Stage(0, 10, 32),)


@pytest.mark.parametrize(
    ("prune_it", "prune_ratio", "why"),
    [
        ([50, 100], [0.3], "one ratio"),
        ([100, 50], [0.3, 0.3], "rise"),
        ([50, 50], [0.3, 0.3], "rise"),
        ([400], [0.3], "past the last"),
        ([-2], [0.3], "-1 alone"),
        ([-1, 50], [0.3, 0.3], "-1 alone"),
        ([50], [1.0], r"\[0, 1\)"),
        ([50], [-0.1], r"\[0, 1\)"),
        ([50], [float("nan")], r"\[0, 1\)"),
        ([-1], [0.3], "dense"),
        ([10, 20], [0.9, 0.9], "leaves none"),
    ],
)
def test_impossible_schedules_are_refused(prune_it, prune_ratio, why):
    with pytest.raises(UserError, match=why):
        stages_of(400, 64, prune_it, prune_ratio)
