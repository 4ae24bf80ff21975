"""Copies found by what images show."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from engine.tools.inspect.copies import find_copies, signature
from engine.tools.shapes import folder as drawn


def _photograph(seed):
    """Smooth colours with some structure, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((240, 180), Image.Resampling.BICUBIC).filter(ImageFilter.SMOOTH)


def _saved(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(file).convert("RGB")


def _copies(images):
    hashes, tinies = zip(*map(signature, images), strict=True)
    return find_copies(np.array(hashes, np.uint64), np.stack(tinies))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: _saved(image, quality=40),
        lambda image: image.resize((80, 60), Image.Resampling.BICUBIC),
        lambda image: image.resize((1200, 900), Image.Resampling.BICUBIC),
        lambda image: _saved(image.resize((224, 224)), quality=75),
        lambda image: _saved(image, "PNG"),
    ],
)
def test_a_changed_copy_is_found(change):
    images = [_photograph(seed) for seed in range(30)]
    images.append(change(images[7]))
    assert _copies(images) == [[7, 30]]


def test_groups_of_several():
    one, two, three = (_photograph(seed) for seed in range(3))
    assert _copies([one, two, one, three, two, one]) == [[0, 2, 5], [1, 4]]
    assert _copies([one]) == []


def test_many_copies_of_one_image_are_one_group():
    placeholder = _photograph(0)
    images = [placeholder] * 300 + [_photograph(1)]
    assert _copies(images) == [list(range(300))]


def test_drawings_of_different_scenes_are_no_copies(tmp_path):
    options = drawn.Options(style="flat", seed=0, num_train=300, num_valid=4, image_size=64)
    (tmp_path / "drawn").mkdir()
    drawn.write(tmp_path / "drawn", options)
    paths = sorted((tmp_path / "drawn" / "train").rglob("*.jpg"))
    assert len(paths) >= 300
    assert len(_copies([Image.open(path).convert("RGB") for path in paths])) <= 3


def test_same_photographs_at_another_shape(shared_data):
    """The 113 photographs of flickr8k_aspect are among the 1,000 of flickr8k's valid split."""
    squeezed = sorted((shared_data / "flickr8k" / "valid").glob("*.jpg"))
    true = sorted((shared_data / "flickr8k_aspect" / "valid").glob("*.jpg"))
    paths = [*squeezed, *true]
    groups = _copies([Image.open(path).convert("RGB") for path in paths])
    right = [g for g in groups if len(g) == 2 and paths[g[0]].name == paths[g[1]].name]
    assert len(right) >= 0.97 * len(true)
    assert len(groups) - len(right) <= 3
