"""Grids of token ids (the value of TOKENS sockets) and their editing.

Shapes: B samples, h and w the height and width in tokens, H and W those of the decoded image in pixels.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.shapes import pixels, size_of
from .batch import Batch

MAX_ID = torch.iinfo(torch.int64).max
MAX_SIDE = 16384  # pixels, ComfyUI's largest image side


@dataclass(frozen=True, eq=False)
class Tokens:
    """Ids [B, h, w], int64 on the CPU; ``mask_id`` where a token is unknown."""

    ids: Tensor
    codebook: int
    mask_id: int
    downscale: int  # pixels along one side of a token

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.ids.dtype != torch.int64 or not self.ids.numel():
            raise ValueError(
                f"token ids of {self.ids.dtype} {size_of(self.ids)} are not int64 [batch, height, width];"
                " encode an image to get them"
            )
        if not 0 < self.codebook <= self.mask_id <= MAX_ID or not 1 <= self.downscale <= MAX_SIDE:
            raise ValueError(
                f"tokens cannot have {_sizes(self.codebook, self.mask_id, self.downscale)}; use at least 1 code,"
                f" a mask id from the number of codes to {MAX_ID}, and a token side of 1 to {MAX_SIDE} pixels"
            )
        wrong = self.ids[((self.ids < 0) | (self.ids >= self.codebook)) & (self.ids != self.mask_id)]
        if len(wrong):
            raise ValueError(
                f"tokens have the id {int(wrong[0])}; expected 0 to {self.codebook - 1}, or {self.mask_id} where"
                " unknown; encode with the model that samples"
            )

    @property
    def unknown(self) -> Tensor:
        """[B, h, w], true at unknown tokens."""
        return self.ids == self.mask_id

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.ids.shape[1] * self.downscale, self.ids.shape[2] * self.downscale

    def with_ids(self, ids: Tensor) -> "Tokens":
        return replace(self, ids=ids.cpu())

    def check(self, name: str, codebook: int, mask_id: int, downscale: int) -> None:
        """Raise ValueError unless the tokens have the sizes of a model.

        Tokens of another model with the same sizes are not detected.
        """
        actual, expected = (self.codebook, self.mask_id, self.downscale), (codebook, mask_id, downscale)
        if actual != expected:
            raise ValueError(
                f"{name} are from another model: expected {_sizes(*expected)}, got {_sizes(*actual)};"
                " encode them with the model that is connected here"
            )

    def check_known(self) -> None:
        """Raise ValueError if any token is unknown, because it cannot be decoded."""
        if unknown := int(self.unknown.sum()):
            raise ValueError(
                f"{unknown} of {self.ids.numel()} tokens are unknown and cannot be decoded; generate them with Masked"
                " Token Sampler first (its 'tokens' input)"
            )


def _sizes(codebook: int, mask_id: int, downscale: int) -> str:
    return f"{codebook} codes, mask id {mask_id}, tokens of {downscale}x{downscale} pixels"


def mask_to_tokens(mask: Tensor, downscale: int) -> Tensor:
    """The tokens under a pixel mask [B, H, W]: bool [B, H / downscale, W / downscale].

    A token is true if any of its mask pixels is at least 0.5. One pixel is enough, because all pixels
    inside the mask must be generated. The pixels outside the mask are restored later (see paste.py).
    """
    if mask.shape[1] % downscale or mask.shape[2] % downscale:
        raise ValueError(
            f"a mask of {mask.shape[2]}x{mask.shape[1]} pixels cannot be divided into tokens of"
            f" {downscale}x{downscale} pixels; crop or pad it to multiples of {downscale}"
        )
    return F.max_pool2d(mask.float().unsqueeze(1), downscale).squeeze(1) >= 0.5


def edit(tokens: Tokens, mask: Tensor, source: Tokens | None = None) -> Tokens:
    """Replace the tokens under the ``mask`` [B, H, W] by those of ``source``, or by unknown tokens without a source.

    Tokens, mask and source each have batch size 1 or the same larger batch size.
    """
    check_mask(mask, tokens.size)
    grids = {"token grids": len(tokens.ids), "masks": len(mask)}
    under = mask_to_tokens(mask, tokens.downscale).cpu()
    new = torch.full_like(tokens.ids[:1], tokens.mask_id)
    if source is not None:
        source.check("the source's tokens", tokens.codebook, tokens.mask_id, tokens.downscale)
        if source.size != tokens.size:
            raise ValueError(
                f"a source of {pixels(source.size)} pixels does not fit tokens of {pixels(tokens.size)} pixels; use the same"
                " size for both"
            )
        grids["sources"] = len(source.ids)
        new = source.ids
    batch = Batch.of(1, **grids)
    return tokens.with_ids(torch.where(batch.expand(under), batch.expand(new), batch.expand(tokens.ids)))


def check_mask(mask: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless a mask is [B, H, W] with the ``size`` (height, width) in pixels of its image."""
    if mask.ndim != 3 or tuple(mask.shape[1:]) != tuple(size):
        raise ValueError(
            f"a mask of {pixels(mask.shape[-2:])} does not fit an image of {pixels(size)} pixels; resize it to the"
            " image, or draw it on the image"
        )
