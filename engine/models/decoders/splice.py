"""Images in the midst of texts: at each mark in a row's ids stand the tokens of its next image."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_ID = -200  # the mark of an image among token ids, as LLaVA has it


def splice(
    text_BTD: Tensor, image_MND: Tensor, ids_BT: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, D] of texts with their images, and their mask [B, S]; padded on the right.

    Args:
        text_BTD: embeddings of the texts; those at marks are not looked at.
        image_MND: tokens of all rows' images, in the order of rows and of marks within them.
        ids_BT: ``IMAGE_ID`` at marks.
        mask_BT: 1 for what counts; elsewhere neither texts nor marks are taken.

    Raises ValueError where there are more or fewer images than marks.
    """
    mark_BT = (ids_BT == IMAGE_ID) & mask_BT.bool()
    if (marks := int(mark_BT.sum())) != len(image_MND):
        raise ValueError(f"the texts have the marks of {marks} images, but {len(image_MND)} came")
    num_tokens = image_MND.shape[1]
    size_BT = torch.where(mark_BT, num_tokens, mask_BT.long())
    end_BT = size_BT.cumsum(1)
    length_B = end_BT[:, -1]
    # where each row's s-th place comes from: the text's or mark's position, and the token within it
    place_BS = torch.arange(int(length_B.max()), device=ids_BT.device).expand(len(ids_BT), -1)
    at_BS = torch.searchsorted(end_BT, place_BS.contiguous(), right=True)
    there_BS = place_BS < length_B[:, None]
    at_BS = at_BS.clamp_max(ids_BT.shape[1] - 1)
    within_BS = place_BS - (end_BT - size_BT).gather(1, at_BS)
    image_BT = mark_BT.flatten().cumsum(0).view_as(mark_BT) - 1
    of_text_BS = 1 + torch.arange(ids_BT.numel(), device=ids_BT.device).view_as(ids_BT).gather(
        1, at_BS
    )
    of_image_BS = 1 + ids_BT.numel() + image_BT.gather(1, at_BS) * num_tokens + within_BS
    source_BS = torch.where(mark_BT.gather(1, at_BS), of_image_BS, of_text_BS) * there_BS
    rows_PD = torch.cat(
        [
            text_BTD.new_zeros(1, text_BTD.shape[2]),  # for padding
            text_BTD.flatten(0, 1),
            image_MND.flatten(0, 1).to(text_BTD.dtype),
        ]
    )
    found_PD = rows_PD.index_select(0, source_BS.flatten())
    return found_PD.view(*source_BS.shape, -1), there_BS.long()


def side_by_side(image_MND: Tensor, num_images_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's images in turn, padded on the left: [B, K · N, D], and their mask [B, K · N]."""
    most = int(num_images_B.max())
    if (total := int(num_images_B.sum())) != len(image_MND):
        raise ValueError(f"the rows have {total} images, but {len(image_MND)} came")
    place_BK = torch.arange(most, device=image_MND.device) - (most - num_images_B)[:, None]
    first_B = num_images_B.cumsum(0) - num_images_B
    source_BK = torch.where(place_BK >= 0, 1 + first_B[:, None] + place_BK, 0)
    images_MND = torch.cat([image_MND.new_zeros(1, *image_MND.shape[1:]), image_MND])
    there_BK = (place_BK >= 0).long()
    return images_MND[source_BK].flatten(1, 2), there_BK.repeat_interleave(image_MND.shape[1], 1)
