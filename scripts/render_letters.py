#!/usr/bin/env python3
"""Render letters with Pillow's own font: an image folder to pretrain a student's backbone on, without a download.

    python scripts/render_letters.py --output runs/letters
    python scripts/train_teacher.py --init scratch --dataset runs/letters --epochs 25 --batch_size 32 \
        --dtype float32 --no-flip --output runs/letters_backbone
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from utils.cli import Parser, natural, positive
from utils.errors import UserError, run_main
from utils.files import writable_folder

SIZE = 32


def render(letter: str, random: np.random.Generator) -> Image.Image:
    """A light letter on a dark ground in random tints, size, place, slant, weight and blur: RGB, 32x32."""
    ground, ink = random.integers(0, 60) + random.integers(0, 20, 3), 255 - random.integers(0, 80, 3)
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), tuple(ground.tolist()))
    font = ImageFont.load_default(size=float(random.uniform(44, 60)))
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
    parser.add_argument("--train", type=positive, default=200, help="training images per letter")
    parser.add_argument("--test", type=positive, default=20, help="test images per letter")
    parser.add_argument("--seed", type=natural, default=0, help="seed of everything random")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder for the images")
    args = parser.parse_args(argv)
    output = writable_folder(args.output, "--output")
    if any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; give a new folder")
    random = np.random.default_rng(args.seed)
    for split, count in (("train", args.train), ("test", args.test)):
        for letter in string.ascii_uppercase:
            folder = output / split / letter
            folder.mkdir(parents=True)
            for number in range(count):
                render(letter, random).save(folder / f"{number:04d}.png")
    print(f"{26 * args.train} training and {26 * args.test} test images: {output}")


if __name__ == "__main__":
    run_main(main)
