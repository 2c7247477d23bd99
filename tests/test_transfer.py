"""Knowledge transfer: the loss, the changes of images, the student, and the loop that a user runs."""

import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import test_kt
import test_quant
from kt import (
    DistillConfig,
    Distiller,
    StudentConfig,
    distill,
    distillation_loss,
    load_student,
    save_student,
)
from kt.distillation import Memory
from kt.match import made
from kt.student import renormalized
from kt.whole import classifier_parameters
from models import LoadedModel, PatchGrid, SparseImages, SparseViT, load_model
from models.packed import PackedBlock
from scripts import compare_kt
from tests.conftest import ROOT, TINY_ARGS, randomize, run_script, tiny_model
from utils import AUGMENTATIONS, augmented
from utils.checkpoint import Checkpoint
from utils.classes import Labels
from utils.config import DataConfig
from utils.data import limited, load_split
from utils.errors import UserError, UserNote
from utils.flags import transfer_parser, transfer_task

GRID = PatchGrid(4, 4, 8, 8)
CPU = torch.device("cpu")
FAST = ["--iterations", 4, "--inversion-batchsize", 4, "--images_per_epoch", 8, "--kr-batchsize", 4, "--val_limit", 40]
FROM_SCRATCH = StudentConfig(init="scratch", finetune="full")
SCRATCH = ["--student_init", "scratch", "--finetune", "full", "--lr", 0.01]


def kept_images(count=6, kept=10) -> SparseImages:
    generator = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.randperm(16, generator=generator)[:kept].sort().values for _ in range(count)])
    return SparseImages(torch.randn(count, kept, 3, 8, 8, generator=generator), positions, torch.zeros(count).long())


def whole(images: SparseImages) -> torch.Tensor:
    return GRID.unpatchify(images.patches, images.positions)


def kt(tmp_path: Path, *args, output="out", pool="pool") -> dict:
    """Run test_kt.py in this process."""
    folders = ["--datapool", tmp_path / pool, "--output", tmp_path / output]
    return test_kt.main([str(arg) for arg in (*FAST, *SCRATCH, *folders, *args)])


def pool_files(root: Path) -> dict[str, bytes]:
    """Everything that a pool holds."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def torchrun(ranks: int, script: str, *args, timeout=120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def said(script: ModuleType, flags: list, ranks: int, capsys) -> str:
    """What a script prints that as many ranks run to its end, one of them here."""
    if ranks == 1:
        script.main(list(map(str, flags)))
        return capsys.readouterr().out
    result = torchrun(ranks, f"{script.__name__}.py", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_loss_is_the_formula():
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), expected)
    assert distillation_loss(teacher, teacher, 3.0).abs() < 1e-12


def test_flip_mirrors_whole_images():
    images = kept_images(20)
    flipped = whole(AUGMENTATIONS["flip"](images, GRID, torch.Generator().manual_seed(1)))
    kinds = {
        "same" if torch.equal(a, b) else "mirrored" if torch.equal(a, b.flip(-1)) else "wrong"
        for a, b in zip(flipped, whole(images), strict=True)
    }
    assert kinds == {"same", "mirrored"}


def test_shift_rolls_by_whole_patches():
    images = kept_images(40)
    moved = whole(AUGMENTATIONS["shift"](images, GRID, torch.Generator().manual_seed(1)))
    rolls = [(8 * dy, 8 * dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    found = {
        next(roll for roll in rolls if torch.equal(a, b.roll(roll, (-2, -1))))
        for a, b in zip(moved, whole(images), strict=True)
    }
    assert len(found) == 9


def test_scattered_patches_keep_their_pixels_and_never_meet():
    images = kept_images(20)
    scattered = AUGMENTATIONS["scatter"](images, GRID, torch.Generator().manual_seed(1))
    torch.testing.assert_close(scattered.patches, images.patches)
    moved = (scattered.positions != images.positions).any(dim=1).sum()
    assert 4 < moved < 16  # about half of them
    for row in scattered.positions.tolist():
        assert len(set(row)) == len(row) and set(row) <= set(range(GRID.count))


def test_the_learning_rate_falls_to_zero_over_all_steps():
    teacher = load_model("deit_nano_4_digits")
    student = load_student(teacher, FROM_SCRATCH)
    config = DistillConfig(batch_size=4, lr=0.2, epochs=4, lr_schedule="cosine", augment=())
    distiller = Distiller(teacher, student, config, CPU)
    positions = torch.arange(10).expand(4, 10)
    nano, rates = SparseImages(torch.randn(4, 10, 3, 4, 4), positions, torch.zeros(4).long()), []
    for _ in range(4):
        distiller.run(nano, 1)
        rates.append(distiller.optimizer.param_groups[0]["lr"])
    expected = [0.2 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(expected)


def test_crop_enlarges_a_part_of_each_image():
    """Brightness grows along rows, columns and both: enlarged, it still does, more slowly."""
    rows, cols = torch.meshgrid(*(torch.arange(side) / side for side in GRID.image_size), indexing="ij")
    pixels = torch.stack([rows, cols, rows + cols]).expand(16, -1, -1, -1)
    images = SparseImages.whole(GRID, pixels, torch.zeros(16))
    cropped = AUGMENTATIONS["crop"](images, GRID, torch.Generator().manual_seed(1))
    assert torch.equal(cropped.positions, images.positions)
    seen = whole(cropped)
    for channel, dim in ((0, -2), (1, -1)):
        slopes = seen[:, channel, 4:-4, 4:-4].diff(dim=dim) * 32
        side = slopes.mean(dim=(1, 2))
        torch.testing.assert_close(slopes, side[:, None, None].expand_as(slopes), rtol=1e-3, atol=1e-3)
        assert (side >= 0.35**0.5 - 1e-3).all() and (side <= 1 + 1e-3).all() and side.std() > 0.05
    torch.testing.assert_close(seen[:, 2], seen[:, 0] + seen[:, 1])  # the same part of every channel


@pytest.mark.parametrize("kept", [1, 5, 14])
def test_crop_and_blur_of_sparse_images_show_kept_pixels_alone(kept):
    places = torch.rand(16, GRID.count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :kept]
    patches = 3 + torch.arange(16.0)[:, None, None, None, None].expand(16, kept, 3, 8, 8)
    images = SparseImages(patches, places, torch.zeros(16))
    cropped = AUGMENTATIONS["crop"](images, GRID, torch.Generator().manual_seed(1))
    count = cropped.positions.shape[1]
    assert kept / 2 <= count <= GRID.count
    assert all(len(row.unique()) == count for row in cropped.positions)
    torch.testing.assert_close(cropped.patches, patches[:, :1].expand_as(cropped.patches))
    blurred = AUGMENTATIONS["blur"](images, GRID, torch.Generator().manual_seed(1))
    assert torch.equal(blurred.positions, places)
    torch.testing.assert_close(blurred.patches, patches)


def test_blur_takes_away_what_is_fine_and_colour_changes_channels_apart():
    images = SparseImages.whole(GRID, torch.randn(64, 3, 32, 32), torch.zeros(64))
    blurred = whole(AUGMENTATIONS["blur"](images, GRID, torch.Generator().manual_seed(1)))
    spread = blurred.std(dim=(1, 2, 3))
    assert spread.max() > 0.9 and spread.min() < 0.7 and blurred.mean().abs() < 0.02
    coloured = AUGMENTATIONS["colour"](images, GRID, torch.Generator().manual_seed(1))
    factors = coloured.patches.std(dim=(1, 3, 4)) / images.patches.std(dim=(1, 3, 4))
    assert (factors > 0.59).all() and (factors < 1.41).all() and factors.std(dim=1).min() > 0


def test_a_preset_says_how_a_student_learns_and_given_flags_win():
    task = transfer_task(transfer_parser("").parse_args(["--preset", "transfer"]))
    learning = task.distillation
    assert (learning.augment, learning.optimizer, learning.steps) == (("flip", "crop", "blur", "colour"), "lbfgs", 25)
    assert task.images.config.init == "leaves"
    given = ["--augment", "--lr", "0.5", "--match", "features", "--finetune", "full", "--optimizer", "sgd"]
    learning = transfer_task(transfer_parser("").parse_args(["--preset", "transfer", *given])).distillation
    assert (learning.augment, learning.optimizer, learning.reuse, learning.lr) == ((), "sgd", 1, 0.5)
    assert learning.epochs == DistillConfig.of_preset("transfer", StudentConfig()).epochs == 10
    for student, *wanted in (
        (StudentConfig(finetune="full"), 3e-5, 250, 30),
        (StudentConfig("resnet10t", finetune="full"), 3e-5, 0, 200),
        (FROM_SCRATCH, 1e-3, 0, 200),
    ):
        of_all = DistillConfig.of_preset("transfer", student)
        assert [of_all.lr, of_all.head_steps, of_all.steps] == wanted
        assert (of_all.optimizer, of_all.reuse) == ("adamw", 1)
    assert DistillConfig.of_preset("transfer", StudentConfig("resnet10t")).reuse == 1
    stepwise = DistillConfig.of_preset("transfer", StudentConfig(), optimizer="adamw")
    assert (stepwise.lr, stepwise.reuse, stepwise.steps, stepwise.lr_schedule) == (3e-3, 8, 200, "cosine")
    fitted = DistillConfig.of_preset("transfer", StudentConfig(), optimizer="lbfgs", lr=1.0)
    assert fitted == replace(DistillConfig.of_preset("transfer", StudentConfig()), lr=1.0)
    assert (fitted.temperature, fitted.reuse, fitted.steps) == (8.0, 1, 25)
    begun = DistillConfig.of_preset("transfer", StudentConfig(), head_steps=5)
    assert (begun.optimizer, begun.head_steps, begun.reuse) == ("adamw", 5, 8)
    plain = transfer_task(transfer_parser("").parse_args(["--preset", "smi"])).distillation
    assert plain == transfer_task(transfer_parser("").parse_args([])).distillation == DistillConfig()


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        (["--no-flip"], ("shift",)),
        (["--no-flip", "--preset", "transfer"], ("crop", "blur", "colour")),
        (["--no-flip", "--augment", "mix", "flip"], ("mix", "flip")),
        (["--flip"], ("flip", "shift")),
        (["--views", "roll"], ("flip", "shift")),
    ],
)
def test_no_flip_leaves_mirroring_out_of_the_lessons_unless_it_is_asked_for(given, changes):
    assert transfer_task(transfer_parser("").parse_args(given)).distillation.augment == changes


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_reproducible_and_leaves_the_images_alone(name):
    images, before = kept_images(), kept_images()
    first, again = (augmented(images, GRID, [name], torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.patches, again.patches)
    assert torch.equal(first.positions, again.positions)
    assert not (torch.equal(first.patches, images.patches) and torch.equal(first.positions, images.positions))
    assert torch.equal(images.patches, before.patches)
    assert torch.equal(images.positions, before.positions)


@pytest.mark.parametrize("finetune", ["linear", "full"])
def test_what_learns_is_what_was_asked_for(finetune):
    teacher, student = tiny_model(), tiny_model()
    heads = {"head.weight", "head.bias"}
    for name, parameter in student.vit.named_parameters():
        parameter.requires_grad_(finetune == "full" or name in heads)
    torch.nn.init.zeros_(student.vit.head.weight)
    before = {key: value.clone() for key, value in student.vit.state_dict().items()}
    Distiller(teacher, student, DistillConfig(batch_size=4), CPU).run(kept_images(), 2)
    changed = {key for key, value in student.vit.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == (heads if finetune == "linear" else set(before))


def test_the_teacher_is_left_alone():
    teacher = tiny_model()
    before = teacher.fingerprint()
    Distiller(teacher, load_student(teacher_like(), FROM_SCRATCH), DistillConfig(batch_size=4), CPU)
    assert teacher.fingerprint() == before


def teacher_like():
    return load_model("deit_nano_4_digits")


def test_a_student_learns_the_teacher_on_the_images_it_sees():
    teacher, student = tiny_model(), tiny_model()
    torch.nn.init.zeros_(student.vit.head.weight)
    student.vit.requires_grad_(True)
    config = DistillConfig(batch_size=6, optimizer="adamw", lr=1e-3, augment=())
    distiller = Distiller(teacher, student, config, CPU)
    first = distiller.run(kept_images(), 1)
    distiller.run(kept_images(), 60)
    assert distiller.run(kept_images(), 1) < 0.05 * first


def test_a_saved_student_is_loaded_by_timm(tmp_path):
    teacher, student = tiny_model(), tiny_model()
    save_student(student, teacher, tmp_path / "student", top1=12.5)
    file = tmp_path / "student" / "model.safetensors"
    loaded = timm.create_model(f"local-dir:{file.parent}", checkpoint_path=str(file)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), student.vit(images))
    assert json.loads((tmp_path / "student" / "config.json").read_text())["top1"] == 12.5
    assert list(loaded.pretrained_cfg["mean"]) == list(teacher.preprocessing.mean)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((None, None, "scratch", "linear"), "--finetune full"),
        ((None, "x.pth", "scratch", "full"), "--student_path"),
        ((None, "x.pth", "pretrained", "full"), "--student_path x.pth does not exist"),
        (("deit_teeny_patch16_224", None, "scratch", "full"), "unknown model.*did you mean"),
    ],
)
def test_students_that_cannot_be_are_refused(args, why):
    with pytest.raises(UserError, match=why):
        load_student(teacher_like(), StudentConfig(*args))


def test_a_student_never_starts_from_the_teachers_own_weights(tmp_path):
    save_student(tiny_model(), tiny_model(), tmp_path / "teacher")
    teacher = load_model(f"local-dir:{tmp_path / 'teacher'}")
    with pytest.raises(UserError, match="teacher's own weights"):
        load_student(teacher, StudentConfig())


def test_the_run_reports_and_saves_what_it_says(tmp_path):
    report = kt(tmp_path, "--epochs", 3, "--kd_steps", 2, "--eval_every", 2)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["task"] == "kt"
    assert report["teacher"]["top1"] > 90
    assert report["pool"]["images"] == 24
    assert report["synthesis"]["seconds"] > 0
    assert report["distill"]["seconds"] > 0
    assert [entry["images"] for entry in report["history"]] == [8, 16, 24]
    tops = [entry["top1"] for entry in report["history"]]
    assert tops[0] is None
    assert report["student"] == {"top1": tops[2], "kept": "last", "epoch": 3}
    file = tmp_path / "out" / "student" / "model.safetensors"
    vit = timm.create_model(f"local-dir:{file.parent}", checkpoint_path=str(file)).eval()
    assert vit.num_classes == 10
    assert json.loads((tmp_path / "out" / "student" / "config.json").read_text())["top1"] == tops[2]


@pytest.mark.parametrize("mode", [1, 2])
def test_noise_and_real_images_need_no_pool(tmp_path, mode):
    report = kt(tmp_path, "--epochs", 2, "--mode", mode, "--max_images", 20)
    assert report["images"] == {1: "gaussian", 2: "real"}[mode]
    assert report["pool"] == {"images": 20, "path": None}
    assert not (tmp_path / "pool").exists()


def test_an_existing_pool_is_used_without_adding_to_it(tmp_path):
    kt(tmp_path, "--epochs", 2)
    before = pool_files(tmp_path / "pool")
    report = kt(tmp_path, "--epochs", 3, "--images_per_epoch", 0, output="again")
    assert report["pool"]["images"] == 16
    assert pool_files(tmp_path / "pool") == before


def test_any_pool_of_the_teacher_can_be_learnt_from(tmp_path):
    pool = kt(tmp_path, "--epochs", 2)["pool"]["path"]
    report = kt(tmp_path, "--epochs", 1, "--images", pool, "--max_images", 12, output="again", pool="other")
    assert (report["images"], report["pool"]) == ("stored", {"images": 12, "path": None})
    assert not (tmp_path / "other").exists()
    page = (tmp_path / "again" / "report.html").read_text()
    assert "12 stored images" in page


def test_an_existing_pool_is_used_while_another_run_fills_it(tmp_path):
    pool = Path(kt(tmp_path, "--epochs", 2)["pool"]["path"])
    with open(pool / "pool.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        flags = ["--epochs", 1, "--images_per_epoch", 0, "--max_images", 11]
        report = kt(tmp_path, *flags, output="again")
    assert report["pool"]["images"] == 11
    assert report["synthesis"]["seconds"] is None  # made by another run


def test_ranks_share_the_batches_of_a_pool_that_has_fewer(tmp_path):
    arguments = [*FAST, *SCRATCH, "--datapool", tmp_path / "pool", "--epochs", 1, "--images_per_epoch", 4]
    test_kt.main(list(map(str, [*arguments, "--output", tmp_path / "out"])))
    result = torchrun(2, "test_kt.py", *arguments, "--images_per_epoch", 0, "--output", tmp_path / "again")
    assert result.returncode == 0, result.stderr


def test_a_run_that_is_told_to_end_before_its_first_evaluation_is_evaluated(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    write = Checkpoint.write

    def write_and_stop(checkpoint, state):
        write(checkpoint, state)
        if len(state["progress"]["history"]) == 2:
            raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Checkpoint, "write", write_and_stop)
        kt(tmp_path, "--epochs", 9, "--eval_every", 9)
    report = kt(tmp_path, "--epochs", 1, "--eval_every", 9)
    assert report["epochs"] == 2
    assert report["student"]["top1"] == report["history"][-1]["top1"] is not None


def test_the_student_that_is_kept_is_the_nearest_to_the_teacher_on_images_held_back(tmp_path):
    """And its weights are those of that epoch; what test images say of it decides nothing."""
    flags = ["--keep_student", "agreement", "--held_back", 8, "--images_per_epoch", 16, "--lr", 0.05, "--kd_steps", 4]
    report = kt(tmp_path, "--epochs", 4, *flags)
    agreements = [entry["agreement"] for entry in report["history"]]
    assert [entry["images"] for entry in report["history"]] == [8, 24, 40, 56]
    kept = report["student"]["epoch"]
    assert agreements[kept - 1] == max(agreements)
    assert report["student"] == {"top1": report["history"][kept - 1]["top1"], "kept": "agreement", "epoch": kept}
    ended = kt(tmp_path, "--epochs", kept, *flags, output="as far")
    assert ended["student"]["epoch"] == kept
    read = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("out", "as far")]
    assert all(torch.equal(read[0][key], read[1][key]) for key in read[0])
    with pytest.raises(UserError, match=r"--held_back 99.*8 images"):
        kt(tmp_path, "--epochs", 1, "--keep_student", "agreement", "--held_back", 99, output="few")


def test_tokens_and_relations_are_imitated():
    teacher, student = tiny_model(), tiny_model(depth=1, embed_dim=16)
    ours, theirs = SparseViT(student.vit), SparseViT(teacher.vit)
    images = kept_images()
    say = [vit(images.patches, images.positions, return_tokens=True) for vit in (ours, theirs)]
    assert say[1].tokens.shape == (6, 10, 32)
    whole_tokens = teacher.vit.forward_features(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches, positions = theirs.grid.patchify(pixels), theirs.grid.all_positions(2)
    found = theirs(patches, positions, return_tokens=True).tokens
    torch.testing.assert_close(found, whole_tokens[:, 1:], rtol=1e-4, atol=1e-5)
    expected = sum(_cosine_error(a, b) for a, b in zip(say[0].tokens, say[1].tokens, strict=True))
    (weight, relations), (_, features) = made(("relations:weight=0.5", "features"), ours, theirs, 20.0)
    assert weight == 0.5
    torch.testing.assert_close(relations(*say), expected / 6)
    wanted = (say[1].tokens - say[1].tokens.mean(-1, keepdim=True)) / say[1].tokens.var(
        -1, unbiased=False, keepdim=True
    ).add(1e-5).sqrt()
    torch.testing.assert_close(features(*say), (features.map(say[0].tokens) - wanted).square().mean())


def _cosine_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the cosines of all pairs of rows, pair by pair."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a))]
    cosine = torch.nn.functional.cosine_similarity
    return torch.stack([(cosine(a[i], a[j], dim=0) - cosine(b[i], b[j], dim=0)).square() for i, j in pairs]).mean()


@pytest.mark.parametrize("ways", [("features",), ("relations",), ("logits", "features:weight=0.1")], ids=str)
def test_every_way_of_matching_brings_down_what_it_measures(ways):
    teacher, student = tiny_model(), tiny_model(depth=1, embed_dim=16)
    config = DistillConfig(batch_size=8, optimizer="adamw", lr=3e-3, match=ways, augment=())
    distiller = Distiller(teacher, student, config, CPU)
    images = kept_images(8)
    first = distiller.run(images, 1)
    distiller.run(images, 60)
    last = distiller.run(images, 1)
    assert last < 0.8 * first


def test_a_distillation_token_is_taught_decisions():
    teacher = tiny_model()
    with pytest.raises(UserError, match="--match hard is for a student with a distillation token"):
        Distiller(teacher, tiny_model(), DistillConfig(match=("logits", "hard")), CPU)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    student = LoadedModel("distilled", timm.create_model("deit_tiny_distilled_patch16_224", **args), None, None)
    ours, theirs, images = SparseViT(student.vit), SparseViT(teacher.vit), kept_images()
    said, taught = (vit(images.patches, images.positions) for vit in (ours, theirs))
    ((_, hard),) = made(("hard",), ours, theirs, 20.0)
    logits = student.vit.head_dist(said.features[:, 1])
    expected = -logits.log_softmax(1)[torch.arange(6), taught.logits.argmax(1)].mean()
    torch.testing.assert_close(hard(said, taught), expected)


@pytest.mark.parametrize("changes", [("drop",), ("collage",), ("collage", "drop")], ids=str)
def test_patches_that_are_left_out_or_put_together_keep_their_places(changes):
    images = kept_images(40, kept=7)
    changed = augmented(images, GRID, changes, torch.Generator().manual_seed(1))
    assert changed.positions.shape[1] == 7 or "drop" in changes
    for row, (patches, positions) in enumerate(zip(changed.patches, changed.positions, strict=True)):
        assert len(set(positions.tolist())) == len(positions)
        for patch, position in zip(patches, positions, strict=True):
            there = images.positions == position
            assert any(torch.equal(patch, one) for one in images.patches[there])
        if changes == ("drop",):
            assert set(positions.tolist()) <= set(images.positions[row].tolist())
    if "collage" in changes:
        mixed = sum(not torch.isin(c, o).all() for c, o in zip(changed.positions, images.positions, strict=True))
        assert 5 < mixed < 35


@pytest.mark.parametrize("finetune", ["linear", "full"])
def test_a_cnn_is_taught_whole_images_of_its_own_size_and_saved_in_timms_format(tmp_path, finetune):
    flags = ["--student", "resnet10t", "--student_img_size", 48, "--student_init", "scratch", "--finetune", "full"]
    if finetune == "linear":
        model = timm.create_model("resnet10t", num_classes=7)
        torch.save(model.state_dict(), tmp_path / "cnn.pth")
        flags = ["--student", "resnet10t", "--student_img_size", 48, "--student_path", tmp_path / "cnn.pth"]
        flags += ["--student_init", "pretrained", "--finetune", "linear"]
    schedule = ["--prune_it", 1, "--prune_ratio", 0.5]
    report = kt(tmp_path, "--epochs", 2, "--kd_steps", 2, *schedule, *flags)
    assert report["student_name"] == "resnet10t"
    folder = tmp_path / "out" / "student"
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    saved = timm.create_model(f"local-dir:{folder}", checkpoint_path=str(folder / "model.safetensors")).eval()
    assert saved.num_classes == 10
    if finetune == "linear":
        assert torch.equal(saved.conv1[0].weight, model.conv1[0].weight)
        assert torch.equal(saved.bn1.running_mean, model.bn1.running_mean)
    with pytest.raises(UserError, match=r"--no-fill.*whole images"):
        kt(tmp_path, "--epochs", 2, "--no-fill", *schedule, *flags, output="no")


def test_what_a_cnn_is_fed_is_the_teachers_image_in_its_own_normalization():
    teacher = tiny_model()
    student = load_student(teacher, StudentConfig("resnet10t", init="scratch", finetune="full", img_size=32))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs, ours = (preprocessing.normalize(images) for preprocessing in (teacher.preprocessing, student.preprocessing))
    whole = student.sparse()
    seen = []
    whole.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole(teacher.grid.patchify(theirs), teacher.grid.all_positions(2))
    torch.testing.assert_close(seen[0], ours)


def test_a_vit_of_other_patches_is_a_student_of_whole_images(tmp_path):
    flags = ["--student", "vit_tiny_patch16_224", "--student_img_size", 32]
    report = kt(tmp_path, "--epochs", 1, *flags, "--match", "logits")
    assert report["student_name"] == "vit_tiny_patch16_224"
    with pytest.raises(UserError, match="--match relations compares patch tokens"):
        kt(tmp_path, "--epochs", 1, *flags, "--match", "relations", output="no")
    with pytest.raises(UserError, match="--adv"):
        kt(tmp_path, "--epochs", 1, *flags, "--adv", 1, output="no adversary")


def test_images_are_made_for_so_long(tmp_path):
    """One batch at least; a run that goes on, or finds images that others made, adds what its time is good for."""
    assert kt(tmp_path, "--epochs", 2, "--minutes", 1e-6)["history"][1]["images"] == 4
    report = kt(tmp_path, "--epochs", 1, "--minutes", 0.02, output="longer", pool="longer pool")
    seconds = [
        json.loads(line)["seconds"] for line in (tmp_path / "longer" / "synthesis.jsonl").read_text().splitlines()
    ]
    assert report["pool"]["images"] == 4 * len(seconds)
    assert sum(seconds) >= 1.2 > sum(seconds[:-1])
    again = kt(tmp_path, "--epochs", 2, "--minutes", 0.02, output="longer", pool="longer pool")
    assert [entry["images"] for entry in again["history"]] == [report["pool"]["images"]] * 2
    with pytest.raises(UserError, match="--minutes is the time to invert"):
        kt(tmp_path, "--epochs", 1, "--minutes", 1, "--mode", 1, output="noise")


def test_the_images_of_a_trajectory_are_fed_together(tmp_path):
    report = kt(tmp_path, "--epochs", 1, "--strategy", "pri", "--pri_division", 4, "--join")
    assert report["history"][0]["images"] == 2
    with pytest.raises(UserError, match=r"--join.*--strategy pri"):
        kt(tmp_path, "--epochs", 1, "--join", output="no")


@pytest.mark.parametrize("flags", [["--kd_lr_schedule", "cosine"], ["--mode", 1]], ids=str)
def test_more_epochs_are_refused_where_they_would_change_those_before(tmp_path, flags):
    kt(tmp_path, "--epochs", 1, *flags)
    with pytest.raises(UserError, match="--epochs 1, not 2"):
        kt(tmp_path, "--epochs", 2, *flags)


def test_images_that_find_no_room_are_refused(tmp_path):
    for flags in (["--max_images", 10**9], ["--images_per_epoch", 0]):
        with pytest.raises(UserError, match="--max_images"):
            kt(tmp_path, "--mode", 1, *flags)


def test_an_empty_pool_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        kt(tmp_path, "--images_per_epoch", 0)


def test_other_flags_in_the_same_output_are_refused(tmp_path):
    kt(tmp_path, "--epochs", 1)
    with pytest.raises(UserError, match="--lr"):
        kt(tmp_path, "--epochs", 2, "--lr", 0.5)


def test_a_killed_run_ends_with_the_same_numbers(tmp_path, capsys):
    arguments = [*FAST, *SCRATCH, "--epochs", 6, "--kd_lr_schedule", "cosine"]

    def command(name: str) -> list[str]:
        return list(map(str, [*arguments, "--datapool", tmp_path / f"{name}-pool", "--output", tmp_path / name]))

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(
        [sys.executable, "test_kt.py", *command("killed")], cwd=ROOT, env=env, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "killed" / "report.json").exists()
    test_kt.main(command("killed"))
    assert "going on after epoch" in capsys.readouterr().out
    test_kt.main(command("straight"))
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "straight")]
    assert reports[0]["history"] == reports[1]["history"]
    assert reports[0]["student"] == reports[1]["student"]
    assert pool_files(tmp_path / "killed-pool") == pool_files(tmp_path / "straight-pool")


def test_adversarial_images_follow_the_student_also_after_a_restart(tmp_path):
    """They depend on what the student has learnt, so the restarted run must bring it back first."""
    plain, straight = (
        kt(tmp_path, "--epochs", 2, "--adv", adv, output=f"adv{adv}", pool=f"pool{adv}") for adv in (0, 1)
    )
    kt(tmp_path, "--epochs", 1, "--adv", 1, output="restarted", pool="restarted-pool")
    restarted = kt(tmp_path, "--epochs", 2, "--adv", 1, output="restarted", pool="restarted-pool")
    assert restarted["history"] == straight["history"] != plain["history"]
    assert pool_files(tmp_path / "restarted-pool") == pool_files(tmp_path / "pool1")


def test_images_that_look_natural_are_the_same_whatever_is_learnt(tmp_path):
    """The backbone that looks at them is the one that the student starts from; a run that is started again has it."""

    def run(epochs: int, learns: str, output: str) -> dict:
        folders = ["--datapool", f"{tmp_path}/pool-{output}", "--output", f"{tmp_path}/{output}"]
        flags = [*FAST, "--prior", "natural", "--epochs", epochs, "--finetune", learns, "--lr", 0.01, *folders]
        return test_kt.main([str(flag) for flag in flags])

    once, short, again, full = (
        run(*args) for args in ((2, "linear", "once"), (1, "full", "twice"), (2, "full", "twice"), (2, "full", "full"))
    )
    assert short["history"] == again["history"][:1]
    assert again["history"] == full["history"] != once["history"]
    pools = [pool_files(tmp_path / f"pool-{name}") for name in ("once", "twice", "full")]
    assert pools[0] == pools[1] == pools[2]


def test_two_ranks_transfer_as_one_does(tmp_path, capsys):
    arguments = [*FAST, *SCRATCH, "--epochs", 2, "--kd_steps", 2, "--kd_dtype", "float32", "--head_steps", 2]
    for name in ("one", "two"):
        flags = [*arguments, "--datapool", tmp_path / f"{name}-pool", "--output", tmp_path / name]
        assert said(test_kt, flags, 1 if name == "one" else 2, capsys).count("student, the last") == 1
    assert pool_files(tmp_path / "one-pool") == pool_files(tmp_path / "two-pool")
    one, two = (
        timm.create_model(f"local-dir:{folder}", checkpoint_path=f"{folder}/model.safetensors")
        for folder in (tmp_path / "one" / "student", tmp_path / "two" / "student")
    )
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["teacher"] == pytest.approx(reports[1]["teacher"])
    assert reports[0]["student"]["top1"] == pytest.approx(reports[1]["student"]["top1"], abs=5)
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=key)


def test_two_ranks_quantize_as_one_does(tmp_path, capsys):
    arguments = ["--iterations", 4, "--calib-batchsize", 4, "--num_images", 12, "--a_bit", 4, "--val_limit", 41]
    arguments += ["--check_images", 4]
    reports = []
    for name in ("one", "two"):
        flags = [*arguments, "--datapool", tmp_path / f"{name}-pool", "--output", tmp_path / name]
        said(test_quant, flags, 1 if name == "one" else 2, capsys)
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    assert pool_files(tmp_path / "one-pool") == pool_files(tmp_path / "two-pool")
    for key, part in itertools.product(("fp", "quant"), ("top1", "top5", "loss", "images")):
        assert reports[0][key][part] == pytest.approx(reports[1][key][part]), (key, part)


def test_more_ranks_than_batches_is_one_clear_error(tmp_path):
    arguments = ["--iterations", 4, "--datapool", tmp_path / "pool", "--output", tmp_path / "out", "--val_limit", 10]
    result = torchrun(2, "test_quant.py", *arguments)
    assert result.returncode != 0
    assert "error: 2 ranks for 1 batches" in result.stderr


def test_the_command_line_speaks_of_missing_teachers(tmp_path):
    result = run_script("test_kt.py", "--model", "deit_tiny_16_cifar10", "--model_path", tmp_path / "none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --model_path")
    assert result.stderr.count("\n") == 1


def test_a_student_is_a_sparse_vit_like_any_other():
    student = load_student(teacher_like(), FROM_SCRATCH)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(SparseViT(student.vit).forward_images(images), student.vit(images), rtol=1e-4, atol=1e-4)


def test_compare_tabulates_what_students_learn(tmp_path):
    flags = ["--epochs", "1", "--images_per_epoch", "4", "--inversion-batchsize", "4", "--kd_steps", "2"]
    flags += ["--kr-batchsize", "4", "--iterations", "8", "--prune_it", "2", "--prune_ratio", "0.5"]
    flags += ["--val_limit", "40", "--num-workers", "0", "--baselines", "gaussian", "--strategies", "smi", "pri"]
    flags += ["--students", "linear", "scratch", "--scratch", "--optimizer adamw --lr 0.001"]
    flags += ["--datapool", str(tmp_path / "pool")]
    summary = compare_kt.main([*flags, "--output", str(tmp_path / "out")])
    found = {(row["data"], row["finetune"], row["student_init"]) for row in summary}
    kinds = (("linear", "pretrained"), ("full", "scratch"))
    assert found == {(data, *kind) for data in ("gaussian", "smi", "pri") for kind in kinds}
    assert all(row["synthesis_seconds"] > 0 for row in summary if row["data"] != "gaussian")
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written[-1]["data"] == "teacher"
    assert all({"data", "finetune", "top1", "synthesis_seconds", "images"} <= row.keys() for row in written[:-1])
    assert (tmp_path / "out" / "images.png").is_file()


CNN = StudentConfig("resnet10t", init="scratch", finetune="full", img_size=32)


def test_a_look_at_images_held_back_teaches_a_student_nothing():
    """Nor does it read them as in training: batch norms use what they learnt, and nothing is dropped."""
    teacher = tiny_model()
    student = load_student(teacher, CNN)
    student.vit.drop_rate = 0.5
    distiller = Distiller(teacher, student, DistillConfig(batch_size=4, dtype="float32"), CPU)
    distiller.run(kept_images(), 3)
    before, images = distiller.weights(), kept_images(12)
    found = [distiller.agreement(images) for _ in range(2)]
    after = distiller.weights()
    assert all(torch.equal(before[key], after[key]) for key in before)
    pixels = teacher.preprocessing.denormalize(whole(images.filled(GRID)))
    said = student.vit.eval()(student.preprocessing.normalize(pixels))
    taught = teacher.vit(whole(images.filled(GRID)))
    same = 100 * (said.argmax(1) == taught.argmax(1)).double().mean().item()
    assert found[0] == found[1] == pytest.approx((same, -distillation_loss(said, taught, 20.0).item()), rel=1e-4)


def test_the_kept_cnn_is_saved_as_it_was_when_it_was_tested(tmp_path):
    flags = ["--student", "resnet10t", "--student_img_size", 32, "--keep_student", "agreement", "--held_back", 2]
    report = kt(tmp_path, "--epochs", 2, "--kd_steps", 3, "--prune_it", 1, "--prune_ratio", 0.5, *flags)
    folder = tmp_path / "out" / "student"
    saved = timm.create_model(f"local-dir:{folder}", checkpoint_path=str(folder / "model.safetensors")).eval()
    config = timm.data.resolve_model_data_config(saved, use_test_size=True)
    assert config["input_size"] == (3, 32, 32)
    test_set = limited(load_split("test", "digits", DataConfig(), timm.data.create_transform(**config), Labels(10)), 40)
    images, labels = zip(*test_set, strict=True)
    right = (saved(torch.stack(images)).argmax(1) == torch.tensor(labels)).double().mean().item()
    assert report["student"]["top1"] == pytest.approx(100 * right, abs=0.01)


@pytest.mark.parametrize("match", ["logits", "features"])
def test_what_is_dropped_and_the_map_that_learns_go_on_as_in_a_run_without_a_stop(tmp_path, match):
    teacher = tiny_model()

    def learnt(epochs: int, folder: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        student = load_student(teacher, CNN) if match == "logits" else tiny_model()
        student.vit.requires_grad_(True)
        student.vit.drop_rate = 0.5  # of a ResNet; read at every forward pass
        config = DistillConfig(batch_size=4, epochs=epochs, lr=0.01, match=(match,), keep="agreement", held_back=2)
        (tmp_path / folder).mkdir(exist_ok=True)
        checkpoint = Checkpoint(tmp_path / folder, {}, "student")
        found = distill(teacher, student, kept_images(), config, CPU, checkpoint=checkpoint)
        return found.history, student.vit.state_dict()

    straight = learnt(4, "straight")
    learnt(2, "stopped")
    stopped = learnt(4, "stopped")
    assert stopped[0] == straight[0]
    assert all(torch.equal(stopped[1][key], straight[1][key]) for key in straight[1])


def test_a_run_that_failed_while_it_looked_at_images_held_back_looks_again(tmp_path, monkeypatch):
    teacher, config = tiny_model(), DistillConfig(batch_size=4, epochs=2, keep="agreement", held_back=2)

    def learnt() -> list[dict]:
        checkpoint = Checkpoint(tmp_path, {}, "student")
        return distill(
            teacher, tiny_model(), kept_images(), config, CPU, evaluate=lambda vit: 0.0, checkpoint=checkpoint
        ).history

    def fail(*_: object) -> None:
        raise UserError("no memory")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="no memory"):
        patched.setattr(Distiller, "agreement", fail)
        learnt()
    assert all(entry["agreement"] is not None for entry in learnt())


def test_images_are_counted_as_they_were_made(tmp_path):
    """Those that were held back too, and those of a trajectory one by one: they are what was paid for."""
    flags = ["--strategy", "pri", "--pri_division", 4, "--join", "--keep_student", "agreement", "--held_back", 1]
    report = kt(tmp_path, "--epochs", 2, *flags)
    assert [entry["images"] for entry in report["history"]] == [1, 3]
    assert report["pool"]["images"] == report["synthesis"]["images"] == 16


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--minutes", 60, "--match", "features", "--student", "resnet10t"], "--match features"),
        (["--minutes", 60, "--no-fill", "--student", "resnet10t"], "--no-fill"),
        (["--keep_student", "agreement", "--held_back", 8, "--iterations", 10**6], "--held_back 8.*8 images"),
        (["--kr-batchsize", 1, "--student", "resnet10t"], "--kr-batchsize 1.*batch norms"),
        (["--reuse", 2], "--reuse 2 is for a student of which one layer learns"),
        (["--student_img_size", 64], "--student_img_size.*--student"),
    ],
    ids=str,
)
def test_what_cannot_be_learnt_is_refused_before_images_are_made(tmp_path, flags, why):
    with pytest.raises(UserError, match=why):
        kt(tmp_path, "--epochs", 1, *flags)
    assert not list((tmp_path / "pool").rglob("*.pt")) and not list((tmp_path / "pool").rglob("*.safetensors"))


def test_a_cnn_starts_from_a_folder_of_weights(tmp_path):
    vit = timm.create_model("resnet10t", num_classes=7)
    torch.save(vit.state_dict(), tmp_path / "any.pth")
    student = load_student(tiny_model(), StudentConfig("resnet10t", str(tmp_path), img_size=32))
    assert torch.equal(student.vit.conv1[0].weight, vit.conv1[0].weight)


@pytest.mark.parametrize(
    ("config", "key", "why"),
    [
        (None, None, "no config.json"),
        ({"architecture": "resnet10t", "model_args": 7}, None, "model_args is not an object"),
        ({"architecture": "resnet10t", "pretrained_cfg": {"std": [0, 0, 0]}}, None, "of its std"),
        ({"architecture": "resnet10t"}, "ema", "--student_weights_key ema chooses in a file"),
    ],
    ids=["no config", "arguments", "deviation", "key"],
)
def test_a_folder_that_is_no_student_is_refused(tmp_path, config, key, why):
    if config is not None:
        cfg = {"input_size": [3, 32, 32], **config.get("pretrained_cfg", {})}
        (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
        torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=why):
        load_student(tiny_model(), StudentConfig(f"local-dir:{tmp_path}", finetune="full", key=key))


def test_a_cnn_learns_from_a_teacher_of_grey_images():
    teacher = LoadedModel.of(timm.create_model("vit_tiny_patch16_224", **TINY_ARGS, in_chans=1))
    student = load_student(teacher, CNN)
    assert student.preprocessing.input_size == (1, 32, 32)
    assert len(student.preprocessing.mean) == 1
    images = SparseImages.whole(teacher.grid, torch.randn(4, 1, 32, 32), torch.zeros(4, dtype=torch.long))
    assert math.isfinite(Distiller(teacher, student, DistillConfig(batch_size=4), CPU).run(images, 1))


def taught(student, config: DistillConfig, eager: bool = False, images=None) -> dict[str, torch.Tensor]:
    """What a student has learnt of a tiny teacher in three steps."""
    distiller = Distiller(tiny_model(), student, config, CPU, eager)
    distiller.run(images or kept_images(), 3)
    return distiller.weights()


def a_student(kind: str) -> LoadedModel:
    """Of random weights that differ from the teacher's: its head learns alone, or all of it."""
    torch.manual_seed(1)
    if kind.startswith("cnn"):
        student = load_student(tiny_model(), CNN)
        learns = kind == "cnn"
    else:
        student, learns = tiny_model(), kind in ("all", "biasless")
        for parameter in student.vit.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        if kind == "biasless":
            student.vit.head.bias = None
    student.vit.requires_grad_(learns)
    student.vit.get_classifier().requires_grad_(True)
    return student


KINDS = [("head", "logits"), ("head", "features"), ("all", "relations"), ("cnn head", "logits"), ("cnn", "logits")]


@pytest.mark.parametrize(("kind", "match"), KINDS)
def test_frozen_parts_made_fast_teach_the_same(kind, match):
    config = DistillConfig(batch_size=4, lr=0.01, match=("logits", match) if match != "logits" else (match,))
    plain = taught(a_student(kind), replace(config, dtype="float32"), eager=True)
    exact = taught(a_student(kind), replace(config, dtype="float32"))
    moved = [key for key, value in a_student(kind).sparse().state_dict().items() if not torch.equal(plain[key], value)]
    assert moved and (len(moved) <= 2 or "head" not in kind), moved
    for key in plain:
        torch.testing.assert_close(exact[key], plain[key], rtol=1e-4, atol=1e-5, msg=key)
    rounded = taught(a_student(kind), replace(config, dtype="bfloat16"))
    before = a_student(kind).sparse().state_dict()
    for key in moved:
        if plain[key].is_floating_point():
            step = (plain[key] - before[key]).norm()
            assert (rounded[key] - plain[key]).norm() <= 0.1 * step + 1e-4, key


@pytest.mark.parametrize("kind", ["head", "cnn head"])
def test_what_was_seen_is_fed_to_a_head_again_instead_of_running_the_models(kind):
    config = DistillConfig(batch_size=4, lr=0.01, reuse=3, dtype="float32", augment=())
    distiller = Distiller(tiny_model(), a_student(kind), config, CPU)
    looks = []
    distiller.teacher.register_forward_hook(lambda *_: looks.append(1))
    distiller.run(kept_images(4), 7)
    assert len(looks) == 3
    # Each batch is all four images, so every step is that of a run which looks each time.
    once = Distiller(tiny_model(), a_student(kind), replace(config, reuse=1), CPU)
    once.run(kept_images(4), 7)
    learnt, expected = distiller.weights(), once.weights()
    for key in expected:
        torch.testing.assert_close(learnt[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["resnetv2_50", "crossvit_tiny_240", "pit_ti_distilled_224", "volo_d1_224"])
def test_a_last_layer_that_does_not_end_a_model_is_taught_through_all_of_it(name):
    """A convolution, several classifiers, and one more behind the one that timm names."""
    torch.manual_seed(0)
    size = 32 if name.startswith("resnet") else None
    student = load_student(tiny_model(), StudentConfig(name, init="scratch", finetune="full", img_size=size))
    student.vit.requires_grad_(False)
    for parameter in classifier_parameters(student.vit):
        parameter.requires_grad_(True)
    config = DistillConfig(batch_size=2, lr=0.01, dtype="float32", augment=())
    with pytest.raises(UserError, match="--reuse 2 is for a student of which one layer learns"):
        Distiller(tiny_model(), student, replace(config, reuse=2), CPU)
    images, distiller = kept_images(2), Distiller(tiny_model(), student, config, CPU)
    pixels = tiny_model().preprocessing.denormalize(whole(images.filled(GRID)))
    resized = torch.nn.functional.interpolate(
        pixels, student.preprocessing.input_size[1:], mode="bicubic", antialias=True
    )
    with torch.no_grad():
        said = student.vit(student.preprocessing.normalize(resized))
        wanted = distillation_loss(said, tiny_model().vit(whole(images.filled(GRID))), 20.0)
    assert distiller.run(images, 1) == pytest.approx(wanted.item(), rel=1e-3)


def test_what_was_seen_is_kept_over_a_stop_and_no_more_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Memory, "SIZE", 10)
    config = DistillConfig(batch_size=4, epochs=4, steps=3, lr=0.01, reuse=2)

    def learnt(epochs: int, folder: str) -> dict[str, torch.Tensor]:
        student = a_student("head")
        (tmp_path / folder).mkdir(exist_ok=True)
        checkpoint = Checkpoint(tmp_path / folder, {}, "student")
        distill(tiny_model(), student, kept_images(), replace(config, epochs=epochs), CPU, checkpoint=checkpoint)
        return student.vit.state_dict()

    straight = learnt(4, "straight")
    learnt(2, "stopped")
    stopped = learnt(4, "stopped")
    assert all(torch.equal(stopped[key], straight[key]) for key in straight)
    rows = Checkpoint(tmp_path / "straight", {}, "student").state["distiller"]["memory"]
    assert [len(one) for one in rows] == [10, 10]


@pytest.mark.parametrize("kind", ["all", "cnn"])
def test_a_first_head_is_kept_over_a_stop_in_the_first_epoch(tmp_path, monkeypatch, kind):
    """Looking for it may take as long as all steps."""
    config, stepped, looked = DistillConfig(batch_size=4, epochs=2, steps=2, lr=0.01, head_steps=3), Distiller._step, []
    look = Distiller._batch
    monkeypatch.setattr(Distiller, "_batch", lambda self, images: looked.append(1) or look(self, images))

    def learnt(folder: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        student = a_student(kind)
        (tmp_path / folder).mkdir(exist_ok=True)
        found = distill(
            tiny_model(), student, kept_images(), config, CPU, checkpoint=Checkpoint(tmp_path / folder, {}, "student")
        )
        assert len(found.history) == 2
        return student.vit.state_dict()

    def stop(distiller: Distiller, images: SparseImages) -> torch.Tensor:
        if distiller.steps:
            raise KeyboardInterrupt
        return stepped(distiller, images)

    straight = learnt("straight")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Distiller, "_step", stop)
        learnt("stopped")
    looked.clear()
    stopped = learnt("stopped")
    assert len(looked) == 4
    assert all(torch.equal(stopped[key], straight[key]) for key in straight)


@pytest.mark.parametrize(("lr", "grows"), [(1e-2, False), (1e3, True)])
def test_a_loss_that_grows_is_told(recwarn, lr, grows):
    """Too high a learning rate need not end in infinity; a student that learns has nothing to be told."""
    config = DistillConfig(batch_size=4, epochs=8, lr=lr, dtype="float32")
    losses = [epoch["loss"] for epoch in distill(tiny_model(), a_student("head"), kept_images(), config, CPU).history]
    assert (losses[-1] > 2 * losses[0]) == grows
    told = [str(one.message) for one in recwarn]
    assert [f"is {losses[-1]:.4g} in the last: lower --lr" in one for one in told] == [True] * grows


def test_a_student_that_answers_as_the_teacher_does_has_nothing_to_be_told(recwarn):
    """Its loss is rounding, which may double."""
    for seed in range(4):
        config = DistillConfig(batch_size=4, epochs=3, lr=0.1, dtype="float32", seed=seed)
        distill(tiny_model(), tiny_model(), kept_images(), config, CPU)
    assert not any("distillation loss" in str(one.message) for one in recwarn)


def test_reuse_refuses_what_it_cannot_keep():
    with pytest.raises(UserError, match="--reuse 2 keeps no tokens"):
        Distiller(tiny_model(), a_student("head"), DistillConfig(reuse=2, match=("relations",)), CPU)


def fitted(monkeypatch, kind: str, penalty: float, temperature: float) -> tuple[Distiller, torch.Tensor, torch.Tensor]:
    """A student fitted to 25 batches of 4, what its head read and what the teacher said, float64.

    One of which all learns is fitted before its first step, which here is none.
    """
    alone = kind.endswith("head")
    how = {"optimizer": "lbfgs"} if alone else {"head_steps": 25, "lr": 1e-30}
    config = DistillConfig(batch_size=4, head_penalty=penalty, temperature=temperature, dtype="float32", **how)
    distiller, seen, keep = Distiller(tiny_model(), a_student(kind), config, CPU), [], Memory.add
    monkeypatch.setattr(Memory, "add", lambda memory, *rows: seen.append(rows) or keep(memory, *rows))
    before = {name: value.clone() for name, value in distiller.student.named_parameters()}
    for steps in (20, 5) if alone else (1, 1):
        distiller.run(kept_images(), steps)
    now = distiller.student.named_parameters()
    moved = [name for name, value in now if not torch.allclose(before[name], value, rtol=0, atol=1e-20)]
    assert len(seen) == 25 and len(moved) == 2
    return distiller, *(torch.cat(rows).double() for rows in zip(*seen, strict=True))


@pytest.mark.parametrize("kind", ["head", "cnn head", "all", "cnn"])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_head_is_fitted_to_all_that_was_looked_at(monkeypatch, kind, penalty, temperature):
    """No change of it makes the loss of all looks less: its gradient is none, beside that of no head at all."""
    distiller, x, y = fitted(monkeypatch, kind, penalty, temperature)
    spread = x.std(dim=0, correction=0).clamp(min=1e-6)

    def gradient(weights: torch.Tensor, biases: torch.Tensor) -> float:
        weights, biases = (value.detach().double().requires_grad_(True) for value in (weights, biases))
        loss = distillation_loss(x @ weights.T + biases, y, temperature)
        loss = loss + penalty / (2 * y.shape[1]) * (weights * spread).square().sum()
        slopes = torch.autograd.grad(loss, (weights, biases))
        return (slopes[0] / spread).norm().item() + slopes[1].norm().item()

    (head,) = distiller.heads
    none = gradient(torch.zeros_like(head.weight), torch.zeros_like(head.bias))
    assert gradient(head.weight, head.bias) < 1e-3 * none


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_at_high_temperature_a_fitted_head_is_the_ridge_regression(monkeypatch, penalty):
    """What a least squares solver gives for all looks together, the penalty as rows of its own."""
    distiller, x, y = fitted(monkeypatch, "head", penalty, 1e3)
    centred, y = x - x.mean(dim=0), y - y.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=0).sqrt().clamp(min=1e-6)
    rows = torch.cat([centred / spread, (penalty * len(x)) ** 0.5 * torch.eye(x.shape[1]).double()])
    wanted = torch.cat([y - y.mean(dim=0), torch.zeros(x.shape[1], y.shape[1]).double()])
    told = (centred / spread) @ torch.linalg.lstsq(rows, wanted, driver="gelsd").solution + y.mean(dim=0)
    with torch.no_grad():
        said = distiller.lesson.student.classify(x.float()).double()
    torch.testing.assert_close(said, told, rtol=1e-3, atol=1e-3 * y.abs().max().item())


def two_headed() -> LoadedModel:
    """`tiny_model` with a distillation token."""
    torch.manual_seed(0)
    vit = randomize(timm.create_model("deit_tiny_distilled_patch16_224", **TINY_ARGS))
    return replace(tiny_model(), name="two_headed", vit=vit)


@pytest.mark.parametrize("model", [tiny_model, two_headed])
def test_a_head_on_the_teachers_own_features_is_the_teachers(tmp_path, model):
    """Which is linear in them, so that looks at random images are enough; stopped and gone on with it is the same."""
    config = DistillConfig(batch_size=32, epochs=4, steps=2, optimizer="lbfgs", head_penalty=0.0, dtype="float32")
    kept, found = {}, {}
    for name, stops in (("straight", (4,)), ("stopped", (1, 4))):
        for epochs in stops:
            student = model()
            student.vit.requires_grad_(False)
            for parameter in classifier_parameters(student.vit):
                torch.nn.init.zeros_(parameter.requires_grad_(True))
            (tmp_path / name).mkdir(exist_ok=True)
            checkpoint = Checkpoint(tmp_path / name, {}, "student")
            how = replace(config, epochs=epochs)
            found[name] = distill(model(), student, kept_images(64), how, CPU, checkpoint=checkpoint)
        kept[name] = student.vit.state_dict()
    assert all(torch.equal(kept["stopped"][key], kept["straight"][key]) for key in kept["straight"])
    assert found["straight"].history[-1]["loss"] < 1e-6 < found["straight"].history[0]["loss"]


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("all", {}, "linear layers at its end learn alone"),
        ("cnn", {}, "linear layers at its end learn alone"),
        ("head", {"match": ("features",)}, "--match features: --optimizer lbfgs fits a head to logits alone"),
        ("head", {"match": ("logits", "relations")}, "--match logits relations: --optimizer lbfgs"),
        ("head", {"reuse": 2}, "--reuse 2: --optimizer lbfgs uses all"),
        ("head", {"head_penalty": -1.0}, "--head_penalty -1.0 is not"),
        ("head", {"head_steps": 2}, "--head_steps 2: --optimizer lbfgs fits the head after every epoch already"),
        (
            "all",
            {"optimizer": "sgd", "head_steps": 10**7},
            "all that is looked at needs .* lower --head_steps 10000000",
        ),
        ("biasless", {"optimizer": "sgd", "head_steps": 2}, "--head_steps 2 fits linear layers, which .* in; give 0"),
        ("head", {"epochs": 10**6, "steps": 10**4}, "all that is looked at needs about .* lower --kd_steps 10000"),
    ],
)
def test_what_cannot_be_fitted_is_refused(kind, settings, why):
    with pytest.raises(UserError, match=why):
        Distiller(tiny_model(), a_student(kind), DistillConfig(**{"optimizer": "lbfgs", **settings}), CPU)


def test_wrong_fast_kernels_are_noticed_and_not_used(monkeypatch):
    right = taught(a_student("head"), DistillConfig(batch_size=4, dtype="float32"), eager=True)
    forward = PackedBlock.forward
    monkeypatch.setattr(PackedBlock, "forward", lambda *args: (2 * (out := forward(*args))[0], *out[1:]))
    with pytest.warns(UserNote, match="plain code runs"):
        found = taught(a_student("head"), DistillConfig(batch_size=4, dtype="float32"))
    for key in right:
        torch.testing.assert_close(found[key], right[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"class_token": False, "global_pool": "avg", "bias": False}])
def test_a_backbone_of_another_normalization_reads_the_teachers_images(options, tmp_path):
    """What it says of an image is what it said of the same pixels, normalized as it was trained with."""
    options, bias = dict(options), options.get("bias", True)
    options.pop("bias", None)
    backbone = tiny_model(**options)
    if not bias:
        backbone.vit.patch_embed.proj.bias = None
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ways = replace(backbone.preprocessing, mean=(0.48, 0.45, 0.4), std=(0.27, 0.26, 0.28))
    wanted = replace(ways, mean=(0.5, 0.4, 0.5), std=(0.5, 0.25, 0.3))
    expected = backbone.vit(ways.normalize(pixels))
    found = renormalized(replace(backbone, preprocessing=ways), wanted)
    torch.testing.assert_close(found.vit(wanted.normalize(pixels)), expected, rtol=1e-4, atol=1e-5)
    assert (found.preprocessing.mean, found.preprocessing.std) == (wanted.mean, wanted.std)


def test_a_backbone_that_cannot_be_renormalized_is_told_of():
    backbone = tiny_model()
    backbone.vit.patch_embed.proj.bias, backbone.vit.patch_embed.norm = None, nn.LayerNorm(32)
    weight = backbone.vit.patch_embed.proj.weight.clone()
    with pytest.warns(UserNote, match="is fed the teacher's"):
        renormalized(backbone, replace(backbone.preprocessing, mean=(0.1, 0.2, 0.3)))
    assert torch.equal(backbone.vit.patch_embed.proj.weight, weight)
