"""Wrong flags, damaged files, hostile models and full disks: each is one line that names what is wrong, and exit 2."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import test_kt
import test_quant
from inversion import ImagePool, InversionConfig
from kt import DistillConfig
from models import ModelConfig, load_model
from models.registry import Preprocessing
from quant import QuantConfig, load_quantized
from scripts import compare, compare_kt, train_teacher
from tests.conftest import tiny_model
from tests.odd_images import REFUSED
from tests.test_odd_inputs import bundled
from tests.test_weights import NAME, local_dir, made, saved
from utils import device, files
from utils.data import DataConfig
from utils.errors import UserError, run_main
from utils.task import RunConfig

BIG = "1" + "0" * 24
QUANT = ["--iterations", "6", "--calib-batchsize", "3", "--prune_it", "2", "--prune_ratio", "0.5", "--num_images", "6"]
QUANT += ["--val_limit", "10", "--check_images", "0"]
NOISE = ["--mode", "1", "--val_limit", "10", "--calib-batchsize", "2", "--check_images", "0"]
KT = ["--mode", "1", "--epochs", "2", "--images_per_epoch", "4", "--kr-batchsize", "2", "--val_limit", "10"]
COMPARE = ["--baselines", "gaussian", "--strategies", "--bits", "8/8", "--val_limit", "8", "--calib-batchsize", "4"]
SCRATCH = ["--student_init", "scratch", "--finetune", "full"]
MAINS = {
    "quant": test_quant.main,
    "kt": test_kt.main,
    "compare": compare.main,
    "compare_kt": compare_kt.main,
    "train": train_teacher.main,
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """`run_main` sets how warnings are shown, and what fits once is not asked again."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(device, "_fitted", {})


def refusal(capsys, run: Callable[[], object]) -> str:
    """The one line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
        run_main(run)
    told = capsys.readouterr().err.splitlines()
    lines = [line for line in told if line.strip() and "%|" not in line]  # without progress bars
    assert exit.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- flags


def rows(script: str, flag: str, values: str, why: str) -> list[tuple[str, list[str], str]]:
    """The same flag with wrong values, parted by blanks, all of them refused for the same reason."""
    return [(script, [flag, value], why.replace("FLAG", flag)) for value in values.split()]


INTEGER, NUMBER = "FLAG:? .*is not an integer from", "FLAG:? .*is not a number from"
FLAGS = [
    *rows("quant", "--iterations", f"0 -1 1.5 ten {BIG} nan {'9' * 5000}", INTEGER),
    *rows("quant", "--calib-batchsize", f"0 -3 {BIG} 2147483648 inf", INTEGER),
    *rows("quant", "--val-batchsize", f"0 {BIG} 1e3", INTEGER),
    *rows("quant", "--num_images", f"0 -1 {BIG}", INTEGER),
    *rows("quant", "--check_images", f"-1 {BIG} x", INTEGER),
    *rows("quant", "--val_limit", f"0 -7 {BIG}", INTEGER),
    *rows("quant", "--num-workers", "-1 1000000 2.0", INTEGER),
    *rows("quant", "--seed", f"-1 {2**70} 0.5 x", INTEGER),
    *rows("quant", "--gpu", f"-1 {BIG}", INTEGER),
    *rows("quant", "--img_size", f"0 -32 {BIG} 5000 3.5", INTEGER),
    *rows("quant", "--warmup", f"-1 {BIG}", INTEGER),
    *rows("quant", "--pri_division", f"1 0 {BIG}", INTEGER),
    *rows("quant", "--reconstruct_steps", f"0 {BIG}", INTEGER),
    *rows("quant", "--cmi_bank", f"-1 {BIG}", INTEGER),
    *rows("quant", "--lr_g", "0 -0.1 nan inf 1e300 1e-300 x", NUMBER),
    *rows("quant", "--oh", "nan inf 1e300 x", NUMBER),
    *rows("quant", "--tv1", "nan inf", NUMBER),
    *rows("quant", "--tv2", "nan 1e39 --1", "--tv2"),
    *rows("quant", "--l2", "inf", NUMBER),
    *rows("quant", "--pse", "nan", NUMBER),
    *rows("quant", "--cr", "nan", NUMBER),
    *rows("quant", "--psaq_bandwidth", "0 nan inf", NUMBER),
    *rows("quant", "--cmi_temperature", "0 nan inf 1e300", NUMBER),
    *rows("quant", "--reconstruct_seconds", "0 nan inf -3", NUMBER),
    *rows("quant", "--soft_label", "1 -0.1 nan inf", "--soft_label .* is not in"),
    *rows("quant", "--projection", "lowpass:cutoff=nan lowpass:cutoff=0 lowpass:every=inf", "lowpass"),
    *rows("quant", "--projection", "blur lowpass:cutoff lowpass:size=3 clamp:1", "--projection"),
    *rows("quant", "--views", "zoom -1 , crop=0.5 :area=1 Crop", "--views .* is unknown; there are roll, flip, crop"),
    *rows("quant", "--views", "crop:area crop:area= crop:0.5 crop:side=1 crop:area=x", "--views crop.* like area=0.35"),
    *rows("quant", "--views", f"crop:area=0 crop:area=nan crop:area=1.1 crop:area={BIG}", "crop: area .* not in"),
    *rows("quant", "--views", "roll:share=-1 roll:share=inf roll:share=2", r"--views roll: share .* not in \[0, 1\]"),
    *rows("quant", "--views", "colour:scale=6 colour:shift=-1 contrast:scale=nan noise:deviation=11", " is not in "),
    *rows("quant", "--views", "flip:share=1 flip:x", "--views flip:.*: it has no settings"),
    ("quant", ["--views", "crop", "crop:area=0.5"], "--views has crop twice"),
    ("quant", ["--views", "crop:area=0.5,area=0.6"], "--views crop.* like area=0.35"),
    ("quant", ["--views"], "--views"),
    *rows("quant", "--canvas", "paint Pixels 1 ,", "--canvas"),
    *rows("quant", "--copies", f"0 -1 1.5 x nan {BIG}", INTEGER),
    *rows("quant", "--lr_schedule", "linear phase", "--lr_schedule"),
    *rows("quant", "--phases", "0 -1 nan inf x 1:0.5 1:coarse 1:coarse=x 1:coarse=2,coarse=2", "--phases"),
    *rows("quant", "--phases", f"1:coarse=0 1:coarse=1.5 1:coarse=nan 1:coarse={BIG}", "--phases .* coarse is a whole"),
    *rows("quant", "--phases", "1:fresh=2 1:fresh=nan", "--phases .* fresh is 1 or 0"),
    *rows("quant", "--phases", "1:share=0.5 1:zoom=2", "--phases .* there are coarse, fresh and VIEW.SETTING"),
    *rows("quant", "--phases", "1:crop.area=0.5", "--phases .* crop is not among --views roll flip"),
    *rows("quant", "--phases", "1:roll.size=0.5 1:flip.share=0.5", "--phases .* has no setting"),
    *rows("quant", "--phases", "1:roll.share=2 1:roll.share=nan", r"share .* is not in \[0, 1\]"),
    (
        "quant",
        ["--phases", "1", "1", "--lr_schedule", "phases", "--warmup", "3", "--iterations", "6"],
        "--warmup 3 is not in .* the iterations of the shortest phase",
    ),
    ("quant", ["--phases", "1:coarse=3", "--iterations", "6"], "cannot be averaged over 3x3"),
    ("quant", ["--phases"], "--phases"),
    *rows("quant", "--lr_end", "-1 nan inf", NUMBER),
    *rows("quant", "--lr_end", "0.5", "--lr_end 0.5 is above --lr_g 0.25"),
    *rows("quant", "--weight_decay", "-1 nan inf", NUMBER),
    *rows("quant", "--soft_logits", "-1 nan inf", NUMBER),
    ("quant", ["--soft_logits", "5", "--soft_label", "0.1"], "two ways to make labels soft"),
    *rows("quant", "--stopped", "shown Black 1", "--stopped"),
    *rows("quant", "--synq_sure", "-0.1 1.1 nan", NUMBER),
    *rows("quant", "--synq_cutoff", "0 nan inf", NUMBER),
    *rows("quant", "--views", "roll:diagonal=2 roll:diagonal=nan", "diagonal .* is neither 0 nor 1"),
    ("quant", ["--strategy", "grow", "--prune_it", "5", "--iterations", "6"], "--prune_it needs --prune_ratio"),
    ("quant", ["--strategy", "grow", "--prune_it", "3", "--prune_ratio", "0.99", "--iterations", "6"], "leaves none"),
    *rows("quant", "--targets", f"class:{BIG} -1 class: class:-1 1.5 ² {BIG}", "--targets"),
    *rows("quant", "--targets", "class:10 99", "there is no class"),
    *rows("quant", "--w_bit", f"0 1 9 16 -4 {BIG}", "--w_bit .* is not 2 to 8"),
    *rows("quant", "--a_bit", "1 33", "--a_bit .* is not 2 to 8"),
    *rows("quant", "--keep", "nose , ,head", "--keep"),
    *rows("quant", "--model", "vit resnet50 no/such/model local-dir:/nowhere local-dir:", "error: "),
    *rows("quant", "--model_path", "/nowhere/w.pth ~nosuchuser/w.pth /dev/null", "nowhere|no such user|/dev/null"),
    *rows("quant", "--dataset", "/nowhere ~nosuchuser/data /dev/null", "--dataset"),
    *rows("quant", "--images", "/nowhere ~nosuchuser/images /dev/null", "nowhere|no such user|/dev/null"),
    *rows("quant", "--background", "1 1,2,3,4 a,b,c 1,2,999 nan,0,0", "--background"),
    *rows("quant", "--output", "/dev/null/x ~nosuchuser/out", "--output"),
    *rows("quant", "--datapool", "/dev/null/x ~nosuchuser/pool", "--datapool"),
    *rows("quant", "--save", "/dev/null/x ~nosuchuser/model", "--save"),
    *rows("quant", "--export", "model.txt /dev/null/m.onnx ~nosuchuser/m.onnx", "--export"),
    *rows("quant", "--mode", "3 -1 x", "--mode"),
    *rows("quant", "--observer", "best", "--observer"),
    *rows("quant", "--prior", "gan", "--prior"),
    *rows("quant", "--strategy", "sparse smi lowest", "--strategy"),
    *rows("quant", "--device", "tpu", "--device"),
    *rows("quant", "--dtype", "int8", "--dtype"),
    *rows("quant", "--snapshots", f"-1 7 {BIG}", "--snapshots"),
    *rows("quant", "--nothing", "1", "unrecognized"),
    ("quant", ["--betas", "0.5"], "--betas"),
    ("quant", ["--betas", "0.5", "1"], "--betas"),
    ("quant", ["--betas", "nan", "0.9"], "--betas"),
    ("quant", ["--prune_it", "2", "--prune_ratio", "nan"], "--prune_ratio"),
    ("quant", ["--prune_it", "2", "--prune_ratio", "1"], "--prune_ratio"),
    ("quant", ["--prune_it", "2", "--prune_ratio", "inf"], "--prune_ratio"),
    ("quant", ["--prune_it", "2", "1", "--prune_ratio", "0.1", "0.1"], "--prune_it"),
    ("quant", ["--prune_it", BIG, "--prune_ratio", "0.1"], "--prune_it"),
    ("quant", ["--prune_it", "2"], "--prune_it"),
    ("quant", ["--prune_it", "2", "--prune_ratio", "0.999"], "leaves none"),
    ("quant", ["--bn", "1", "--bn_source", "vgg0"], "--bn_source"),
    ("quant", ["--bn", "1", "--bn_source", "resnet18=/nowhere"], "/nowhere"),
    ("quant", ["--bn", "1", "--bn_source", "resnet18=~nosuchuser/w"], "no such user"),
    ("quant", ["--adv", "1"], "--adv"),
    ("quant", ["--prior", "natural"], "--natural, of the prior natural, looks at a student"),
    ("kt", ["--mode", "0", "--natural", "1", *SCRATCH], "--natural looks with a backbone that has seen images"),
    ("kt", ["--mode", "0", "--natural", "1", "--adv", "1", *SCRATCH], "--natural looks with a backbone that has"),
    ("kt", ["--mode", "0", "--natural", "1", "--student", "resnet10t", *SCRATCH], "--natural show a student the"),
    ("quant", ["--oh", "0", "--tv2", "0"], "every loss weight"),
    ("quant", ["--w_bit", "32", "--a_bit", "32", "--sensitivity"], "--sensitivity"),
    ("quant", ["--mode", "1", "--images", "x"], "--images"),
    ("quant", ["--weights_key", "ema"], "--weights_key"),
    ("quant", ["extra"], "unrecognized"),
    *rows("kt", "--epochs", f"0 -1 1.5 {BIG}", "is not an integer from"),
    *rows("kt", "--kd_steps", f"0 {BIG}", INTEGER),
    *rows("kt", "--eval_every", f"0 {BIG}", INTEGER),
    *rows("kt", "--images_per_epoch", f"-1 {BIG}", INTEGER),
    *rows("kt", "--max_images", f"0 {BIG}", INTEGER),
    *rows("kt", "--kr-batchsize", f"0 {BIG}", INTEGER),
    *rows("kt", "--inversion-batchsize", f"0 {BIG}", INTEGER),
    *rows("kt", "--lr", "0 nan inf 1e300 -1", NUMBER),
    *rows("kt", "--temperature", "0 nan inf 1e-300", NUMBER),
    *rows("kt", "--augment", "spin", "--augment"),
    *rows("kt", "--student_path", "/nowhere ~nosuchuser/w.pth", "nowhere|no such user"),
    *rows("kt", "--student", "vit resnet5000", "resnet5000|vit"),
    ("kt", ["--images_per_epoch", "0", "--mode", "1"], "asks for no images"),
    ("kt", ["--student_init", "scratch"], "--finetune full"),
    *rows("compare", "--bits", f"4 4/x 1/8 8/{BIG} /", "4/8|is not 2 to 8"),
    *rows("compare", "--seeds", f"-1 {2**64} x", "--seeds: .*is not an integer"),
    *rows("compare", "--baselines", "fake", "--baselines"),
    *rows("compare", "--output", "/dev/null/x ~nosuchuser/out", "--output"),
    *rows("compare", "--iterations", f"0 {BIG}", INTEGER),
    *rows("compare", "--models", "resnet50", "resnet50"),
    ("compare", ["--strategies", "dense", "--with", "dense", "--lr_g nan"], "--lr_g"),
    ("compare", ["--baselines", "--strategies"], "nothing to compare"),
    *rows("compare_kt", "--students", "tall", "--students"),
    *rows("compare_kt", "--epochs", f"0 {BIG}", "is not an integer from"),
    ("compare_kt", ["--linear", "--lr nan"], "--lr"),
    *rows("train", "--epochs", f"0 {BIG}", INTEGER),
    *rows("train", "--batch_size", f"0 {BIG}", INTEGER),
    *rows("train", "--lr", "0 nan 1e300", NUMBER),
    *rows("train", "--weight_decay", "1 nan", "--weight_decay"),
    *rows("train", "--noise", "-1 nan inf", "--noise"),
    *rows("train", "--seed", f"-1 {2**63}", INTEGER),
    *rows("train", "--warmup_epochs", f"-1 {BIG}", INTEGER),
    *rows("train", "--output", "~nosuchuser/out", "--output"),
]  # fmt: skip


USUAL = {"quant": QUANT, "kt": KT, "compare": COMPARE, "compare_kt": [], "train": ["--output", "out"]}


@pytest.mark.parametrize(("script", "flags", "why"), FLAGS, ids=lambda value: str(value)[:50])
def test_a_wrong_flag_is_one_line(tmp_path, monkeypatch, capsys, script, flags, why):
    monkeypatch.chdir(tmp_path)  # where a run would leave what nobody named
    alone = any(flag in flags for flag in ("--strategy", "--prune_it", "--images"))
    line = refusal(capsys, lambda: MAINS[script]([*([] if alone else USUAL[script]), *flags]))
    assert re.search(why, line), line
    assert not list(tmp_path.rglob("report.json"))


MUCH = [
    (
        "quant",
        ["--calib-batchsize", "2000000000", "--num_images", "1"],
        "inversion batch .*GB are free; .*would fit",
    ),
    ("quant", ["--calib-batchsize", "2000000000", "--num_images", "2000000000"], "lower --calib-batchsize 2000000000"),
    ("quant", ["--num_images", "2000000000"], "lower --num_images"),
    ("quant", ["--num_images", "2000000000", "--reconstruct"], "the calibration needs.*lower --num_images 2000000000"),
    ("quant", ["--num_images", "2000000000", "--mode", "1", "--bias_correction"], "lower --num_images 2000000000"),
    ("quant", ["--num_images", "2000000000", "--mode", "1"], "--num_images"),
    ("quant", ["--copies", "2000000000"], "an inversion "),
    ("quant", ["--iterations", "2000000000"], "an inversion so long .*lower --iterations 2000000000"),
    ("quant", ["--check_images", "2000000000"], "an inversion batch"),
    ("kt", ["--kr-batchsize", "2000000000"], "a step .*lower --kr-batchsize 2000000000"),
    ("kt", ["--images_per_epoch", "2000000000", "--epochs", "2000000000"], "--max_images"),
    ("kt", ["--mode", "0", "--inversion-batchsize", "2000000000"], "an inversion batch"),
    ("kt", ["--mode", "0", "--images_per_epoch", "2000000000"], "--max_images"),
    ("compare", ["--num_images", "2000000000"], "--num_images"),
]


@pytest.mark.parametrize(("script", "flags", "why"), MUCH, ids=lambda value: str(value)[:50])
def test_what_finds_no_memory_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, script, flags, why):
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, lambda: MAINS[script]([*USUAL[script], *flags]))
    assert re.search(why, line), line
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("report.json"), *tmp_path.rglob("rows.jsonl")]


def test_a_large_evaluation_batch_is_one_of_the_whole_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert test_quant.main([*NOISE, "--val-batchsize", "2000000000"])["fp"]["images"] == 10


def test_what_would_fit_is_told_and_fits(monkeypatch):
    monkeypatch.setattr(device, "free_memory_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="lower --n 11: 10 would fit"):
        device.require_memory(11, 100, torch.device("cpu"), "it", "--n")
    device.require_memory(10, 100, torch.device("cpu"), "it", "--n")
    monkeypatch.setattr(device, "free_memory_bytes", lambda device: 0)
    device.require_memory(9, 100, torch.device("cpu"), "it", "--n")  # in what the ten left
    with pytest.raises(UserError, match="not even one would fit"):
        device.require_memory(1, 2000, torch.device("cpu"), "it", "--n")


def test_memory_of_a_control_group_counts(tmp_path, monkeypatch):
    """A container's limit, less what is in use, plus files that the system can drop."""
    limits = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 300\n"}
    told = {"/proc/self/cgroup": "0::/a/b\n", "/proc/meminfo": "MemAvailable: 9 kB\n"}
    told |= {f"/sys/fs/cgroup/a/{name}": text for name, text in limits.items()}
    monkeypatch.setattr(device, "_lines", lambda file: told.get(str(file), "").splitlines())
    assert device.free_memory_bytes(torch.device("cpu")) == 400
    told["/sys/fs/cgroup/a/memory.max"] = "max"
    assert device.free_memory_bytes(torch.device("cpu")) == 9 * 1024


@pytest.mark.parametrize(
    "make",
    [
        lambda: InversionConfig(iterations=10**24),
        lambda: InversionConfig(iterations="10"),
        lambda: InversionConfig(lr=float("nan")),
        lambda: InversionConfig(lr=True),
        lambda: InversionConfig(seed=-1),
        lambda: InversionConfig(batch_size=0),
        lambda: InversionConfig(dtype="int8"),
        lambda: InversionConfig(canvas="paint"),
        lambda: InversionConfig(copies=0),
        lambda: InversionConfig(views=("zoom",)),
        lambda: InversionConfig(lr_schedule="phase"),
        lambda: InversionConfig(phases=("1:coarse=x",)),
        lambda: InversionConfig(phases=("0",)),
        lambda: InversionConfig.from_settings({"phases": 5}),
        lambda: InversionConfig.from_settings({"phases": [5]}),
        lambda: InversionConfig.from_settings({"views": 5}),
        lambda: InversionConfig.from_settings({"views": [5]}),
        lambda: InversionConfig.from_settings({"canvas": {}}),
        lambda: InversionConfig(weights={"oh": float("inf")}),
        lambda: InversionConfig(weights={"cr": 1.0}, options={"cmi_bank": -1}),
        lambda: InversionConfig.from_settings({"strategy": {}}),
        lambda: InversionConfig.from_settings({"targets": 5}),
        lambda: QuantConfig(batch_size=10**24),
        lambda: QuantConfig(seed=2**70),
        lambda: QuantConfig(reconstruct=True, reconstruct_seconds=float("inf")),
        lambda: DistillConfig(epochs=10**24),
        lambda: DistillConfig(temperature=float("nan")),
        lambda: DataConfig(val_batchsize=10**24),
        lambda: DataConfig(num_workers=10**6),
        lambda: RunConfig(seed=2**70),
        lambda: ModelConfig(img_size=10**6),
        lambda: train_teacher.TrainConfig(output="x", epochs=10**24),
    ],
)
def test_python_callers_have_the_limits_of_the_flags(make):
    with pytest.raises(UserError) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


# ---- files of a finished run


class Finished(NamedTuple):
    """Where a finished run of each kind lies, with the images of its training, and what goes on with it."""

    root: Path
    data: Path

    def quant(self) -> object:
        return test_quant.main([*QUANT, *self.places("quant"), "--snapshots", "1", "--save", str(self.root / "saved")])

    def kt(self, epochs: int = 2) -> object:
        return test_kt.main([*KT, "--epochs", str(epochs), *self.places("kt")])

    def kt_of_pool(self) -> object:
        """Which takes the images of the pool as they are."""
        return test_kt.main([*KT, "--images", str(self.pool), "--mode", "0", "--output", str(self.root / "of_pool")])

    def compare(self) -> object:
        return compare.main([*COMPARE, *self.places("compare")])

    def pictures(self) -> None:
        for folder in ("train/a", "train/b", "val/a", "val/b"):
            (self.data / folder).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(self.data / folder / "1.bmp")

    def train(self) -> object:
        flags = ["--epochs", "1", "--init", "scratch", "--data", "folder", "--dataset", str(self.data)]
        return train_teacher.main([*flags, "--num_workers", "0", "--output", str(self.root / "train")])

    def load(self) -> object:
        return load_quantized(self.root / "saved")

    def read(self) -> object:
        found = ImagePool.existing(self.pool, bundled())
        return found.read(6), found.losses(6)

    def snapshots(self) -> object:
        return ImagePool.existing(self.pool, bundled()).snapshots(0)

    def places(self, name: str) -> list[str]:
        return ["--output", str(self.root / name), "--datapool", str(self.root / "pool")]

    @property
    def pool(self) -> Path:
        return next((self.root / "pool").iterdir())

    def file(self, name: str) -> Path:
        """By the end of its path; the first in order of names."""
        return min(path for path in self.root.rglob("*") if str(path).endswith(name) and path.is_file())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    done = Finished(tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("data"))
    for run in (done.pictures, done.quant, done.kt, done.compare, done.train):
        run()
    return done


@pytest.fixture
def run(finished, tmp_path) -> Finished:
    """A copy that may be damaged."""
    shutil.copytree(finished.root, tmp_path / "run")
    return Finished(tmp_path / "run", finished.data)


def test_a_finished_run_can_be_run_again(run):
    for again in (run.quant, run.kt, run.kt_of_pool, run.compare, run.load, run.snapshots):
        again()


Damage = Callable[[Path], object]


def edited(**changes: Any) -> Damage:
    """Keys of a JSON object given other values; a function is given the old one."""

    def damage(file: Path) -> None:
        found = json.loads(file.read_text().splitlines()[0] if file.suffix == ".jsonl" else file.read_text())
        for key, value in changes.items():
            found[key] = value(found[key]) if callable(value) else value
        file.write_text(json.dumps(found) + "\n")

    return damage


def first(value: Any) -> Callable[[list], list]:
    """A list (of lists) whose first number is another."""
    return lambda old: [first(value)(old[0]) if isinstance(old[0], list) else value, *old[1:]]


def state(change: Callable[[Any], Any]) -> Damage:
    """What torch saved, changed."""

    def damage(file: Path) -> None:
        torch.save(change(torch.load(file, weights_only=True)), file)

    return damage


def flipped(file: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def instead(file: Path) -> None:
    """A folder in the place of the file."""
    file.unlink()
    file.mkdir()


TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "latin-1": '{"name": "Müller"}'.encode("latin-1"),
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "deep": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a long number": b'{"a": ' + b"9" * 5000 + b"}",
    "half": b'{"format_version": 1, "batch"',
}
LINES = {name: text for name, text in TEXTS.items() if name not in ("empty", "half")}  # those may be


def written(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def of(name: str, run: str, damages: dict[str, Damage], why: str = "") -> list[tuple[str, str, Damage, str]]:
    """A row for each damage to the file of this name, which `run` goes on with."""
    return [pytest.param(name, run, damage, why, id=f"{name}-{told}") for told, damage in damages.items()]


TEXTS_ALONE = {name: written(text) for name, text in TEXTS.items()}
TEXT_DAMAGES = TEXTS_ALONE | {"folder": instead}
LINE_DAMAGES = {name: written(text) for name, text in LINES.items()} | {"folder": instead}
BINARY_DAMAGES = {
    "empty": written(b""),
    "text": written(b"nothing"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flipped,
    "folder": instead,
}
RECORDS = {
    "position -1": edited(kept_positions=first(-1)),
    "position beyond": edited(kept_positions=first(64)),
    "position of text": edited(kept_positions=first("3")),
    "position true": edited(kept_positions=first(True)),
    "position 1.5": edited(kept_positions=first(1.5)),
    "a position twice": edited(kept_positions=lambda old: [[old[0][1], *old[0][1:]], *old[1:]]),
    "a position less": edited(kept_positions=lambda old: [old[0][1:], *old[1:]]),
    "each a position less": edited(kept_positions=lambda old: [row[1:] for row in old]),
    "another position": edited(
        kept_positions=lambda old: [sorted({*old[0][1:], min({*range(64)} - {*old[0]})}), *old[1:]]
    ),
    "a row less": edited(kept_positions=lambda old: old[1:]),
    "a row more": edited(kept_positions=lambda old: [*old, old[0]]),
    "no rows": edited(kept_positions=[]),
    "rows of null": edited(kept_positions=None),
    "a label less": edited(labels=lambda old: old[1:]),
    "label -1": edited(labels=first(-1)),
    "label beyond": edited(labels=first(10)),
    "label nan": edited(labels=first(float("nan"))),
    "label huge": edited(labels=first(10**30)),
    "another label": edited(labels=lambda old: [(old[0] + 1) % 10, *old[1:]]),
    "a loss less": edited(losses=lambda old: old[1:]),
    "loss nan": edited(losses=first(float("nan"))),
    "loss infinite": edited(losses=first(float("inf"))),
    "loss huge": edited(losses=first(10**400)),
    "loss of text": edited(losses=first("1")),
    "loss an object": edited(losses={}),
    "batch 1": edited(batch=1),
    "batch true": edited(batch=False),
    "another seed": edited(seed=7),
    "another format": edited(format_version=2),
}
LOG = {
    "seconds": edited(seconds="long"),
    "no seconds": edited(seconds=None),
    "seconds nan": edited(seconds=float("nan")),
    "batch": edited(batch=[]),
    "peak": edited(peak_memory_bytes="much"),
    "pool": edited(pool=3),
}
ROW = {
    "top1": edited(top1="good"),
    "top1 null": edited(top1=None),
    "top1 nan": edited(top1=float("nan")),
    "top1 huge": edited(top1=10**400),
    "method": edited(method=4),
    "width": edited(width=[]),
    "seconds": edited(synthesis_seconds={}),
    "images": edited(images=True),
    "cell": edited(cell=[]),
}
CHECKPOINT = {
    "a list": state(lambda old: [1]),
    "a tensor": state(lambda old: torch.zeros(3)),
    "no state": state(lambda old: {"config": old["config"]}),
    "state 3": state(lambda old: {**old, "state": 3}),
    "empty state": state(lambda old: {**old, "state": {}}),
    "config 3": state(lambda old: {**old, "config": 3}),
    "no history": state(lambda old: {**old, "state": {**old["state"], "progress": {"history": 5}, "history": 5}}),
    "history": state(lambda old: {**old, "state": {**old["state"], "progress": {"history": [5]}, "history": [5]}}),
    "weights": state(lambda old: {**old, "state": {**old["state"], "distiller": {}, "model": {}}}),
}
SNAPSHOTS = {
    "an object": state(lambda old: {}),
    "none": state(lambda old: []),
    "numbers": state(lambda old: [1, 2]),
    "no pixels": state(lambda old: [{"iteration": 1}]),
    "fewer pixels": state(lambda old: [{**old[0], "pixels": old[0]["pixels"][:1]}]),
    "pixels nan": state(lambda old: [{**old[0], "pixels": old[0]["pixels"] * float("nan")}]),
    "positions": state(lambda old: [{**old[0], "positions": old[0]["positions"] + 64}]),
    "more": state(lambda old: [{**old[0], "more": 1}]),
}
QUANTIZED = {
    "format": edited(format=99),
    "width": edited(quantization=lambda old: {**old, "a_bit": 4}),
    "quantization": edited(quantization=[]),
    "architecture": edited(architecture="resnet50"),
    "arguments": edited(arguments=5),
    "classes": edited(classes=["a"]),
    "preprocessing": edited(preprocessing=None),
}
PICTURES = {
    "missing": Path.unlink,
    "empty": written(b""),
    "half": BINARY_DAMAGES["half"],
    "flipped": flipped,
    "folder": instead,
    "larger": lambda file: Image.new("RGB", (64, 64)).save(file),
    "white": lambda file: Image.new("RGB", (32, 32), "white").save(file),
}
FILES = [
    *of("batches/000000.json", "read", RECORDS | TEXTS_ALONE, "and the command that made the pool makes the batch"),
    *of("batches/000000.json", "quant", {"position": RECORDS["position -1"]}, "makes the batch again"),
    *of("batches/000000.json", "quant", {"folder": instead}, "cannot write .*: Is a directory"),
    *of("000004.png", "read", PICTURES, "delete .*batches/000001.json"),
    *of("000000.png", "kt_of_pool", {"missing": Path.unlink}, "batches/000000.json"),
    *of("pool.json", "quant", TEXT_DAMAGES | {"seed": edited(inversion=lambda old: {**old, "seed": 1})}),
    *of("pool.json", "read", TEXTS_ALONE),
    *of("pool.json", "read", {"settings": edited(inversion={"iterations": "x"}), "none": edited(inversion=5)}),
    *of("pool.json", "kt_of_pool", {"strategy": edited(inversion={"strategy": []}), "model": edited(model=[])}),
    *of("quant/synthesis.jsonl", "quant", LOG | LINE_DAMAGES),
    *of("rows.jsonl", "compare", ROW | LINE_DAMAGES),
    *of("kt/checkpoint.pt", "kt", CHECKPOINT | BINARY_DAMAGES, "give another --output"),
    *of("train/checkpoint.pt", "train", CHECKPOINT | BINARY_DAMAGES, "give another --output"),
    *of("snapshots/000000.pt", "snapshots", SNAPSHOTS | BINARY_DAMAGES | {"folder": written(b"PK")}),
    *of("saved/quantized.json", "load", QUANTIZED | TEXT_DAMAGES),
    *of("quant/quantized/quantized.json", "quant", {**TEXTS_ALONE, "width": QUANTIZED["width"]}),
    *of("quant/quantized/made_from.json", "quant", TEXTS_ALONE),
    *of("saved/model.safetensors", "load", BINARY_DAMAGES),
    *of("quant/report.json", "quant", {"folder": instead}, "cannot write .*: Is a directory"),
    *of("quant/images.png", "quant", {"folder": instead}, "cannot write .*: Is a directory"),
    *of("quant/report.html", "quant", {"folder": instead}, "cannot write .*: Is a directory"),
    *of("saved/quantized.json", "quant", {"folder": instead}, "Is a directory"),
    *of("compare/results.csv", "compare", {"folder": instead}, "cannot write .*: Is a directory"),
    *of("compare/summary.json", "compare", {"folder": instead}, "cannot write .*: Is a directory"),
]


@pytest.mark.parametrize(("name", "again", "damage", "why"), FILES)
def test_a_damaged_file_is_named(run, capsys, name, again, damage, why):
    file = run.file(name)
    damage(file)
    line = refusal(capsys, getattr(run, again))
    where = (file, file.parent) if file.suffix != ".png" or "images.png" in name else (file, file.parent.parent)
    assert any(str(path) in line for path in where), line
    assert re.search(why, line), line
    assert not list(run.root.rglob("*.part"))


@pytest.mark.parametrize("name", ["batches/000000.json", "000004.png"])
def test_what_the_line_about_a_pool_says_makes_the_same_pool_again(run, capsys, name):
    whole = {path: path.read_bytes() for path in run.pool.rglob("*.*") if path.is_file()}
    run.file(name).write_bytes(b"damaged")
    Path(re.search("delete (.*), and", refusal(capsys, run.quant))[1]).unlink()
    run.quant()
    assert {path: path.read_bytes() for path in run.pool.rglob("*.*") if path.is_file()} == whole


def test_a_damaged_batch_is_told_before_others_are_made(run, capsys):
    edited(batch=5)(run.file("batches/000000.json"))
    run.file("batches/000001.json").unlink()
    refusal(capsys, run.quant)
    assert not (run.pool / "batches" / "000001.json").exists()


@pytest.mark.parametrize("line", [b"{", b'{"ce', b'{"cell": {"a": [1, 2', b""])
def test_a_line_that_a_kill_cut_off_is_passed_over(run, line):
    file = run.file("rows.jsonl")
    before = file.read_bytes()
    file.write_bytes(before + line)
    run.compare()
    assert file.read_bytes() == before + line
    file.write_bytes(line)
    run.compare()
    assert len(files.read_json_lines(file, cell=dict)) == len(before.splitlines())


# ---- models


IMPOSSIBLE = {
    "std 0": {"std": [0.5, 0, 0.5]},
    "std negative": {"std": [0.5, -0.1, 0.5]},
    "std nan": {"std": [0.5, float("nan"), 0.5]},
    "std huge": {"std": [1e300] * 3},
    "std empty": {"std": []},
    "std a number": {"std": 0.5},
    "one std": {"std": [0.5]},
    "two means": {"mean": [0.5, 0.5]},
    "four means": {"mean": [0.5] * 4},
    "mean text": {"mean": "grey"},
    "means of text": {"mean": ["a", "b", "c"]},
    "mean infinite": {"mean": [0.5, float("inf"), 0.5]},
    "mean true": {"mean": [True, 0, 0]},
    "mean an object": {"mean": {}},
    "crop 0": {"crop_pct": 0},
    "crop -1": {"crop_pct": -1},
    "crop tiny": {"crop_pct": 1e-9},
    "crop nan": {"crop_pct": float("nan")},
    "crop text": {"crop_pct": "all"},
    "crop huge": {"crop_pct": 1e9},
    "crop mode": {"crop_mode": "round"},
    "crop mode a list": {"crop_mode": []},
    "interpolation": {"interpolation": "cubic spline"},
    "interpolation 3": {"interpolation": 3},
    "interpolation a list": {"interpolation": ["bicubic"]},
    "size of two": {"input_size": [32, 32]},
    "size of text": {"input_size": "32"},
    "label_names 5": {"label_names": 5},
    "num_classes text": {"num_classes": "five"},
    "num_classes 10**9": {"num_classes": 10**9},
}
ARGUMENTS = {
    "depth huge": {"depth": 10**9},
    "depth 0": {"depth": 0},
    "depth text": {"depth": "two"},
    "width huge": {"embed_dim": 10**12},
    "heads 0": {"num_heads": 0},
    "heads 3": {"num_heads": 3},
    "patch 0": {"patch_size": 0},
    "size 0": {"img_size": 0},
    "size huge": {"img_size": 10**9},
    "unknown": {"colour": "red"},
    "no head": {"num_classes": 0},
    "channels": {"in_chans": 1},
    "pooling": {"global_pool": "some"},
}


def config_of(folder: Path, change: Callable[[dict], None]) -> str:
    """A model in timm's format whose `config.json` is changed."""
    name = local_dir(folder, made())
    about = json.loads((folder / "config.json").read_text())
    change(about)
    (folder / "config.json").write_text(json.dumps(about))
    return name


def in_pretrained_cfg(changes: dict) -> Callable[[dict], None]:
    def change(about: dict) -> None:
        about["pretrained_cfg"] = {**about.get("pretrained_cfg", {}), **changes}
        about |= {key: value for key, value in changes.items() if key in about}

    return change


def in_arguments(changes: dict) -> Callable[[dict], None]:
    return lambda about: about["model_args"].update(changes)


CONFIGS = {
    **{name: in_pretrained_cfg(changes) for name, changes in IMPOSSIBLE.items()},
    **{name: in_arguments(changes) for name, changes in ARGUMENTS.items()},
    "architecture 3": lambda about: about.update(architecture=3),
    "architecture of a CNN": lambda about: about.update(architecture="resnet18"),
    "no such architecture": lambda about: about.update(architecture="vit_of_nobody"),
    "arguments a list": lambda about: about.update(model_args=[1]),
    "configuration a list": lambda about: about.update(pretrained_cfg=[1]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_impossible_configuration_is_named(tmp_path, capsys, name):
    model = config_of(tmp_path, CONFIGS[name])
    flags = ["--model", model, "--dataset", str(tmp_path), "--output", str(tmp_path / "out"), *NOISE]
    assert str(tmp_path) in refusal(capsys, lambda: test_quant.main(flags))


@pytest.mark.parametrize("changes", [IMPOSSIBLE[name] for name in ("std 0", "std a number", "two means", "crop -1")])
def test_an_impossible_configuration_beside_weights_is_named(tmp_path, capsys, changes):
    config_of(tmp_path, in_pretrained_cfg(changes))
    line = refusal(capsys, lambda: load_model(NAME, tmp_path))
    assert str(tmp_path / "config.json") in line


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_configuration_that_is_no_json_object_is_named(tmp_path, capsys, text):
    model = local_dir(tmp_path, made())
    (tmp_path / "config.json").write_bytes(text)
    assert str(tmp_path) in refusal(capsys, lambda: test_quant.main(["--model", model, *NOISE]))


TRANSFORMERS = {
    "model_type 3": {"model_type": 3},
    "heads text": {"num_attention_heads": "two"},
    "id2label a list": {"id2label": [1]},
    "id2label words": {"id2label": {"a": "b"}},
    "epsilon text": {"layer_norm_eps": "small"},
    "activation 5": {"hidden_act": []},
}


@pytest.mark.parametrize("changes", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_configuration_of_transformers_is_named(tmp_path, capsys, changes):
    save_file(made().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"} | changes))
    assert str(tmp_path) in refusal(capsys, lambda: load_model(NAME, tmp_path))


PROCESSORS = {
    "std 0": {"image_mean": [0, 0, 0], "image_std": [0, 0, 0]},
    "no mean": {"image_std": [1, 1, 1]},
    "mean text": {"image_mean": "x", "image_std": [1, 1, 1]},
    "resample 9": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "resample": 9},
    "scale text": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": "x"},
    "size a list": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": [1]},
    "edge 0": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": 10**9, "crop_size": 1, "do_center_crop": True},
}


@pytest.mark.parametrize("about", PROCESSORS.values(), ids=PROCESSORS)
def test_preprocessing_of_transformers_is_named(tmp_path, capsys, about):
    save_file(made().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    assert str(tmp_path) in refusal(capsys, lambda: load_model(NAME, tmp_path))


def tensor(name: str, value: Any) -> Callable[[Path], Path]:
    """A weights file in which one tensor is another."""
    return lambda folder: saved({**made().state_dict(), name: value}, folder / "w.pth")


WEIGHTS = {
    "a scalar head": tensor("head.weight", torch.tensor(1.0)),
    "a flat head": tensor("head.weight", torch.zeros(5)),
    "a head of three axes": tensor("head.weight", torch.zeros(5, 32, 1)),
    "a scalar bias": tensor("head.bias", torch.tensor(1.0)),
    "a scalar class token": tensor("cls_token", torch.tensor(1.0)),
    "scalar positions": tensor("pos_embed", torch.tensor(1.0)),
    "flat positions": tensor("pos_embed", torch.zeros(17, 32)),
    "no positions": tensor("pos_embed", torch.zeros(1, 0, 32)),
    "a scalar projection": tensor("patch_embed.proj.weight", torch.tensor(1.0)),
    "a flat projection": tensor("patch_embed.proj.weight", torch.zeros(32)),
    "a scalar qkv": tensor("blocks.0.attn.qkv.weight", torch.tensor(1.0)),
    "scalar registers": tensor("reg_token", torch.tensor(1.0)),
    "scalar register_tokens": tensor("register_tokens", torch.tensor(1.0)),
    "scalar queries": tensor("blocks.0.attn.q_bias", torch.tensor(1.0)),
    "a scalar second token": tensor("dist_token", torch.tensor(1.0)),
    "a number": lambda folder: saved(3, folder / "w.pth"),
    "a list": lambda folder: saved([1, 2], folder / "w.pth"),
    "an empty dict": lambda folder: saved({}, folder / "w.pth"),
    "text": lambda folder: saved({"weight": "x"}, folder / "w.pth"),
    "one tensor": lambda folder: saved({"a.weight": torch.zeros(2)}, folder / "w.pth"),
    "arrays without axes": lambda folder: arrays(folder, {"embedding/kernel": np.zeros(())}),
    "arrays of three axes": lambda folder: arrays(folder, {"embedding/kernel": np.zeros((2, 2, 2))}),
    "arrays of text": lambda folder: arrays(folder, {"embedding/kernel": np.array("x")}),
    "an index": lambda folder: index(folder, b"[]"),
    "a deep index": lambda folder: index(folder, TEXTS["deep"]),
    "an index of numbers": lambda folder: index(folder, b'{"weight_map": {"a": 1}}'),
    "an index of nothing": lambda folder: index(folder, b'{"weight_map": {}}'),
    "an index of NUL": lambda folder: index(folder, b'{"weight_map": {"a": "\\u0000"}}'),
    "half": lambda folder: half(tensor("a", torch.zeros(1))(folder)),
    "a pipe": lambda folder: Path("/dev/null"),
    **{name: (lambda folder, data=data: raw(folder, data)) for name, (data, _) in list(REFUSED.items())[:2]},
    "nothing": lambda folder: raw(folder, b""),
    "zeros": lambda folder: raw(folder, bytes(1000)),
    "a zip of nothing": lambda folder: raw(folder, b"PK\x05\x06" + bytes(18)),
    "a header of safetensors": lambda folder: raw(folder, (10**15).to_bytes(8, "little") + b"{"),
    "deep safetensors": lambda folder: raw(folder, len(TEXTS["deep"]).to_bytes(8, "little") + TEXTS["deep"]),
}


def raw(folder: Path, data: bytes) -> Path:
    (folder / "w.pth").write_bytes(data)
    return folder / "w.pth"


def half(file: Path) -> Path:
    BINARY_DAMAGES["half"](file)
    return file


def arrays(folder: Path, content: dict) -> Path:
    np.savez(folder / "w.npz", **content)
    return folder / "w.npz"


def index(folder: Path, text: bytes) -> Path:
    (folder / "model.safetensors.index.json").write_bytes(text)
    return folder


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_are_named(tmp_path, capsys, name):
    path = WEIGHTS[name](tmp_path)
    line = refusal(capsys, lambda: load_model(NAME, path))
    assert str(path) in line


# ---- disks


@contextlib.contextmanager
def room_for(most: int) -> Iterator[None]:
    """No file may have more bytes. Ends before the test does: pytest writes as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("task", "most"), [("quant", 0), ("quant", 3000), ("kt", 20_000), ("train", 20_000)])
def test_a_disk_without_room_is_one_line_and_nothing_is_half_written(tmp_path, tmp_path_factory, capsys, task, most):
    run = Finished(tmp_path, tmp_path_factory.mktemp("data"))
    run.pictures()
    with room_for(most):
        line = refusal(capsys, getattr(run, task))
    assert re.match(rf"error: .*{tmp_path}.*: File too large", line), line
    left = contents(tmp_path)
    assert not [path for path in left if path.name.endswith(".part") or path.name.startswith(".")]
    for path in left:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
    getattr(run, task)()  # goes on


@pytest.mark.parametrize("name", ["top1.json", "log.jsonl"])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_whatever_the_system_says_is_told(tmp_path, monkeypatch, name, kind):
    def refuse(*args: object, **how: object) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(files.os, "fsync", refuse)
    monkeypatch.setattr(files, "open", refuse, raising=False)
    write = files.write_json if name.endswith("json") else files.append_json_line
    with pytest.raises(UserError, match=f"cannot write {tmp_path / name}: {os.strerror(kind)}"):
        write(tmp_path / name, {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(tmp_path):
    files.append_json_line(tmp_path / "rows.jsonl", {"a": "b" * 50})
    before = (tmp_path / "rows.jsonl").read_bytes()
    with room_for(100), pytest.raises(UserError, match="File too large"):
        files.append_json_line(tmp_path / "rows.jsonl", {"a": "b" * 50})
    assert (tmp_path / "rows.jsonl").read_bytes() == before


LONG = "n" * 300
PLACES = ["--output", "--datapool", "--save"]


@pytest.mark.parametrize("flag", [*PLACES, "--dataset", "--images", "--model_path", "--export"])
def test_a_name_that_no_disk_holds_is_one_line(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    name = tmp_path / (LONG + ".onnx" * (flag == "--export"))
    usual = QUANT if flag == "--datapool" else [] if flag == "--images" else NOISE
    line = refusal(capsys, lambda: test_quant.main([*usual, flag, str(name)]))
    assert LONG in line


@pytest.mark.parametrize("flag", [*PLACES, "--dataset", "--images", "--export"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, monkeypatch, capsys, flag, below):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    usual = QUANT if flag == "--datapool" else [] if flag == "--images" else NOISE
    assert "file" in refusal(capsys, lambda: test_quant.main([*usual, flag, f"{tmp_path}/file{below}"]))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
@pytest.mark.parametrize("flag", [*PLACES, "--dataset", "--images", "--model_path", "--export"])
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_folder_that_may_not_be_entered_or_written_is_one_line(tmp_path, monkeypatch, capsys, flag, mode):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir(mode=mode)
    usual = QUANT if flag == "--datapool" else [] if flag == "--images" else NOISE
    assert "closed" in refusal(capsys, lambda: test_quant.main([*usual, flag, f"{tmp_path}/closed/in.onnx"]))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "cannot use /x/y: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "cannot use /x: Permission denied"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (MemoryError(), "there is no memory left"),
        (
            torch.OutOfMemoryError("Tried to allocate 2.00 GiB."),
            r"no memory left \(for 2\.00 GiB\)",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line_wherever_it_is_met(capsys, error, line):
    def run() -> None:
        raise error

    assert re.search(line, refusal(capsys, run))


def test_memory_that_torch_does_not_get_is_one_line(capsys):
    assert "no memory left (for 400000000000000 bytes)" in refusal(capsys, lambda: torch.empty(10**14))


def test_other_errors_are_shown_as_they_are(capsys):
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_a_preprocessing_that_cannot_be_is_refused_in_python(model):
    model = tiny_model()
    model.vit.pretrained_cfg = {**model.vit.pretrained_cfg, "std": (0.0, 1.0, 1.0)}
    with pytest.raises(UserError, match=r"tiny: of its std, 0\.0 is not a number from"):
        Preprocessing.of(model.vit, "tiny")


def test_the_weights_of_a_saved_model_are_those_that_were_written(run):
    file = run.file("saved/model.safetensors")
    tensors = load_file(file)
    name = next(name for name, value in tensors.items() if value.dtype == torch.int8)
    tensors[name][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="damaged"):
        run.load()
