"""`report.html`: what a run or a comparison found, as one file that needs no server, network or script."""

from __future__ import annotations

import base64
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from utils.files import atomic
from utils.pictures import LossCurve
from utils.report import accuracy, by_method

COSTS = {
    "synthesis_seconds": "made in, s",
    "images_per_second": "images/s",
    "gflop_per_image": "GFLOP/image",
    "peak_memory_mb": "peak MB",
}
ENVIRONMENT = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
LINEAR, WHOLE = (MaxNLocator(6, steps=[1, 2, 5, 10], integer=integer) for integer in (False, True))
LOGARITHMIC = LogLocator(subs=(1,)), LogLocator(subs=(1, 2, 5))
MARK_ROOM = 9
"""What the label of a mark takes on a narrow page, in per cent of a curve's width."""
STOPPED, FROZEN = "Stopped patches are black", "Stopped patches are shown as they were when they stopped"


@dataclass(frozen=True)
class Section:
    """A part of the page, shown by the template's macro of its name; two that are `half` as wide share a row."""

    title: str
    note: str = field(default="", kw_only=True)
    half: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Table(Section):
    """Names and their numbers, where an empty cell is unknown; `bars` under the names have lengths in per cent.

    Rows after the first `shown` unfold.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()
    shown: int | None = None


@dataclass(frozen=True)
class Facts(Section):
    """Values by name, empty ones left out, and perhaps a command line."""

    values: Mapping[str, str]
    command: str | None = None


@dataclass(frozen=True)
class Picture(Section):
    """A PNG in base64; one with text in it is not shrunk until that cannot be read."""

    data: str
    text: bool = False


@dataclass(frozen=True)
class Curve(Section):
    """A line and the range around it, as SVG points; all places are per cent of the width or height, from top left.

    Ticks, `marks` (vertical) and `levels` (horizontal) are places with labels; that of a mark is so many rows up.
    """

    line: str
    band: str
    x_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    marks: Sequence[tuple[float, str, int]]
    levels: Sequence[tuple[float, str]]


def write_quant_page(folder: Path, report: Mapping, curve: LossCurve | None) -> Path:
    """The page of test_quant.py, from what `report.json` holds and the pictures in `folder`."""
    width = f"W{report['w_bit']}/A{report['a_bit']}"
    named = {"full precision": report["fp"], width: report["quant"], "ONNX file": report.get("export")}
    header, lines = ["", "top-1 %", "change", "top-5 %", "loss"], []
    for name, found in named.items():
        if found:
            lines.append([name, *against(found, report["fp"]), f"{found['top5']:.2f}", f"{found['loss']:.4f}"])
    sections = [
        Table("Accuracy", header, lines, note=f"{report['fp']['images']:,} test images", half=True),
        cost(report["inversion"], calibration=number(report["calibration_seconds"], " s")),
        check(report.get("check")),
        picture(folder / "images.png", "Calibration images", stopped(report["inversion"])),
        loss_curve(curve),
        error_by_layer(report.get("sensitivity")),
        onnx_file(report.get("export")),
        origin(report),
    ]
    images = f"{report['calibration_images']:,} {report['calibration']} images"
    about = f"{width} by {report['quantization']['method']}, calibrated on {images}"
    return write_page(folder, "Quantization", report["model"], about, sections)


def write_transfer_page(folder: Path, report: Mapping, curve: LossCurve | None) -> Path:
    """The page of test_kt.py, from what `report.json` holds and the pictures in `folder`."""
    teacher, student, distill = report["teacher"], report["student"], report["distill"]
    kept = "the last" if student["kept"] == "last" else f"of epoch {student['epoch']}, by agreement"
    named = {"teacher": teacher, f"student, {kept}": student}
    lines = [[name, *against(found, teacher)] for name, found in named.items()]
    top1, loss = (
        {epoch: [entry[key]] for epoch, entry in enumerate(report["history"], start=1) if entry[key] is not None}
        for key in ("top1", "loss")
    )
    note, levels = f"{teacher['images']:,} test images", {teacher["top1"]: f"teacher {teacher['top1']:.2f}"}
    sections = [
        Table("Accuracy", ["", "top-1 %", "against teacher"], lines, note=note, half=True),
        cost(report["synthesis"], distillation=number(distill["seconds"], " s"), steps=f"{distill['steps']:,}"),
        drawn("Student's top-1, %", top1, "epoch", levels=levels, half=True),
        drawn("Student's loss", loss, "epoch", log=True, half=True),
        picture(folder / "images.png", "Images the student learnt from", stopped(report["synthesis"])),
        loss_curve(curve),
        origin(report),
    ]
    images = f"{report['pool']['images']:,} {report['images']} images in {report['epochs']:,} epochs"
    about = f"student {report['student_name']}, {report['student_init']}, {report['finetune']} fine-tuning, {images}"
    return write_page(folder, "Knowledge transfer", report["model"], about, sections)


def write_comparison_page(folder: Path, title: str, summary: Sequence[Mapping], column: str, facts: Mapping) -> Path:
    """The page of a grid over `column` (`width` or `student`), from `summary.json` and the pictures in `folder`.

    `facts` are `device`, `dtype`, `versions` and `command`, as far as they are known.
    """
    models = list(dict.fromkeys(row["model"] for row in summary))
    tables = [comparison(model, [row for row in summary if row["model"] == model], column) for model in models]
    chart = picture(folder / "accuracy.png", "Accuracy and cost", text=True)
    pictures = []
    for path in sorted(folder.glob("images*.png"), key=lambda path: path.stem):  # images.png is of the first model
        model = path.stem.removeprefix("images").removeprefix("-") or models[0].rstrip("/").split("/")[-1]
        pictures.append(picture(path, f"Images of {model}", f"{STOPPED}, or shown as they were then", text=True))
    return write_page(folder, "Comparison", title, "", [*tables, chart, *pictures, origin(facts)])


def write_page(folder: Path, task: str, title: str, about: str, sections: Sequence[Section | None]) -> Path:
    """`report.html`, without the sections that are None."""
    shown = [(type(section).__name__.lower(), section) for section in sections if section]
    page = ENVIRONMENT.get_template("report_page.html.j2").render(task=task, title=title, about=about, sections=shown)
    with atomic(folder / "report.html") as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")  # a path may hold bytes that are no text
    return folder / "report.html"


def comparison(model: str, rows: Sequence[Mapping], column: str) -> Table:
    """Methods down, the values of `column` across, then the cost of their images; a row without method is a teacher."""
    values, methods = by_method(rows, column)
    lines = []
    for method, found in methods.items():
        first = next(filter(None, found))
        lines.append([method, *map(accuracy, found), f"{first['images']:,}", *(number(first[key]) for key in COSTS)])
    seeds = max(len(row["top1_per_seed"]) for found in methods.values() for row in found if row)
    note = "Top-1 in per cent" + (f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else "")
    note += "".join(f"; teacher {row['top1']:.2f}" for row in rows if "method" not in row)
    return Table(model, ["images", *map(str, values), "number", *COSTS.values()], lines, note=note)


def cost(synthesis: Mapping, **further: str) -> Facts:
    """What the images cost, nothing of those that were not inverted, and what was done with them."""
    made, time = synthesis["images"], synthesis["seconds"]
    values = {
        "inversion": number(time, " s"),
        "images": f"{made:,}",
        "iterations": f"{synthesis['iterations']:,}",
        "images/s": number(made / time if time else None),
        "GFLOP/image": number(synthesis["flops"] / max(made, 1) / 1e9),
        "peak memory": number(synthesis["peak_memory_bytes"] / 2**20, " MB"),
        "patches by stage": " → ".join(map(str, synthesis["patches_per_stage"])),
    }
    return Facts("Cost", (values if made else {}) | further, half=True)


def check(found: Mapping | None) -> Facts | None:
    """How far the quantized model is from its original on images without labels, if that was measured."""
    if found is None:
        return None
    values = {
        "agreement": f"{found['agreement']:.2f}%",
        "divergence": f"{found['divergence']:.4f} nats",
        "lost confidence": f"{100 * found['lost_confidence']:.1f}%",
        "foretold loss of top-1": f"about {found['predicted_drop']:.1f} points",
        "cost most": ", ".join(found.get("costliest", [])),
        "try": ", ".join(found.get("try", [])),
    }
    return Facts("Without labels", values, note=f"Against full precision, on {found['images']} other inverted images")


def error_by_layer(rows: Sequence[Mapping] | None) -> Table | None:
    """What each layer alone costs, if that was measured."""
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: -row["divergence"])
    lines = []
    for row in rows:
        width = f"W{row['w_bit']}/A{row['a_bit']}" if row["w_bit"] else f"A{row['a_bit']}"
        lines.append([row["layer"], f"{row['divergence']:.5f}", f"{row['changed']:.2f}", width])
    most = max(rows[0]["divergence"], 1e-12)
    bars = [max(0, round(100 * row["divergence"] / most, 1)) for row in rows]
    note = "With this layer alone quantized: divergence of the predictions in nats, and how many of them change"
    return Table("Error by layer", ["layer", "divergence", "changed %", "bits"], lines, bars, shown=12, note=note)


def onnx_file(found: Mapping | None) -> Table | None:
    """Size and speed of an exported file, if there is one."""
    if not found:
        return None
    named = {"quantized": "ONNX file", "float32": "ONNX file, float32", "pytorch": "PyTorch, float32"}
    lines = [[name, *(f"{found[of][key]:.2f}" for of in ("latency_ms", "throughput"))] for key, name in named.items()]
    note = f"{found['file']}: {found['bytes'] / 1e6:.2f} MB, {found['size_ratio']:.3f}x of float32; agrees with the "
    note += f"simulated model on {found['agreement']:.2f}% of the images. Time of one image, throughput of 32"
    return Table("ONNX file", [f"{found['threads']} threads", "ms", "images/s"], lines, note=note)


def origin(facts: Mapping) -> Facts | None:
    """What the numbers depend on, as far as it is known."""
    known = {key: str(facts[key]) for key in ("device", "dtype", "seed") if facts.get(key) is not None}
    known |= facts.get("versions") or {}
    command = facts.get("command")
    return Facts("How it was made", known, command) if known or command else None


def stopped(synthesis: Mapping) -> str:
    """What is seen of stopped patches, if some stopped."""
    if not any(later < earlier for earlier, later in itertools.pairwise(synthesis["patches_per_stage"])):
        return ""
    return FROZEN if synthesis.get("shows_stopped") else STOPPED


def picture(path: Path, title: str, note: str = "", text: bool = False) -> Picture | None:
    """A PNG file, if there is one."""
    return Picture(title, base64.b64encode(path.read_bytes()).decode(), text, note=note) if path.is_file() else None


def loss_curve(curve: LossCurve | None) -> Curve | None:
    """The inversion loss by iteration, if there was an inversion."""
    if curve is None:
        return None
    batches = f"Mean and range of {len(curve.losses)} batches; " if len(curve.losses) > 1 else ""
    marks = {start + 1: str(count) for start, count in zip(curve.starts, curve.patches, strict=True)}
    values = dict(enumerate(curve.losses.T.tolist(), start=1))
    note = f"{batches}stages begin at the vertical lines, with so many patches left"
    return drawn("Inversion loss", values, "iteration", log=True, marks=marks, note=note[0].upper() + note[1:])


def drawn(
    title: str,
    values: Mapping[int, Sequence[float]],
    x_label: str,
    *,
    log: bool = False,
    marks: Mapping[int, str] = MappingProxyType({}),
    levels: Mapping[float, str] = MappingProxyType({}),
    **section: Any,
) -> Curve | None:
    """Mean and range of the values at each x, without those that are not finite; None for fewer than two points.

    `marks` are labels by x, `levels` by y. `log` asks for a logarithmic axis, and has it where all is above 0.
    """
    finite = {x: at for x, at in values.items() if all(map(math.isfinite, at))}
    if len(finite) < 2:
        return None
    left, right = min(values), max(values)
    bottom, top = (choose([*map(choose, finite.values()), *levels]) for choose in (min, max))
    log = log and bottom > 0
    scale = math.log if log else float
    margin = 0.04 * (scale(top) - scale(bottom)) or 1

    def across(x: float) -> float:
        return round(100 * (x - left) / (right - left), 2)

    def down(y: float) -> float:
        return round(100 * (scale(top) + margin - scale(y)) / (scale(top) - scale(bottom) + 2 * margin), 2)

    def points(of: Callable) -> list[str]:
        return [f"{across(x)},{down(of(at))}" for x, at in finite.items()]

    placed: list[tuple[float, str, int]] = []
    for x, label in sorted(marks.items(), reverse=True):
        taken = {row for place, _, row in placed if place - across(x) < MARK_ROOM}
        placed.append((across(x), label, next(row for row in itertools.count() if row not in taken)))
    return Curve(
        title,
        line=" ".join(points(statistics.fmean)),
        band=" ".join(points(max) + points(min)[::-1]),
        x_label=x_label,
        x_ticks=[(across(x), f"{x:,.0f}") for x in ticks(left, right, WHOLE)],
        y_ticks=[(down(y), f"{y:,g}") for y in ticks(bottom, top, *(LOGARITHMIC if log else ()), LINEAR)],
        marks=placed,
        levels=[(down(y), label) for y, label in levels.items()],
        **section,
    )


def ticks(low: float, high: float, *locators: Locator) -> list[float]:
    """Round numbers from `low` to `high`, by the first locator that finds three."""
    for locator in locators:
        found = [float(value) for value in locator.tick_values(low, high) if low <= value <= high]
        if len(found) > 2:
            break
    return found


def against(found: Mapping, reference: Mapping) -> list[str]:
    """Top-1, and by how many percentage points it is above that of `reference`."""
    above = "" if found is reference else f"{found['top1'] - reference['top1']:+.2f}".replace("-", "−")
    return [f"{found['top1']:.2f}", above]


def number(value: float | None, unit: str = "") -> str:
    """Three digits, from 1000 on all before the point; empty for None."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}{unit}"
