"""Checks of masks [M, H, W] that are connected beside a batch of images: their number, and Load Image's empty mask."""

from torch import Tensor

EMPTY_SIDE = (
    64  # pixels; Load Image's mask for an image without transparency is 64 x 64 zeros, whatever the image's size
)
IGNORED = (
    "mask: counts as not connected, because it looks like the empty 64x64 mask that Load Image returns for an image"
    " without transparency"
)


def is_empty_default(mask: Tensor, size: tuple[int, int]) -> bool:
    """Whether ``mask`` [M, H, W] looks like the empty mask of Load Image, beside images of another ``size`` (height, width)."""
    default = (EMPTY_SIDE, EMPTY_SIDE)
    return tuple(mask.shape[-2:]) == default != tuple(size) and not bool(mask.any())


def connected(mask: Tensor | None, size: tuple[int, int] | None) -> tuple[Tensor | None, list[str]]:
    """``mask`` [(M,) H, W] as [M, H, W], and notes for the report.

    None if no mask is connected, or one that looks like Load Image's empty mask beside images of another ``size`` (height, width).
    """
    if mask is None:
        return None, []
    mask = mask.reshape(-1, *mask.shape[-2:])
    return (None, [IGNORED]) if size is not None and is_empty_default(mask, size) else (mask, [])


def check_count(masks: int, images: int) -> None:
    """Raise a ValueError unless the number of masks is 1 or that of the images."""
    if masks not in (1, images):
        expected = "1 mask" if images == 1 else f"1 mask for all {images} images, or {images} masks (one per image)"
        raise ValueError(f"expected {expected}, got {masks} masks; connect the masks of this batch, or a single mask")
