"""Scenes drawn with Pillow, in one of two styles.

Every measure is a fraction of the image's side, so that any image size shows the same picture.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from engine.tools.shapes.scenes import Group, Scene

RGB = {
    "red": (222, 30, 38),
    "green": (24, 165, 58),
    "blue": (32, 78, 226),
    "yellow": (240, 210, 16),
    "purple": (146, 44, 196),
    "orange": (250, 128, 12),
}
DIAMETER = {"small": 0.16, "large": 0.265}
MARGIN = 0.02  # kept free at the image's edge and between the halves
SUPERSAMPLE = 4
STROKE = 0.035  # of the sketch style's outlines

Points = list[tuple[float, float]]


def draw(scene: Scene, style: str, image_size: int, rng: np.random.Generator) -> Image.Image:
    """An RGB image of ``image_size`` pixels square that shows the scene."""
    side = image_size * SUPERSAMPLE
    sketch = style == "sketch"
    low, high = (15, 55) if sketch else (222, 256)  # of the ground's channels
    image = Image.new("RGB", (side, side), tuple(rng.integers(low, high, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for group, half in ((scene.first, 0.25), (scene.second, 0.75)):
        colour = tuple(np.clip(RGB[group.colour] + rng.integers(-10, 11, 3), 0, 255).tolist())
        for along, across in _places(group, half, rng):
            centre = (across, along) if scene.relation == "left" else (along, across)
            points = _outline(group, centre, rng, side)
            pen.polygon(points, fill=tuple(c * 2 // 5 for c in colour) if sketch else colour)
            if sketch:
                # The path is closed by its first two points: so the last joint is round too.
                pen.line(points + points[:2], fill=colour, width=int(STROKE * side), joint="curve")
    image = image.reduce(SUPERSAMPLE)
    return _grain(image, rng) if sketch else image


def _places(group: Group, half: float, rng: np.random.Generator) -> Points:
    """Centres (along, across) of a group's shapes: in a row along its half of the image."""
    diameter = DIAMETER[group.size]
    extent = 1.1 * diameter + STROKE  # a turned star's points reach a little further
    spacing = diameter + rng.uniform(0.045, 0.06)
    reach = ((group.count - 1) * spacing + extent) / 2
    middle = 0.5 + rng.uniform(-1, 1) * min(0.12, 0.5 - MARGIN / 2 - reach)
    room = 0.25 - extent / 2 - MARGIN
    return [
        (middle + (i - (group.count - 1) / 2) * spacing, half + rng.uniform(-room, room))
        for i in range(group.count)
    ]


def _outline(
    group: Group, centre: tuple[float, float], rng: np.random.Generator, side: int
) -> Points:
    """Corner points, in pixels, of one shape: slightly turned."""
    radius = DIAMETER[group.size] / 2
    turn = math.radians(rng.uniform(-9, 9))
    cos, sin = radius * math.cos(turn), radius * math.sin(turn)
    x, y = centre
    return [
        (side * (x + cos * u - sin * v), side * (y + sin * u + cos * v))
        for u, v in UNIT_SHAPES[group.shape]
    ]


def _grain(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Grey noise, as of rough paper."""
    noise = rng.integers(-16, 17, (image.height, image.width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _arc(centre: float, radius: float, start: float, stop: float, steps: int = 18) -> Points:
    """Points on a circle around (centre, 0), angles in radians."""
    angles = np.linspace(start, stop, steps)
    return [(centre + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> Points:
    corners = [((1.08, 0.45)[i % 2], math.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


_W = 0.33  # half the width of a cross's arms
UNIT_SHAPES: dict[str, Points] = {  # in a circle of radius 1 or little more, y downwards
    "circle": _arc(0, 0.98, 0, 2 * math.pi * 17 / 18),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.98), (1, 0.82), (-1, 0.82)],
    "cross": [(-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W), (_W, 1), (-_W, 1),
              (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W)],
    "star": _star(),
    # The outer arc meets the inner one, a circle of radius 0.8 around (0.5, 0), at its two horns.
    "moon": _arc(0, 1, 0.93, 2 * math.pi - 0.93) + _arc(0.5, 0.8, 4.84, 1.44),
}  # fmt: skip
