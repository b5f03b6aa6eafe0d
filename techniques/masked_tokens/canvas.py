"""From a picture, a mask and a draft of tokens to the tokens that a run starts from, and from its tokens to a picture.

Three tasks, told apart by what is given:
- a picture: it is repainted, all of it or what lies under the mask; the tokens of a draft hold there
- no picture but tokens: the unknown ones are painted, and those under the mask anew
- nothing: all is painted

Shapes: B samples, h and w tokens, H and W pixels of height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.shapes import size_of
from .batch import Batch
from .paste import paste
from .tokens import Tokens, cells, check_mask, pixels


@dataclass(frozen=True, eq=False)
class InitialTokens:
    """The tokens a run starts from: ``ids``, ``free`` and ``pinned`` are what masked_tokens.decode takes."""

    ids: Tensor  # [B, h, w], the mask id where nothing is known
    free: Tensor | None  # [B, h, w] true where tokens may change; None: everywhere
    pinned: Tensor | None  # [B, h, w], the mask id where a token is free
    picture: Tensor | None  # [B, H, W, 3], 0..1: what stays outside the mask
    mask: Tensor | None  # [B, H, W], 1 where the picture may change; None: everywhere

    def finish(self, ids: Tensor, to_pictures: Callable[[Tensor], Tensor], feather: int = 0) -> Tensor:
        """Pictures [B, H, W, 3] of ``ids`` [B, h, w], pasted into the picture that was given: outside the mask, and of
        samples none of whose tokens changed, its pixels come back bit for bit.

        ``to_pictures(ids)`` gives those of any number of samples; it is asked for none where nothing changed.
        """
        if self.picture is None:
            return to_pictures(ids)
        changed = (ids != self.ids).flatten(1).any(1)
        finished = self.picture.clone()
        if changed.any():
            painted = to_pictures(ids[changed]).to(finished)
            if self.mask is not None:
                painted = paste(self.picture[changed], painted, self.mask[changed], feather)
            finished[changed] = painted
        return finished


@dataclass(frozen=True, eq=False)
class Request:
    """The user's inputs, each of its own number of samples; sizes in pixels."""

    blank: Tokens  # one unknown token of the model, for its sizes
    size: tuple[int, int]  # height and width; what is wired decides over them
    picture: Tensor | None = None  # [I, H, W, 3], 0..1
    mask: Tensor | None = None  # [M, H, W]
    tokens: Tokens | None = None  # [T, h, w]

    def __post_init__(self) -> None:
        if self.tokens is not None:
            self.tokens.check("the tokens", self.blank.codebook, self.blank.mask_id, self.blank.downscale)
        check_sides("the picture" if self.picture is not None else "width and height", self.area, self.blank.downscale)
        if self.picture is not None and self.tokens is not None and self.tokens.size != self.area:
            raise ValueError(
                f"tokens of a {pixels(self.tokens.size)} picture do not fit the image of {pixels(self.area)} pixels;"
                " resize the image, or leave one of the two unwired"
            )
        if self.mask is not None:
            if self.picture is None and self.tokens is None:
                raise ValueError(
                    "a mask is wired, but nothing that could stay outside it; wire the image or the tokens, or leave"
                    " the mask unwired"
                )
            check_mask(self.mask, self.area)

    @property
    def area(self) -> tuple[int, int]:
        """Height and width in pixels of what is painted."""
        if self.picture is not None:
            height, width = self.picture.shape[1:3]
            return height, width
        return self.tokens.size if self.tokens is not None else self.size

    def counts(self) -> dict[str, int]:
        """How many there are of each thing that is wired, for Batch.of."""
        ids = None if self.tokens is None else self.tokens.ids
        things = {"images": self.picture, "masks": self.mask, "token_grids": ids}
        return {name: len(x) for name, x in things.items() if x is not None}

    def initial_tokens(self, batch: Batch, to_tokens: Callable[[Tensor], Tensor]) -> InitialTokens:
        """The samples of ``batch``; ``to_tokens`` gives the ids [I, h, w] of the pictures [I, H, W, 3]."""
        picture, mask, held = (
            None if x is None else batch.spread(x)
            for x in (self.picture, self.mask, None if self.tokens is None else self.tokens.ids)
        )
        free = None if mask is None else cells(mask, self.blank.downscale).cpu()
        if self.picture is not None:
            ids = batch.spread(to_tokens(self.picture))
            # outside the mask the picture stays, so its own tokens are what the others shall fit to
            pinned = held if held is None or free is None else torch.where(free, held, self.blank.mask_id)
        elif held is not None:
            ids, pinned = held, held if free is None else None
        else:
            height, width = (side // self.blank.downscale for side in self.area)
            ids, pinned = batch.spread(torch.full((1, height, width), self.blank.mask_id)), None
        return InitialTokens(ids, free, pinned, picture, mask)


def check_sides(name: str, size: Sequence[int], downscale: int) -> None:
    """Raise ValueError unless the ``size`` (height, width) in pixels is a whole number of tokens."""
    if any(side < downscale or side % downscale for side in size):
        fitting = tuple(max(1, round(side / downscale)) * downscale for side in size)
        raise ValueError(
            f"{name} of {pixels(size)} pixels cannot be divided into tokens of {downscale}x{downscale};"
            f" use multiples of {downscale}, here {pixels(fitting)}"
        )


def rgb(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, C] as float32 with three channels: a fourth is alpha and is dropped, a single one is grey."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"an image of size {size_of(image)} is not batch x height x width x channels with 1, 3 or 4"
            " channels; convert it to RGB"
        )
    return image[..., :3].float().expand(*image.shape[:3], 3)
