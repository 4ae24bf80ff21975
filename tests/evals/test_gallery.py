"""Examples of rows: small upright pictures, whatever the image, with the right texts."""

import io

import pytest
from PIL import Image

from engine.evals.gallery import retrieved, spoken, thumbnail
from engine.evals.predictions import Prediction
from tests.evals.colours import ColourSource, png

LIMIT = 10_000_000


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def turned():
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    return encoded(Image.new("RGB", (600, 300), "red"), "JPEG", exif=exif)


@pytest.mark.parametrize(
    ("image", "size", "colour"),
    [
        (encoded(Image.new("RGB", (4000, 1000), "red"), "JPEG"), (224, 56), "red"),
        (turned(), (112, 224), "red"),
        (encoded(Image.new("RGB", (3, 2), "red")), (3, 2), "red"),
        (encoded(Image.new("RGBA", (10, 20), (255, 0, 0, 0))), (10, 20), "white"),
        (encoded(Image.new("L", (900, 9), 0)), (224, 2), "black"),
        (encoded(Image.new("1", (4000, 4000))), (224, 224), "grey"),  # more than is allowed
        (b"no image", (224, 224), "grey"),
        (None, (224, 224), "grey"),
    ],
)
def test_pictures_are_small_and_upright(tmp_path, image, size, colour):
    path = tmp_path / "file"
    path.write_bytes(image or b"")
    want = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    for given in (image, path):
        shown = thumbnail(given, LIMIT)
        assert (shown.mode, shown.size) == ("RGB", size)
        assert shown.getpixel((1, 1)) == pytest.approx(want, abs=3)  # JPEG


def test_texts_of_an_example():
    source = ColourSource([(png((1, 2, 3)), f"caption {n}", f"id{n}", None) for n in range(3)])
    shown = retrieved(source, 1, [(2, 0.5), (1, 0.25)], LIMIT)
    assert (shown.captions, shown.name) == (["caption 1"], "id1")
    assert shown.found == [("caption 2", 0.5), ("caption 1", 0.25)]

    plain = spoken(source, Prediction("id2", 2, "said", ["own", "other"]), LIMIT)
    assert (plain.found, plain.captions, plain.name) == ([("said", None)], ["own", "other"], "id2")
    best = Prediction("id2", 2, "b", [], ["a", "b", "c", "d"], [0.1, 0.4, 0.4, 0.3])
    assert spoken(source, best, LIMIT).found == [("b", 0.4), ("c", 0.4), ("d", 0.3)]
