"""What is quantized how: one frozen object, checked when it is made."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quant.observers import OBSERVERS
from utils.augment import AUGMENTATIONS, augmented
from utils.cli import any_seed, check_numbers, positive, rate, setting
from utils.errors import UserError
from utils.lazy import torch

if TYPE_CHECKING:
    from models import PatchGrid, SparseImages

BITS = (*range(2, 9), 32)
KEPT_BITS = 8
PRESETS = {"quantize": {"observer": "auto", "num_images": 64}}
"""What `--preset` says of calibration, besides of the images; flags that are given win."""
RECONSTRUCTION_LOSSES = ("mse", "fisher", "global")
"""Keys of `quant.losses.LOSSES`, which needs torch."""
LEFT: dict[str, object] = {"rotate": False, "hadamard": False, "compensate": False, "fill": False, "augment": ()}
"""What is done besides choosing ranges where nothing is said, and, with `auto`, at 8 bits."""
MENDED: dict[str, object] = {
    "rotate": True,
    "hadamard": True,
    "compensate": True,
    "fill": True,
    "augment": ("crop", "blur", "colour"),
}
"""What `auto` does below 8 bits, `hadamard` below 8 bits of activations."""
EITHER = {"action": argparse.BooleanOptionalAction}
OLDEST_OPSET, INT4_OPSET = 17, 21
"""The first with layer norms, and the first with int4."""
# What --keep calls parts of the model, and how its layers' names begin.
PARTS = {"first": "patch_proj", "head": "head."}


def check_bits(w_bit: int, a_bit: int) -> None:
    """Raise `UserError` unless both widths can be had."""
    for flag, bits in (("--w_bit", w_bit), ("--a_bit", a_bit)):
        if bits not in BITS:
            raise UserError(f"{flag} {bits} is not 2 to 8, or 32 for full precision")


def stores_int4(bits: int, opset: int) -> bool:
    """Whether weights of so many bits are int4 in a file, two in a byte."""
    return bits <= 4 and opset >= INT4_OPSET


def parts(text: str) -> tuple[str, ...]:
    """argparse type: what commas part."""
    return tuple(part.strip() for part in text.split(","))


@dataclass(frozen=True)
class QuantConfig:
    """Everything that a quantized model depends on besides the model and the images.

    `rotate`, `hadamard`, `compensate`, `fill` and `augment` that are None are what the observer `auto` takes at these
    widths, of any other one off; `resolved` says which. `keep`: see `kept`. `batch_size`: images a forward pass.
    `seed`: of the matrices of `rotate`, of the changes of `augment` and of what `reconstruct` draws.

    Raises `UserError` for values that cannot be, or not together.
    """

    w_bit: int = setting(8, "bits of the weights, 2 to 8; 32 leaves them alone", type=int)
    a_bit: int = setting(8, "bits of the activations, 2 to 8; 32 leaves them alone", type=int)
    observer: str = setting(
        "minmax",
        "how ranges are chosen; minmax quantizes residual sums, scores and embeddings too, the others the factors of "
        "matrix products alone; output: by the error of what layers put out; auto: heads, --rotate, --hadamard, "
        "--compensate, --fill and --augment below 8 bits, else mse; default minmax, of --preset quantize auto",
        choices=(*OBSERVERS, "auto"),
    )
    symmetric: bool = setting(False, "zero points of 0, activations in int8: what TensorRT and NPUs ask for")
    rotate: bool | None = setting(
        None,
        "rotate residual stream and heads, exactly, so that channels are alike; default: --observer decides",
        **EITHER,
    )
    hadamard: bool | None = setting(
        None,
        "mix the hidden channels of every MLP in front of their quantizer, exactly, by a matrix that stays in the "
        "model; default: --observer decides",
        **EITHER,
    )
    compensate: bool | None = setting(
        None,
        "fit each layer to its quantized input and round its weights in turn; default: --observer decides",
        **EITHER,
    )
    fill: bool | None = setting(
        None,
        "calibrate on full grids: stopped patches as pools show them, else their nearest kept ones; default: "
        "--observer decides",
        **EITHER,
    )
    join: bool = setting(False, "calibrate on what the images of a PRI trajectory are together, on full grids")
    augment: tuple[str, ...] | None = setting(
        None,
        "changes of the calibration images, none where no name is given; default: --observer decides",
        nargs="*",
        choices=AUGMENTATIONS,
    )
    keep: tuple[str, ...] = setting(
        (), "first,last,head or parts of names: 8 bits or more", type=parts, metavar="PARTS"
    )
    bias_correction: bool = setting(False, "shift biases until every layer's mean output is as it was")
    reconstruct: bool = setting(False, "learn rounding and ranges, block by block, on the images")
    reconstruct_loss: str = setting(
        "mse",
        "what its blocks are asked for: their output (mse), by what it does to the predictions (fisher: FIMA-Q), or "
        "with the last features behind it (global: GLF-Q)",
        choices=RECONSTRUCTION_LOSSES,
    )
    reconstruct_steps: int = setting(300, "steps for each block", type=positive)
    reconstruct_seconds: float | None = setting(None, "its time limit in s; default none", type=rate, metavar="S")
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.w_bit, self.a_bit)
        check_numbers(self)
        positive.check(self.batch_size, "--calib-batchsize")
        any_seed.check(self.seed, "--seed")
        if self.observer not in (*OBSERVERS, "auto"):
            raise UserError(f"--observer {self.observer} is not one of {', '.join((*OBSERVERS, 'auto'))}")
        if self.a_bit == 32 and self.observer in ("percentile", "repq"):
            raise UserError(f"--observer {self.observer} is about activations, which --a_bit 32 leaves alone; take mse")
        if self.a_bit == 32 and self.hadamard:
            raise UserError("--hadamard is about activations, which --a_bit 32 leaves alone")
        if self.a_bit == 32 and self.symmetric:
            raise UserError("--symmetric is about activations, which --a_bit 32 leaves alone")
        if self.w_bit == 32 and self.reconstruct:
            raise UserError("--reconstruct learns how weights are rounded, and --w_bit 32 leaves them alone")
        for name in self.augment or ():
            if name not in AUGMENTATIONS:
                raise UserError(f"--augment {name} is not one of {', '.join(AUGMENTATIONS)}")
        if self.reconstruct_loss not in RECONSTRUCTION_LOSSES:
            losses = ", ".join(RECONSTRUCTION_LOSSES)
            raise UserError(f"--reconstruct_loss {self.reconstruct_loss} is not one of {losses}")
        if self.reconstruct_loss != "mse" and not self.reconstruct:
            raise UserError("--reconstruct_loss is what --reconstruct lowers, which is not given")
        if self.reconstruct_seconds is not None and not self.reconstruct:
            raise UserError("--reconstruct_seconds is the limit of --reconstruct, which is not given")
        if self.w_bit == self.a_bit == 32:
            for name in ("keep", "bias_correction", "join", *LEFT):
                if getattr(self, name):
                    raise UserError(f"--{name} needs something quantized, and --w_bit 32 --a_bit 32 leaves all alone")
        if self.keep and all(bits in (8, 32) for bits in (self.w_bit, self.a_bit)):
            raise UserError(f"--keep is for layers that shall have {KEPT_BITS} bits where the others have fewer")

    def resolved(self, rotates: bool = True, mixes: bool = True) -> QuantConfig:
        """What `auto` stands for at these widths; `rotates`, `mixes`: whether a model allows either in any part.

        With 8 bits ranges are all that it takes; with fewer, what docs/quantize.md has the tables of.
        """
        auto, few = self.observer == "auto", min(self.w_bit, self.a_bit) < 8
        found = MENDED if auto and few else LEFT
        chosen = {key: found[key] if getattr(self, key) is None else getattr(self, key) for key in found}
        if self.rotate is None and not rotates:
            chosen["rotate"] = False
        if self.hadamard is None and not (mixes and self.a_bit < 8):
            chosen["hadamard"] = False
        if auto:
            fine = "heads" if chosen["rotate"] or self.a_bit >= 8 else "repq"
            chosen["observer"] = fine if few else "mse"
        return replace(self, **chosen)

    def fed(self, images: SparseImages, grid: PatchGrid) -> SparseImages:
        """What of these images, on the CPU, the model is calibrated on."""
        if self.join:
            images = images.put_together(grid)
        elif self.fill:
            images = images.filled(grid)
        return augmented(images, grid, self.augment or (), torch.Generator().manual_seed(self.seed))

    @property
    def method(self) -> str:
        """The observer that is used: what `auto` stands for at these widths."""
        return self.resolved().observer

    def widths(self, names: list[str], blocks: int) -> dict[str, tuple[int, int]]:
        """Bits of the weight and of the input, by name of the layer or tap. Raises `UserError` as `kept` does."""
        narrow, wide = (self.w_bit, self.a_bit), (max(self.w_bit, KEPT_BITS), max(self.a_bit, KEPT_BITS))
        wide_names = kept(self.keep, names, blocks)
        found = {name: wide if name in wide_names else narrow for name in names}
        if OBSERVERS[self.method].wide_input:
            w_bit, a_bit = found[PARTS["first"]]
            found[PARTS["first"]] = w_bit, max(a_bit, KEPT_BITS)
        return found


def kept(keep: tuple[str, ...], names: list[str], blocks: int) -> set[str]:
    """The names that `--keep` means.

    Args:
        keep: `first` (the patch projection), `last` (the last block), `head` (the classifier), or any part of a name,
            such as `blocks.0.` or `fc2`.
        names: of everything that is quantized.
        blocks: how many blocks the model has.

    Raises:
        UserError: a part that is in no name.
    """
    found = set()
    for part in keep:
        text = {**PARTS, "last": f"blocks.{blocks - 1}."}.get(part, part)
        matching = {name for name in names if text in name}
        if not text or not matching:
            raise UserError(f"--keep {part}: no layer is called so; layers are {names[0]}, {names[1]}, .., {names[-1]}")
        found |= matching
    return found
