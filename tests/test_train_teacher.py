"""Teacher training: it learns, survives being killed, and gives a folder that timm and the registry load."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from models import load_model
from scripts import train_teacher
from tests.conftest import ROOT, TINY_ARGS, run_script, tiny_vit
from utils.errors import UserError

COLOURS = {"blue": (20, 40, 200), "green": (30, 190, 40), "red": (210, 30, 20)}


@pytest.fixture
def folder(tmp_path):
    """Noisy pictures of three colours: 8 of each to train, 4 of each to test."""
    torch.manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            path = tmp_path / "data" / split / name
            path.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randn(36, 30, 3) * 30 + torch.tensor(colour)
                Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(path / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def teacher(tmp_path):
    """A small model with 5 classes in timm's local-dir format, and its name."""
    save_for_hf(tiny_vit(), tmp_path / "teacher", model_args=TINY_ARGS, safe_serialization=True)
    return f"local-dir:{tmp_path / 'teacher'}"


@pytest.fixture
def flags(folder, teacher, tmp_path):
    """Two epochs of three steps."""
    return [
        *("--model", teacher, "--dataset", str(folder), "--output", str(tmp_path / "out"), "--device", "cpu"),
        *("--epochs", "2", "--batch_size", "8", "--num_workers", "0", "--dtype", "float32"),
    ]


def logits_of(folder):
    vit = timm.create_model(f"local-dir:{folder}", checkpoint_path=f"{folder}/model.safetensors").eval()
    with torch.inference_mode():
        return vit(torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32))


def losses(folder):
    return [(epoch["loss"], epoch["top1"]) for epoch in json.loads((folder / "training.json").read_text())["epochs"]]


def test_a_fine_tuned_model_has_a_new_head_and_loads_in_timm_and_in_the_registry(flags, tmp_path):
    train_teacher.main([*flags, "--epochs", "15", "--lr", "2e-3"])
    out = tmp_path / "out"
    assert json.loads((out / "training.json").read_text())["top1"] == 100
    loaded = load_model(f"local-dir:{out}")
    assert (loaded.classes, loaded.preprocessing.input_size) == (3, (3, 32, 32))
    assert loaded.vit.pretrained_cfg["label_names"] == list(COLOURS)
    source = load_model(flags[1])
    assert loaded.preprocessing == source.preprocessing
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    torch.testing.assert_close(loaded.vit.state_dict(), dict(state["model"]), rtol=0, atol=0)
    torch.testing.assert_close(logits_of(out), loaded.vit(torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32)))


def test_an_epoch_outlives_an_evaluation_that_failed(flags, folder, tmp_path):
    flags = [*flags, "--noise", "0.5"]
    train_teacher.main([*flags, "--output", str(tmp_path / "straight")])
    last = folder / "val" / "red" / "3.png"
    image = last.read_bytes()
    last.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"red/3\.png"):
        train_teacher.main(flags)
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["state"]["history"][0]["top1"] is None
    last.write_bytes(image)
    train_teacher.main(flags)
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "straight" / "model.safetensors"
    ).read_bytes()


def test_training_drops_patches_and_adds_noise_and_evaluation_does_not(flags, monkeypatch):
    seen = {"train": [], "test": []}

    class Watched(train_teacher.Trainer):
        def __init__(self, vit, *args):
            super().__init__(vit, *args)
            vit.blocks[0].register_forward_pre_hook(
                lambda _, inputs: seen["train" if vit.training else "test"].append(inputs[0].shape[1])
            )

    monkeypatch.setattr(train_teacher, "Trainer", Watched)
    monkeypatch.setattr(Watched, "_impaired", record_strengths(Watched._impaired, strengths := []))
    train_teacher.main([*flags, "--epochs", "8", "--patch_drop", "0.8", "--noise", "0.5"])
    patches = {tokens - 1 for tokens in seen["train"]}
    assert set(seen["test"]) == {17}
    assert min(patches) >= 3
    assert max(patches) <= 16
    assert len(patches) > 5
    assert 0 <= torch.cat(strengths).min() < 0.1
    assert 0.4 < torch.cat(strengths).max() < 0.6


def record_strengths(impaired, into: list):
    """`_impaired`, the standard deviation of each image's noise noted."""

    def recorded(self, images):
        noisy = impaired(self, images)
        into.append((noisy - images).flatten(1).std(dim=1))
        return noisy

    return recorded


def test_named_models_keep_their_preprocessing_and_take_weights_with_another_head(folder, tmp_path):
    vit = timm.create_model("deit_tiny_patch16_224")
    torch.save(vit.state_dict(), tmp_path / "imagenet.pth")
    loaded = load_model("deit_tiny_16_cifar10", tmp_path / "imagenet.pth", classes=10)
    assert torch.equal(loaded.vit.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    args = train_teacher.parse_arguments(["--model", "deit_tiny_16_cifar10", "--output", str(tmp_path)])
    assert (args.data, args.flip) == ("cifar10", True)
    train_teacher.save_model(loaded, [str(i) for i in range(10)], args, tmp_path / "out")
    again = load_model(f"local-dir:{tmp_path / 'out'}")
    assert again.preprocessing == loaded.preprocessing
    assert again.preprocessing.mean == (0.4914, 0.4822, 0.4465)


def test_a_run_cut_short_ends_as_if_undisturbed(flags, tmp_path, monkeypatch):
    train_teacher.main(flags)
    whole, cut = tmp_path / "out", tmp_path / "cut"
    evaluate = train_teacher.Trainer.evaluate

    def fail_in_the_second_epoch(self, test):
        if self.history:
            raise KeyboardInterrupt
        return evaluate(self, test)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_teacher.Trainer, "evaluate", fail_in_the_second_epoch)
        train_teacher.main([*flags, "--output", str(cut)])
    assert not (cut / "model.safetensors").exists()
    train_teacher.main([*flags, "--output", str(cut)])
    assert losses(cut) == losses(whole)
    assert torch.equal(logits_of(cut), logits_of(whole))


def test_a_killed_process_leaves_a_checkpoint_that_other_flags_do_not_touch(flags, tmp_path):
    command = [sys.executable, "scripts/train_teacher.py", *flags, "--epochs", "2000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    state = torch.load(checkpoint, weights_only=True)["state"]
    assert state["history"]
    before = checkpoint.read_bytes()
    with pytest.raises(UserError, match=r"with --epochs 2000, not 2; give another folder"):
        train_teacher.main(flags)
    assert checkpoint.read_bytes() == before


def test_a_finished_run_is_not_trained_again(flags, tmp_path, monkeypatch):
    train_teacher.main(flags)
    before = logits_of(tmp_path / "out")
    monkeypatch.setattr(train_teacher.Trainer, "run_epoch", None)
    train_teacher.main(flags)
    assert torch.equal(logits_of(tmp_path / "out"), before)


def test_the_schedule_warms_up_and_ends_near_zero_and_the_head_has_its_own_rate(tmp_path):
    args = train_teacher.parse_arguments(
        ["--lr", "1e-3", "--head-lr", "1e-2", "--epochs", "10", "--warmup-epochs", "2", "--output", str(tmp_path)]
    )
    steps = torch.utils.data.DataLoader(range(5))
    trainer = train_teacher.Trainer(tiny_vit(), steps, args)
    rates = []
    for step in range(1, 51):
        rates.append({group["lr"] for group in trainer.optimizer.param_groups})
        trainer.scheduler.step_update(step)
    assert rates[0] == {0}
    assert max(rates[10]) == pytest.approx(10 * min(rates[10])) and max(rates[10]) > 0.009
    assert max(max(rate) for rate in rates) == max(rates[10])
    assert max(rates[-1]) < 1e-4
    spared = [group for group in trainer.optimizer.param_groups if group["weight_decay"] == 0]
    assert sum(p.numel() for group in spared for p in group["params"]) > sum(
        m.weight.numel() for m in trainer.vit.modules() if isinstance(m, nn.LayerNorm)
    )


@pytest.mark.parametrize("flip", [True, False])
def test_training_images_are_changed_and_mirrored_only_where_asked(flip):
    preprocessing = load_model(train_teacher.DEFAULT_MODEL, random_weights=True).preprocessing
    transform = train_teacher.train_transform(preprocessing, "cifar10", 0, flip)
    half = Image.new("RGB", (32, 32))
    half.paste((255, 255, 255), (0, 0, 16, 32))
    torch.manual_seed(0)
    left = {transform(half)[0, 16, 0].item() > 0 for _ in range(30)}
    assert left == ({True, False} if flip else {True})
    digits = train_teacher.train_transform(preprocessing, "digits", None, False)
    assert not torch.equal(digits(half), digits(half))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "/nowhere"], "/nowhere needs a train/ folder"),
        (["--warmup_epochs", "2"], "must be below --epochs 2"),
        (["--data", "digits"], "leave out --dataset"),
        (["--data", "cifar10"], "has 3 classes, the model has 10"),
        (["--init", "scratch", "--model_path", "x"], "leave out --model_path"),
        (["--model_path", "/nowhere"], "/nowhere does not exist"),
        (["--model", "resnet18"], "not one of timm's VisionTransformer"),
        (["--lr", "0"], "--lr: 0 is not a number from 1e-38"),
        (["--lr", "1e30"], "the loss became"),
        (["--epochs", "0"], "--epochs: 0 is not an integer from 1"),
    ],
)
def test_wrong_inputs_are_told(flags, change, message):
    with pytest.raises(UserError, match=message):
        train_teacher.main([*flags, *change])


def test_a_model_that_is_already_there_is_not_overwritten(flags, tmp_path):
    with pytest.raises(UserError, match="holds a model that this command did not make"):
        train_teacher.main([*flags, "--output", str(tmp_path / "teacher")])


def test_a_wrong_input_is_one_line_and_exit_code_two(tmp_path):
    done = run_script("scripts/train_teacher.py", "--model", "deit_tiny_16_cifar10", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --dataset DIR is missing: the root of cifar10"]


@pytest.mark.parametrize(
    ("model", "args", "why"),
    [
        ("resnet10t", ["drop_rate=0.1"], "resnet10t cannot be run on kept patches: it is a ResNet"),
        ("deit_nano_4_digits", ["depth=2"], "--model_args is for timm's own names"),
        ("local-dir:any", ["depth=2"], "--model_args is for timm's own names"),
        ("vit_tiny_patch16_224", ["num_classes=3"], "num_classes does not change the architecture"),
        ("vit_tiny_patch16_224", ["checkpoint_path='x'"], "checkpoint_path does not change the architecture"),
        ("vit_tiny_patch16_224", ["depth=0"], "--model_args: depth 0 is not an integer from 1"),
        ("vit_tiny_patch16_224", ["depth=1000000"], "--model_args: depth 1000000 is not an integer from 1 to 1000"),
        ("swin_tiny_patch4_window7_224", ["depths=2,99999"], "--model_args: depths 99999 is not"),
        ("vit_tiny_patch16_224", ["depth=2", "depth=3"], "--model_args gives depth twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_arguments_that_make_no_architecture_are_refused(folder, tmp_path, model, args, why):
    flags = ["--dataset", str(folder), "--output", str(tmp_path / "out"), "--init", "scratch", "--model", model]
    with pytest.raises(UserError, match=why):
        train_teacher.main([*flags, "--model_args", *args])
