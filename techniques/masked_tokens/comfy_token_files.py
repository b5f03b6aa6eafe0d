"""Files of token ids: safetensors with one int64 tensor and what it takes to read it, in the host's output folder."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...host.files import KeptFiles
from .tokens import Tokens

FILES = KeptFiles(".tokens.safetensors", "token", "Save Masked Tokens", "tokens/ComfyUI")
NAME = "ids"  # of the tensor
SIZES = ("codebook", "mask_id", "downscale")  # metadata that every file must have


def save_ids(ids: Tensor, sizes: Mapping[str, int], prefix: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write ``ids`` [B, h, w] as KeptFiles.save does; ``sizes`` has the SIZES, ``metadata`` what else shall go along."""
    metadata = {**metadata, **{key: str(sizes[key]) for key in SIZES}}
    return FILES.save(prefix, {NAME: ids.contiguous()}, metadata)


def load_tokens(name: str) -> Tokens:
    """The tokens of a file; a ValueError that names it where that cannot be."""
    path = FILES.find(name)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, found = file.metadata() or {}, list(file.keys())
            if found != [NAME]:
                raise ValueError(f"it holds {', '.join(found) or 'nothing'} instead of {NAME}")
            # a copy: the file does not stay open
            ids = file.get_tensor(NAME).clone()
        if missing := [key for key in SIZES if not metadata.get(key, "").isdecimal()]:
            raise ValueError(f"its metadata lack a number for {', '.join(missing)}")
        if ids.dtype != torch.int64 or ids.ndim != 3:
            raise ValueError(f"its ids are {ids.dtype} {tuple(ids.shape)}, not int64 [batch, height, width]")
        return Tokens(ids, **{key: int(metadata[key]) for key in SIZES})
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"'{name}' cannot be read as a token file: {str(error)[:300]}; save it anew") from error
