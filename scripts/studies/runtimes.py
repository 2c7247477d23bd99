#!/usr/bin/env python3
"""Accuracy of exported files in the runtimes that people have, beside the simulated model's.

W8/A8, W4/A8 and W4/A4, with and without --symmetric, each as a file of opset 17, of 21, and of the newest that onnx and
onnxruntime take, are run on the evaluation images here, in the Python interpreters of other environments (--runtimes),
and in OpenVINO. OUTPUT gets the files, the table (runtimes.md; a dash: does not run) and runtimes.json with reasons.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from models import LoadedModel, ModelConfig, load_model
from quant import QuantConfig, quantize
from quant.config import INT4_OPSET, OLDEST_OPSET
from quant.export import export, require_export
from utils.cli import Parser, add_flags, from_flags, natural, positive
from utils.data import DataConfig, evaluation_set, limited, loader
from utils.errors import UserError, run_main
from utils.evaluation import evaluate
from utils.files import atomic, writable_folder, write_json
from utils.images import Real, images_at_hand
from utils.report import markdown

WIDTHS = ((8, 8), (4, 8), (4, 4))
OPENVINO = "pip install openvino, or give --openvino another interpreter"

# What another interpreter runs, which has one of these packages, numpy, and nothing of this repository.
RUN = """
import json, sys
import numpy as np
kind, images, files = sys.argv[1], sys.argv[2], sys.argv[3:]
images = np.load(images, mmap_mode="r")
if kind == "onnxruntime":
    import onnxruntime as runtime
    def opened(file):
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {"images": batch})[0]
else:
    import openvino as runtime
    def opened(file):
        model = runtime.Core().compile_model(file, "CPU")
        return lambda batch: model([batch])[0]
found = {}
for file in files:
    try:
        run = opened(file)
        found[file] = [int(c) for i in range(0, len(images), 100) for c in run(images[i : i + 100]).argmax(1)]
    except Exception as error:
        found[file] = "does not run: " + str(error).strip().splitlines()[0][:160]
print(json.dumps([runtime.__version__.split("-")[0], found]))
"""


def newest_opset(model: LoadedModel, file: Path) -> int:
    """The newest one that onnx and onnxruntime take."""
    import onnx

    for opset in range(onnx.defs.onnx_opset_version(), OLDEST_OPSET, -1):
        with contextlib.suppress(UserError):
            require_export(file, model, QuantConfig(4, 8), opset)
            return opset
    return OLDEST_OPSET


def answered(interpreters: list[str], openvino: str, folder: str, files: list[str]) -> Iterator[tuple[str, dict]]:
    """Every runtime, and by file which class it puts each image in, or in words why it does not run the file."""
    for kind, python in (*(("onnxruntime", python) for python in interpreters), ("openvino", openvino)):
        try:
            command = [python, "-c", RUN, kind, str(Path(folder, "images.npy")), *files]
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"cannot run {python}: {error.strerror}") from None
        if result.returncode == 0:
            version, classes = json.loads(result.stdout.splitlines()[-1])
            yield f"{kind} {version}", classes
        elif kind == "openvino":
            print(f"note: OpenVINO is left out, {openvino} has none: {OPENVINO}", file=sys.stderr)
        else:
            raise UserError(f"{python} has no onnxruntime: {result.stderr.strip().splitlines()[-1][:160]}")


def main(argv: list[str] | None = None) -> list[dict]:
    """Quantize, export, run everywhere; print and write the table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add_flags(parser, ModelConfig)
    add_flags(parser, DataConfig)
    add("--runtimes", nargs="*", default=[], metavar="PYTHON", help="interpreters that have another onnxruntime")
    add("--openvino", default=sys.executable, metavar="PYTHON", help="interpreter that has openvino; default this one")
    add("--num_images", type=positive, default=32, help="real calibration images")
    add("--seed", type=natural, default=0, help="which of them")
    add("--output", default="./runs/runtimes", metavar="DIR", help="where everything goes")
    args = parser.parse_args(argv)
    output, data = writable_folder(args.output, "--output"), from_flags(DataConfig, args)
    model = load_model(from_flags(ModelConfig, args))
    opsets = sorted({OLDEST_OPSET, INT4_OPSET, newest_opset(model, output / "w4.onnx")})
    test_set = evaluation_set(model, data)
    batches = loader(
        limited(test_set, data.val_limit), data.val_batchsize, data.num_workers, model.preprocessing.input_size
    )
    source = Real(data.dataset, data.class_order, data.background)
    calibration = images_at_hand(model, source, args.num_images, args.seed)
    vit, models, files = model.sparse(), {}, {}
    for (w_bit, a_bit), symmetric in itertools.product(WIDTHS, (False, True)):
        name = f"W{w_bit}/A{a_bit}" + ", symmetric" * symmetric
        config = QuantConfig(w_bit, a_bit, "auto", symmetric, augment=())
        models[name] = quantize(vit, calibration, config)
        for opset in opsets:
            file = output / f"w{w_bit}a{a_bit}{'-symmetric' * symmetric}-{opset}.onnx"
            require_export(file, model, config, opset)
            files[name, opset] = str(export(file, models[name], model, config, test_set.classes, opset))
    found = evaluate({"full precision": vit, **models}, batches, vit.device)
    rows = [{"runs": "simulated", **{name: found[name]["top1"] for name in models}}]
    seen = [(images.numpy(), labels.numpy()) for images, labels in batches]
    images, labels = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "images.npy"), images)
        answers = list(answered([*args.runtimes, sys.executable], args.openvino, folder, list(files.values())))
    for opset, (runtime, classes) in itertools.product(opsets, answers):
        top1 = {name: accuracy(classes[files[name, opset]], labels) for name in models}
        rows.append({"runs": f"opset {opset}, {runtime}", **top1})
    write_json(output / "runtimes.json", {"full_precision": found["full precision"]["top1"], "rows": rows})
    lines = [[row["runs"], *(shown(row[name]) for name in models)] for row in rows]
    text = markdown(["", *models], lines)
    with atomic(output / "runtimes.md") as partial:
        partial.write_text(text + "\n")
    print(f"top-1 % of {len(labels)} images, full precision {found['full precision']['top1']:.2f}\n{text}")
    print(f"files and table: {output}")
    return rows


def accuracy(classes: list[int] | str, labels: np.ndarray) -> float | str:
    """Top-1 in per cent, or why there is none."""
    return classes if isinstance(classes, str) else round(100 * float((np.array(classes) == labels).mean()), 2)


def shown(top1: float | str) -> str:
    """A cell of the table."""
    return "-" if isinstance(top1, str) else f"{top1:.2f}"


if __name__ == "__main__":
    run_main(main)
