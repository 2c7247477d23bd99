"""Image files of every kind that cameras, scanners and programs write, with the pixels that they stand for."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

GREY = np.array([[0, 1, 40, 99], [128, 200, 254, 255]], dtype=np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
ALPHA = np.array([[255, 255, 255, 255], [0, 0, 255, 0]], dtype=np.uint8)
BACKGROUND = (10, 130, 250)


@dataclass(frozen=True)
class Odd:
    """A file and what it looks like on `BACKGROUND`, within `tolerance` where a format or a rounding loses some."""

    name: str
    data: bytes
    pixels: np.ndarray
    transparent: bool = False
    tolerance: int = 0


def png(depth: int, kind: int, rows: Sequence[bytes], width: int, height: int | None = None, **chunks: bytes) -> bytes:
    """A PNG: bits a sample, colour type, packed rows, and chunks before the pixels by their names."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height or len(rows), depth, kind, 0, 0, 0))
    before = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + before + pixels + chunk(b"IEND", b"")


def tiff(
    data: bytes, width: int, height: int, bits: int, photometric: int = 1, form: int = 1, extra: int | None = None
) -> bytes:
    """A grey TIFF in Intel's order, not compressed; `form`: 1 unsigned, 2 signed, 3 float; `extra`: kind of alpha."""
    samples = 1 if extra is None else 2
    tags = {256: width, 257: height, 258: (bits,) * samples, 259: 1, 262: photometric, 273: 0, 277: samples}
    tags |= {278: height, 279: len(data), 339: (form,) * samples} | ({} if extra is None else {338: extra})
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    out = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        long = tag in (273, 279)
        out += struct.pack("<HHI", tag, 4 if long else 3, len(values))
        out += struct.pack("<I", value) if long else struct.pack("<2H", *values, *(0,) * (2 - len(values)))
    return out + struct.pack("<I", 0) + data


def saved(image: Image.Image, form: str, **how: object) -> bytes:
    """What Pillow writes."""
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(values[..., None], 3, axis=2)


def laid(name: str, data: bytes, pixels: np.ndarray, alpha: np.ndarray, tolerance: int = 0) -> Odd:
    """A file with colours (H, W, 3) or (H, W), transparent where alpha (H, W) is not 255."""
    colours, share = pixels if pixels.ndim == 3 else grey(pixels), alpha[..., None] / 255
    seen = np.rint(colours * share + np.array(BACKGROUND) * (1 - share)).astype(np.uint8)
    return Odd(name, data, seen, True, tolerance)


def hole(name: str, data: bytes, pixels: np.ndarray, number: int) -> Odd:
    """A file of which one pixel is transparent, by its number."""
    alpha = np.full(pixels.shape[:2], 255, np.uint8)
    alpha.reshape(-1)[number] = 0
    return laid(name, data, pixels, alpha)


def with_alpha(pixels: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """An image with an alpha channel; what is hidden is pink."""
    image = Image.fromarray(np.where(alpha[..., None] == 0, (255, 0, 255), pixels).astype(np.uint8))
    image.putalpha(Image.fromarray(alpha))
    return image


def palette(alphas: bytes | int | None = None, form: str = "PNG") -> bytes:
    """Colours 0 .. 7 of a palette, some of them transparent."""
    image = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(2, 4), "P")
    image.putpalette(RGB.reshape(-1).tolist())
    return saved(image, form, **({} if alphas is None else {"transparency": alphas}))


def deep(form: Callable[[np.ndarray], bytes], most: int = 65535) -> bytes:
    """`GREY`, stretched to 0 .. `most`, as `form` writes it."""
    return form(np.rint(GREY.astype(np.float64) * most / 255).astype(np.uint16))


def packed(values: Sequence[int], bits: int) -> bytes:
    """Numbers of so many bits each."""
    text = "".join(f"{value:0{bits}b}" for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def doubled(values: np.ndarray) -> bytes:
    """8-bit values with 16 bits each, big end first."""
    return (values * np.uint16(257)).astype(">u2").tobytes()


def deep_png(values: np.ndarray, **chunks: bytes) -> bytes:
    """16 bits a sample, big end first."""
    return png(16, 0, [row.astype(">u2").tobytes() for row in values], 4, **chunks)


def colours_png(depth: int, hidden: Sequence[int]) -> bytes:
    """`RGB`, with a colour that stands for nothing; 16-bit values end in 7."""
    scaled = (RGB.astype(int) * 256 + 7).astype(">u2") if depth == 16 else RGB
    return png(depth, 2, [row.tobytes() for row in scaled], 4, tRNS=struct.pack(">3H", *hidden))


def frames(form: str) -> bytes:
    """Two pictures in a file, the first of them `RGB`."""
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    if form == "GIF":
        first, second = first.quantize(8), second.quantize(8)
    lossless = {"lossless": True} if form == "WEBP" else {}
    return saved(first, form, save_all=True, append_images=[second], **lossless)


def large(picture: np.ndarray) -> np.ndarray:
    """Every pixel 16 x 16 times."""
    return picture.repeat(16, axis=0).repeat(16, axis=1)


FOUR = np.array([[0, 85, 170, 255]], dtype=np.uint8)
SIXTEEN = np.arange(0, 256, 17, dtype=np.uint8)[None]
NONE, ALL = np.zeros((2, 4), np.uint8), np.full((2, 4), 255, np.uint8)
SOFT = np.array([[255, 128, 64, 0], [255, 10, 200, 255]], dtype=np.uint8)
PREMULTIPLIED = np.stack([np.array([[64, 30, 0, 255]], np.uint8), np.array([[128, 255, 0, 255]], np.uint8)], axis=2)
PICTURE, BITS = Image.fromarray(RGB), Image.fromarray(GREY > 100)
INKS = np.concatenate([RGB, GREY[..., None] // 2], axis=2)
PRINT, PRINTED = Image.fromarray(INKS, "CMYK"), np.rint((255 - INKS[..., :3]) * (1 - INKS[..., 3:] / 255.0))
BLACK_AND_WHITE = grey(np.where(GREY > 100, 255, 0).astype(np.uint8))
LAB = Image.merge("LAB", [BITS.convert("L"), *[Image.new("L", (4, 2), 128)] * 2])
LARGE_PRINT = Image.fromarray(large(INKS), "CMYK")

ODD = [
    Odd("1-bit.png", saved(BITS, "PNG"), BLACK_AND_WHITE),
    Odd("1-bit.tif", saved(BITS, "TIFF"), BLACK_AND_WHITE),
    Odd("2-bit.png", png(2, 0, [packed(range(4), 2)], 4), grey(FOUR)),
    Odd("4-bit.png", png(4, 0, [packed(range(16), 4)], 16), grey(SIXTEEN)),
    Odd("grey.png", saved(Image.fromarray(GREY), "PNG"), grey(GREY)),
    Odd("grey-white-is-zero.tif", tiff(GREY.tobytes(), 4, 2, 8, photometric=0), grey(255 - GREY)),
    Odd("16-bit.png", deep(deep_png), grey(GREY)),
    Odd("16-bit.tif", deep(lambda values: tiff(values.tobytes(), 4, 2, 16)), grey(GREY)),
    Odd("16-bit-white-is-zero.tif", deep(lambda v: tiff(v.tobytes(), 4, 2, 16, photometric=0)), grey(255 - GREY)),
    Odd("16-bit-big-end.tif", deep(lambda v: saved(Image.fromarray(v.astype(">u2")), "TIFF")), grey(GREY)),
    Odd("16-bit.jp2", deep(lambda v: saved(Image.fromarray(v), "JPEG2000", irreversible=False)), grey(GREY)),
    Odd("12-bit.tif", deep(lambda v: tiff(b"".join(packed(row, 12) for row in v), 4, 2, 12), 4095), grey(GREY)),
    Odd("16-bit.pgm", deep(lambda v: b"P5 4 2 65535\n" + v.astype(">u2").tobytes()), grey(GREY)),
    Odd("10-bit.pgm", deep(lambda v: b"P5 4 2 1023\n" + v.astype(">u2").tobytes(), 1023), grey(GREY)),
    Odd("text-of-16-bit.pgm", deep(lambda v: b"P2 4 2 65535 " + " ".join(map(str, v.ravel())).encode()), grey(GREY)),
    Odd("16-bit.ppm", b"P6 4 2 65535\n" + doubled(RGB), RGB),
    Odd("16-bit-colour.png", png(16, 2, [doubled(row) for row in RGB], 4), RGB),
    Odd("palette.png", palette(), RGB),
    Odd("palette-nothing-hidden.png", palette(ALL.tobytes()), RGB),
    laid("palette-hidden.png", palette(ALPHA.tobytes()), RGB, ALPHA),
    laid("palette-soft.png", palette(SOFT.tobytes()), RGB, SOFT, 1),
    hole("palette-hidden.gif", palette(3, "GIF"), RGB, 3),
    laid("palette-alpha.tif", saved(with_alpha(RGB, ALPHA).convert("PA"), "TIFF"), RGB, ALPHA),
    laid("alpha.png", saved(with_alpha(RGB, ALPHA), "PNG"), RGB, ALPHA),
    laid("alpha-soft.png", saved(with_alpha(RGB, SOFT), "PNG"), RGB, SOFT, 1),
    laid("alpha.webp", saved(with_alpha(RGB, ALPHA), "WEBP", lossless=True), RGB, ALPHA),
    laid("all-hidden.png", saved(with_alpha(RGB, NONE), "PNG"), RGB, NONE),
    laid("grey-alpha.png", saved(with_alpha(grey(GREY), ALPHA).convert("LA"), "PNG"), GREY, ALPHA),
    laid("16-bit-alpha.png", png(16, 6, [doubled(row) for row in np.dstack([RGB, ALPHA])], 4), RGB, ALPHA),
    laid(
        "grey-alpha-premultiplied.tif",
        tiff(PREMULTIPLIED.tobytes(), 4, 1, 8, extra=1),
        np.array([[128, 30, 0, 255]]),
        PREMULTIPLIED[..., 1],
        1,
    ),
    Odd("alpha-opaque.png", saved(with_alpha(RGB, ALL), "PNG"), RGB),
    Odd("grey-alpha-opaque.png", saved(with_alpha(grey(GREY), ALL).convert("LA"), "PNG"), grey(GREY)),
    hole("1-bit-hidden.png", png(1, 0, [packed([1, 0, 1], 1)], 3, tRNS=b"\0\0"), 255 * np.array([[1, 0, 1]]), 1),
    hole("2-bit-hidden.png", png(2, 0, [packed(range(4), 2)], 4, tRNS=b"\0\2"), FOUR, 2),
    hole("4-bit-hidden.png", png(4, 0, [packed(range(16), 4)], 16, tRNS=b"\0\5"), SIXTEEN, 5),
    hole("grey-hidden.png", png(8, 0, [row.tobytes() for row in GREY], 4, tRNS=b"\0\x63"), GREY, 3),
    hole("16-bit-hidden.png", deep(lambda v: deep_png(v, tRNS=struct.pack(">H", 99 * 257))), GREY, 3),
    hole("colour-hidden.png", colours_png(8, RGB[0, 3].tolist()), RGB, 3),
    hole("16-bit-colour-hidden.png", colours_png(16, [256 * value + 7 for value in RGB[0, 3].tolist()]), RGB, 3),
    Odd("hidden-colour-not-there.png", colours_png(8, [1, 2, 3]), RGB),
    Odd("cmyk.tif", saved(PRINT, "TIFF"), PRINTED, tolerance=1),
    Odd(
        "cmyk-of-adobe.jpg", saved(Image.fromarray(large(INKS), "CMYK"), "JPEG", quality=100), large(PRINTED), False, 3
    ),
    Odd("ycbcr.tif", saved(PICTURE.convert("YCbCr"), "TIFF"), RGB, tolerance=3),
    Odd("lab.tif", saved(LAB, "TIFF"), BLACK_AND_WHITE, tolerance=1),
    Odd("two.tif", frames("TIFF"), RGB),
    Odd("two.gif", frames("GIF"), RGB),
    Odd("two.png", frames("PNG"), RGB),
    Odd("two.webp", frames("WEBP"), RGB),
    Odd("really-png.jpg", saved(PICTURE, "PNG"), RGB),
    Odd("LOUD.BMP", saved(PICTURE, "BMP"), RGB),
    Odd("long.png", saved(PICTURE.resize((300, 3), 0), "PNG"), np.asarray(PICTURE.resize((300, 3), 0))),
]

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
REFUSED = {
    "float.tif": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "mode F"),
    "float.pfm": (b"Pf\n4 2\n-1.0\n" + GREY.astype("<f4").tobytes(), "mode F"),
    "32-bit.tif": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "mode I"),
    "16-bit-signed.tif": (tiff(GREY.astype("<i2").tobytes(), 4, 2, 16, form=2), "mode I"),
    "8-bit-signed.tif": (tiff(GREY.tobytes(), 4, 2, 8, form=2), "mode L"),
    "half-float.tif": (tiff(GREY.astype("<f2").tobytes(), 4, 2, 16, form=3), "cannot read"),
    "cut.jpg": (saved(NOISE, "JPEG")[:-400], "cannot read"),
    "cut.png": (saved(NOISE, "PNG")[:-400], "cannot read"),
    "cut.gif": (saved(NOISE.convert("P"), "GIF")[:-400], "cannot read"),
    "cut.webp": (saved(NOISE, "WEBP")[:-400], "cannot read"),
    "cut.tif": (saved(NOISE, "TIFF")[:-400], "cannot read"),
    "empty.png": (b"", "cannot read"),
    "page.png": (b"<html>404 not found</html>", "cannot read"),
    "wide.png": (saved(Image.new("L", (20_000, 1)), "PNG"), "20000 x 1 pixels"),
    "high.png": (saved(Image.new("L", (1, 20_000)), "PNG"), "1 x 20000 pixels"),
    "huge.png": (png(1, 0, [b"\0"], 2**16, 2**16), "65536 x 65536 pixels"),
}
