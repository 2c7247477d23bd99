"""Image files: which files of a folder are some, and the one function that reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.config import Colour
from utils.errors import UserError

ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".avif")
LEFT_BEHIND = {
    *("__macosx", "__pycache__", "lost+found", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
"""What archivers, network drives and systems leave in folders besides names that begin with a dot; lower case."""

WHITE: Colour = (255, 255, 255)
MOST_PIXELS = 2**28
MOST_STRETCHED = 100
"""How many times longer than the other a side may be: resizing by the shorter side makes the longer one long."""
SCALES = {"1": 255, "L;2": 85, "L;4": 17}
"""What a step of grey is in 8 bits, by Pillow's name of the PNG's layout."""


def listing(names: Sequence[str], most: int = 3) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def subfolders(root: Path) -> list[str]:
    """The names of the folders in a folder in text order, without what tools leave behind."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _left_behind(entry.name))


def image_paths(root: Path) -> list[str]:
    """All image files in a folder, at any depth, in the order of their paths, without what tools leave behind.

    Links to folders are followed, each folder is read once. Raises `UserError` where a folder cannot be read.
    """
    found, seen = [], set()
    for folder, inside, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not _left_behind(name))
        images = (name for name in files if name.lower().endswith(ENDINGS) and not _left_behind(name))
        found += [os.path.join(folder, name) for name in images]
    return sorted(found, key=lambda path: path.split(os.sep))


def read_image(path: str | Path, background: Colour = WHITE, mode: str = "RGB") -> tuple[Image.Image, bool]:
    """The first picture in an image file with 8 bits a channel, and whether anything was laid on `background`.

    Grey values of more than 8 bits are scaled by their own range. An orientation in EXIF is left alone, as timm and
    torchvision do. `scripts/run_onnx.py` has this function as well.

    Args:
        path: the file.
        background: what is behind transparency; nothing in RGBA, which keeps it.
        mode: `L` (grey), `RGB` or `RGBA`.

    Raises:
        UserError: a file that cannot be read, one of more than `MOST_PIXELS` or longer than `MOST_STRETCHED` times its
            other side, which is found out before anything is decoded, or pixels whose white is not known.
    """
    try:
        with _opened(path) as image:
            reason = _refusal(image)
            decoded = None if reason else _decoded(image)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"cannot read the image {path} ({type(error).__name__}); repair or remove it") from None
    if decoded is None:
        raise UserError(f"the image {path} {reason}")
    if mode == "RGBA":
        return decoded.convert(mode), False
    if decoded.mode == "RGB" or decoded.getchannel("A").getextrema()[0] == 255:
        return decoded.convert("RGB").convert(mode), False
    canvas = Image.new("RGB", decoded.size, background)
    canvas.paste(decoded, mask=decoded)
    return canvas.convert(mode), True


def _opened(path: str | Path) -> Image.Image:
    """The file without Pillow's own limit, which warns of sound pictures and calls larger ones damaged."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _refusal(image: Image.Image) -> str | None:
    """Why it is not decoded, None where it is."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        return f"is {width} x {height} pixels, more than {MOST_PIXELS}; make it smaller"
    if max(width, height) > MOST_STRETCHED * min(width, height):
        return f"is {width} x {height} pixels, one side more than {MOST_STRETCHED} times the other; crop it"
    signed = 2 in getattr(image, "tag_v2", {}).get(339, ())
    if signed or image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        return f"has pixels of mode {image.mode}, in which no value is known to be white; save it with 8 or 16 bits"
    return None


def _decoded(image: Image.Image) -> Image.Image:
    """It in RGB, or in RGBA where parts may be transparent."""
    if image.mode.startswith("I"):  # a PGM of more than 8 bits is "I", scaled to 16 bits
        return _eight_bits(image)
    hidden = image.info.get("transparency")
    if image.format == "PNG" and hidden is not None:  # in units of the file, the pixels are in those of 8 bits
        rawmode = image.tile[0][3]
        if rawmode in SCALES:
            image.info["transparency"] = min(255, hidden * SCALES[rawmode])
        elif rawmode == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in hidden)
    if image.mode == "La":
        image = image.convert("LA")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits, or 12 in a TIFF, scaled to 8."""
    tags = getattr(image, "tag_v2", {})
    most = 2 ** tags.get(258, (16,))[0] - 1
    values = np.asarray(image).astype(np.uint32)
    hidden = image.info.get("transparency")
    alpha = None if hidden is None else Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
    values *= 255
    values += most // 2
    values //= most
    grey = values.astype(np.uint8)
    if tags.get(262) == 0:  # white is 0, which Pillow turns round in images of 8 bits alone
        grey = 255 - grey
    result = Image.fromarray(grey).convert("RGB")
    if alpha is not None:
        result.putalpha(alpha)
    return result


def _left_behind(name: str) -> bool:
    return name.startswith(".") or name.casefold() in LEFT_BEHIND


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")
