"""report.html: the right numbers, nothing from elsewhere, and readable in a browser of any width."""

import copy
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageStat

from utils.pictures import LossCurve
from utils.report_page import write_comparison_page, write_quant_page, write_transfer_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """</title></code><script>alert(1)</script><img src=x onerror='alert(1)'>"&{{ 7 * 7 }}"""
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}
SYNTHESIS = {
    "strategy": "smi",
    "images": 32,
    "iterations": 500,
    "seconds": 16.0,
    "patches_per_stage": [64, 44, 14],
    "flops": 1_092_000_000_000,
    "peak_memory_bytes": 928 * 2**20,
    "pool": "datapool/x",
}
FREE = SYNTHESIS | {"images": 0, "iterations": 0, "seconds": 0.0, "patches_per_stage": [], "flops": 0}
QUANT = {
    "task": "quant",
    "model": "deit_nano",
    "mode": 0,
    "calibration": "smi",
    "w_bit": 4,
    "a_bit": 8,
    "quantization": {"method": "repq"},
    "seed": 7,
    "device": "a CPU",
    "dtype": "bfloat16",
    "fp": {"top1": 99.444, "top5": 100.0, "loss": 0.02423, "images": 360},
    "quant": {"top1": 98.333, "top5": 99.722, "loss": 0.05181, "images": 360},
    "inversion": SYNTHESIS,
    "calibration_images": 32,
    "calibration_seconds": 1.228,
    "versions": VERSIONS,
}
EXPORT = {
    "top1": 98.056,
    "top5": 99.722,
    "loss": 0.0524,
    "agreement": 99.71,
    "file": "model.onnx",
    "bytes": 2_500_000,
    "size_ratio": 0.263,
    "threads": 2,
    "latency_ms": {"quantized": 1.25, "float32": 2.5, "pytorch": 3.75},
    "throughput": {"quantized": 800.5, "float32": 400.0, "pytorch": 266.7},
}
TRANSFER = {
    "task": "kt",
    "model": "deit_nano",
    "mode": 0,
    "images": "smi",
    "student_name": "deit_pico",
    "finetune": "full",
    "student_init": "scratch",
    "seed": 42,
    "device": "a CPU",
    "dtype": "float32",
    "epochs": 4,
    "teacher": {"top1": 99.444, "top5": 100.0, "loss": 0.02, "images": 360},
    "student": {"top1": 90.0, "kept": "agreement", "epoch": 2},
    "pool": {"images": 400, "path": "datapool/x"},
    "synthesis": SYNTHESIS,
    "distill": {"seconds": 14.17, "steps": 600},
    "history": [{"loss": 2 - n / 4, "top1": [None, 80.0][n % 2], "images": 100 * n} for n in range(1, 5)],
    "versions": VERSIONS,
}


def sensitivity(count: int, name: str = "blocks.{}.mlp.fc1") -> list[dict]:
    return [
        {"layer": name.format(n), "w_bit": 4 if n % 2 else None, "a_bit": 8, "divergence": 0.1 / (n + 1), "changed": n}
        for n in range(count)
    ]


def row(method: str, width: str, top1: float, **others) -> dict:
    costs = {"images": 32, "synthesis_seconds": 17.5, "images_per_second": 1.83, "gflop_per_image": 34.1}
    about = {"model": "deit_nano", "method": method, "prior": None, "strategy": method, "width": width}
    per_seed = {"top1": top1, "top1_std": 0.5, "top1_per_seed": [top1, top1 - 1]}
    return {**about, **per_seed, **costs, "peak_memory_mb": None, **others}


def losses(*batches: float, iterations: int = 500) -> LossCurve:
    falling = torch.logspace(2, 0, iterations)
    return LossCurve(torch.stack([start * falling for start in batches]), [0, 50, 300], [64, 44, 14])


def grid(folder: Path, name: str = "images.png") -> None:
    Image.new("RGB", (808, 404), "teal").save(folder / name)


class Page(HTMLParser):
    """What a browser makes of a page: its text, its tags and their attributes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def stands_alone(self) -> bool:
        links = [value for _, attributes in self.tags for name, value in attributes.items() if name in ("src", "href")]
        loads = re.search(r"https?:|url\(|@import", self.source)
        events = [name for _, attributes in self.tags for name in attributes if name.startswith("on")]
        tags = {"script", "link", "iframe", "object"} & {tag for tag, _ in self.tags}
        return all(link.startswith("data:image/png;base64,") for link in links) and not (loads or events or tags)


@pytest.fixture
def full_quant(tmp_path) -> Path:
    grid(tmp_path)
    report = QUANT | {"sensitivity": sensitivity(50), "export": EXPORT, "command": "test_quant.py --w_bit 4 " * 9}
    return write_quant_page(tmp_path, report, losses(1, 2))


def test_a_quantization_with_all_there_is(full_quant):
    page = Page(full_quant)
    assert full_quant.name == "report.html"
    assert page.stands_alone()
    assert "full precision 99.44 – 100.00 0.0242 W4/A8 98.33 −1.11 99.72 0.0518 ONNX file 98.06 −1.39" in page.text
    assert "inversion 16.0 s images 32 iterations 500 images/s 2.00 GFLOP/image 34.1 peak memory 928 MB" in page.text
    assert "64 → 44 → 14" in page.text
    assert "model.onnx: 2.50 MB" in page.text and "ONNX file 1.25 800.50" in page.text
    assert "test_quant.py --w_bit 4" in page.text and "torch 2.13.0" in page.text and "seed 7" in page.text
    assert len(page.named("img")) == 1


def test_the_costliest_layers_come_first_and_the_rest_unfolds(full_quant):
    shown, unfolding = full_quant.read_text(encoding="utf-8").split("<details>")
    names = re.findall(r"blocks\.(\d+)\.mlp", shown), re.findall(r"blocks\.(\d+)\.mlp", unfolding)
    assert [int(name) for name in names[0] + names[1]] == list(range(50))
    assert len(names[0]) == 12 and "38 more" in unfolding
    bars = [float(width) for width in re.findall(r'<i style="width:([\d.]+)%', shown + unfolding)]
    assert bars[:2] == [100, 50] and len(bars) == 50
    assert "0.10000 0.00 A8" in Page(full_quant).text and "0.05000 1.00 W4/A8" in Page(full_quant).text


def test_layers_that_cost_nothing_have_no_bars(tmp_path):
    rows = [{"layer": "a", "w_bit": 8, "a_bit": 8, "divergence": -1e-9 * n, "changed": 0.0} for n in (2, 1)]
    page = Page(write_quant_page(tmp_path, QUANT | {"sensitivity": rows}, None))
    assert [bar["style"] for bar in page.named("i")] == ["width:0%"] * 2


def test_what_was_not_asked_for_is_left_out(tmp_path):
    page = Page(write_quant_page(tmp_path, QUANT | {"mode": 2, "calibration": "real", "inversion": FREE}, None))
    assert page.stands_alone()
    for absent in ("ONNX", "Error by layer", "Inversion loss", "Calibration images", "GFLOP", "patches"):
        assert absent not in page.text
    assert "calibration 1.23 s" in page.text
    assert not page.named("svg") and not page.named("img") and not page.named("pre")
    unknown = Page(write_quant_page(tmp_path, QUANT | {"inversion": SYNTHESIS | {"seconds": None}}, None))
    assert "inversion" not in unknown.text and "images/s" not in unknown.text and "GFLOP/image 34.1" in unknown.text


def test_the_loss_curve_marks_the_stages(tmp_path):
    one, three = (Page(write_quant_page(tmp_path, QUANT, losses(*batches))) for batches in ([1], [1, 2, 3]))
    marks = [tag for tag in three.named("line") if tag["class"] == "mark"]
    assert sorted(float(tag["x1"].rstrip("%")) for tag in marks) == [0, 10.02, 60.12]
    labels = three.text.partition("so many patches left")[2]
    assert all(label in labels.split() for label in ("64", "44", "14", "100", "500"))
    assert "Mean and range of 3 batches" in three.text and "Mean" not in one.text
    points = [tuple(map(float, point.split(","))) for point in one.named("polyline")[0]["points"].split()]
    assert len(points) == 500 and points[0][0] == 0 and points[-1][0] == 100
    assert points[250][1] == pytest.approx(50, abs=0.2)  # straight on a logarithmic axis, half way from 100 to 1


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([1.0, 2.0, 3.0], 3), ([1.0, 0.0, -3.0], 3), ([1.0, float("nan"), 2.0], 2), ([5.0, 5.0], 2), ([1.0], 0)],
)
def test_any_losses_give_a_page(tmp_path, values, drawn):
    page = Page(write_quant_page(tmp_path, QUANT, LossCurve(torch.tensor([values]), [0], [64])))
    assert sum(len(line["points"].split()) for line in page.named("polyline")) == drawn
    assert not re.search(r"\b(nan|inf)\b", page.source)


def test_crowded_labels_stand_in_rows(tmp_path):
    curve = LossCurve(torch.rand(1, 4000), [0, 50, 100, 3000], [196, 138, 97, 48])
    source = write_quant_page(tmp_path, QUANT, curve).read_text(encoding="utf-8")
    heights = re.findall(r'class="label" x="[\d.]+%" y="(-?\d+)" dx="4">(\d+)<', source)
    assert {label: int(y) for y, label in heights} == {"48": -4, "97": -4, "138": -18, "196": -32}


def test_names_from_outside_stay_text(tmp_path):
    report = copy.deepcopy(QUANT) | {"model": HOSTILE, "calibration": HOSTILE, "device": HOSTILE, "command": HOSTILE}
    report |= {"sensitivity": sensitivity(13, HOSTILE.replace("{{ 7 * 7 }}", "{}")), "versions": {HOSTILE: HOSTILE}}
    report |= {"export": EXPORT | {"file": HOSTILE}}
    comparison = [row(HOSTILE, HOSTILE, 99.0, model=HOSTILE)]
    transfer = TRANSFER | {"model": HOSTILE, "student_name": HOSTILE, "images": HOSTILE}
    grid(tmp_path, "images-<script>.png")
    for file in (
        write_quant_page(tmp_path, report, None),
        write_transfer_page(tmp_path, transfer, None),
        write_comparison_page(tmp_path, HOSTILE, comparison, "width", {"command": HOSTILE}),
    ):
        page = Page(file)
        assert page.stands_alone()
        assert " ".join(HOSTILE.split()) in page.text


def test_a_path_that_is_no_text(tmp_path):
    page = Page(write_quant_page(tmp_path, QUANT | {"command": "--output caf\udce9 é"}, None))
    assert "--output caf? é" in page.text


def test_a_transfer_shows_how_the_student_learnt(tmp_path):
    grid(tmp_path)
    page = Page(write_transfer_page(tmp_path, TRANSFER | {"command": "test_kt.py --epochs 4"}, losses(1)))
    assert page.stands_alone()
    assert "teacher 99.44 – student, of epoch 2, by agreement 90.00 −9.44" in page.text
    assert "student deit_pico, scratch, full fine-tuning, 400 smi images in 4 epochs" in page.text
    assert "distillation 14.2 s steps 600" in page.text and "test_kt.py --epochs 4" in page.text
    lines = [len(line["points"].split()) for line in page.named("polyline")]
    assert lines == [2, 4, 500]  # two epochs were evaluated, four have a loss
    assert "teacher 99.44" in page.text.partition("Student's top-1")[2]
    short = TRANSFER | {"history": TRANSFER["history"][:1], "synthesis": FREE}
    assert not Page(write_transfer_page(tmp_path, short, None)).named("svg")


def test_a_comparison_has_a_table_for_each_model(tmp_path):
    one_seed = {"top1_std": None, "top1_per_seed": [70.0], "synthesis_seconds": None}
    summary = [
        row("smi", "W8/A8", 99.167),
        row("smi", "W4/A4", 98.5, synthesis_seconds=99.0),
        row("real", "W8/A8", 99.444, gflop_per_image=None),
        row("dense", "W8/A8", 70.0, model="hf-hub:org/other", **one_seed),
        {"data": "teacher", "model": "deit_nano", "top1": 99.5},
    ]
    for name in ("accuracy.png", "images.png", "images-other.png", "unrelated.png"):
        grid(tmp_path, name)
    facts = {"device": "a GPU", "versions": VERSIONS, "command": "compare.py --seeds 0 1"}
    page = Page(write_comparison_page(tmp_path, "Calibration images", summary, "width", facts))
    assert page.stands_alone()
    assert "smi 99.17 ± 0.50 98.50 ± 0.50 32 17.5 1.83 34.1 –" in page.text
    assert "real 99.44 ± 0.50 – 32 17.5 1.83 – –" in page.text
    assert "dense 70.00 32 – 1.83" in page.text
    assert "standard deviation of 2 seeds; teacher 99.50" in page.text
    assert page.text.index("Images of deit_nano") < page.text.index("Images of other")
    assert len(page.named("table")) == 2 and len(page.named("img")) == 3
    assert "a GPU" in page.text and "compare.py --seeds 0 1" in page.text
    many = Page(write_comparison_page(tmp_path, "Many", [row(f"m{n}", "W8/A8", n) for n in range(30)], "width", {}))
    assert len(many.named("tr")) == 31 and not many.named("details")
    (tmp_path / "bare").mkdir()
    bare = Page(write_comparison_page(tmp_path / "bare", "Images", summary[:1], "width", {}))
    assert not bare.named("img") and "How it was made" not in bare.text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
def test_a_browser_shows_it_at_any_width_in_light_and_dark(full_quant, tmp_path):
    """Frames of a phone's and of a screen's width, in a page whose title says how wide their content is."""
    page = html.escape(re.sub("<meta http-equiv.*?>", "", full_quant.read_text(encoding="utf-8")))
    frames = "".join(
        f'<iframe style="width:{w}px;height:1500px;border:0" srcdoc="{page}"></iframe>' for w in (400, 1400)
    )
    measure = "Array.from(frames, f => [f.innerWidth, f.document.documentElement.scrollWidth])"
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"{frames}<script>onload = () => document.title = {measure}.join()</script>", encoding="utf-8")
    brightness = []
    for scheme in ("1", "0"):
        picture = tmp_path / f"{scheme}.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        flags += ["--window-size=1900,1500", f"--blink-settings=preferredColorScheme={scheme}"]
        command = [BROWSER, *flags, f"--screenshot={picture}", "--dump-dom", wrapper.as_uri()]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if found.returncode:
            pytest.skip(f"{BROWSER} does not run here")
        widths = [int(width) for width in re.search("<title>([0-9,]+)</title>", found.stdout)[1].split(",")]
        assert widths[0] == 400 and widths[2] == 1400
        assert widths[1] <= 400 and widths[3] <= 1400
        brightness.append(ImageStat.Stat(Image.open(picture).convert("L").crop((20, 20, 1800, 1400))).mean[0])
    assert brightness[0] > 180 > 90 > brightness[1]
