"""Small tar files for tests, written by Python's tarfile."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture(number, size=(12, 8)):
    """A JPEG of noise that is a function of its number."""
    noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    image = io.BytesIO()
    Image.fromarray(noise).save(image, "JPEG")
    return image.getvalue()


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """A tar of (name, bytes) pairs; a TarInfo instead of a name is written as it is."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pairs(numbers, fields=None):
    """Members of so many whole samples: an image, its text and, where given, a JSON."""
    for number in numbers:
        yield f"{number:05d}.jpg", picture(number)
        yield f"{number:05d}.txt", f"row {number}".encode()
        if fields is not None:
            yield f"{number:05d}.json", json.dumps(fields).encode()


def kind(name, letter, to=""):
    """The header of a link, device or any other type of member."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname = letter, to
    return header
