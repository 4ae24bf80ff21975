"""The memory of a batch's images, shared with the trainer from the beginning.

The loader hands each image its place in the batch before it is read, so that pixels are written
there once and copied no more: not into a stack, and not on the way out of a worker. They lie there
as BHWC (channels last), which is how images are decoded and resized: sorting the channels takes a
processor a tenth of the whole time, and a GPU next to none.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from engine.errors import FaultError
from engine.types import Sample

_HUGE_PAGE = 2 << 20  # bytes
_LARGE = 2 * _HUGE_PAGE


def allocate_images(number: int, size: tuple[int, int]) -> Tensor:
    """uint8 ``image_BCHW`` of that many images of ``size`` (height, width), to be written to."""
    return allocate((number, *size, 3)).permute(0, 3, 1, 2)


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
        with suppress(OSError):  # a kernel without them; small ones cost a tenth of all the time
            memory.madvise(mmap.MADV_HUGEPAGE)
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
    form = first.shape, first.stride(), first.dtype
    beside = _is_dense(first) and all(
        image.data_ptr() == first.data_ptr() + i * size
        and (image.shape, image.stride(), image.dtype) == form
        for i, image in enumerate(images)
    )
    # Two memories may happen to be neighbours.
    if beside and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr():
        return first.as_strided((len(images), *first.shape), (first.numel(), *first.stride()))
    stacked = allocate((len(images), *first.shape), first.dtype)
    return torch.stack(images, out=stacked)


def _is_dense(image_CHW: Tensor) -> bool:
    """Whether its memory is without gaps, in either order."""
    return image_CHW.is_contiguous() or image_CHW.permute(1, 2, 0).is_contiguous()
