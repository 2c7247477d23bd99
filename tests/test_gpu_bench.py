"""The one command that a GPU owes its numbers to, gone through on the CPU."""

import json

import pytest

from scripts.bench import gpu
from tests.conftest import ROOT

CHECKS = ("forward and gradient", "recorded and eager", "pool twice", "accuracy", "two ranks")


def test_every_part_runs_dry_and_is_not_run_again(tmp_path, capsys):
    before = sorted((ROOT / "docs" / "benchmarks").iterdir())
    gpu.main(["--dry", "--output", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    (table,) = folder.glob("*.md")
    report = json.loads(table.with_suffix(".json").read_text())
    assert list(report["parts"]) == list(gpu.PARTS)
    assert {name: part.get("error") for name, part in report["parts"].items() if "error" in part} == {}
    assert [name for name in CHECKS if report["parts"][name]["ok"] is not True] == []
    dense = report["parts"]["DeiT-Base, 128 images"]
    assert {"dense", "dense_vs_compiled"} <= dense["speedup"].keys()
    assert all(row["share_of_peak"] > 0 and row["peak_memory_bytes"] > 0 for row in dense["rows"])
    text = table.read_text()
    assert all(f"| {name} |" in text for name in gpu.PARTS)
    assert sum(part["took"] for part in report["parts"].values()) > 0
    capsys.readouterr()
    assert gpu.main(["--dry", "--output", str(tmp_path)])["parts"] == report["parts"]
    assert "== " not in capsys.readouterr().out
    assert sorted((ROOT / "docs" / "benchmarks").iterdir()) == before


def test_a_part_that_fails_stops_no_other_and_is_tried_again(tmp_path, capsys, monkeypatch):
    runs = []

    def broken(bench):
        runs.append("broken")
        raise RuntimeError("no kernel\nat line 3")

    parts = {"broken": broken, "whole": lambda bench: runs.append("whole") or {"ok": True, "n": 0.25}}
    monkeypatch.setattr(gpu, "PARTS", parts)
    for _ in range(2):
        report = gpu.main(["--dry", "--output", str(tmp_path)])
        assert report["parts"]["broken"]["error"] == "RuntimeError: no kernel"
        assert report["parts"]["whole"]["ok"]
    assert runs == ["broken", "whole", "broken"]
    assert "no kernel" in capsys.readouterr().out
    monkeypatch.setitem(parts, "late", pytest.fail)
    assert gpu.main(["--dry", "--output", str(tmp_path), "--tried", "late"])["parts"]["late"]["error"] == "not run yet"
