"""Explains torch's errors about sizes to a user who connected a wrong model or too small a latent."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SHAPES = re.compile(
    r"shapes cannot be multiplied|must match the size|Sizes of tensors must match|expected input\[|Expected 3D"
)


@contextmanager
def explain_shape_errors(model: str) -> Iterator[None]:
    """Turn an error about sizes into a ValueError that names ``model`` and the remedy; other errors pass through."""
    try:
        yield
    except ZeroDivisionError as error:  # PixArt below 264 pixels scales its position embedding by 0
        raise ValueError(
            f"{model} divides by zero on a latent of this size; use a larger latent, or a model for small images"
        ) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not SHAPES.search(str(error)):
            raise
        raise ValueError(
            f"the inputs do not fit the layers of {model} ({error}); encode its prompts with the CLIP and its images with"
            " the VAE of the same checkpoint"
        ) from error
