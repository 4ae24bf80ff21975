"""A source of small drawn images, some of them bad, for the loader's tests."""

import io

import numpy as np
import torch
from PIL import Image

from engine.types import BadSample, Row, Source


class Drawn(Source):
    """Rows whose picture and caption tell their number; rows of ``bad`` cannot be used."""

    split = "train"

    def __init__(self, name, length, bad=None):
        self.name, self.length, self.bad = name, length, bad or {}

    def column(self, name):
        raise NotImplementedError

    def captions(self):
        raise NotImplementedError

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        image = io.BytesIO()
        noise = np.random.default_rng(index).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image, "PNG")
        data, kind = image.getvalue(), self.bad.get(index)
        if kind == "no caption":
            raise BadSample("no caption")
        if kind == "truncated":
            data = data[:200]
        return Row(f"{index}.png", (data,), f"row {index}", str(index), f"{index}c")


def noisy(image):
    """A random transform: the pixels plus noise from torch's generator."""
    pixels_HWC = torch.from_numpy(np.array(image))
    return (pixels_HWC + torch.randint(0, 255, pixels_HWC.shape, dtype=torch.uint8)).permute(
        2, 0, 1
    )


def collate(samples):
    """Tensors of all that a loader decides, and one random draw."""
    return {
        "image_BCHW": torch.stack([sample.images[0] for sample in samples]),
        "row_B2": torch.tensor([(sample.dataset, sample.index) for sample in samples]),
        "seed_B": [sample.seed for sample in samples],
        "text_B": [sample.row.caption for sample in samples],
        "draw": torch.rand(3),
    }
