"""Encoded image → RGB, checked from its header on, every failure named by its cause.

Plain JPEGs are decoded by libjpeg-turbo through simplejpeg where that is installed (extra
``fast``): it gives the very pixels that Pillow does, in two thirds of the time and without a copy.
Whatever it has a warning about is left to Pillow, which then reports what is wrong with it.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from engine.data.image_files import read_bytes
from engine.types import BadSample

if TYPE_CHECKING:  # exported models are run where there is no torch
    from torch import Tensor

try:
    import simplejpeg
except ImportError:  # Pillow does it all, a little slower
    simplejpeg = None

Size = tuple[int, int]

# Formats of photographs only: among Pillow's other readers are some that start an outside program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
for _reader in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "WebP", "Tiff", "Avif", "Jpeg2K"):
    with suppress(ImportError):  # before workers are forked, so that none has to
        importlib.import_module(f"PIL.{_reader}ImagePlugin")
_KNOWN = [name for name in _FORMATS if name in Image.OPEN]
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation


def decode_by(
    decoder: str, image: bytes | Path, *, max_pixels: int, target: Size | None = None
) -> Image.Image | Tensor:
    """``decode``, by the decoder that ``data.decoder`` names, to the same pixels.

    ``simplejpeg`` gives plain JPEGs as uint8 CHW in memory of HWC order, ``auto`` where simplejpeg
    is installed; all else comes from Pillow. Raises BadSample.
    """
    data = read_bytes(image)
    if decoder == "simplejpeg" or (decoder == "auto" and simplejpeg is not None):
        pixels_CHW = _by_simplejpeg(data, max_pixels, target)
        if pixels_CHW is not None:
            return pixels_CHW
    return decode(data, max_pixels=max_pixels, target=target)


def decode(image: bytes | Path, *, max_pixels: int, target: Size | None = None) -> Image.Image:
    """An upright RGB image from a file or its bytes; of an animation, the first frame.

    A JPEG of at least twice ``target`` (height, width) is decoded at the half, quarter or eighth
    scale that still covers it. Transparency becomes white. Raises BadSample.
    """
    data = read_bytes(image)
    try:
        with _opened(data) as opened:
            return _load(opened, max_pixels, target)
    except BadSample:
        raise
    except MemoryError as error:
        raise BadSample("too large", "not enough memory to decode it") from error
    except Exception as error:  # Pillow's readers raise nearly any exception on damaged bytes
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # it names an object in memory
            detail = f"begins with {data[:16]!r}; formats read are {', '.join(_KNOWN)}"
        raise BadSample(_cause(data, error), detail) from error


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """An image of Pillow's without its own bound: ``_check_size`` comes before any pixels."""
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata: the pixels decide
            with Image.open(io.BytesIO(data), formats=_KNOWN) as opened:
                yield opened
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _by_simplejpeg(data: bytes, max_pixels: int, target: Size | None) -> Tensor | None:
    """A plain JPEG, shrunk as by Pillow's draft mode; None for all that is left to Pillow."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(height, width, max_pixels)
        orientation = 1
        header = _header(data)
        if b"Exif\0\0" in header or b"tiff:Orientation" in header:
            with _opened(data) as opened:
                orientation = _orientation(opened)
        least = {}
        if target is not None:
            down, across = target if orientation < 5 else target[::-1]
            most = min(height // down, width // across)
            if most >= 2:
                scale = 8 if most >= 8 else 4 if most >= 4 else 2
                height, width = -(-height // scale), -(-width // scale)
                least = {"min_height": height, "min_width": width, "min_factor": scale}
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", strict=True, **least)
    except (ValueError, RuntimeError, MemoryError, OSError, SyntaxError):
        return None
    if pixels_HWC.shape != (height, width, 3):
        return None
    if orientation != 1:
        pixels_HWC = np.array(Image.fromarray(pixels_HWC).transpose(_TURN[orientation]))
    import torch  # here alone, so that Pillow's side of decoding runs without it

    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _header(data: bytes) -> bytes:
    """A JPEG up to its first scan, where its orientation is: to search all takes long."""
    at = 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == b"\xda":
            return data[:at]
        fill = marker == b"\xff"  # any number of them may be before a marker
        at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        bound = f"data.max_image_pixels {max_pixels}"
        raise BadSample("too large", f"{width}×{height} pixels, {bound}")


def _load(image: Image.Image, max_pixels: int, target: Size | None) -> Image.Image:
    width, height = image.size
    _check_size(height, width, max_pixels)
    if target is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, target if _orientation(image) >= 5 else target[::-1])
    image.load()
    orientation = _orientation(image)  # of a PNG this would hide an error in its pixels before
    rgb = _to_rgb(image)
    return rgb if orientation == 1 else rgb.transpose(_TURN[orientation])


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF does not concern the pixels
        return 1
    return value if isinstance(value, int) and value in _TURN else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's → RGB, 8 bits a channel."""
    if image.mode == "RGB" and "transparency" not in image.info:
        # Other readers may need their file again, which is closed on return.
        return image if image.format == "JPEG" else image.copy()
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def _to_bytes(grey: np.ndarray) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floats in [0, 1] or [0, 255], scaled to 0 … 255."""
    if grey.dtype.kind == "f":
        values = np.nan_to_num(grey, posinf=0.0, neginf=0.0)
        scale = 255.0 if values.size == 0 or values.max() <= 1.0 else 1.0
    else:
        values = grey.astype(np.float64)
        wide = grey.dtype.itemsize > 2 and values.max(initial=0.0) > 65535
        scale = 255 / (2**31 - 1) if wide else 255 / 65535
    return np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)


def _cause(data: bytes, error: Exception) -> str:
    if "truncated" in str(error).lower() or isinstance(error, EOFError) or _cut_short(data):
        return "truncated"
    if isinstance(error, UnidentifiedImageError) and not data.startswith(_MAGIC):
        return "not an image"
    return "corrupt"


def _cut_short(data: bytes) -> bool:
    """Whether the end that the format prescribes is absent; some bytes may follow it."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    return data.startswith(b"GIF8") and b"\x3b" not in data[-64:]
