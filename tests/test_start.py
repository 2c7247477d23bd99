"""How programs start, at once and without what they do not need yet, and how they end: in one line."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import test_quant
from scripts.studies import interrupts
from tests.conftest import ROOT
from utils.errors import UserError, UserNote, run_main

SCRIPTS = ["test_quant.py", "test_kt.py", "scripts/compare.py", "scripts/compare_kt.py", "scripts/train_teacher.py"]
SCRIPTS += ["scripts/paper/published.py"]
HEAVY = {"torch", "timm", "torchvision", "numpy", "PIL", "matplotlib", "jinja2", "sklearn", "tqdm", "onnx"}
COMMAND_LINES = """
import contextlib, io, runpy, sys
script = sys.argv[1]
for flag, code in (("--help", 0), ("--no_such_flag", 2)):
    sys.argv = [script, flag]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == code
print(*sys.modules)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_wrong_flag_import_nothing_heavy(script):
    command = [sys.executable, "-c", COMMAND_LINES, script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "utils.cli" in done.stdout.split()
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("package", ["inversion", "models", "quant", "kt", "utils"])
def test_packages_give_their_names_when_asked(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert not isinstance(getattr(module, name), ModuleType)
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


# A program that is interrupted by itself, at a moment of its choice: `me` sends Ctrl-C.
HEAD = """
import os, signal, sys
sys.path.insert(0, {root!r})
from utils.errors import UserError, exit_on_interrupt, run_main
exit_on_interrupt(__name__)
def me(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
"""
LINE = "interrupted; what is finished is kept, the same command goes on from there\n"


def ends(tmp_path: Path, body: str, *flags: str) -> tuple[int, str]:
    """Exit code and stderr of a program."""
    program = tmp_path / "program.py"
    program.write_text(HEAD.format(root=str(ROOT)) + body)
    done = subprocess.run(
        [sys.executable, program, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("me()", id="at the first line"),
        pytest.param("try:\n    me()\nexcept BaseException:\n    pass\nprint('going on')", id="caught by a library"),
        pytest.param("class A:\n    __del__ = me\na = A()\ndel a", id="in a destructor"),
        pytest.param("me(); me()", id="twice"),
        pytest.param("run_main(lambda: me())", id="at work"),
        pytest.param("import atexit\natexit.register(me)\nrun_main(lambda: None)", id="when all is done"),
        pytest.param(
            "import multiprocessing\nwork = multiprocessing.get_context('fork').Process(target=me)\n"
            "work.start()\nwork.join()\nassert work.exitcode == 130\nme()",
            id="in a worker",
        ),
    ],
)
def test_ctrl_c_is_one_line_and_code_130(tmp_path, body):
    assert ends(tmp_path, body) == (130, LINE)


@pytest.mark.parametrize("to", ["os.kill(os.getpid(), signal.SIGINT)", "os.killpg(os.getpgrp(), signal.SIGINT)"])
def test_ctrl_c_ends_the_workers_of_a_data_loader_in_silence(tmp_path, to):
    """The program alone is told, or all of its processes are, as by a terminal; stderr ends with the last of them."""
    body = f"from torch.utils.data import DataLoader\nfor _ in DataLoader(range(10**6), num_workers=2):\n    {to}"
    assert ends(tmp_path, body) == (130, LINE)


def test_ctrl_c_behind_a_bar_of_progress_has_its_own_line(tmp_path):
    code, errors = ends(tmp_path, "from tqdm import tqdm\nwith tqdm(total=5) as bar:\n    me()")
    assert code == 130
    assert errors.endswith("\n" + LINE)


def test_nothing_follows_the_line_of_an_error(tmp_path):
    body = "import atexit\natexit.register(me)\ndef main():\n    raise UserError('wrong')\nrun_main(main)"
    assert ends(tmp_path, body) == (2, "error: wrong\n")


def test_a_program_that_is_imported_leaves_ctrl_c_alone():
    before = signal.getsignal(signal.SIGINT)
    importlib.reload(importlib.import_module("test_quant"))
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupts_in_the_first_seconds(tmp_path):
    """The short version of the experiment."""
    flags = ["--moments", "2", "--seconds", "2.5", "--output", str(tmp_path)]
    (row,) = interrupts.main(["--programs", "test_quant.py", *flags])
    assert row[interrupts.RIGHT] >= 1
    assert row["wrong"] == []


def failing(main, capsys) -> str:
    """The one line of an entry point that ends with code 2."""
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def noisy():
    warnings.warn("a library is worried", stacklevel=1)
    # What becomes of a logger's warning where nobody has set up logging, as pytest has.
    logging.lastResort.handle(logging.makeLogRecord({"msg": "so is its logger", "levelno": logging.WARNING}))


def test_what_libraries_say_does_not_stand_above_an_error(capsys):
    def main():
        noisy()
        raise UserError("wrong")

    assert failing(main, capsys) == "error: wrong"


def test_a_pickle_that_torch_warns_of_is_refused_in_one_line(tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pth", pickle_protocol=4)
    flags = ["--model_path", str(tmp_path / "old.pth"), "--output", str(tmp_path / "out")]
    assert "old.pth" in failing(lambda: test_quant.main(flags), capsys)


def test_what_libraries_say_comes_at_the_end_of_a_run(capsys):
    def main():
        noisy()
        warnings.warn(UserNote("as it is read"), stacklevel=1)
        print("done", file=sys.stderr)

    run_main(main)
    note, done, worry, *_, last = capsys.readouterr().err.splitlines()
    assert (note, done) == ("note: as it is read", "done")
    assert "a library is worried" in worry
    assert last == "so is its logger"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read a\nb.png", r"cannot read a\nb.png"),
        ("\x1b[2J\r.png", r"\x1b[2J\r.png"),
        ("a\u2028b\u202e", r"a\u2028b\u202e"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("Ω é 图", "Ω é 图"),
    ],
)
def test_control_characters_are_shown_and_not_sent(text, shown, capsys):
    def main():
        raise UserError(text)

    assert failing(main, capsys) == f"error: {shown}"
    run_main(lambda: warnings.warn(UserNote(text), stacklevel=1))
    assert capsys.readouterr().err == f"note: {shown}\n"


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise UserError("cannot read a\nb.png")


def test_the_message_of_a_worker_process_is_whole(capsys):
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")
    assert failing(lambda: list(loader), capsys) == r"error: cannot read a\nb.png"


def test_windows_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert failing(lambda: None, capsys).startswith("error: this runs on Linux and macOS")


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_threads_that_wait_soon_sleep_unless_somebody_says_otherwise(given, count):
    code = "import sys, os, utils.errors; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [count, "False"]
