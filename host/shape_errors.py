"""Errors of torch about shapes, said as what they mean to the person who wired a model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHAPES = re.compile(
    r"shapes cannot be multiplied|must match the size|Sizes of tensors must match|expected input\[|Expected 3D"
)


@contextmanager
def explained(who: str) -> Iterator[None]:
    """A ValueError in place of torch's word on shapes that do not fit the layers of ``who``; all other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not SHAPES.search(str(error)):
            raise
        raise ValueError(
            f"{who} cannot read what it was given ({error}); encode its prompts with the CLIP of its own checkpoint, and its"
            " pictures with that VAE"
        ) from error
