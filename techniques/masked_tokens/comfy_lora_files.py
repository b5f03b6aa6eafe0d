"""LoRAs of masked token models on disk: read from the host's models/loras, written to its output folder."""

from collections.abc import Mapping
from pathlib import Path

import comfy.utils
import folder_paths
from torch import Tensor

from ...host.files import next_file, write_whole
from .comfy_files import diagnosis

FOLDER, SUFFIX = "loras", ".safetensors"
EXAMPLE = "loras/masked_token_lora"  # of a prefix
NONE = "none"  # a combo without any file must still have an entry


def lora_files() -> list[str]:
    """What a combo offers: NONE, then the files."""
    return [NONE, *(name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX))]


def read_lora(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file in models/loras."""
    if not name.endswith(SUFFIX):
        raise ValueError(f"'{name}' is not a {SUFFIX} file; convert it first")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(
            f"there is no such LoRA in {' or '.join(folder_paths.get_folder_paths(FOLDER))}; refresh the list"
        )
    try:
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:  # the host and safetensors raise several kinds
        raise ValueError(f"'{name}' cannot be read: {diagnosis(Path(path))} ({str(error)[:200]})") from error
    return tensors, metadata or {}


def write_lora(prefix: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """A new numbered file of the output folder: whole or not at all, and never in place of another."""
    path, _ = next_file(prefix, SUFFIX, EXAMPLE)
    write_whole(path, tensors, metadata)
    return path
