"""The memory of a batch's images, shared with the trainer from the beginning.

The loader hands each image its place in the batch before it is read, so that pixels are written
there once and copied no more: not into a stack, and not on the way out of a worker.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from engine.errors import FaultError
from engine.types import Sample

_HUGE_PAGE = 2 << 20  # bytes
_LARGE = 2 * _HUGE_PAGE


def allocate(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """A tensor with nothing in it yet; in a worker process, in memory that other processes can map.

    Raises FaultError where there is not as much of that.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if get_worker_info() is None:
        if num_bytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        whole_pages = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE  # which also aligns them
        memory = mmap.mmap(-1, whole_pages, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)  # small ones cost a tenth of all the time
        count = num_bytes // dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=count).view(torch.Size(shape))
    try:
        storage = torch.UntypedStorage._new_shared(num_bytes)
    except RuntimeError as error:
        raise FaultError(
            f"shared memory (/dev/shm) has no {num_bytes >> 20} MiB left for a batch of images: "
            f"lower data.num_workers or the batch ({error})"
        ) from error
    return torch.empty(0, dtype=dtype).set_(storage).view(torch.Size(shape))


def stack_images(samples: Sequence[Sample]) -> Tensor:
    """``image_BCHW`` of the samples that have an image, for a collate.

    Images that lie side by side already, as the loader puts them, are not copied.
    """
    images = [sample.image for sample in samples if sample.image is not None]
    first, last = images[0], images[-1]
    size = first.numel() * first.element_size()
    beside = first.is_contiguous() and all(
        image.data_ptr() == first.data_ptr() + i * size and image.shape == first.shape
        for i, image in enumerate(images)
    )
    # Two memories may happen to be neighbours.
    if beside and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr():
        return first.as_strided((len(images), *first.shape), (first.numel(), *first.stride()))
    stacked = allocate((len(images), *first.shape), first.dtype)
    return torch.stack(images, out=stacked)
