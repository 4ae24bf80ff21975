"""Copies of an image found by what it shows: rescaled, compressed again, under another name.

A 64-bit perceptual hash (the signs of the lowest frequencies of a cosine transform, as in the
ImageHash library, without its dependencies) finds candidates, a tiny colour picture confirms them:
drawings of few shapes have equal hashes but different pictures.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

HASH_BITS = 6  # that two copies may differ in; up to 3 are always found
TINY = 8  # pixels a side of the tiny picture
_SIDE = 32  # pixels a side of what is transformed
_LOW = 8  # frequencies a side
_MEAN_DIFFERENCE, _MAX_DIFFERENCE = 4.0, 32  # grey levels between the tiny pictures of copies
_BANDS = 4
_NEIGHBOURS = 64  # that a hash is compared with in the order of each band
_COSINES = np.cos(
    np.pi / _SIDE * (np.arange(_SIDE) + 0.5)[None, :] * np.arange(1, _LOW + 1)[:, None]
)


def signature(image: Image.Image) -> tuple[int, np.ndarray]:
    """The 64-bit hash of an RGB image, and its tiny picture as uint8 [TINY · TINY · 3]."""
    box = Image.Resampling.BOX
    small = image if max(image.size) <= 512 else image.resize((256, 256), box, reducing_gap=2.0)
    grey = np.asarray(small.convert("L").resize((_SIDE, _SIDE), box), np.float64)
    low = _COSINES @ grey @ _COSINES.T
    bits = np.packbits(low > np.median(low))
    tiny = np.asarray(small.convert("RGB").resize((TINY, TINY), box), np.uint8)
    return int.from_bytes(bits.tobytes(), "big"), tiny.reshape(-1)


def find_copies(hashes: np.ndarray, tinies: np.ndarray) -> list[list[int]]:
    """Groups of two or more images that are copies of one another, by their places, ascending.

    Args:
        hashes: uint64 [images].
        tinies: uint8 [images, TINY · TINY · 3]; may be memory-mapped.
    """
    parents: dict[int, int] = {}

    def root(place: int) -> int:
        while (above := parents.setdefault(place, place)) != place:
            parents[place] = place = parents[above]
        return place

    for one, other in _pairs(hashes, tinies):
        parents[root(max(one, other))] = root(min(one, other))
    groups: dict[int, list[int]] = {}
    for place in sorted(parents):
        groups.setdefault(root(place), []).append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda g: g[0])


def _pairs(hashes: np.ndarray, tinies: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of copies, some of them several times.

    Hashes that differ in fewer bits than there are bands agree in one band: in the order of that
    band they stand close together.
    """
    width = 64 // _BANDS
    for band in range(_BANDS):
        left = np.uint64(band * width)
        turned = hashes << left | hashes >> np.uint64(64) - left  # by 64 places numpy shifts to 0
        order = np.argsort(turned, kind="stable")
        bands = (turned[order] >> np.uint64(64 - width)).astype(np.uint32)
        for distance in range(1, min(_NEIGHBOURS + 1, len(order))):
            near = np.flatnonzero(bands[distance:] == bands[:-distance])
            if not len(near):
                break
            one, other = order[near], order[near + distance]
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= HASH_BITS
            one, other = one[close], other[close]
            for start in range(0, len(one), 4096):
                a, b = one[start : start + 4096], other[start : start + 4096]
                same = _look_alike(tinies[a], tinies[b])
                yield from zip(a[same].tolist(), b[same].tolist(), strict=True)


def _look_alike(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    differences = np.abs(ones.astype(np.int16) - others)
    return (differences.mean(1) <= _MEAN_DIFFERENCE) & (differences.max(1) <= _MAX_DIFFERENCE)
