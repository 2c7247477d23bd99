"""The study of views and canvases: its cells, its table, and what it keeps."""

import json

import pytest

from scripts.studies import views_and_canvas
from scripts.studies.views_and_canvas import GridConfig, spaced
from utils.errors import UserError

SMALL = [
    "--iterations",
    "10",
    "--num_images",
    "10",
    "--batch",
    "10",
    "--views",
    "roll",
    "roll,crop,colour",
    "--tv2",
    "0.02",
]
JUDGE = ["--judge_epochs", "1", "--judge_images", "200", "--val_limit", "40", "--figures", "recognized_cnn", "head"]


def test_every_cell_is_an_inversion_of_its_own():
    cells = list(GridConfig(iterations=(30, 100)).cells("float32"))
    assert len(cells) == 2 * 3 * 2 * 2
    assert len({json.dumps(inversion.settings(), sort_keys=True) for _, inversion in cells}) == len(cells)
    for label, inversion in cells:
        assert (label["canvas"], label["its"]) == (inversion.canvas, inversion.iterations)
        assert inversion.weights["tv2"] == (1e-3 if inversion.canvas == "pixels" else 0)
        assert inversion.prune_it == (
            {30: (3, 6, 9, 12), 100: (10, 20, 30, 40)}[label["its"]] if label["strategy"] == "smi" else (-1,)
        )


def test_a_run_is_kept_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, *JUDGE, "--head", "--strategies", "smi", "--bits", "8/8", "--calibration_images", "4"]
    found = views_and_canvas.main([*flags, "--canvases", "pixels"])
    assert [one["views"] for one in found] == ["roll", "roll,crop,colour"]
    assert all(0 <= one[key][0] <= 100 for one in found for key in ("recognized_cnn", "head", "8/8"))
    rows = (tmp_path / "runs/image_quality/rows.jsonl").read_text()
    more = views_and_canvas.main(flags)
    assert (tmp_path / "runs/image_quality/rows.jsonl").read_text().startswith(rows)
    assert [{**one, "s": None} for one in more if one["canvas"] == "pixels"] == [{**one, "s": None} for one in found]
    assert len((tmp_path / "runs/image_quality/table.md").read_text().splitlines()) == 2 + 4


def test_images_that_calibrate_are_spread_over_the_labels():
    assert spaced(10, 4) == [0, 2, 5, 7]
    assert spaced(3, 9) == [0, 1, 2]


def test_a_width_that_cannot_be_is_refused_before_anything_is_made():
    with pytest.raises(UserError, match="--w_bit"):
        GridConfig(bits=((1, 8),))
