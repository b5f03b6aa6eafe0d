"""Grids of token ids between the nodes: what the TOKENS socket carries, and how they are edited.

Shapes: B samples, h and w tokens of height and width, H and W pixels of the picture that they stand for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch

MOST_ID = torch.iinfo(torch.int64).max
MOST_SIDE = 16384  # pixels, the host's largest picture


@dataclass(frozen=True, eq=False)
class Tokens:
    """Ids [B, h, w] in int64 on the CPU; ``mask_id`` where a token is unknown."""

    ids: Tensor
    codebook: int
    mask_id: int
    downscale: int  # pixels along one side of a token

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.ids.dtype != torch.int64 or not self.ids.numel():
            raise ValueError(
                f"token ids of {self.ids.dtype} {tuple(self.ids.shape)} are not int64 [batch, height, width];"
                " encode an image to get them"
            )
        if not 0 < self.codebook <= self.mask_id <= MOST_ID or not 1 <= self.downscale <= MOST_SIDE:
            raise ValueError(
                f"tokens cannot have {self.codebook} codes, the mask id {self.mask_id} and {self.downscale} pixels a"
                f" side; at least one code, a mask id that is none, up to {MOST_ID}, and 1 to {MOST_SIDE} pixels"
            )
        wrong = self.ids[((self.ids < 0) | (self.ids >= self.codebook)) & (self.ids != self.mask_id)]
        if len(wrong):
            raise ValueError(
                f"tokens hold the id {int(wrong[0])}; ids are 0 to {self.codebook - 1}, or {self.mask_id} where unknown"
            )

    @property
    def unknown(self) -> Tensor:
        """[B, h, w], true where the token is not known."""
        return self.ids == self.mask_id

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.ids.shape[1] * self.downscale, self.ids.shape[2] * self.downscale

    def with_ids(self, ids: Tensor) -> "Tokens":
        return replace(self, ids=ids.cpu())

    def check(self, name: str, codebook: int, mask_id: int, downscale: int) -> None:
        """Raise ValueError unless a model of these sizes can read them; of two models of one size only their makers know."""
        own, wanted = (self.codebook, self.mask_id, self.downscale), (codebook, mask_id, downscale)
        if own != wanted:
            raise ValueError(
                f"{name} are of another model: {_sizes(*own)}, this one has {_sizes(*wanted)}; make them with the model"
                " that is wired here"
            )

    def check_known(self) -> None:
        """Raise ValueError if any token is unknown: no picture shows that one."""
        if unknown := int(self.unknown.sum()):
            raise ValueError(
                f"{unknown} of {self.ids.numel()} tokens are unknown and have no picture; fill them with Masked Token"
                " Sampler first (its 'tokens' input)"
            )


def _sizes(codebook: int, mask_id: int, downscale: int) -> str:
    return f"{codebook} codes, mask id {mask_id}, {downscale} pixels a token"


def cells(mask: Tensor, downscale: int) -> Tensor:
    """Which tokens a pixel mask [B, H, W] touches: bool [B, H / downscale, W / downscale], true where any pixel has 0.5.

    Any, not most: what lies outside the mask is pasted back pixel by pixel, what lies inside must all be new.
    """
    if mask.shape[1] % downscale or mask.shape[2] % downscale:
        raise ValueError(
            f"a mask of {mask.shape[2]}x{mask.shape[1]} pixels does not divide into tokens of {downscale};"
            f" crop or pad to multiples of {downscale}"
        )
    return F.max_pool2d(mask.float().unsqueeze(1), downscale).squeeze(1) >= 0.5


def edit(tokens: Tokens, mask: Tensor, source: Tokens | None = None) -> Tokens:
    """``tokens`` with those of ``source`` under the ``mask`` [B, H, W], or with unknown ones where there is none.

    Each of the three has one sample or as many as the others.
    """
    check_mask(mask, tokens.size)
    grids = {"token grids": len(tokens.ids), "masks": len(mask)}
    under = cells(mask, tokens.downscale).cpu()
    new = torch.full_like(tokens.ids[:1], tokens.mask_id)
    if source is not None:
        source.check("the source's tokens", tokens.codebook, tokens.mask_id, tokens.downscale)
        if source.size != tokens.size:
            raise ValueError(
                f"a source of {pixels(source.size)} pixels does not fit tokens of {pixels(tokens.size)}; make both of"
                " one size"
            )
        grids["sources"] = len(source.ids)
        new = source.ids
    batch = Batch.of(1, **grids)
    return tokens.with_ids(torch.where(batch.spread(under), batch.spread(new), batch.spread(tokens.ids)))


def check_mask(mask: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless a mask [B, H, W] has the ``size`` (height, width) in pixels of what it lies on."""
    if mask.ndim != 3 or tuple(mask.shape[1:]) != tuple(size):
        raise ValueError(
            f"a mask of {pixels(mask.shape[-2:])} does not fit a picture of {pixels(size)} pixels; resize it, or paint it"
            " on that picture (a Load Image without transparency gives an empty mask of 64x64: leave it unwired)"
        )


def pixels(size: Sequence[int]) -> str:
    """A height and width as people read them: width x height."""
    return f"{size[1]}x{size[0]}"
