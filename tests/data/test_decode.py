"""Decoding: every mode becomes upright RGB, every failure has its cause."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from engine.data.decode import decode
from engine.types import BadSample

BOUND = 178_956_970
RED = (200, 30, 10)


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photograph(width=64, height=48):
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def cause(data, **options):
    with pytest.raises(BadSample) as error:
        decode(data, max_pixels=options.pop("max_pixels", BOUND), **options)
    assert error.value.detail
    return error.value.cause


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(format):
    image = decode(encoded(photograph(), format), max_pixels=BOUND)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert np.asarray(image).std() > 10


def test_bytes_and_path_agree(tmp_path):
    data = encoded(photograph(), "JPEG", quality=90)
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    from_path, from_bytes = decode(path, max_pixels=BOUND), decode(data, max_pixels=BOUND)
    assert from_path.tobytes() == from_bytes.tobytes()
    assert from_bytes.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_an_image_outlives_its_file(tmp_path):
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        image = decode(encoded(photograph(), format), max_pixels=BOUND)
        image.crop((0, 0, 5, 5)).load()
        assert np.asarray(image).shape == (48, 64, 3)


# modes


@pytest.mark.parametrize(
    ("mode", "colour", "format", "expected"),
    [
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("LA", (40, 255), "PNG", (40, 40, 40)),
        ("LA", (40, 0), "PNG", (255, 255, 255)),
        ("RGBA", (*RED, 255), "PNG", RED),
        ("RGBA", (*RED, 0), "PNG", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 127), "PNG", (128, 128, 128)),
        ("I;16", 257 * 100, "PNG", (100, 100, 100)),
        ("I;16", 65535, "TIFF", (255, 255, 255)),
        ("I", 257 * 7, "TIFF", (7, 7, 7)),
        ("I", 2**31 - 1, "TIFF", (255, 255, 255)),
        ("F", 0.5, "TIFF", (128, 128, 128)),
        ("F", 50.0, "TIFF", (50, 50, 50)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
    ],
)
def test_modes(mode, colour, format, expected):
    image = decode(encoded(Image.new(mode, (8, 6), colour), format), max_pixels=BOUND)
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == expected


def test_cmyk_jpeg():
    image = decode(encoded(photograph().convert("CMYK"), "JPEG"), max_pixels=BOUND)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photograph())).mean() < 12


def test_palette_with_and_without_transparency():
    palette = photograph().quantize(16)
    plain = decode(encoded(palette), max_pixels=BOUND)
    assert np.array_equal(np.asarray(plain), np.asarray(palette.convert("RGB")))
    index = palette.getpixel((0, 0))
    clear = decode(encoded(palette, transparency=index), max_pixels=BOUND)
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_rgb_with_a_transparent_colour():
    data = encoded(Image.new("RGB", (4, 4), RED), transparency=RED)
    assert decode(data, max_pixels=BOUND).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(data, max_pixels=BOUND).getpixel((4, 4)) == RED


def test_values_that_are_no_number_become_black():
    grey = np.full((6, 8), 0.5, np.float32)
    grey[:3] = np.nan
    image = decode(encoded(Image.fromarray(grey), "TIFF"), max_pixels=BOUND)
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((0, 5)) == (128, 128, 128)


# orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(orientation, format):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True}
    data = encoded(photograph(), format, exif=exif, **(options if format != "PNG" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = decode(data, max_pixels=BOUND)
    assert image.size == ((48, 64) if orientation >= 5 else (64, 48))
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_a_rotated_image_is_shrunk_by_its_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photograph(800, 200), "JPEG", exif=exif)
    assert decode(data, max_pixels=BOUND, target=(400, 100)).size == (100, 400)
    assert decode(data, max_pixels=BOUND, target=(100, 400)).size == (200, 800)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_impossible_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(photograph(), "JPEG", exif=exif), max_pixels=BOUND).size == (64, 48)


def test_damaged_exif_is_ignored():
    data = encoded(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data, max_pixels=BOUND).size == (64, 48)


# draft


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (None, (640, 480)),
        ((480, 480), (640, 480)),
        ((241, 241), (640, 480)),
        ((240, 240), (320, 240)),
        ((100, 100), (160, 120)),
        ((10, 10), (80, 60)),
        ((240, 321), (640, 480)),
    ],
)
def test_a_jpeg_is_shrunk_only_where_it_still_covers_the_target(target, size):
    data = encoded(photograph(640, 480), "JPEG", quality=90)
    assert decode(data, max_pixels=BOUND, target=target).size == size


def test_a_shrunk_jpeg_looks_the_same():
    data = encoded(photograph(640, 480), "JPEG", quality=95)
    small = decode(data, max_pixels=BOUND, target=(240, 240)).resize((160, 120))
    full = decode(data, max_pixels=BOUND).resize((160, 120))
    assert np.abs(np.asarray(small).astype(int) - np.asarray(full)).mean() < 3


def test_other_formats_are_never_shrunk():
    assert decode(encoded(photograph(640, 480)), max_pixels=BOUND, target=(9, 9)).size == (640, 480)


# failures


def test_missing_and_unreadable_files(tmp_path):
    assert cause(tmp_path / "none.jpg") == "missing"
    assert cause(tmp_path) == "unreadable"
    (tmp_path / "file").write_bytes(b"x")
    assert cause(tmp_path / "file" / "below.jpg") == "missing"
    assert cause(tmp_path / "a\0b.jpg") == "unreadable"
    assert cause(tmp_path / ("n" * 300)) == "unreadable"


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "locked.jpg").write_bytes(encoded(photograph(), "JPEG"))
    monkeypatch.setattr("os.open", refuse)  # whoever runs the tests may read everything
    with pytest.raises(BadSample, match=r"Permission denied.*locked\.jpg") as error:
        decode(tmp_path / "locked.jpg", max_pixels=BOUND)
    assert error.value.cause == "unreadable"


def test_a_pipe_does_not_block(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.jpg")
    assert cause(tmp_path / "pipe.jpg") == "unreadable"


def test_empty_file(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert cause(tmp_path / "empty.jpg") == "empty file"
    assert cause(b"") == "empty file"


@pytest.mark.parametrize(
    "data",
    [b"<html>not found</html>", b"\0" * 100, b"x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0"],
)
def test_not_an_image(data):
    with pytest.raises(BadSample, match=r"begins with b'.*formats read are JPEG, PNG") as error:
        decode(data, max_pixels=BOUND)
    assert error.value.cause == "not an image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated(format, kept):
    data = encoded(photograph(200, 150), format)
    assert cause(data[: int(len(data) * kept)]) == "truncated"


def test_truncation_raises_however_pillow_is_set_up():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    data = encoded(photograph(200, 150), "JPEG")
    assert cause(data[:-200], target=(20, 20)) == "truncated"


def test_corrupt():
    png = bytearray(encoded(photograph(), "PNG"))
    png[60] ^= 0xFF  # inside the compressed pixels: the checksum fails
    assert cause(bytes(png)) == "corrupt"
    jpeg = encoded(photograph(), "JPEG")
    assert cause(jpeg[:30] + b"\0" * (len(jpeg) - 32) + jpeg[-2:]) == "corrupt"


def bomb(width, height):
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header():
    assert cause(bomb(20_000, 20_000)) == "too large"
    assert cause(bomb(10_001, 10_000), max_pixels=10**8) == "too large"
    assert cause(encoded(photograph(64, 48)), max_pixels=64 * 48 - 1) == "too large"
    assert decode(encoded(photograph(64, 48)), max_pixels=64 * 48).size == (64, 48)


def test_a_higher_bound_than_pillows_holds_and_pillows_comes_back():
    before = Image.MAX_IMAGE_PIXELS
    assert cause(bomb(20_000, 20_000), max_pixels=10**9) != "too large"
    assert before == Image.MAX_IMAGE_PIXELS


def test_no_warning_escapes(recwarn):
    warnings.simplefilter("always")
    decode(encoded(photograph().quantize(8), transparency=b"\0\x80\xff"), max_pixels=BOUND)
    assert not recwarn.list


def test_damaged_bytes_raise_nothing_but_bad_sample():
    drawn = random.Random(0)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        original = encoded(photograph(), format)
        for _ in range(40):
            data = bytearray(original)
            for _ in range(drawn.randint(1, 8)):
                data[drawn.randrange(len(data))] = drawn.randrange(256)
            try:
                image = decode(bytes(data[: drawn.randint(1, len(data))]), max_pixels=10**6)
            except BadSample as bad:
                assert bad.cause in {"truncated", "corrupt", "not an image", "too large"}
            else:
                assert image.mode == "RGB"
