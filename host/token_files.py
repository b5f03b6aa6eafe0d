"""Files of token ids: safetensors with one int64 tensor and what it takes to read it, in the host's output folder."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import folder_paths
import safetensors.torch
import torch
from comfy.cli_args import args
from safetensors import SafetensorError, safe_open
from torch import Tensor

ENDING = ".tokens.safetensors"
NAME = "ids"  # of the tensor
SIZES = ("codebook", "mask_id", "downscale")  # metadata that every file must have

T = TypeVar("T")


def save_ids(ids: Tensor, sizes: Mapping[str, int], prefix: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write ``ids`` [B, h, w] under the next free number of ``prefix``, whole or not at all.

    ``sizes`` has the SIZES, ``metadata`` what else shall go along. Returns where it is, as the host shows it: filename,
    subfolder, type. A prefix outside of the output folder is an error of the host's.
    """
    if not os.path.basename(os.path.normpath(prefix)).strip("."):
        raise ValueError(f"filename_prefix '{prefix}' names no file; give a name such as tokens/ComfyUI")
    output = folder_paths.get_output_directory()
    folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    metadata = {**metadata, **{key: str(sizes[key]) for key in SIZES}}
    data = safetensors.torch.save({NAME: ids.contiguous()}, metadata)
    target = Path(folder, f"{name}_{number:05}_{ENDING}")
    part = target.with_name(target.name + ".part")
    try:
        part.write_bytes(data)
        if target.exists():
            raise FileExistsError(f"{target} was written meanwhile; nothing is overwritten, save again")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return {"filename": target.name, "subfolder": subfolder, "type": "output"}


def workflow_metadata(hidden) -> dict[str, str]:
    """What the host saves beside its own results, so that a file dropped on the canvas opens its workflow; nothing
    where the user forbids it, or where there is no workflow. ``hidden``: a node's, with prompt and extra_pnginfo."""
    if hidden is None or args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in found.items() if value is not None}


def list_files() -> list[str]:
    """The files of the input folder, and those of the output folder with the host's mark for it."""
    folders = (folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")
    return [
        name + mark
        for folder, mark in folders
        for name in sorted(folder_paths.recursive_search(folder)[0])
        if name.endswith(ENDING)
    ]


def find(name: str) -> Path:
    """The file of a ``name`` as list_files gives it; a ValueError where there is none or it is not one of ours."""
    bare, folder = folder_paths.annotated_filepath(name)
    folder = folder or folder_paths.get_input_directory()
    path = Path(folder, bare)
    if not bare.endswith(ENDING) or not folder_paths.is_within_directory(folder, str(path)):
        raise ValueError(f"'{name}' is no token file of the input or output folder; its name ends on {ENDING}")
    if not path.is_file():
        raise ValueError(f"there is no token file '{name}'; save one with Save Masked Tokens, or refresh the list")
    return path


def load_ids(name: str, make: Callable[..., T]) -> T:
    """``make(ids, codebook=, mask_id=, downscale=)`` of a file; a ValueError that names it where that cannot be."""
    path = find(name)
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
        return make(ids, **{key: int(metadata[key]) for key in SIZES})
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"'{name}' cannot be read as a token file: {error}; save it anew") from error


def fingerprint(name: str) -> str:
    """Changes when the file does."""
    return hashlib.sha256(find(name).read_bytes()).hexdigest()
