"""Writes the files of demo/weights and hashes them, for recipes and benchmarks."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..demo import weights
from .recipes import state


def save_weights(name: str, state_dict: Mapping[str, Tensor], **facts: object) -> None:
    """Write a state dict in fp16, with ``facts`` as strings in the metadata."""
    half = {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in state_dict.items()}
    write_whole(weights.path(name), half, {k: str(v) for k, v in facts.items()})


def write_whole(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically: an interrupted call leaves no partial file."""

    def write(part: Path) -> None:
        safetensors.torch.save_file(tensors, part, metadata=metadata)
        part.chmod(0o644)

    state.write_whole(file, write)


def digest(*names: str) -> str:
    """SHA-256 of the files demo/weights/<name>.safetensors."""
    made = hashlib.sha256()
    for name in names:
        made.update(weights.path(name).read_bytes())
    return made.hexdigest()


def save_network(folder: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], **facts: object) -> None:
    """Write a network in diffusers' layout, weights and config.json, to demo/weights/<folder>."""
    save_weights(f"{folder}/{weights.NETWORK}", state_dict, **facts)
    (weights.FOLDER / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
