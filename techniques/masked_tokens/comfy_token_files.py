"""Files of token ids in ComfyUI's output folder: safetensors with one int64 tensor and the sizes of the model."""

from collections.abc import Mapping

from torch import Tensor

from ...host.files import OutputFiles, read_tensor
from .tokens import Tokens

FILES = OutputFiles(".tokens.safetensors", "token", "Save Masked Tokens", "tokens/ComfyUI")
NAME = "ids"  # the name of the tensor
SIZES = ("codebook", "mask_id", "downscale")  # metadata that every file must have


def save_ids(ids: Tensor, sizes: Mapping[str, int], prefix: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write ``ids`` [B, h, w] to a new numbered file; returns the value of OutputFiles.save.

    ``sizes``: the values of SIZES, by name; ``metadata``: further entries of the file's metadata.
    """
    metadata = {**metadata, **{key: str(sizes[key]) for key in SIZES}}
    return FILES.save(prefix, {NAME: ids.contiguous()}, metadata)


def load_tokens(name: str) -> Tokens:
    """The tokens of a file; a ValueError names the file if it cannot be read."""
    path = FILES.find(name)
    with FILES.reading(name):
        ids, metadata = read_tensor(path, NAME)
        if missing := [key for key in SIZES if not metadata.get(key, "").isdecimal()]:
            raise ValueError(f"its metadata lack a number for {', '.join(missing)}")
        return Tokens(ids, **{key: int(metadata[key]) for key in SIZES})
