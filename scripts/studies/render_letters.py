#!/usr/bin/env python3
"""Render letters in the fonts of matplotlib: an image folder to pretrain a student's backbone on, without a download.

    python scripts/render_letters.py --output runs/letters
    python scripts/train_teacher.py --init scratch --dataset runs/letters --epochs 60 --batch_size 64 \
        --label_smoothing 0 --dtype float32 --no-flip --patch_drop 0.8 --noise 0.5 --output runs/letters_backbone
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.realpath(f"{__file__}/../../.."))

from utils.errors import exit_on_interrupt, run_main

exit_on_interrupt(__name__)

import string

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from utils.cli import Parser, any_seed, positive
from utils.errors import UserError
from utils.files import writable_folder

SIZE = 32
LETTERS = string.ascii_uppercase + "abdefghijkmnpqrty"  # the capitals and most of the small ones that differ
_DEJAVU = "Sans Sans-Bold Sans-Oblique Serif Serif-Bold Serif-Italic SansMono"
_OTHERS = "STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmss10 cmtt10 cmb10"
FONTS = [
    f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf"
    for name in [*(f"DejaVu{style}" for style in _DEJAVU.split()), *_OTHERS.split()]
]


def render(letter: str, random: np.random.Generator) -> Image.Image:
    """A light letter on a dark ground in random tints, size, place, slant, weight and blur: RGB, 32x32."""
    ground, ink = random.integers(0, 60) + random.integers(0, 20, 3), 255 - random.integers(0, 80, 3)
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), tuple(ground.tolist()))
    size, choice = float(random.uniform(44, 60)), int(random.integers(0, len(FONTS) + 2))
    pillows = choice >= len(FONTS)
    font = ImageFont.load_default(size=size) if pillows else ImageFont.truetype(FONTS[choice], size)
    place = tuple((SIZE + random.uniform(-4, 4, 2)).tolist())
    weight = int(random.integers(0, 3))
    ImageDraw.Draw(image).text(place, letter, tuple(ink.tolist()), font, anchor="mm", stroke_width=weight)
    shear, angle = random.uniform(-0.2, 0.2), random.uniform(-10, 10)
    fill = {"resample": Image.Resampling.BILINEAR, "fillcolor": tuple(ground.tolist())}
    image = image.transform(image.size, Image.Transform.AFFINE, (1, shear, -shear * SIZE, 0, 1, 0), **fill)
    image = image.rotate(angle, **fill).filter(ImageFilter.GaussianBlur(random.uniform(0, 1.5)))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def main(argv: list[str] | None = None) -> None:
    """Write `train/` and `test/`, a folder per letter."""
    parser = Parser(__doc__)
    parser.add_argument("--train", type=positive, default=160, help="training images per letter")
    parser.add_argument("--test", type=positive, default=12, help="test images per letter")
    parser.add_argument("--seed", type=any_seed, default=0, help="seed of everything random")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder for the images")
    args = parser.parse_args(argv)
    output = writable_folder(args.output, "--output")
    if any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; give a new folder")
    random = np.random.default_rng(args.seed)
    for split, count in (("train", args.train), ("test", args.test)):
        for letter in LETTERS:
            # A and a are one folder to some file systems.
            folder = output / split / (f"{letter}_" if letter.islower() else letter)
            folder.mkdir(parents=True)
            for number in range(count):
                render(letter, random).save(folder / f"{number:04d}.png")
    print(f"{len(LETTERS) * args.train} training and {len(LETTERS) * args.test} test images: {output}")


if __name__ == "__main__":
    run_main(main)
