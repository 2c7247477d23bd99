"""The task of `test_quant.py`: quantize a model without its data, and say how accurate it still is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from inversion import SynthesisReport, configured, engine
from models import LoadedModel, SparseImages, SparseViT, load_model
from models.registry import short_name
from quant import QuantConfig, calibration, export, fitting, require_own_folder, save_quantized
from quant.config import MENDED
from quant.fidelity import fidelity
from quant.hadamard import unmixed
from quant.rotation import rotations
from quant.sensitivity import save_sensitivity, sensitivity
from quant.storage import quantized_once
from utils import evaluation
from utils.cli import by_flag, natural, positive
from utils.data import evaluation_set, limited, loader
from utils.device import pick_device, pick_dtype, seed_all
from utils.errors import UserError
from utils.evaluation import evaluate
from utils.files import user_path, write_json
from utils.images import NEEDS_PRI, Inverted, Stored, Synthesis, images_at_hand
from utils.pictures import LossCurve, save_images, save_loss_curve
from utils.ranks import rank, rank_zero_first, ranks
from utils.report_page import write_quant_page
from utils.task import Task

CHECK = {"iterations": 100, "init": "pink", "lr_schedule": "cosine"}
"""How images to check with are made; they are whole."""
CHECK_SEED = 2**32 - 1
SMOOTH = 1.1
"""Weight of their total variation times the root of the values in a batch; with 0 they are noise to any other model."""
SUSPECT = 0.06
"""Lost confidence from which on a run says what is to blame; docs/quantize.md has what models lost on either side."""


@dataclass(frozen=True)
class QuantTask(Task):
    """Everything that a run of the task is asked for.

    `num_images`: calibration images. `check_images`: others that the quantized model is held against its original on,
    without labels, by `Fidelity`; 0: none. `check_pool`: where those are kept. `sensitivity`: measure what each layer
    alone costs. `save`: folder for the quantized model. `export`: ONNX file. `opset`: of that file; None: the oldest
    that stores it without waste.

    Raises `UserError` for what cannot go together.
    """

    num_images: int
    quantization: QuantConfig
    check_images: int = 32
    check_pool: str | Path = "./datapool"
    sensitivity: bool = False
    save: str | Path | None = None
    export: str | Path | None = None
    opset: int | None = None

    def __post_init__(self) -> None:
        positive.check(self.num_images, "--num_images")
        natural.check(self.check_images, "--check_images")
        if self.opset is not None and not self.export:
            raise UserError("--opset is the version of the file of --export, which is not given")
        if self.quantization.join and self.images.kind not in ("pri", "stored"):
            raise UserError(NEEDS_PRI)
        if self.sensitivity and self.quantization.w_bit == self.quantization.a_bit == 32:
            raise UserError("--sensitivity needs something quantized, and --w_bit 32 --a_bit 32 leaves all alone")

    @property
    def name(self) -> str:
        """What its folder is called."""
        how = self.quantization
        model = short_name(self.model.name)
        return f"{model}-{self.images.kind}-w{how.w_bit}a{how.a_bit}-s{self.run.seed}"

    def settings(self) -> dict[str, object]:
        """What its numbers depend on besides the model's weights, by the names of the flags."""
        how = self.quantization
        numbers = {"num_images": self.num_images, "calib_batchsize": how.batch_size}
        return super().settings() | by_flag(how) | numbers


def quant_report(task: QuantTask, device: torch.device | None = None) -> dict:
    """Run the task, on one rank of a `process_group`; its report, which stands in the output folder with pictures.

    The folder also gets the quantized model as soon as there is one, and the same task goes on from there.

    Raises `UserError` for whatever the user can mend; what can be refused is refused before anything is computed.
    """
    device = device or pick_device(task.run.device, task.run.gpu)
    seed_all(task.run.seed)
    model = load_model(task.model)
    config = fitting(SparseViT(model.vit), task.quantization)
    output = task.folder
    kept, saved = output / "quantized", task.save and user_path(task.save, "--save")
    if not config.w_bit == config.a_bit == 32:
        require_own_folder(kept, "--output")
    if saved:
        require_own_folder(saved)
    if task.export:
        export.require_export(task.export, model, config, task.opset)
    test_set = evaluation_set(model, task.data)
    chosen, image_size = limited(test_set, task.data.val_limit), model.preprocessing.input_size
    data = loader(chosen, task.data.val_batchsize, task.data.num_workers, image_size)

    _require_room(task, model, config, data, device)

    images, synthesis, curve = _calibration(task, model, device, output)
    vit = model.sparse(device)
    quantized, seconds = quantized_once(kept, vit, images, model, config, test_set.classes, task.run.progress)
    models = {"fp": vit, "quant": quantized}
    with rank_zero_first():
        if saved and saved.resolve() != kept.resolve() and rank() == 0:
            save_quantized(saved, quantized, model, config, test_set.classes)
        if task.export:
            file = user_path(task.export, "--export")
            if rank() == 0:
                export.export(file, quantized, model, config, test_set.classes, task.opset)
            models["export"] = export.OnnxModel(file)
    accuracy = evaluate(models, data, device, "quant" if task.export else None, task.run.progress, task.run.eager)

    report = {
        "task": "quant",
        "model": model.name,
        "mode": task.images.mode,
        "calibration": task.images.kind,
        "w_bit": config.w_bit,
        "a_bit": config.a_bit,
        "quantization": {**asdict(config), "observer": task.quantization.observer, "method": config.method},
        "chosen": choice(task.quantization, config, vit),
        **task.origin(device),
        **accuracy,
        "inversion": asdict(synthesis),
        "calibration_images": len(images),
        "calibration_seconds": seconds,
    }
    if task.check_images:
        report["check"] = _check(task, model, vit, quantized, images, config)
    if task.sensitivity:
        report["sensitivity"] = sensitivity(vit, images, config, task.run.progress)
    if rank() == 0:
        if task.export:
            difference = round(report["export"]["top1"] - report["quant"]["top1"], 3)
            report["export"] |= {
                "file": str(file),
                "top1_difference": difference,
                **export.speed(file, vit, model, task.opset),
            }
        if task.sensitivity:
            write_json(output / "sensitivity.json", report["sensitivity"])
            save_sensitivity(output / "sensitivity.png", report["sensitivity"])
        save_images(output / "images.png", images, model)
        if curve is not None:
            save_loss_curve(output / "loss.png", curve)
        write_json(output / "report.json", report)
        write_quant_page(output, report, curve)
    return report


def _require_room(
    task: QuantTask, model: LoadedModel, config: QuantConfig, data: DataLoader, device: torch.device
) -> None:
    """Raise `UserError` where something that comes later in the run finds no room, or a rank no batch."""
    vit, stored = SparseViT(model.vit), isinstance(task.images, Stored)
    patches = task.images.config.kept(model.grid) if isinstance(task.images, Inverted) else model.grid.count
    calibration.require_batches(task.num_images, config)
    if not stored:  # of a pool nobody has said yet how many patches its images have
        calibration.require_memory_for(vit, config, task.num_images, patches, device)
    if task.check_images:
        engine.require_memory_for(vit, check_source(model, task, device).config, device, "--check_images")
    evaluation.require_memory_for(vit, data, device)


def check_source(model: LoadedModel, task: QuantTask, device: torch.device) -> Inverted:
    """Images inverted out of the model, kept and the same for every run; no run is calibrated on them."""
    tv2 = SMOOTH / math.sqrt(task.check_images * math.prod(model.preprocessing.input_size))
    fixed = {"batch_size": task.check_images, "seed": CHECK_SEED, "dtype": pick_dtype("auto", device)}
    return Inverted(configured(tv2=float(f"{tv2:.3g}"), **CHECK, **fixed), task.check_pool)


def _check(
    task: QuantTask,
    model: LoadedModel,
    vit: SparseViT,
    quantized: SparseViT,
    images: SparseImages,
    config: QuantConfig,
) -> dict[str, object]:
    """The `Fidelity` of the quantized model; of a suspect one also the places that cost most, and what to try."""
    how = {"progress": task.run.progress, "eager": task.run.eager}
    seen = Synthesis(model, check_source(model, task, vit.device), vit.device, **how).first(task.check_images)
    found = fidelity(vit, quantized, seen, config.batch_size)
    report = {"images": len(seen), **asdict(found), "predicted_drop": round(found.predicted_drop, 2)}
    if found.lost_confidence >= SUSPECT:
        few = images.at(slice(8 * ranks()))
        rows = sensitivity(vit, few, replace(config, batch_size=max(1, len(few) // ranks())))
        report |= {"costliest": [row["layer"] for row in rows[:3]], "try": remedies(config, task.images.mode)}
    return report


def choice(asked: QuantConfig, config: QuantConfig, vit: SparseViT) -> str | None:
    """A line that says what `auto` stands for, and why; None where nothing was left to it."""
    if asked.observer != "auto" or asked.w_bit == asked.a_bit == 32:
        return None
    taken = {key: getattr(config, key) for key in MENDED if getattr(asked, key) is None}
    steps = [" ".join([f"--{key}", *(value if key == "augment" else ())]) for key, value in taken.items() if value]
    if not steps:
        return f"auto takes --observer {config.observer}: at these widths ranges are all that it takes"
    why = "below 8 bits channels that look alike and layers fitted to their input decide"
    left = {
        "not rotated": rotations(vit).refused() if asked.rotate is None else [],
        "hidden channels not mixed": unmixed(vit) if asked.hadamard is None and config.a_bit < 8 else [],
    }
    but = "".join(f" ({what}: {'; '.join(lines)})" for what, lines in left.items() if lines)
    return f"auto takes --observer {config.observer} {' '.join(steps)}: {why}{but}"


def remedies(config: QuantConfig, mode: int | None) -> list[str]:
    """Flags that may give back what a quantized model lost."""
    few = min(config.w_bit, config.a_bit) < 8
    tried = {
        "--mode 0": mode == 1,
        "--observer auto": config.observer == "minmax" or (few and not config.compensate),
        "--reconstruct": config.w_bit < 32 and not config.reconstruct,
        "--keep with these": few,
        "more bits": few,
    }
    return [flag for flag, helps in tried.items() if helps]


def _calibration(
    task: QuantTask, model: LoadedModel, device: torch.device, output: Path
) -> tuple[SparseImages, SynthesisReport, LossCurve | None]:
    """The images, what synthesizing them cost, and the course of their loss where they were inverted."""
    if not isinstance(task.images, Inverted):
        return images_at_hand(model, task.images, task.num_images, task.run.seed), SynthesisReport(), None
    where = {"log": output / "synthesis.jsonl", "tensorboard": task.events, "progress": task.run.progress}
    synthesis = Synthesis(model, task.images, device, **where, eager=task.run.eager)
    images = synthesis.first(task.num_images)
    return images, synthesis.cost(task.num_images), synthesis.course(task.num_images)
