"""Bytes of images, and the endings that they should have."""

import io
import os

import pytest
from PIL import Image

from engine.data.image_files import ending_of, read_bytes
from engine.types import BadSample


@pytest.mark.parametrize(
    ("form", "ending"),
    [
        ("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"),
        ("TIFF", "tif"), ("PPM", "ppm"), ("AVIF", "avif"), ("JPEG2000", "jp2"),
    ],
)  # fmt: skip
def test_endings(form, ending):
    file = io.BytesIO()
    try:
        Image.new("RGB", (16, 16), "red").save(file, form)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {form}")
    assert ending_of(file.getvalue()) == ending


@pytest.mark.parametrize("data", [b"<html>", b"\x00" * 32, b"RIFF1234WAVE", b"%PDF-1.7", b"x"])
def test_bytes_of_something_else(data):
    with pytest.raises(BadSample) as caught:
        ending_of(data)
    assert caught.value.cause == "not an image"


def test_reading(tmp_path):
    (tmp_path / "a").write_bytes(b"bytes")
    assert read_bytes(tmp_path / "a") == read_bytes(b"bytes") == b"bytes"


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, cause in (
        ("empty", "empty file"),
        ("absent", "missing"),
        ("empty/inside", "missing"),
        ("folder", "unreadable"),
        ("pipe", "unreadable"),
        ("null\0byte", "unreadable"),
    ):
        with pytest.raises(BadSample) as caught:
            read_bytes(tmp_path / name)
        assert caught.value.cause == cause, name
