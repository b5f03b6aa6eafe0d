"""LoRA files of masked token models: read from ComfyUI's models/loras, written to its output folder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ...host.files import CONVERT, read_weights, write_numbered
from ...host.model_folders import places
from .lora_scale import CONFIG

FOLDER, SUFFIX = "loras", ".safetensors"
EXAMPLE = "loras/masked_token_lora"  # the filename_prefix that error messages suggest
PEFT_NAME = "adapter_model"  # the name of PEFT's files, without the ending
MAX_CONFIG = 2**20  # bytes; PEFT's files have about one thousand
NONE = "none"  # the first option, because a combo needs one even if there is no file

log = logging.getLogger("comfyui-chorus")


def lora_files() -> list[str]:
    """The options of a combo: NONE, then the files."""
    return [NONE, *(name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(SUFFIX))]


def read_lora(name: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any] | None]:
    """The tensors and the metadata of a file in models/loras, and the settings of PEFT that are saved beside it."""
    if not name.lower().endswith(SUFFIX):
        raise ValueError(f"'{name}' is not a {SUFFIX} file; {CONVERT}")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"there is no LoRA file '{name}'; put it into {places(FOLDER)}, or refresh the list")
    return *read_weights(Path(path), f"'{name}'"), read_config(Path(path))


def read_config(path: Path) -> dict[str, Any] | None:
    """The content of the adapter_config.json that belongs to the file ``path``; None if there is none.

    It belongs to adapter_model.safetensors, as PEFT names its files, or to the only LoRA in its folder.
    """
    config = path.with_name(CONFIG)
    if not config.is_file():
        return None
    if path.stem != PEFT_NAME and sum(other.name.lower().endswith(SUFFIX) for other in path.parent.iterdir()) > 1:
        log.warning(
            "LoadMaskedTokenLora: %s is not used, because its folder has several LoRAs. If it belongs to %s, put the two"
            " files into a folder of their own",
            config.name,
            path.name,
        )
        return None
    with config.open("rb") as file:
        data = file.read(MAX_CONFIG + 1)
    try:
        content = json.loads(data.decode("utf-8-sig")) if len(data) <= MAX_CONFIG else None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name}: {CONFIG} beside it is not valid JSON ({error}); replace or remove that file"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path.name}: {CONFIG} beside it: expected an object of at most {MAX_CONFIG} bytes, got {len(data)} bytes of"
            f" {type(content).__name__}; replace or remove that file"
        )
    return content


def write_lora(prefix: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a new numbered file to the output folder, atomically and without overwriting another."""
    return write_numbered(prefix, SUFFIX, EXAMPLE, tensors, metadata)[0]
