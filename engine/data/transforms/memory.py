"""Pillow's pixels as a tensor without copying them."""

import warnings

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

_NUM_CHANNELS = 4  # Pillow keeps RGB in four bytes, the last of them unused


def pillow_memory(image: Image.Image) -> Tensor:
    """An RGB image's own memory as uint8 CHW of four channels (the fourth means nothing).

    Read only: it is the image's. An image too large for one block of Pillow's memory is copied.
    """
    try:
        pixels = pa.array(image)  # the Arrow interface of Pillow 11.2 and later
    except (ValueError, MemoryError, TypeError, pa.ArrowInvalid):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    buffer = pixels.values.buffers()[1]
    shape = (image.height, image.width, _NUM_CHANNELS)
    return _read_only(np.frombuffer(buffer, np.uint8).reshape(shape)).permute(2, 0, 1)


def _read_only(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns once that nothing keeps us from writing
    _read_only(np.frombuffer(b"\0", np.uint8))
