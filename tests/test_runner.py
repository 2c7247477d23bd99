"""`scripts/run_onnx.py` with files that are damaged, hostile, or for a newer runtime."""

import json

import pytest
from PIL import Image

from quant import QuantConfig
from scripts import run_onnx
from tests.conftest import ROOT, run_script, tiny_model

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements-export.txt)")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements-export.txt)")

NAMES = ["a", "b", "c", "d", "e"]
HOW = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of five classes, and a picture."""
    from quant.export import export

    folder, model = tmp_path_factory.mktemp("onnx"), tiny_model()
    Image.new("RGB", (40, 32), (200, 30, 90)).save(folder / "image.png")
    return export(folder / "t.onnx", model.sparse(), model, QuantConfig(32, 32), NAMES), folder / "image.png"


def changed(tmp_path, file, **metadata):
    """The file with other metadata; None takes one away."""
    proto = onnx.load(file)
    about = {one.key: one.value for one in proto.metadata_props} | metadata
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {key: value for key, value in about.items() if value is not None})
    onnx.save(proto, tmp_path / "changed.onnx")
    return tmp_path / "changed.onnx"


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        run_onnx.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ") and line.isprintable() and len(line) < 500 and not out
    return line


PREPARED = {
    "another size": {"input_size": [3, 64, 64]},
    "a size of words": {"input_size": ["3", "32", "32"]},
    "two means": {"mean": [0.5, 0.5]},
    "means that are names": {"mean": ["a", "b", "c"]},
    "a std of 0": {"std": [0.2, 0, 0.2]},
    "a std that is no number": {"std": [0.2, float("nan"), 0.2]},
    "an endless mean": {"mean": [0.5, float("inf"), 0.5]},
    "a huge integer": {"mean": [0.5, 10**400, 0.5]},
    "a crop of nothing": {"crop_pct": 0},
    "a negative crop": {"crop_pct": -1},
    "a tiny crop": {"crop_pct": 1e-9},
    "a crop larger than the image": {"crop_pct": 1e9},
    "an unknown crop": {"crop_mode": "border\x1b[2J"},
    "an unknown interpolation": {"interpolation": "random"},
    "an interpolation that is a list": {"interpolation": [1]},
}


@pytest.mark.parametrize("what", PREPARED)
def test_preprocessing_that_cannot_be_is_refused(tmp_path, written, capsys, what):
    file, image = written
    line = refused(capsys, changed(tmp_path, file, preprocessing=json.dumps({**HOW, **PREPARED[what]})), image)
    assert "is damaged" in line


@pytest.mark.parametrize(
    "metadata",
    [
        {"classes": json.dumps(NAMES[:4])},
        {"classes": json.dumps([*NAMES, "f"])},
        {"classes": "[]"},
        {"classes": "[1, 2, 3, 4, 5]"},
        {"classes": '{"0": "a"}'},
        {"classes": "[" * 100_000},
        {"classes": "\x1b[2J"},
        {"classes": None},
        {"preprocessing": "7"},
        {"preprocessing": "{}"},
        {"preprocessing": None},
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, written, capsys, metadata):
    file, image = written
    refused(capsys, changed(tmp_path, file, **metadata), image)


def test_names_do_nothing_to_a_terminal(tmp_path, written, capsys):
    file, image = written
    names = [f"\x1b[2J\n{name}\u202e\x9b" for name in NAMES]
    odd = tmp_path / "odd\n\x1b.png"
    odd.write_bytes(image.read_bytes())
    (found,) = run_onnx.main([str(changed(tmp_path, file, classes=json.dumps(names))), str(odd)])
    assert found in names
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable() and r"odd\n\x1b.png: \x1b[2J\n" in line and r"\u202e\x9b" in line
    assert r"none\x1b[2J" in refused(capsys, file, tmp_path / "none\x1b[2J")
    assert r"none\x1b[2J" in refused(capsys, tmp_path / "none\x1b[2J", image)


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path, written, monkeypatch):
    file, image = written
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run_script("scripts/run_onnx.py", changed(tmp_path, file, classes=json.dumps(["é"] * 5)), image)
    assert (result.returncode, result.stderr) == (0, "")
    assert r"\xe9 " in result.stdout


def test_files_of_other_kinds_and_damaged_ones_are_refused(tmp_path, written, capsys):
    file, image = written
    data = file.read_bytes()
    for content in (
        b"",
        b"nothing",
        data[: len(data) // 2],
        data[:100] + b"\xff" * 100 + data[200:],
        image.read_bytes(),
    ):
        (tmp_path / "damaged.onnx").write_bytes(content)
        assert "damaged.onnx" in refused(capsys, tmp_path / "damaged.onnx", image)
    assert "No such file" in refused(capsys, tmp_path / "none.onnx", image)
    assert "directory" in refused(capsys, tmp_path, image)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "other",
        [onnx.helper.make_tensor_value_info("x", 1, [1])],
        [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )
    other = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(other, tmp_path / "other.onnx")
    assert "is no file that --export wrote" in refused(capsys, tmp_path / "other.onnx", image)
    onnx.helper.set_model_props(other, {"preprocessing": json.dumps(HOW), "classes": json.dumps(NAMES)})
    onnx.save(other, tmp_path / "other.onnx")
    assert "does not go from images to logits" in refused(capsys, tmp_path / "other.onnx", image)


def test_weights_that_are_no_numbers_are_told(tmp_path, written, capsys):
    file, image = written
    proto = onnx.load(file)
    for one in proto.graph.initializer:
        if one.data_type == onnx.TensorProto.FLOAT:
            one.raw_data = b"\xff" * len(one.raw_data)
    onnx.save(proto, tmp_path / "nan.onnx")
    assert "finite numbers" in refused(capsys, tmp_path / "nan.onnx", image)


def test_a_runtime_that_is_too_old_is_named(tmp_path, written, capsys, monkeypatch):
    def old(*args, **kwargs):
        raise RuntimeError("Unsupported model IR version: 13, max supported IR version: 9\nand so on")

    file, image = written
    newer = changed(tmp_path, file, requires="onnxruntime>=1.23")
    monkeypatch.setattr(onnxruntime, "InferenceSession", old)
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.1")
    assert "changed.onnx needs onnxruntime 1.23 or newer, 1.22.1 is installed" in refused(capsys, newer, image)
    assert "onnxruntime 1.22.1 does not run" in refused(capsys, file, image)


@pytest.mark.parametrize(
    "flags", [["--top", "x"], ["--background", "1,2"], ["--background", "a,b,c"], ["--no\x1bsuch"]], ids=ascii
)
def test_wrong_flags_are_one_line(written, capsys, flags):
    refused(capsys, *written, *flags)


def test_the_runner_stands_alone():
    text = (ROOT / "scripts" / "run_onnx.py").read_text()
    assert not any(
        f"{word} {name}" in text for word in ("from", "import") for name in ("utils", "models", "quant", "torch")
    )
