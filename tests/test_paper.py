"""The papers' comparisons: what their scripts ask for, and what is set beside what they found."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from models.config import DEFAULT_MODEL
from scripts import compare, compare_kt
from scripts.paper import published
from tests.conftest import ROOT
from utils.cli import Parser
from utils.errors import UserError, run_main
from utils.flags import quant_parser, quant_task

SCRIPTS = ("quant", "kt", "sardfq", "pri")
PLACE = 'printf "%q " "$@" >>calls && echo >>calls'
DATA = {"DATASET": "data", "MODEL_PATH": "teachers"}


def ran(folder: Path, name: str, *flags: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """A script run beside an environment whose Python notes how it is called; these calls, those of pip left out."""
    shutil.copytree(ROOT / "scripts" / "paper", folder / "scripts" / "paper")
    shutil.copy(ROOT / "scripts" / "environment.sh", folder / "scripts")
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\n[ "$1" = -m ] || {{ {PLACE}; }}\n')
    python.chmod(0o755)
    (folder / "requirements.txt").touch()
    (folder / ".venv" / "installed-requirements.txt").touch()
    env = {key: value for key, value in os.environ.items() if key not in (*DATA, "OUTPUT")}
    command = ["bash", f"scripts/paper/{name}.sh", *flags]
    env |= {"PYTHON": sys.executable, **variables}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    calls = folder / "calls"
    return done, [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def cells(call: Sequence[str]) -> list[compare.Cell | compare_kt.Cell]:
    """The comparison that a script calls for."""
    parsers: dict[str, tuple[object, Parser]] = {
        "scripts/compare.py": (compare, compare.quant_grid_parser()),
        "scripts/compare_kt.py": (compare_kt, compare_kt.transfer_grid_parser()),
    }
    script, parser = parsers[call[0]]
    return script.cells_of(*parser.parse_known_args(call[1:]))


def configs(found: Sequence[compare.Cell]) -> dict[str, object]:
    """How the images of each inverted method are made."""
    return {cell.method.name: cell.task.images.config for cell in found if cell.method.prior}


def of_preset(name: str) -> dict[str, object]:
    """The settings of a preset alone."""
    return quant_task(quant_parser("").parse_args(["--preset", name])).images.config.settings()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "paper").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_shell(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags", [["--tiny"], []], ids=["tiny", "whole"])
def test_what_a_script_asks_for_can_be_had_and_its_table_is_of_it(tmp_path, name, flags):
    done, calls = ran(tmp_path, name, *flags, "--num-workers", "0", **({} if flags else DATA))
    assert done.returncode == 0, done.stderr
    assert len(calls) == (4 if name == "kt" and not flags else 2)
    for comparison, table in zip(calls[::2], calls[1::2], strict=True):
        found = cells(comparison)
        assert {cell.task.data.num_workers for cell in found} == {0}  # what is given goes on to the comparison
        models = {cell.task.model.name for cell in found}
        assert models == {DEFAULT_MODEL} if flags else models <= published.THEIRS.keys()
        script, paper, folder = table
        assert (script, paper in published.TABLES) == ("scripts/paper/published.py", True)
        assert {str(cell.task.run.output.parent) for cell in found} == {folder}


def test_quantization_is_compared_by_the_published_quantizer_each_method_as_published(tmp_path):
    _, (comparison, _) = ran(tmp_path, "quant", **DATA)
    found = cells(comparison)
    assert {cell.task.quantization.observer for cell in found} == {"published"}
    assert {cell.width for cell in found} == {"W8/A8", "W4/A8"}
    made = configs(found)
    assert list(made) == ["psaq-dense", "dense", "smi"]
    for name, preset in (("psaq-dense", "psaq_vit"), ("smi", "smi")):
        assert made[name].settings() == of_preset(preset) | {"dtype": made[name].dtype}
    assert made["dense"].iterations == 4000


def test_sardfq_is_compared_at_four_bits_each_method_as_published(tmp_path):
    _, (comparison, _) = ran(tmp_path, "sardfq", **DATA)
    found = cells(comparison)
    assert {(cell.task.quantization.observer, cell.width) for cell in found} == {("repq", "W4/A4")}
    assert {published.THEIRS[cell.task.model.name] for cell in found} == set(published.ALL)
    made = configs(found)
    for name, preset in (("psaq-dense", "psaq_vit"), ("smi", "smi"), ("sardfq-dense", "sardfq")):
        assert made[name].settings() == of_preset(preset) | {"dtype": made[name].dtype}


@pytest.mark.parametrize(
    ("name", "flags", "variables", "line"),
    [
        *((name, [], {}, "error: give DATASET=") for name in SCRIPTS),
        ("kt", [], {"DATASET": "data"}, "error: give MODEL_PATH="),
        ("quant", ["--tiny", "--output", "here"], {}, "error: --output is given as OUTPUT="),
    ],
)
def test_what_a_script_cannot_do_is_one_line(tmp_path, name, flags, variables, line):
    done, calls = ran(tmp_path, name, *flags, **variables)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def row(model: str, method: str, top1: float, **more: object) -> dict[str, object]:
    """A comparison's row, as far as a table of published figures reads it."""
    return {"task": "quant", "model": model, "method": method, "width": "W4/A4", "top1": top1, "top1_std": None} | more


def table(tmp_path: Path, capsys, paper: str, *rows: object) -> list[str]:
    """What is printed of a summary, its empty lines left out."""
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    published.main([paper, str(tmp_path)])
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_ours_stand_beside_what_is_published_of_the_same_model_method_and_width(tmp_path, capsys):
    small, swin = "deit_small_16_imagenet", "swin_base_patch4_window7_224.ms_in22k_ft_in1k"
    rows = [
        row(small, "real", 69.5, val_images=50_000),
        row(small, "psaq-dense", 40.0, val_images=50_000),
        row(small, "smi", 43.25, top1_std=0.5, val_images=50_000),
        row(small, "smi", 50.0, width="W8/A8", val_images=50_000),
        row(swin, "smi", 60.0, val_images=50_000),
    ]
    assert table(tmp_path, capsys, "sardfq", *rows) == [
        "SARDFQ (ICCV 2025), top-1 in per cent, ours / published",
        "| images | DeiT-S, W4/A4 | DeiT-S, W8/A8 | Swin-B, W4/A4 | published by |",
        "| --- | --- | --- | --- | --- |",
        "| real | 69.50 / 69.03 | - / - | - / - | RepQ-ViT (ICCV 2023) |",
        "| psaq-dense | 40.00 / - | - / - | - / - | - |",
        "| smi | 43.25 ± 0.50 / 42.77 | 50.00 / - | 60.00 / 65.23 | SARDFQ (ICCV 2025) |",
    ]


def test_figures_of_another_quantizer_are_not_set_beside_ours(tmp_path, capsys):
    lines = table(tmp_path, capsys, "smi", row("deit_base_16_imagenet", "smi", 65.0))
    assert "| smi | 65.00 / - | - |" in lines
    assert lines[-1] == "For none of these is a published figure at hand."
    lines = table(tmp_path, capsys, "smi", row("deit_base_16_imagenet", "psaq-dense", 79.0, width="W8/A8"))
    assert "| psaq-dense | 79.00 / 79.10 | PSAQ-ViT (ECCV 2022) |" in lines


@pytest.mark.parametrize("model", [DEFAULT_MODEL, "local-dir:my/deit_small_patch16_224", "vit_base_patch16_224.mae"])
def test_models_that_no_paper_has_stand_alone(tmp_path, capsys, model):
    title, *_, line, remark = table(tmp_path, capsys, "sardfq", row(model, "smi", 90.0))
    assert title.endswith("in per cent, ours")
    assert line == "| smi | 90.00 |"
    assert remark.startswith("Ours alone: ")
    lines = table(tmp_path, capsys, "sardfq", row(model, "smi", 90.0), row("deit_tiny_16_imagenet", "smi", 31.0))
    assert "| smi | 90.00 | 31.00 / 30.14 | SARDFQ (ICCV 2025) |" in lines


def test_students_have_a_table_as_well_and_other_numbers_of_test_images_are_told(tmp_path, capsys):
    student = row("deit_tiny_16_cifar10", "smi", 93.0, task="kt", student="linear")
    teacher = {"data": "teacher", "model": "deit_tiny_16_cifar10", "top1": 95.0}
    lines = table(tmp_path, capsys, "smi", student, teacher)
    assert lines[1:4:2] == ["| images | DeiT-T, CIFAR-10, linear | published by |", "| smi | 93.00 / - | - |"]
    lines = table(tmp_path, capsys, "sardfq", row("deit_tiny_16_imagenet", "smi", 31.0, val_images=1000))
    assert lines[-1] == "Ours are of 1000 test images, published ones of 50000."


def test_every_figure_is_of_a_model_and_in_a_table():
    used = {paper for _, papers in published.TABLES.values() for paper in papers}
    keys = [(one.paper, one.method, one.width) for one in published.FIGURES]
    assert len(set(keys)) == len(keys)
    for one in published.FIGURES:
        assert one.paper in used
        assert one.top1.keys() <= published.MODELS.keys()
        assert all(0 < value < 100 for value in one.top1.values())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "summary.json: No such file"),
        ("[", "is no JSON"),
        ("{}", "not of a comparison"),
        ("[]", "not of a comparison"),
        ("[1]", "method 1 lacks"),
        (json.dumps([row(DEFAULT_MODEL, "smi", 90.0), row(DEFAULT_MODEL, "smi", "90")]), "method 2 lacks"),
        (json.dumps([row(DEFAULT_MODEL, "smi", 90.0, task="kt")]), "method 1 lacks"),
        (json.dumps([row(DEFAULT_MODEL, "smi", 90.0, top1_std="")]), "method 1 lacks"),
        (json.dumps([row(DEFAULT_MODEL, "smi", 90.0, val_images="9")]), "method 1 lacks"),
        (json.dumps([row(DEFAULT_MODEL, "smi", 90.0, task=[])]), "method 1 lacks"),
    ],
)
def test_a_folder_that_is_no_comparison_is_refused_in_one_line(tmp_path, capsys, text, why):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: published.main(["smi", str(tmp_path)]))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and why in line


def test_papers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"PAPER.*smi.*pri.*sardfq"):
        published.main(["psaq", str(tmp_path)])
