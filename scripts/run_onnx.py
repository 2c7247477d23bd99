#!/usr/bin/env python3
"""Classify images with a file that `test_quant.py --export` wrote: needs onnxruntime, numpy and Pillow alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings

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


class Refused(Exception):
    """Why an image is not read."""


def colour(text: str) -> tuple[int, ...]:
    """argparse type: R,G,B, each 0 to 255."""
    parts = tuple(int(part) for part in text.split(","))
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not R,G,B with numbers from 0 to 255")
    return parts


def read_image(path: str, background: tuple[int, ...] = WHITE) -> tuple[Image.Image, bool]:
    """The first picture in a file as 8-bit RGB, upright, and whether anything of it was transparent.

    Raises `Refused` with the reason, and what Pillow raises on damaged files.
    """
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        if reason := refusal(image):
            raise Refused(f"the image {path} {reason}")
        decoded = upright(decode(image), image)
    if decoded.mode == "RGB":
        return decoded, False
    if decoded.getchannel("A").getextrema()[0] == 255:
        return decoded.convert("RGB"), False
    canvas = Image.new("RGB", decoded.size, background)
    canvas.paste(decoded, mask=decoded)
    return canvas, True


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
    """RGB image -> (C, H, W) float32, resized, cropped and normalized as `how` says, as timm's evaluation transform."""
    _, height, width = how["input_size"]
    resample = Image.Resampling[how["interpolation"].upper()]
    scaled = int(height / how["crop_pct"]), int(width / how["crop_pct"])
    if how["crop_mode"] == "squash":
        size = scaled[::-1]
    else:  # the shorter side, the crop is square
        short = min(image.size)
        size = tuple(scaled[0] if side == short else int(scaled[0] * side / short) for side in image.size)
    image = image.resize(size, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    return ((pixels - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)


def open_model(file: str) -> tuple[onnxruntime.InferenceSession, dict, list[str]]:
    """The file, ready to run, its preprocessing and the names of its classes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Without VNNI, x86 CPUs sum products of uint8 and int8 in 16 bits, which overflow.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    return session, json.loads(about["preprocessing"]), json.loads(about["classes"])


def main(argv: list[str] | None = None) -> list[str]:
    """Print a line per image: its most likely classes with their probability. Returns the names of the first."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    except Exception as error:  # the runtime raises many kinds
        return _fail(f"{args.file} is no file that --export wrote: {str(error).strip().splitlines()[0][:160]}")
    found, transparent = [], []
    for path in args.images:
        try:
            image, has_holes = read_image(path, args.background)
        except Refused as error:
            return _fail(str(error))
        except Exception as error:  # Pillow raises many kinds
            return _fail(f"cannot read the image {path} ({type(error).__name__}); repair or remove it")
        transparent += [path] * has_holes
        pixels = preprocess(image, how)
        logits = session.run(None, {session.get_inputs()[0].name: pixels[None]})[0][0].astype(np.float64)
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-shares)[: max(args.top, 1)]
        print(f"{path}: " + ", ".join(f"{classes[index]} {100 * shares[index]:.1f}%" for index in best))
        found.append(classes[best[0]])
    if transparent:
        text = f"{len(transparent)} of the images have transparency, first {transparent[0]}"
        print(f"note: {text}; they are laid on --background {','.join(map(str, args.background))}", file=sys.stderr)
    return found


def _fail(message: str) -> list[str]:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
