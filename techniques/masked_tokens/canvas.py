"""Prepares the initial tokens of a sampling run from the user's inputs, and composes the final image from its result.

The connected inputs decide the task:
- Image without a mask: image to image. Image with a mask: inpainting. If tokens are connected too, they are pinned,
  that is, kept in the result. With a mask, only the tokens under the mask are pinned.
- Tokens without an image: unknown tokens are generated. With a mask, the tokens under the mask are generated too.
- Neither: text to image. All tokens are generated.

Shapes: B samples, h and w the height and width in tokens, H and W those in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.shapes import pixels, size_of
from .batch import Batch
from .paste import paste
from .tokens import Tokens, check_mask, mask_to_tokens


@dataclass(frozen=True, eq=False)
class InitialTokens:
    """The tokens a run starts from. ``decode.decode`` receives ``ids``, ``free`` (as its mask) and ``pinned``."""

    ids: Tensor  # [B, h, w], the mask id at unknown tokens
    free: Tensor | None  # [B, h, w], true where tokens may change; None: everywhere
    pinned: Tensor | None  # [B, h, w]: the ids of pinned tokens, the mask id elsewhere; None: no token is pinned
    image: Tensor | None  # the input image [B, H, W, 3], 0..1; kept outside the mask
    mask: Tensor | None  # [B, H, W], 1 where the image may change; None: everywhere

    def finish(self, ids: Tensor, to_images: Callable[[Tensor], Tensor], feather: int = 0) -> Tensor:
        """Images [B, H, W, 3] of ``ids`` [B, h, w], pasted into the input image if there is one.

        Outside the mask, and in samples without a changed token, the input pixels are returned bit for bit.
        ``to_images(ids)`` decodes any number of samples; it is called only for samples with changed tokens.
        """
        if self.image is None:
            return to_images(ids)
        changed = (ids != self.ids).flatten(1).any(1)
        finished = self.image.clone()
        if changed.any():
            generated = to_images(ids[changed]).to(finished)
            if self.mask is not None:
                generated = paste(self.image[changed], generated, self.mask[changed], feather)
            finished[changed] = generated
        return finished


@dataclass(frozen=True, eq=False)
class Request:
    """The user's inputs, each with its own batch size; sizes in pixels."""

    blank: Tokens  # a single unknown token; specifies the codebook, the mask id and the downscale
    size: tuple[int, int]  # height and width; ignored if an image or tokens are given
    image: Tensor | None = None  # [I, H, W, 3], 0..1
    mask: Tensor | None = None  # [M, H, W]
    tokens: Tokens | None = None  # [T, h, w]

    def __post_init__(self) -> None:
        if self.tokens is not None:
            self.tokens.check("the tokens", self.blank.codebook, self.blank.mask_id, self.blank.downscale)
        check_sides("the image" if self.image is not None else "width and height", self.area, self.blank.downscale)
        if self.image is not None and self.tokens is not None and self.tokens.size != self.area:
            raise ValueError(
                f"tokens for {pixels(self.tokens.size)} pixels do not fit the image of {pixels(self.area)} pixels;"
                " resize the image, or disconnect the image or the tokens"
            )
        if self.mask is not None:
            if self.image is None and self.tokens is None:
                raise ValueError(
                    "expected an image or tokens with the mask, got neither; connect one of them, or disconnect the mask"
                )
            check_mask(self.mask, self.area)

    @property
    def area(self) -> tuple[int, int]:
        """Height and width in pixels of the generated image."""
        if self.image is not None:
            height, width = self.image.shape[1:3]
            return height, width
        return self.tokens.size if self.tokens is not None else self.size

    @property
    def notes(self) -> list[str]:
        """Why no token is generated, with the remedy, for the report; empty if some are."""
        unknown = self.tokens is not None and bool(self.tokens.unknown.any())
        if self.tokens is not None and not unknown and (self.mask is None or self.image is not None):
            other = "connect a mask of the area to generate" if self.image is None else "disconnect the tokens"
            return [
                "tokens: all of them are known, so that no token is generated; make some unknown with Masked Token Edit,"
                f" or {other}"
            ]
        if self.mask is not None and not bool((self.mask >= 0.5).any()) and (self.image is not None or not unknown):
            return ["mask: below 0.5 everywhere, so that no token is generated; draw the area to generate"]
        return []

    def counts(self) -> dict[str, int]:
        """The batch size of each given input, for Batch.of."""
        ids = None if self.tokens is None else self.tokens.ids
        inputs = {"images": self.image, "masks": self.mask, "token_grids": ids}
        return {name: len(x) for name, x in inputs.items() if x is not None}

    def initial_tokens(self, batch: Batch, to_tokens: Callable[[Tensor], Tensor]) -> InitialTokens:
        """The initial tokens of ``batch``; ``to_tokens`` encodes images [I, H, W, 3] to ids [I, h, w]."""
        image, mask, tokens = (
            None if x is None else batch.expand(x)
            for x in (self.image, self.mask, None if self.tokens is None else self.tokens.ids)
        )
        free = None if mask is None else mask_to_tokens(mask, self.blank.downscale).cpu()
        if self.image is not None:
            ids = batch.expand(to_tokens(self.image))
            # pinned only under the mask: outside the mask the image is kept, and so are its tokens
            pinned = tokens if tokens is None or free is None else torch.where(free, tokens, self.blank.mask_id)
        elif tokens is not None:
            ids, pinned = tokens, tokens if free is None else None
        else:
            height, width = (side // self.blank.downscale for side in self.area)
            ids, pinned = batch.expand(torch.full((1, height, width), self.blank.mask_id)), None
        return InitialTokens(ids, free, pinned, image, mask)


def check_sides(name: str, size: Sequence[int], downscale: int) -> None:
    """Raise ValueError unless both sides of ``size`` (height, width) in pixels are multiples of ``downscale``."""
    if any(side < downscale or side % downscale for side in size):
        fitting = tuple(max(1, round(side / downscale)) * downscale for side in size)
        raise ValueError(
            f"{name} of {pixels(size)} pixels cannot be divided into tokens of {downscale}x{downscale} pixels;"
            f" use multiples of {downscale}, here {pixels(fitting)}"
        )


def rgb(image: Tensor) -> Tensor:
    """An IMAGE [B, H, W, C] as float32 with three channels: alpha (a fourth channel) is dropped, grey is repeated."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"expected an image [batch, height, width, channels] with 1, 3 or 4 channels, got {size_of(image)}; convert it"
            " to RGB"
        )
    return image[..., :3].float().expand(*image.shape[:3], 3)
