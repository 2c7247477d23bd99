"""The scripts as a user runs them: reports, pictures, and one clear line for every wrong input."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import test_quant
from inversion import InversionConfig
from models import DEFAULT_MODEL
from quant import QuantConfig, load_quantized
from scripts import compare, compare_kt
from scripts.bench import bench_inversion, bench_reconstruction, bench_transfer, profile_inversion
from scripts.studies import activation_ranges, figure_pipeline, missing_patches, priors
from tests.conftest import run_script
from utils.cli import Parser
from utils.errors import UserError
from utils.flags import quant_parser, quant_task

QUICK = ["--iterations", "30", "--prune_it", "5", "10", "--prune_ratio", "0.3", "0.3", "--calib-batchsize", "4"]


@pytest.fixture
def quick(tmp_path) -> list[str]:
    """Flags of a run that takes a second or two."""
    where = ["--datapool", str(tmp_path / "pool"), "--output", str(tmp_path / "out")]
    return [*QUICK, "--val_limit", "40", "--check_images", "0", *where]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_quantization_end_to_end_on_the_bundled_model(tmp_path, quick, mode):
    test_quant.main([*quick, "--mode", str(mode), "--w_bit", "4"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["task"], report["model"], report["mode"]) == ("quant", DEFAULT_MODEL, mode)
    assert (report["w_bit"], report["a_bit"], report["seed"]) == (4, 8, 0)
    assert report["fp"]["top1"] >= 90
    assert report["quant"]["top1"] >= 80
    assert report["quant"]["top5"] >= report["quant"]["top1"]
    assert {"device", "dtype", "versions"} <= report.keys()
    inversion = report["inversion"]
    assert inversion.keys() >= {"strategy", "images", "iterations", "seconds", "flops", "peak_memory_bytes"}
    if mode == 0:
        assert (inversion["strategy"], inversion["images"], inversion["iterations"]) == ("smi", 4, 30)
        assert inversion["patches_per_stage"] == [64, 44, 30]
        assert inversion["seconds"] > 0
        assert Image.open(tmp_path / "out" / "loss.png").size[0] > 300
    else:
        assert not (tmp_path / "pool").exists()
    assert Image.open(tmp_path / "out" / "images.png").size[0] > 300
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{report['quant']['top1']:.2f}" in page
    assert ("Inversion loss" in page) == (mode == 0)


def test_low_bits_with_everything_that_mends_them(tmp_path, quick, capsys):
    flags = ["--w_bit", "4", "--a_bit", "4", "--observer", "auto", "--keep", "first,head", "--bias_correction"]
    flags += ["--reconstruct", "--reconstruct_steps", "10", "--sensitivity", "--save", str(tmp_path / "saved")]
    report = test_quant.main([*quick, *flags, "--mode", "2", "--num_images", "32"])
    assert report["quant"]["top1"] >= 90
    how = report["quantization"]
    assert (how["observer"], how["method"], how["rotate"], how["compensate"]) == ("auto", "heads", True, True)
    taken = "--observer heads --rotate --hadamard --compensate --fill --augment crop blur colour"
    assert f"auto takes {taken}: " in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert rows == report["sensitivity"]
    assert {"patch_proj", "head.head", "blocks.5.mlp.fc2", "blocks.0.tap_probs"} <= {row["layer"] for row in rows}
    assert Image.open(tmp_path / "out" / "sensitivity.png").size[0] > 400
    assert load_quantized(tmp_path / "saved").num_classes == 10


def test_the_preset_chooses_images_and_calibrator_and_flags_win_over_it():
    def asked(*flags):
        return quant_task(quant_parser("").parse_args(flags))

    task = asked("--preset", "quantize", "--w_bit", "4")
    assert (task.num_images, task.quantization.observer, task.images.config.iterations) == (64, "auto", 10)
    task = asked("--preset", "quantize", "--num_images", "8", "--observer", "mse", "--no-rotate", "--fill")
    how = task.quantization
    assert (task.num_images, how.observer, how.rotate, how.compensate, how.fill) == (8, "mse", False, None, True)
    task = asked("--preset", "smi")
    assert (task.num_images, task.quantization.observer) == (32, "minmax")


def test_only_trajectories_are_joined(quick):
    flags = [
        "--strategy",
        "pri",
        "--iterations",
        "30",
        "--calib-batchsize",
        "8",
        "--w_bit",
        "4",
        "--a_bit",
        "4",
        "--join",
    ]
    report = test_quant.main([*quick[8:], *flags, "--observer", "auto"])
    assert report["quant"]["top1"] >= 80
    assert report["inversion"]["patches_per_stage"][-1] == 16
    with pytest.raises(UserError, match=r"--join.*--strategy pri"):
        test_quant.main([*quick, "--join"])


def test_a_second_run_takes_the_pool_as_it_is_and_reports_what_it_cost(tmp_path, quick):
    first = test_quant.main(quick)
    again = test_quant.main(quick)
    assert again["inversion"]["seconds"] == first["inversion"]["seconds"]
    assert again["quant"] == first["quant"]
    assert len((tmp_path / "out" / "synthesis.jsonl").read_text().splitlines()) == 1


def test_seconds_are_unknown_where_another_run_made_the_images(tmp_path, quick):
    test_quant.main(quick)
    assert test_quant.main([*quick, "--output", str(tmp_path / "elsewhere")])["inversion"]["seconds"] is None


def test_images_that_one_has_take_the_place_of_the_mode(tmp_path, quick):
    inverted = test_quant.main(quick)
    pool = Path(inverted["inversion"]["pool"])
    stored = test_quant.main([*quick, "--images", str(pool), "--output", str(tmp_path / "stored")])
    assert (stored["mode"], stored["calibration"]) == (None, "stored")
    assert stored["quant"] == inverted["quant"]  # the same images, so the same ranges
    files = test_quant.main([*quick, "--images", str(pool / "images"), "--output", str(tmp_path / "files")])
    assert files["calibration_images"] == 4
    assert files["quant"]["top1"] >= 80
    (tmp_path / "empty").mkdir()
    for flags, why in (
        (["--images", str(pool), "--mode", "2"], "leave one of them out"),
        (["--images", str(pool), "--num_images", "5"], "5 images were asked for.*has 4"),
        (["--images", str(tmp_path / "empty")], "no image files"),
        (["--images", str(tmp_path / "nowhere")], "nowhere.*no image files"),
    ):
        with pytest.raises(UserError, match=why):
            test_quant.main([*quick, *flags])


def test_dense_is_minus_one_and_zero(quick):
    report = test_quant.main([*quick, "--prune_it", "-1", "--prune_ratio", "0"])
    assert report["inversion"]["strategy"] == "dense"
    assert report["inversion"]["patches_per_stage"] == [64]


def test_more_images_than_a_batch(quick):
    report = test_quant.main([*quick, "--num_images", "6"])
    assert (report["calibration_images"], report["inversion"]["images"]) == (6, 6)


def test_dashes_and_underscores_are_the_same():
    parser = quant_parser("")
    args = parser.parse_args(["--w-bit", "4", "--calib_batchsize=7", "--val-limit", "3", "--prune-it", "-1"])
    assert (args.w_bit, args.calib_batchsize, args.val_limit, args.prune_it) == (4, 7, 3, [-1])


def test_defaults_are_the_published_ones():
    task = quant_task(quant_parser("").parse_args([]))
    assert (task.images.mode, task.run.seed, task.run.gpu) == (0, 0, 0)
    assert (task.num_images, task.data.val_batchsize, task.data.num_workers) == (32, 200, 4)
    config = task.images.config
    assert (config.iterations, config.lr, config.prune_it, config.prune_ratio) == (4000, 0.25, (-1,), (0,))
    assert {name: weight for name, weight in config.weights.items() if weight} == {"oh": 1, "tv2": 1e-4}
    assert (config.strategy, config.importance, config.betas) == ("dense", "auto", (0.5, 0.99))
    assert task.images.datapool == "./datapool"
    assert task.quantization == QuantConfig(8, 8, "minmax", reconstruct=False, bias_correction=False)


SCRIPTS = [
    "test_quant.py",
    "test_kt.py",
    "scripts/compare.py",
    "scripts/compare_kt.py",
    "scripts/train_teacher.py",
    "scripts/studies/figure_pipeline.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    result = run_script(script, "--help")
    assert result.returncode == 0
    assert "--output" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("script", [bench_inversion, profile_inversion])
def test_timing_scripts_run_on_the_bundled_model(tmp_path, script, capsys):
    """What they measure means nothing here; that they measure it does."""
    flags = ["--batch", "2", "--repeats", "1", *(["--output", str(tmp_path)] if script is bench_inversion else [])]
    script.main(flags)
    assert "s/iteration" in capsys.readouterr().out
    if script is bench_inversion:
        report = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert {"dense", "final_stage", "schedule_vs_reference_dense"} <= report["speedup"].keys()
        row = {"name", "stage_patches", "seconds_per_iteration", "peak_memory_bytes", "flops", "share_of_peak"}
        assert len(report["rows"]) == 10
        assert all(row <= found.keys() for found in report["rows"])


def test_steps_of_reconstruction_are_timed_on_the_bundled_model(tmp_path):
    bench_reconstruction.main(["--images", "8", "--steps", "2", "--repeats", "2", "--output", str(tmp_path)])
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    plain, ours = report["seconds_a_block"]["plain code"], report["seconds_a_block"]["here"]
    assert report["over_plain"] == pytest.approx([a / b for a, b in zip(plain, ours, strict=True)])
    assert len(ours) == 2 and min(ours) > 0


def test_steps_of_distillation_are_timed_on_the_bundled_model(tmp_path, capsys):
    bench_transfer.main(["--batch", "2", "--repeats", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [(row["name"], row["patches"]) for row in rows[:3]] == [
        ("head, plain", 64),
        ("head", 64),
        ("head, reuse", 64),
    ]
    assert {row["patches"] for row in rows} == {64, 16}
    for row in rows:
        assert row["seconds_min"] <= row["seconds_per_step"] <= row["seconds_max"]
        assert f"| {row['name']} | {row['patches']} |" in printed


def wrong(flags: list[str], *expected: str):
    return pytest.param(flags, expected, id=" ".join(flags)[:60])


WRONG = [
    wrong(["--prune_it", "5", "10", "--prune_ratio", "0.3"], "2 entries", "1"),
    wrong(["--prune_it", "10", "5", "--prune_ratio", "0.3", "0.3"], "rise"),
    wrong(["--prune_it", "5", "5", "--prune_ratio", "0.3", "0.3"], "rise"),
    wrong(["--prune_it", "30", "--prune_ratio", "0.3"], "past the last"),
    wrong(["--prune_it", "5", "--prune_ratio", "1.0"], "[0, 1)"),
    wrong(["--prune_it", "5", "10", "--prune_ratio", "0.98", "0.5"], "leaves none"),
    wrong(["--w_bit", "1"], "--w_bit 1"),
    wrong(["--prune_it", "5", "10", "--prune_ratio"], "--prune_ratio"),
    wrong(["--a_bit", "9"], "--a_bit 9"),
    wrong(["--observer", "median"], "--observer"),
    wrong(["--observer", "repq", "--a_bit", "32"], "--observer repq", "--a_bit 32"),
    wrong(["--reconstruct", "--w_bit", "32"], "--reconstruct"),
    wrong(["--reconstruct_seconds", "0"], "--reconstruct_seconds"),
    wrong(["--w_bit", "4", "--keep", "first,nose"], "--keep nose"),
    wrong(["--sensitivity", "--w_bit", "32", "--a_bit", "32"], "--sensitivity"),
    wrong(["--save", "/proc/nowhere"], "--save", "cannot be written"),
    wrong(["--model", "deit_tinny_16_imagenet"], "deit_tiny_16_imagenet"),
    wrong(["--model", "deit_tiny_16_cifar10", "--model_path", "/nowhere.pth"], "/nowhere.pth"),
    wrong(["--dataset", "/nowhere"], "/nowhere"),
    wrong(["--device", "cuda"], "--device cuda"),
    wrong(["--mode", "3"], "--mode"),
    wrong(["--bn", "1"], "--bn"),
    wrong(["--adv", "1"], "--adv"),
    wrong(["--seed", "-1"], "--seed"),
    wrong(["--iterations", "many"], "--iterations"),
    wrong(["--no-such-flag"], "--no-such-flag"),
    wrong(["--lr_g", "1e30", "--oh", "1e38", "--dtype", "float32"], "loss is", "--lr_g"),
]


@pytest.mark.parametrize(("flags", "expected"), WRONG)
def test_wrong_input_is_one_clear_error_and_leaves_nothing(tmp_path, quick, flags, expected):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError) as error:
        test_quant.main([*quick, *flags])
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in expected), message
    assert not list(tmp_path.rglob("*.png"))
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("flags", [["--prune_it", "5"], ["--preset", "smi", "--prune_it", "5"]], ids=" ".join)
def test_a_schedule_without_shares_is_refused(tmp_path, flags):
    with pytest.raises(UserError, match="--prune_it needs --prune_ratio"):
        test_quant.main([*flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    result = run_script("test_quant.py", "--w_bit", "1", "--output", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --w_bit 1")
    assert len(result.stderr.splitlines()) == 1


def test_a_damaged_image_in_a_data_set_is_one_line_from_worker_processes_too(tmp_path):
    for digit in range(10):
        folder = tmp_path / "data" / "val" / str(digit)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "a.png")
    (tmp_path / "data" / "val" / "3" / "a.png").write_bytes(b"\x89PNG")
    flags = ["--mode", "1", "--dataset", tmp_path / "data", "--output", tmp_path / "out"]
    result = run_script("test_quant.py", *flags)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot read the image")
    assert "3/a.png" in last
    assert "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, quick):
    (tmp_path / "file").write_text("")
    for flag in ("--output", "--datapool"):
        with pytest.raises(UserError, match=f"{flag}.*cannot be written"):
            test_quant.main([*quick, flag, str(tmp_path / "file" / "sub")])


def test_compare_keeps_finished_cells(tmp_path, capsys):
    flags = ["--iterations", "12", "--calib-batchsize", "4", "--prune_it", "3", "6", "--prune_ratio", "0.3", "0.3"]
    flags += ["--bits", "8/8", "4/4", "--baselines", "gaussian", "--priors", "deepinversion", "cmi", "--strategies"]
    flags += ["smi", "pri", "--seeds", "0", "1", "--val_limit", "40", "--with", "cmi", "--cr 0.1"]
    flags += ["--datapool", str(tmp_path / "pool"), "--output", str(tmp_path / "out")]
    summary = compare.main(flags)
    rows = (tmp_path / "out" / "rows.jsonl").read_text()
    assert len(rows.splitlines()) == 1 + 5 * 2 * 2
    found = {(row["method"], row["width"]) for row in summary}
    names = ("gaussian", "smi", "pri", "cmi-smi", "cmi-pri")
    assert found == {(name, width) for name in names for width in ("W8/A8", "W4/A4")}
    inverted = [row for row in summary if row["method"] != "gaussian"]
    assert all(row["synthesis_seconds"] > 0 and row["gflop_per_image"] > 0 for row in inverted)
    assert all(len(row["top1_per_seed"]) == 2 and row["top1_std"] is not None for row in summary)
    assert compare.main(flags) == summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows
    assert "W4/A4" in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(lines) == 20
    assert {line["prior"] for line in lines} == {"", "deepinversion", "cmi"}
    for picture in ("accuracy.png", "images.png"):
        assert Image.open(tmp_path / "out" / picture).size[0] > 400
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in ("cmi-pri", "W4/A4", "compare"))


def test_the_images_of_the_demos_first_step_are_a_cell_of_its_comparison():
    """Which has their seconds from there, for its table."""
    text = (Path(compare.__file__).parent / "demo.sh").read_text()
    single, grid = (re.search(rf"{name}\.py [^#]*?--output (\S+)", text)[1] for name in ("test_quant", "compare"))
    args, others = compare.quant_grid_parser("", "").parse_known_args(["--strategies", "smi", "--output", grid])
    assert Path(single) in {cell.task.folder for cell in compare.cells_of(args, others)}


def test_flags_of_quantization_go_through_compare(tmp_path):
    flags = ["--baselines", "real", "--strategies", "--bits", "4/4", "--val_limit", "60", "--calib-batchsize", "8"]
    flags += ["--output", str(tmp_path)]
    plain, repq = (compare.main([*flags, "--observer", observer])[0]["top1"] for observer in ("minmax", "repq"))
    assert repq > plain
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="--keep nose"):
        compare.main([*flags, "--keep", "nose"])


def test_compare_refuses_what_it_varies_and_flags_of_nothing(tmp_path):
    for flags, why in (
        (["--prior", "psaq"], "--prior is what"),
        (["--with", "psaq", "--tvt 1"], "--with psaq"),
        (["--with", "smi", "--w_bit 2"], "--w_bit is what"),
        (["--with", "smi", "--export x.onnx"], "--export is for one model"),
        (["--with", "smi", "it's"], "--with.*quotation"),
        (["--with", "smi", "--no-such-flag 1"], "unrecognized"),
    ):
        with pytest.raises(UserError, match=why):
            compare.main([*flags, "--output", str(tmp_path)])
    assert not (tmp_path / "rows.jsonl").exists()
    for flags, why in ((["--scratch", "--seed 3"], "--seed is what"), (["--linear", "--nothing 1"], "unrecognized")):
        with pytest.raises(UserError, match=why):
            compare_kt.main([*flags, "--output", str(tmp_path)])
    with pytest.raises(UserError, match="--save is not for this script"):
        missing_patches.main(["--patches", "4", "--save", str(tmp_path / "saved")])


def compared(script, *flags: str) -> dict[str, InversionConfig]:
    """How the images of each inverted method of a comparison are made."""
    parser = compare.quant_grid_parser() if script is compare else compare_kt.transfer_grid_parser()
    cells = script.cells_of(*parser.parse_known_args(["--baselines", *flags]))
    return {cell.method.name: cell.task.images.config for cell in cells}


def of_preset(name: str) -> InversionConfig:
    return quant_task(quant_parser("").parse_args(["--preset", name])).images.config


@pytest.mark.parametrize("script", [compare, compare_kt])
def test_pairs_are_compared_by_their_names(script):
    found = compared(script, "--methods", "psaq-dense", "smi", "cmi-pri", "smi")
    assert list(found) == ["psaq-dense", "smi", "cmi-pri"]
    assert [config.strategy for config in found.values()] == ["dense", "smi", "pri"]
    assert ["pse" in config.weights for config in found.values()] == [True, False, False]
    for flags, why in (
        (["psaq-nose"], "--methods psaq-nose is unknown; there are dense, smi.* PRIOR-STRATEGY for psaq"),
        (["psaq"], "--methods psaq is unknown"),
        (["smi", "--priors", "psaq"], "--methods.*--priors; leave one"),
        (["smi", "--strategies"], "--methods.*--strategies; leave one"),
        (["smi", "--with", "psaq", "--tvt 1"], "--with psaq: no prior and no strategy"),
    ):
        with pytest.raises(UserError, match=why):
            compared(script, "--methods", *flags)


@pytest.mark.parametrize(
    ("method", "name", "preset"),
    [
        ("psaq-dense", "psaq", "psaq_vit"),
        ("smi", "smi", "smi"),
        ("dense", "deepinversion", "quantize"),
        ("dense", "deepinversion", "deepinversion"),
        ("cmi-dense", "cmi", "cmi"),
    ],
)
def test_a_preset_of_one_prior_or_strategy_is_what_it_is_alone(method, name, preset):
    found = compared(compare, "--methods", method, "random", "--with", name, f"--preset {preset}")
    assert found[method].settings() == of_preset(preset).settings() | {"dtype": found[method].dtype}
    if name != "deepinversion":
        assert found["random"] == compared(compare, "--methods", "random")["random"]


def test_a_run_too_short_for_the_published_schedule_has_one_in_proportion():
    found = compared(compare, "--preset", "quantize", "--with", "smi", "--iterations 30")
    assert (found["smi"].prune_it, found["smi"].prune_ratio) == ((3, 6, 9, 12), (0.3,) * 4)
    assert found["dense"].iterations == 10
    assert compared(compare, "--preset", "quantize")["smi"].prune_it == (1, 2, 3, 4)
    assert compared(compare, "--preset", "quantize", "--iterations", "301")["smi"].prune_it == (50, 100, 200, 300)


def test_a_method_is_what_it_is_named_for_whatever_a_preset_says():
    (found,) = compared(compare, "--methods", "psaq-smi", "--with", "psaq", "--preset psaq_vit").values()
    assert (found.strategy, found.prune_it, found.betas, found.warmup) == ("smi", (50, 100, 200, 300), (0.5, 0.9), 100)
    (found,) = compared(compare, "--methods", "psaq-dense", "--with", "psaq", "--preset smi").values()
    assert (found.strategy, "pse" in found.weights, "tv2" in found.weights) == ("dense", True, False)


def test_flags_win_over_a_preset_and_those_of_one_method_over_common_ones():
    flags = ["--methods", "psaq-dense", "smi", "--iterations", "400", "--lr_g", "0.1", "--preset", "quantize"]
    flags += ["--with", "psaq", "--preset psaq_vit --warmup 9", "--with", "psaq", "--lr_g 0.3", "--prune_it", "5", "9"]
    found = compared(compare, *flags, "--prune_ratio", "0.5", "0.4")
    assert [(config.iterations, config.warmup) for config in found.values()] == [(400, 9), (400, 0)]
    assert [config.lr for config in found.values()] == [0.3, 0.1]
    assert (found["smi"].init, found["smi"].prune_it, found["smi"].prune_ratio) == ("scenes", (5, 9), (0.5, 0.4))
    assert found["psaq-dense"].init == "white"


def test_a_line_that_a_kill_cut_off_costs_one_cell_and_is_taken_away(tmp_path):
    flags = ["--baselines", "gaussian", "--strategies", "--bits", "8/8", "--val_limit", "8", "--calib-batchsize", "4"]
    flags += ["--output", str(tmp_path)]
    compare.main(flags)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text()
    file.write_text(lines[: len(lines) // 3])
    for _ in range(2):
        compare.main(flags)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 2


def test_ranges_of_noise_are_held_against_those_of_real_images(tmp_path):
    flags = ["--strategies", "--bits", "8/8", "--observer", "repq", "--val_limit", "8", "--output", str(tmp_path)]
    rows = {row["place"]: row for row in activation_ranges.main(flags)}
    assert all(row["real"] == 1 for row in rows.values())
    assert rows["patch_proj.quantizer"]["gaussian"] > 1.5  # pixels of real images are bounded
    assert {f"blocks.{i}.tap_q" for i in range(6)} < rows.keys()
    assert Image.open(tmp_path / "ranges.png").size[0] > 400
    with pytest.raises(UserError, match="real"):
        activation_ranges.main([*flags, "--baselines", "gaussian"])
    with pytest.raises(UserError, match="32-bit"):
        activation_ranges.main([*flags, "--bits", "4/32"])


@pytest.mark.parametrize("observer", ["minmax", "repq"])
def test_noise_with_every_range_of_real_images_is_as_accurate_as_they_are(observer, tmp_path):
    flags = ["--strategies", "--bits", "4/4", "--observer", observer, "--val_limit", "60"]
    activation_ranges.main([*flags, "--exchange", "--output", str(tmp_path / "ranges")])
    rows = json.loads((tmp_path / "ranges" / "exchange.json").read_text())
    found = {row["from_real"]: row["gaussian"] for row in rows}
    compared = {row["method"]: row["top1"] for row in compare.main([*flags, "--output", str(tmp_path / "compare")])}
    assert found["all"] == pytest.approx(compared["real"])
    assert found["none"] == pytest.approx(compared["gaussian"])
    assert {"qkv", "fc1", "v", "head"} < found.keys()
    assert len(set(found.values())) > 3
    with pytest.raises(UserError, match="--exchange"):
        activation_ranges.main([*flags, "--exchange", "--reconstruct", "--output", str(tmp_path)])


def test_missing_patches_of_real_images_cost_accuracy_at_low_widths(tmp_path):
    flags = ["--patches", "64", "4", "--w_bit", "3", "--a_bit", "3", "--observer", "repq", "--output", str(tmp_path)]
    whole, few = missing_patches.main(flags)
    assert (whole["patches"], few["patches"]) == (64, 4)
    assert whole["top1"] > few["top1"] + 2
    filled = missing_patches.main([*flags, "--fill"])[1]
    assert filled["top1"] > few["top1"] + 1
    with pytest.raises(UserError, match="have 64"):
        missing_patches.main([*flags, "--patches", "65"])


def test_pipeline_figure_of_a_pool_with_snapshots(tmp_path):
    where = ["--output", str(tmp_path / "out"), "--datapool", str(tmp_path / "pool")]
    flags = [*QUICK, "--val_limit", "8", "--check_images", "0", *where]
    report = test_quant.main([*flags, "--snapshots", "0", "5", "10", "30"])
    figure = figure_pipeline.main([report["inversion"]["pool"], "--output", str(tmp_path / "figure.png")])
    assert Image.open(figure).size[0] > 400
    with pytest.raises(UserError, match="0 to 3"):
        figure_pipeline.main([report["inversion"]["pool"], "--images", "4", "--output", str(tmp_path / "no.png")])
    without = test_quant.main(flags)["inversion"]["pool"]
    for pool, why in ((without, "--snapshots"), (str(tmp_path), "pool.json")):
        with pytest.raises(UserError, match=why):
            figure_pipeline.main([pool, "--output", str(tmp_path / "no.png")])


def test_parser_errors_are_user_errors():
    with pytest.raises(UserError, match="unrecognized"):
        Parser("x").parse_args(["--y"])


def test_the_study_of_priors_takes_every_flag_that_it_does_not_vary(tmp_path):
    config = priors.inversion("sardfq", "smi", 20, 4, 1, ["--no-flip", "--tv2", "0.5"])
    assert (config.iterations, config.batch_size, config.seed, config.prune_it) == (20, 4, 1, (2, 4, 6, 8))
    assert (config.init, config.weights["tv2"], config.soft_logits) == ("pink", 0.5, 10.0)
    assert not any(view.startswith("flip") for view in config.views)
    assert priors.asked(["--rotate", "--augment", "blur"]).quantization.augment == ("blur",)
    assert priors.asked([]).quantization.augment == ()
    with pytest.raises(UserError, match=r"--num_images is what this script varies"):
        priors.main(["--output", str(tmp_path), "--num-images", "3"])
