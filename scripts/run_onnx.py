#!/usr/bin/env python3
"""Classify images with a file that `test_quant.py --export` wrote: needs onnxruntime, numpy and Pillow alone."""

from __future__ import annotations

import os
import signal
import sys


def interrupt(*_: object) -> None:
    """Ctrl-C is one line and code 130, whatever is going on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(2, b"interrupted\n")
    try:
        sys.stdout.flush()
    finally:
        os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, interrupt)

import argparse
import contextlib
import json
import math
import mmap
import re
import warnings
from typing import NoReturn

try:
    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps
except ImportError as error:
    print(f"error: {error.name} is missing: pip install onnxruntime numpy pillow", file=sys.stderr)
    raise SystemExit(2) from None


# What follows, as far as `preprocess`, is `utils/image_files.py` for places where the rest of the repository is not.
WHITE = (255, 255, 255)
MOST_PIXELS = 2**28
MOST_STRETCHED = 100
SCALES = {"1": 255, "L;2": 85, "L;4": 17}
ORIENTATION = 274
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Refused(Exception):
    """Why an image or a model is not read."""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (--help lists the flags)")


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: `\\n` for a line's end, `\\x1b` for an escape, and so on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def colour(text: str) -> tuple[int, ...]:
    """argparse type: R,G,B, each 0 to 255."""
    with contextlib.suppress(ValueError):
        parts = tuple(int(part) for part in text.split(","))
        if len(parts) == 3 and all(0 <= part <= 255 for part in parts):
            return parts
    raise argparse.ArgumentTypeError(f"'{text}' is not R,G,B with numbers from 0 to 255")


def read_image(path: str, background: tuple[int, ...] = WHITE, mode: str = "RGB") -> tuple[Image.Image, bool]:
    """The first picture in a file in `mode`, upright, and whether anything was laid on `background`.

    Raises `Refused` with the reason, and what Pillow raises on damaged files.
    """
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        if reason := refusal(image):
            raise Refused(f"the image {path} {reason}")
        decoded = upright(decode(image), image)
    if mode == "RGBA":
        return decoded.convert(mode), False
    if decoded.mode == "RGB" or decoded.getchannel("A").getextrema()[0] == 255:
        return decoded.convert("RGB").convert(mode), False
    canvas = Image.new("RGB", decoded.size, background)
    canvas.paste(decoded, mask=decoded)
    return canvas.convert(mode), True


def refusal(image: Image.Image) -> str | None:
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


def decode(image: Image.Image) -> Image.Image:
    """It in RGB, or in RGBA where parts may be transparent."""
    if image.mode.startswith("I"):
        return eight_bits(image)
    hidden = image.info.get("transparency")
    if image.format == "PNG" and hidden is not None:
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


def eight_bits(image: Image.Image) -> Image.Image:
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
    if tags.get(262) == 0:
        grey = 255 - grey
    result = Image.fromarray(grey).convert("RGB")
    if alpha is not None:
        result.putalpha(alpha)
    return result


def upright(decoded: Image.Image, image: Image.Image) -> Image.Image:
    """The pixels of a file as its EXIF says that they are looked at."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # damaged EXIF tells nothing
        exif[ORIENTATION] = int(image.getexif().get(ORIENTATION, 1))
    decoded.info = {"exif": exif.tobytes()}
    return ImageOps.exif_transpose(decoded)


def preprocess(image: Image.Image, how: dict) -> np.ndarray:
    """Image in the model's mode -> (C, H, W) float32, resized, cropped and normalized as by timm's transform."""
    channels, height, width = how["input_size"]
    resample = Image.Resampling[how["interpolation"].upper()]
    scaled = int(height / how["crop_pct"]), int(width / how["crop_pct"])
    if how["crop_mode"] == "squash":
        size = scaled[::-1]
    elif scaled[0] == scaled[1]:  # the shorter side
        short = min(image.size)
        size = tuple(scaled[0] if side == short else int(scaled[0] * side / short) for side in image.size)
    else:  # the side that is the shorter one of this shape
        ratio = min(image.height / scaled[0], image.width / scaled[1])
        size = tuple(round(side / ratio) for side in image.size)
    image = image.resize(size, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    pixels = pixels.reshape(height, width, channels)
    return ((pixels - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)


def open_model(file: str) -> tuple[onnxruntime.InferenceSession, dict, list[str]]:
    """The file, ready to run, its preprocessing and the names of its classes.

    Raises `Refused` with the reason.
    """
    try:
        session = _session(file)
    except Exception as error:  # the runtime raises many kinds
        raise Refused(_why_not(file, str(error))) from None
    about = session.get_modelmeta().custom_metadata_map
    try:
        how, classes = json.loads(about["preprocessing"]), json.loads(about["classes"])
    except KeyError as error:
        raise Refused(f"{file} is no file that --export wrote: it has no {error.args[0]} in it") from None
    except (ValueError, RecursionError):
        raise Refused(f"{file} is damaged: what it says of preprocessing and classes is no JSON") from None
    if reason := misfit(session, how, classes):
        raise Refused(f"{file} is damaged: {reason}")
    return session, how, classes


def misfit(session: onnxruntime.InferenceSession, how: object, classes: object) -> str | None:
    """What in a file's metadata cannot be, or does not fit its graph; None where all does."""
    graph = [[list(value.shape or []) for value in values] for values in (session.get_inputs(), session.get_outputs())]
    if [[len(shape) for shape in shapes] for shapes in graph] != [[4], [2]]:
        return "its graph does not go from images to logits"
    (_, *size), (_, count) = graph[0][0], graph[1][0]
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return "its classes are no list of names"
    if len(classes) != count:
        return f"it names {len(classes)} classes, its graph has {count}"
    if not isinstance(how, dict) or how.get("input_size") != size:
        return f"it prepares images for another size than its graph's, {size}"
    if size[0] not in MODES or not all(isinstance(side, int) and side > 0 for side in size):
        return f"images of the size {size} are neither grey nor RGB nor RGBA"
    for name, lowest in (("mean", -1e6), ("std", 1e-6)):
        values = how.get(name)
        if not (isinstance(values, list) and len(values) == size[0] and all(_between(v, lowest, 1e6) for v in values)):
            return f"{name} {str(values)[:40]} cannot be"
    least = math.sqrt(size[1] * size[2] / MOST_PIXELS)
    if not _between(how.get("crop_pct"), least, min(size)):
        return f"crop_pct {str(how.get('crop_pct'))[:40]} cannot be"
    if how.get("crop_mode") not in ("squash", "center"):
        return f"crop_mode {str(how.get('crop_mode'))[:40]} is unknown"
    if str(how.get("interpolation")).upper() not in Image.Resampling.__members__:
        return f"interpolation {str(how.get('interpolation'))[:40]} is unknown"
    return None


def _between(value: object, lowest: float, highest: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= highest


def _why_not(file: str, error: str) -> str:
    """Why the runtime does not run a file, with which `error` it refused it."""
    try:
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            needed = re.search(rb"requires\x12.onnxruntime>=(\d{1,4})\.(\d{1,4})", data, re.DOTALL)
            wanted = tuple(int(part) for part in needed.groups()) if needed else ()
            ours = needed or b"sparse-model-inversion" in data[:200]
    except OSError as refused:
        return f"cannot read {file}: {refused.strerror}"
    except ValueError:
        return f"{file} is empty"
    line = error.strip().partition("\n")[0][:160]
    if not ours:
        return f"{file} is no file that --export wrote: {line}"
    if wanted > tuple(map(int, onnxruntime.__version__.split(".")[:2])):
        newer = ".".join(map(str, wanted))
        return f"{file} needs onnxruntime {newer} or newer, {onnxruntime.__version__} is installed; update it"
    return f"onnxruntime {onnxruntime.__version__} does not run {file}, which is damaged or for a newer one: {line}"


def _session(file: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Without VNNI, x86 CPUs sum products of uint8 and int8 in 16 bits, which overflow.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def probabilities(session: onnxruntime.InferenceSession, pixels: np.ndarray, count: int) -> np.ndarray:
    """What the model makes of an image (C, H, W): numbers for `count` classes. Raises `Refused` where it makes none."""
    try:
        logits = session.run(None, {session.get_inputs()[0].name: pixels[None]})[0][0].astype(np.float64)
    except Exception as error:  # the runtime raises many kinds
        raise Refused(f"the model does not run: {str(error).strip().partition(chr(10))[0][:160]}") from None
    if logits.shape != (count,) or not np.isfinite(logits).all():
        raise Refused(f"the model is damaged: what it gives are not {count} finite numbers")
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def main(argv: list[str] | None = None) -> list[str]:
    """Print a line per image: its most likely classes with their probability. Returns the names of the first."""
    parser = Parser(description=__doc__)
    parser.add_argument("file", metavar="FILE.onnx", help="what --export wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes to name for each image; default 3")
    about = "what is behind transparency, 0 to 255 each; default white"
    parser.add_argument("--background", type=colour, default=WHITE, metavar="R,G,B", help=about)
    parser.error = lambda message: _fail(f"{message} (--help lists the flags)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="PIL")  # of files that are then read or refused
    try:
        session, how, classes = open_model(args.file)
    except Refused as error:
        _fail(str(error))
    found, transparent = [], []
    for path in args.images:
        try:
            image, has_holes = read_image(path, args.background, MODES[how["input_size"][0]])
            shares = probabilities(session, preprocess(image, how), len(classes))
        except Refused as error:
            _fail(str(error))
        except Exception as error:  # Pillow raises many kinds
            _fail(f"cannot read the image {path} ({type(error).__name__}); repair or remove it")
        transparent += [path] * has_holes
        best = np.argsort(-shares)[: max(args.top, 1)]
        named = ", ".join(f"{classes[index]} {100 * shares[index]:.1f}%" for index in best)
        print(printable(f"{path}: {named}"), flush=True)
        found.append(classes[best[0]])
    if transparent:
        text = f"{len(transparent)} of the images have transparency, first {transparent[0]}"
        laid = f"they are laid on --background {','.join(map(str, args.background))}"
        print(printable(f"note: {text}; {laid}"), file=sys.stderr)
    return found


def _fail(message: str) -> NoReturn:
    print(printable(f"error: {message}"), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding has not
    main()
