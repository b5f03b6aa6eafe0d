"""Weight files of demo/weights: fp16 safetensors, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..common.weights import complaint, shorten

FOLDER = Path(__file__).resolve().parent / "weights"
REMEDY = "get the pack again, or make it with `python run.py train-demo`"


def path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def load(name: str) -> dict[str, Tensor]:
    """The fp32 state dict of demo/weights/<name>.safetensors."""
    if not path(name).exists():
        raise FileNotFoundError(f"{path(name)} is missing: make it with `python run.py train-demo`.")
    try:
        found = {k: v.float() for k, v in safetensors.torch.load_file(path(name)).items()}
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path(name)} cannot be read ({str(error)[:200]}): {REMEDY}") from error
    if broken := [k for k, v in found.items() if complaint(v, v.shape)]:
        raise ValueError(f"{path(name)} holds no finite numbers for {shorten(broken)}: {REMEDY}")
    return found


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Weights that are not those of the network, as of another version of the pack, are an error that names their file."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path(name)} does not fit this version of the pack ({str(error)[:300]}): {REMEDY}"
        ) from error


def metadata(name: str) -> dict[str, str]:
    with safetensors.safe_open(path(name), "pt") as file:
        return file.metadata() or {}


def save(name: str, state_dict: Mapping[str, Tensor], **facts: object) -> None:
    """Writes fp16; facts go into the metadata as strings."""
    half = {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in state_dict.items()}
    write_whole(path(name), half, {k: str(v) for k, v in facts.items()})


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
        made.update(path(name).read_bytes())
    return made.hexdigest()


def with_lora(state_dict: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a LoRA of their model in them; its files are as the host's LoRA loaders read them, without alpha."""
    found = dict(state_dict)
    up, down = ".lora_up.weight", ".lora_down.weight"
    for key in (key for key in lora if key.endswith(up)):
        name = key.removeprefix("diffusion_model.").removesuffix(up)
        low, weight = lora[key.removesuffix(up) + down], found[f"{name}.weight"]
        found[f"{name}.weight"] = weight + (lora[key].flatten(1) @ low.flatten(1)).view_as(weight)
    return found


NETWORK = "diffusion_pytorch_model"


def load_network(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fp32 state dict and the config of a network saved as diffusers does, in demo/weights/<folder>."""
    return load(f"{folder}/{NETWORK}"), json.loads((FOLDER / folder / "config.json").read_text())


def save_network(folder: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], **facts: object) -> None:
    save(f"{folder}/{NETWORK}", state_dict, **facts)
    (FOLDER / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
