#!/usr/bin/env python3
"""Classify images with a file that `test_quant.py --export` wrote: needs onnxruntime, numpy and Pillow alone."""

from __future__ import annotations

import argparse
import json
import sys

try:
    import numpy as np
    import onnxruntime
    from PIL import Image
except ImportError as error:
    print(f"error: {error.name} is missing: pip install onnxruntime numpy pillow", file=sys.stderr)
    raise SystemExit(2) from None


def preprocess(image: Image.Image, how: dict) -> np.ndarray:
    """An image -> (C, H, W) float32, resized, cropped and normalized as `how` says; as timm's evaluation transform."""
    _, height, width = how["input_size"]
    resample = Image.Resampling[how["interpolation"].upper()]
    scaled = int(height / how["crop_pct"]), int(width / how["crop_pct"])
    image = image.convert("RGB")
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
    args = parser.parse_args(argv)
    try:
        session, how, classes = open_model(args.file)
    except Exception as error:  # the runtime raises many kinds
        return _fail(f"{args.file} is no file that --export wrote: {str(error).strip().splitlines()[0][:160]}")
    found = []
    for path in args.images:
        try:
            with Image.open(path) as image:
                pixels = preprocess(image, how)
        except Exception as error:  # Pillow raises many kinds
            return _fail(f"cannot read the image {path}: {type(error).__name__}")
        logits = session.run(None, {session.get_inputs()[0].name: pixels[None]})[0][0].astype(np.float64)
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-shares)[: max(args.top, 1)]
        print(f"{path}: " + ", ".join(f"{classes[index]} {100 * shares[index]:.1f}%" for index in best))
        found.append(classes[best[0]])
    return found


def _fail(message: str) -> list[str]:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
