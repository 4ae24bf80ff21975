"""The memory of a batch's images, shared with the trainer from the beginning.

The loader reserves each image's memory in the batch before it is read, so that pixels are written
there once and copied no more: not into a stack, and not on the way out of a worker. They are stored
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


class BatchBuffer:
    """Memory of a batch's images, one beside the other, in the order of its samples.

    Nothing is allocated before the first one, so that a batch of texts alone takes no memory.
    """

    def __init__(self, number: int, size: tuple[int, int]) -> None:
        self.number, self.size, self.used = number, size, 0
        self._images_NCHW: Tensor | None = None

    def reserve(self, image: int) -> Tensor | None:
        """CHW memory for an image of the sample that is being read; None where all is used."""
        if self.used + image >= self.number:
            return None
        if self._images_NCHW is None:
            self._images_NCHW = allocate_images(self.number, self.size)
        return self._images_NCHW[self.used + image]

    def commit(self, images: int) -> None:
        """The sample is good: the next one's images come after its own."""
        self.used += images


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
        with suppress(OSError):  # a kernel without them; small ones cost a tenth of the whole time
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
    """``image_BCHW`` of the first image of each sample that has one, for a collate.

    Images that are adjacent in memory, as the loader writes them, are not copied.
    """
    images = [sample.images[0] for sample in samples if sample.images]
    image_BCHW = _side_by_side(images)
    if image_BCHW is None:
        memory = allocate((len(images), *images[0].shape), images[0].dtype)
        image_BCHW = torch.stack(images, out=memory)
    return image_BCHW


def places(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Where the samples come from."""
    return {
        "dataset_B": torch.tensor([sample.dataset for sample in samples]),
        "index_B": torch.tensor([sample.index for sample in samples]),
    }


def stack_several(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor]:
    """``image_BKCHW`` and int64 ``num_images_B`` of samples with any number of images each.

    K is the most that a sample has, and no images (None) where that is 0; places that a row does
    not fill are black. Images that are adjacent in memory are not copied where all rows have K.
    """
    num_images_B = torch.tensor([len(sample.images) for sample in samples])
    most = int(num_images_B.max())
    if not most:
        return None, num_images_B
    first = next(image for sample in samples for image in sample.images)
    black = torch.zeros_like(first)
    images = [
        image
        for sample in samples
        for image in (*sample.images, *[black] * (most - len(sample.images)))
    ]
    image_NCHW = _side_by_side(images)
    if image_NCHW is None:
        channels, *sides = first.shape
        image_NHWC = allocate((len(images), *sides, channels), first.dtype)
        image_NCHW = torch.stack(images, out=image_NHWC.permute(0, 3, 1, 2))
    return image_NCHW.unflatten(0, (len(samples), most)), num_images_B


def _side_by_side(images: Sequence[Tensor]) -> Tensor | None:
    """The images as one tensor, if that takes no copying."""
    first, last = images[0], images[-1]
    size = first.numel() * first.element_size()
    form = first.shape, first.stride(), first.dtype
    dense = first.is_contiguous() or first.permute(1, 2, 0).is_contiguous()
    beside = dense and all(
        image.data_ptr() == first.data_ptr() + i * size
        and (image.shape, image.stride(), image.dtype) == form
        for i, image in enumerate(images)
    )
    # Two separate allocations may happen to be adjacent.
    if beside and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr():
        return first.as_strided((len(images), *first.shape), (first.numel(), *first.stride()))
    return None
