"""What the recipes do with demo/weights beside loading: write its files, and tell their versions apart."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..demo import weights


def save_weights(name: str, state_dict: Mapping[str, Tensor], **facts: object) -> None:
    """Writes fp16; facts go into the metadata as strings."""
    half = {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in state_dict.items()}
    write_whole(weights.path(name), half, {k: str(v) for k, v in facts.items()})


def write_whole(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """As safetensors, by a name of this process until it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    safetensors.torch.save_file(tensors, part, metadata=metadata)
    part.chmod(0o644)
    os.replace(part, file)


def digest(*names: str) -> str:
    """Of the files demo/weights/<name>.safetensors: other weights have another."""
    made = hashlib.sha256()
    for name in names:
        made.update(weights.path(name).read_bytes())
    return made.hexdigest()


def save_network(folder: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], **facts: object) -> None:
    save_weights(f"{folder}/{weights.NETWORK}", state_dict, **facts)
    (weights.FOLDER / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
