"""The image pool: what it holds, that it survives kills, and that it never touches what is not its own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from inversion import ImagePool, InversionConfig, Inverter, synthesize
from models import SparseViT
from tests.conftest import ROOT, tiny_model
from utils.errors import UserError

CPU = torch.device("cpu")
CONFIG = {"iterations": 20, "prune_it": (5,), "prune_ratio": (0.5,), "batch_size": 3}


def filled(root: Path, model, count: int = 6, **changes) -> ImagePool:
    pool = ImagePool(root / "pool", model, InversionConfig(**{**CONFIG, **changes}))
    synthesize(pool, count, CPU, root / "log.jsonl")
    return pool


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_read_gives_what_the_engine_made(tmp_path, model):
    pool = filled(tmp_path, model)
    read = pool.read(6)
    inverter = Inverter(model, pool.config, CPU)
    made = [inverter.invert(batch).images for batch in (0, 1)]
    assert torch.equal(read.positions, torch.cat([m.positions for m in made]))
    assert torch.equal(read.labels, torch.cat([m.labels for m in made]))
    # 8-bit images: off by half a step, in normalized units.
    tolerance = 0.51 / 255 / min(model.preprocessing.std)
    assert (read.patches - torch.cat([m.patches for m in made])).abs().max() <= tolerance
    assert len(pool.read(4)) == 4
    assert pool.losses(6).shape == (2, 20)


def test_torchvision_alone_reads_the_pool(tmp_path, model):
    pool = filled(tmp_path, model)
    dataset = ImageFolder(pool.path / "images")
    read = pool.read(6)
    order = sorted(range(6), key=lambda i: dataset.samples[i][0].split("/")[-1])
    assert [int(dataset.classes[dataset.targets[i]]) for i in order] == read.labels.tolist()
    assert dataset[0][0].size == (32, 32)


def test_stopped_patches_are_black_and_kept_black_patches_stay_kept(tmp_path, model):
    """Defect: kept patches were recovered by looking for non-zero pixels, which a kept black patch breaks."""
    pool = filled(tmp_path, model)
    path = sorted((pool.path / "images").rglob("*.png"))[0]
    number = int(path.stem)
    before = pool.read(6)
    kept = set(before.positions[number].tolist())
    pixels = SparseViT(model.vit).grid.patchify(pil_to_tensor(Image.open(path))[None])
    for position in set(range(16)) - kept:
        assert pixels[0, position].max() == 0
    Image.new("RGB", (32, 32)).save(path)
    after = pool.read(6)
    assert torch.equal(after.positions, before.positions)
    black = model.preprocessing.normalize(torch.zeros(3, 1, 1))
    torch.testing.assert_close(after.patches[number], black.expand(8, 3, 8, 8))


def test_same_configuration_gives_the_same_bytes_twice(tmp_path, model):
    first, second = filled(tmp_path / "a", model), filled(tmp_path / "b", model)
    assert contents(first.path) == contents(second.path)
    assert len(contents(first.path)) == 1 + 6 + 2


def test_finished_batches_are_not_made_again(tmp_path, model, monkeypatch):
    filled(tmp_path, model, count=3)
    made, invert = [], Inverter.invert
    monkeypatch.setattr(Inverter, "invert", lambda self, batch, *args: made.append(batch) or invert(self, batch, *args))
    filled(tmp_path, model, count=6)
    assert made == [1]
    filled(tmp_path, model, count=6)
    assert made == [1]


def test_another_configuration_or_other_weights_go_elsewhere(tmp_path, model):
    """Defect: an existing datapool folder was deleted without asking."""
    first = filled(tmp_path, model)
    before = contents(first.path)
    others = [filled(tmp_path, model, seed=1), filled(tmp_path, model, lr=0.1), filled(tmp_path, tiny_model(depth=1))]
    assert len({pool.path for pool in (first, *others)}) == 4
    assert contents(first.path) == before


def test_a_pool_from_before_a_setting_was_added_is_read_by_its_folder(tmp_path, model):
    pool = filled(tmp_path, model)
    file = pool.path / "pool.json"
    saved = json.loads(file.read_text())
    saved["inversion"] = {key: value for key, value in saved["inversion"].items() if key != "soft_label"}
    file.write_text(json.dumps(saved))
    before = contents(tmp_path)
    assert torch.equal(ImagePool.existing(pool.path, model).read(3).patches, pool.read(3).patches)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="another model"):
        ImagePool.existing(pool.path, tiny_model(depth=1))


def test_nothing_foreign_is_touched(tmp_path, model):
    root = tmp_path / "pool"
    root.mkdir()
    (root / "mine.txt").write_text("keep")
    pool = filled(tmp_path, model)
    assert (root / "mine.txt").read_text() == "keep"
    (pool.path / "notes.txt").write_text("keep")
    filled(tmp_path, model, count=9)
    assert (pool.path / "notes.txt").read_text() == "keep"


def test_a_folder_of_something_else_is_refused(tmp_path, model):
    path = ImagePool(tmp_path / "probe", model, InversionConfig(**CONFIG)).path
    taken = tmp_path / "pool" / path.name
    taken.mkdir(parents=True)
    (taken / "thesis.tex").write_text("keep")
    with pytest.raises(UserError, match=r"no pool\.json"):
        filled(tmp_path, model)
    assert contents(taken) == {"thesis.tex": b"keep"}


def test_a_pool_described_otherwise_is_refused(tmp_path, model):
    pool = filled(tmp_path, model)
    description = json.loads((pool.path / "pool.json").read_text())
    description["format_version"] = 99
    (pool.path / "pool.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="another configuration"):
        filled(tmp_path, model)


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(tmp_path, model, damage):
    pool = filled(tmp_path, model)
    path = sorted((pool.path / "images").rglob("*.png"))[2]
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(UserError, match=path.name):
        pool.read(6)


def test_two_processes_do_not_fill_one_pool_at_once(tmp_path, model):
    import fcntl

    pool = filled(tmp_path, model)
    with open(pool.path / "pool.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            synthesize(pool, 9, CPU, tmp_path / "log.jsonl")


FILL = """
import sys
from pathlib import Path
from tests.test_pool import filled
from tests.conftest import tiny_model
filled(Path(sys.argv[1]), tiny_model(), count=9)
"""


def test_killed_anywhere_and_started_again_it_ends_the_same(tmp_path):
    """SIGKILL at random moments, more often than batches finish, then one run to the end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", FILL, str(folder)], env=env, cwd=ROOT)

    assert start(tmp_path / "whole").wait(60) == 0
    rng = random.Random(0)
    killed = tmp_path / "killed"
    kills = 0
    for _ in range(4):
        process = start(killed)
        # Wait until it is at work, then a random while: in a step, in a PNG, between two files.
        while not (killed / "pool").is_dir() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    assert start(killed).wait(60) == 0
    assert contents(killed / "pool") == contents(tmp_path / "whole" / "pool")
