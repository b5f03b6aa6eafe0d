"""Weight files of demo/weights: fp16 safetensors, written whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
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
