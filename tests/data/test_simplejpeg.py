"""Plain JPEGs by simplejpeg: the pixels, sizes and causes that Pillow gives, or Pillow itself."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from engine.data import decode as decoding
from engine.data.decode import decode, decode_by
from engine.types import BadSample

pytest.importorskip("simplejpeg")
BOUND = 178_956_970


def photograph(width=96, height=72, mode="RGB"):
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert(mode)


def encoded(image=None, **options):
    out = io.BytesIO()
    (image or photograph()).save(out, "JPEG", **{"quality": 90, **options})
    return out.getvalue()


def oriented(value, image=None):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return encoded(image, exif=exif)


def fast(data, target=None):
    return decode_by("simplejpeg", data, max_pixels=BOUND, target=target)


def assert_as_pillow(data, target=None):
    """Decoded by simplejpeg, and what Pillow makes of it."""
    found, pillow = fast(data, target), decode(data, max_pixels=BOUND, target=target)
    assert isinstance(found, torch.Tensor)
    assert found.permute(1, 2, 0).is_contiguous()
    difference = found.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_pixels_are_pillows(mode, subsampling, progressive):
    options = {} if mode == "L" else {"subsampling": subsampling}
    assert_as_pillow(encoded(photograph(mode=mode), progressive=progressive, **options))
    assert_as_pillow(encoded(photograph(1, 1, mode), progressive=progressive, **options))
    assert_as_pillow(encoded(photograph(97, 61, mode), progressive=progressive, **options))


def test_rgb_without_conversion():
    assert_as_pillow(encoded(keep_rgb=True))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("target", [None, (30, 40), (40, 30), (9, 12), (8, 1)])
def test_orientation_and_scale_are_pillows(orientation, target):
    assert_as_pillow(oriented(orientation), target)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_impossible_orientation_is_ignored(orientation):
    assert_as_pillow(oriented(orientation))


def test_damaged_exif_is_ignored():
    assert_as_pillow(encoded(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))


@pytest.mark.parametrize("size", [(640, 480), (641, 479), (333, 1000)])
def test_shrunk_sizes_are_pillows(size):
    data = encoded(photograph(*size))
    for target in [(480, 480), (241, 241), (240, 240), (100, 100), (10, 10), (240, 321), (41, 1)]:
        expected = decode(data, max_pixels=BOUND, target=target).size
        assert tuple(fast(data, target).shape[1:]) == expected[::-1]


def segment(marker, body):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def test_bytes_between_and_after_the_segments():
    data = encoded()
    assert_as_pillow(data[:2] + b"\xff\xff\xff" + data[2:])  # filled before a marker
    assert_as_pillow(data[:2] + segment(0xFE, b"a comment \xff\xda\xff\xc0") + data[2:])
    assert_as_pillow(data + b"\0" * 50)


def test_what_has_two_orientations_or_other_colours_is_as_pillow_has_it():
    exif = b"Exif\0\0" + photograph_exif(6)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    data = encoded()
    for other in (
        encoded(photograph(mode="CMYK")),
        data[:2] + segment(0xE1, exif) + segment(0xE1, exif) + data[2:],
        data[:2] + segment(0xE1, xmp) + data[2:],
    ):
        assert outcome("simplejpeg", other) == outcome("pillow", other)
    assert isinstance(fast(encoded(photograph(mode="CMYK"))), Image.Image)
    assert isinstance(decode_by("pillow", data, max_pixels=BOUND), Image.Image)


def photograph_exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xD0, 0x01])
def test_odd_headers_are_as_pillow_has_them(marker):
    data = encoded()
    for odd in (
        data[:2] + bytes([0xFF, marker, 0, 2]) + data[2:],
        data.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),  # 12 bits
        data[:100],
        data[2:],
        b"",
    ):
        assert outcome("simplejpeg", odd) == outcome("pillow", odd)


def test_without_simplejpeg_pillow_does_it(monkeypatch):
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert isinstance(decode_by("auto", encoded(), max_pixels=BOUND), Image.Image)


# failures


def outcome(decoder, data):
    try:
        found = decode_by(decoder, data, max_pixels=10**6)
    except BadSample as bad:
        return bad.cause, bad.detail
    pixels = found.permute(1, 2, 0) if isinstance(found, torch.Tensor) else found
    return np.asarray(pixels).shape, np.asarray(pixels).astype(int).tobytes()


@pytest.mark.parametrize("progressive", [False, True])
def test_every_truncation_is_told_as_by_pillow(progressive):
    data = encoded(photograph(200, 150), progressive=progressive)
    for kept in {*range(3, len(data), len(data) // 40), *range(len(data) - 5, len(data))}:
        found = outcome("simplejpeg", data[:kept])
        assert found == outcome("pillow", data[:kept])
        assert found[0] == "truncated" or kept >= len(data) - 2


def test_damage_is_told_as_by_pillow():
    drawn, original = random.Random(0), encoded(photograph(64, 48))
    for _ in range(150):
        data = bytearray(original)
        for _ in range(drawn.randint(1, 6)):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        assert outcome("simplejpeg", bytes(data)) == outcome("pillow", bytes(data))


def test_a_bomb_is_refused_by_its_header():
    data = encoded(photograph(16, 16)).replace(b"\x08\0\x10\0\x10", b"\x08\xff\xff\xff\xff")
    with pytest.raises(BadSample, match=r"65535×65535 pixels, data\.max_image_pixels") as error:
        fast(data)
    assert error.value.cause == "too large"


def test_files_that_are_no_jpeg(tmp_path):
    for data, cause in ((b"", "empty file"), (b"<html>", "not an image"), (None, "missing")):
        path = tmp_path / "image.jpg"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(BadSample) as error:
            fast(path)
        assert error.value.cause == cause
