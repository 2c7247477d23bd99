"""A run that ended early and is started again: nothing is lost, nothing is left behind, all numbers are the same."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import test_kt
import test_quant
from inversion import ImagePool, InversionConfig, synthesize
from models import DEFAULT_MODEL, SparseViT, load_model
from quant import QuantConfig, load_quantized, quantize, require_own_folder, save_quantized, storage
from scripts import compare
from scripts.studies.kills import contents, differences
from tests.conftest import run_script
from tests.test_pool import CONFIG, CPU, filled
from utils.data import Digits
from utils.errors import UserError

QUANT = ["--iterations", "8", "--prune_it", "2", "--prune_ratio", "0.3", "--calib-batchsize", "4", "--w_bit", "4"]
QUANT += ["--num-workers", "0"]
KT = ["--iterations", "4", "--inversion-batchsize", "4", "--images_per_epoch", "8", "--kr-batchsize", "4"]
KT += ["--num-workers", "0", "--val_limit", "20", "--student_init", "scratch", "--finetune", "full", "--lr", "0.01"]
TIMES = ("seconds", "peak_memory_bytes", "calibration_seconds", "command")


def without_times(report):
    """A report without what is measured anew in every run."""
    if isinstance(report, dict):
        return {key: without_times(value) for key, value in report.items() if key not in TIMES}
    return [without_times(value) for value in report] if isinstance(report, list) else report


@pytest.fixture
def quantizations(monkeypatch) -> list:
    """The configurations of all models that were quantized, not found."""
    made = []
    monkeypatch.setattr(storage, "quantize", lambda *args: made.append(args[2]) or quantize(*args))
    return made


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Test images of the bundled model as a folder; the last one cannot be read."""
    digits = Digits("test", lambda image: image)
    for number in range(20):
        file = tmp_path / "data" / "test" / str(digits.targets[number]) / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        digits[number][0].save(file)
    file = max((tmp_path / "data").rglob("*.png"))
    shutil.copy(file, tmp_path / "whole.png")
    file.write_bytes(b"no image")
    return file


def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """Two kills of each program, a quarter and three quarters through the changes that it makes to files."""
    result = run_script("scripts/studies/kills.py", "--kills", 0, "--changes", 2, "--output", tmp_path, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[2:4] for line in result.stdout.splitlines()[-3:]] == [["2", "2"]] * 3


def test_what_a_kill_may_leave_is_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "same").write_text("1")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "a" / "state.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "b" / "state.pt")
    (tmp_path / "a" / "gone").touch()
    (tmp_path / "b" / "sub" / ".x.part").touch()
    found = differences(contents(tmp_path / "a"), contents(tmp_path / "b"))
    assert found == ["gone is missing", "sub/.x.part was left behind", "state.pt differs"]


def test_a_model_is_not_quantized_again_after_an_evaluation_that_failed(tmp_path, damaged, quantizations):
    shutil.copytree(tmp_path / "data", tmp_path / "intact")
    shutil.copy(tmp_path / "whole.png", tmp_path / "intact" / damaged.relative_to(tmp_path / "data"))

    def run(output: str, data: str) -> dict:
        folders = ["--datapool", str(tmp_path / "pool"), "--output", str(tmp_path / output), "--dataset"]
        return test_quant.main([*QUANT, "--reconstruct", "--reconstruct_steps", "4", *folders, str(tmp_path / data)])

    with pytest.raises(UserError, match=damaged.name):
        run("out", "data")
    assert len(quantizations) == 1
    shutil.copy(tmp_path / "whole.png", damaged)
    again = run("out", "data")
    assert len(quantizations) == 1
    straight = run("straight", "intact")
    assert len(quantizations) == 2
    assert without_times(again) == without_times(straight)
    assert again["calibration_seconds"] > 0
    for name in ("images.png", "loss.png", "quantized/model.safetensors", "quantized/quantized.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_comparison_keeps_models_until_they_have_rows(tmp_path, damaged, quantizations):
    flags = ["--baselines", "gaussian", "--strategies", "--bits", "8/8", "4/8", "--calib-batchsize", "4"]
    flags += ["--num-workers", "0", "--dataset", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=damaged.name):
        compare.main(flags)
    shutil.copy(tmp_path / "whole.png", damaged)
    assert len(compare.main(flags)) == 2
    assert len(quantizations) == 2
    assert not list((tmp_path / "out").rglob("quantized*"))


def test_a_quantized_model_of_anything_else_is_not_taken(tmp_path, quantizations):
    common = [*QUANT, "--mode", "1", "--val_limit", "8", "--datapool", str(tmp_path / "pool")]
    common += ["--output", str(tmp_path / "out")]
    changes = (["--seed", "1"], ["--num_images", "6"], ["--a_bit", "6"], ["--keep", "head"], ["--bias_correction"])
    for number, flags in enumerate(([], *changes, ["--mode", "0"], ["--mode", "0", "--iterations", "9"]), start=1):
        test_quant.main([*common, *flags])
        assert len(quantizations) == number, flags
    test_quant.main([*common, *flags, "--val_limit", "9", "--save", str(tmp_path / "saved")])
    assert len(quantizations) == number
    assert load_quantized(tmp_path / "saved").num_classes == 10
    (tmp_path / "out" / "quantized" / "model.safetensors").unlink()
    test_quant.main([*common, *flags])
    assert len(quantizations) == number + 1


def test_a_model_found_is_the_model_made(tmp_path):
    model = load_model(DEFAULT_MODEL)
    vit = SparseViT(model.vit)
    images = filled_images(tmp_path, model)
    for config in (
        QuantConfig(4, 4, "repq", bias_correction=True, reconstruct=True, reconstruct_steps=2),
        QuantConfig(8, 8, "minmax", keep=()),
        QuantConfig(3, 6, "mse", fill=True, keep=("last",)),
        QuantConfig(32, 8),
    ):
        made, seconds = storage.quantized_once(tmp_path / "out", vit, images, model, config, [])
        found, same = storage.quantized_once(tmp_path / "out", vit, images, model, config, [])
        assert seconds == same
        assert made.state_dict().keys() == found.state_dict().keys()
        assert all(torch.equal(made.state_dict()[key], value) for key, value in found.state_dict().items())


def filled_images(tmp_path: Path, model):
    pool = ImagePool(tmp_path, model, InversionConfig(**CONFIG))
    synthesize(pool, 3, CPU)
    return pool.read(3)


def test_a_kill_between_the_files_of_a_quantized_model_leaves_no_other(tmp_path, monkeypatch):
    model, config = load_model(DEFAULT_MODEL), QuantConfig()
    vit, images = SparseViT(model.vit), filled_images(tmp_path, model)
    quantized = quantize(vit, images, config)
    for before in (False, True):  # a folder without and with an older model
        folder = tmp_path / str(before)
        if before:
            save_quantized(folder, quantized, model, config, ["older"])
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", stop_at("model.safetensors"))
            save_quantized(folder, quantized, model, config, [])
        with pytest.raises(UserError, match="cannot read"):
            load_quantized(folder)
        require_own_folder(folder)
        load_quantized(save_quantized(folder, quantized, model, config, []))


def stop_at(name: str):
    """`os.replace` that does not come to the file of this name."""
    replace = os.replace

    def stopping(source, target):
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    return stopping


def test_the_seconds_of_a_batch_are_known_whenever_it_is_there(tmp_path, model, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stop_at("000001.json"))
        filled(tmp_path, model)
    pool = filled(tmp_path, model)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [0, 1]
    report = synthesize(pool, 6, CPU, tmp_path / "log.jsonl")
    assert report.seconds == pytest.approx(sum(line["seconds"] for line in lines))


def test_a_batch_that_is_made_again_has_one_course_in_tensorboard(tmp_path, model, monkeypatch):
    pytest.importorskip("tensorboard")
    pool = ImagePool(tmp_path / "pool", model, InversionConfig(**CONFIG))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stop_at("000000.json"))
        synthesize(pool, 3, CPU, tensorboard=tmp_path / "events")
    synthesize(pool, 3, CPU, tensorboard=tmp_path / "events")
    assert len(list((tmp_path / "events" / "batch-000000").iterdir())) == 1


def kt(tmp_path: Path, *args: object) -> dict:
    folders = ["--datapool", str(tmp_path / "pool"), "--output", str(tmp_path / "out")]
    return test_kt.main([*KT, *folders, *map(str, args)])


def test_a_finished_transfer_changes_nothing_when_it_runs_again(tmp_path):
    for args in (["--epochs", 2], ["--epochs", 1, "--mode", 1]):
        kt(tmp_path, *args)
        before = contents(tmp_path)
        kt(tmp_path, *args)
        assert differences(before, contents(tmp_path)) == []
        shutil.rmtree(tmp_path / "out")


def test_its_pictures_are_those_of_the_images_it_used_though_the_pool_has_grown(tmp_path):
    kt(tmp_path, "--epochs", 1)
    shutil.rmtree(tmp_path / "out")
    report = kt(tmp_path, "--epochs", 2, "--images_per_epoch", 0)
    shutil.copytree(tmp_path / "out", tmp_path / "first")
    shutil.rmtree(tmp_path / "out")
    kt(tmp_path, "--epochs", 3)
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "first", tmp_path / "out")
    again = kt(tmp_path, "--epochs", 2, "--images_per_epoch", 0)
    assert without_times(again) == without_times(report)
    assert (tmp_path / "out" / "images.png").read_bytes() == (tmp_path / "first" / "images.png").read_bytes()


def test_what_a_student_learnt_outlives_an_evaluation_that_failed(tmp_path, damaged):
    data = ["--dataset", tmp_path / "data", "--epochs", 2, "--kd_steps", 2]
    with pytest.raises(UserError, match=damaged.name):
        kt(tmp_path, *data)
    assert (tmp_path / "out" / "checkpoint.pt").is_file()
    shutil.copy(tmp_path / "whole.png", damaged)
    again = kt(tmp_path, *data)
    shutil.rmtree(tmp_path / "out")
    straight = kt(tmp_path, *data)
    assert again["history"] == straight["history"]
    assert again["student"] == straight["student"]


@pytest.fixture
def as_nobody():
    """Without the rights of root, for whom no folder is read-only."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.fixture
def shared_folder():
    """A folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_finished_pool_that_cannot_be_written_can_be_used(shared_folder, request):
    quant = [*QUANT, "--val_limit", "8", "--datapool", str(shared_folder / "pool")]
    first = test_quant.main([*quant, "--output", str(shared_folder / "first")])
    kt(shared_folder, "--epochs", 1)
    for name in ("quant", "kt", "more", "other"):
        (shared_folder / name).mkdir()
        (shared_folder / name).chmod(0o777)
    for path in (shared_folder / "pool", *(shared_folder / "pool").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(shared_folder / "pool")
    request.getfixturevalue("as_nobody")
    again = test_quant.main([*quant, "--output", str(shared_folder / "quant")])
    assert again["quant"] == first["quant"]
    output = ["--output", str(shared_folder / "kt")]
    assert kt(shared_folder, "--epochs", 1, *output)["pool"]["images"] == 8
    for more in (["--num_images", "5"], ["--seed", "1"]):  # a batch, and a pool, that are not there
        with pytest.raises(UserError, match=r"--datapool .* cannot be written"):
            test_quant.main([*quant, *more, "--output", str(shared_folder / "more")])
    assert contents(shared_folder / "pool") == before
