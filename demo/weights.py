"""Loads the weight files of demo/weights, which are fp16 safetensors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..common.weights import shorten, weight_error

FOLDER = Path(__file__).resolve().parent / "weights"
REMEDY = "install the pack again, or make the file with `python run.py train-demo`"


def path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def load(name: str) -> dict[str, Tensor]:
    """The fp32 state dict of demo/weights/<name>.safetensors."""
    if not path(name).exists():
        raise FileNotFoundError(f"{path(name)} is missing; {REMEDY}")
    try:
        weights = {k: v.float() for k, v in safetensors.torch.load_file(path(name)).items()}
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path(name)} cannot be read ({str(error)[:200]}); {REMEDY}") from error
    if broken := [k for k, v in weights.items() if weight_error(v, v.shape)]:
        raise ValueError(f"{path(name)} has weights that are not finite (NaN or infinite): {shorten(broken)}; {REMEDY}")
    return weights


@contextmanager
def errors_naming(name: str) -> Iterator[None]:
    """Name the file in the error if its weights do not fit the network, for example because another version of the pack
    wrote them.

    Raises ValueError in place of the RuntimeError or KeyError of the ``with`` block.
    """
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path(name)} does not fit this version of the pack ({str(error)[:300]}); {REMEDY}"
        ) from error


def metadata(name: str) -> dict[str, str]:
    with safetensors.safe_open(path(name), "pt") as file:
        return file.metadata() or {}


def with_lora(state_dict: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the state dict with a LoRA merged into it.

    The LoRA has the keys that ComfyUI's LoRA loaders expect, without alpha: its scale is 1.
    """
    merged = dict(state_dict)
    up, down = ".lora_up.weight", ".lora_down.weight"
    for key in (key for key in lora if key.endswith(up)):
        name = key.removeprefix("diffusion_model.").removesuffix(up)
        low, weight = lora[key.removesuffix(up) + down], merged[f"{name}.weight"]
        merged[f"{name}.weight"] = weight + (lora[key].flatten(1) @ low.flatten(1)).view_as(weight)
    return merged


NETWORK = "diffusion_pytorch_model"


def load_network(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fp32 state dict and the config of a network in diffusers' layout, in demo/weights/<folder>."""
    return load(f"{folder}/{NETWORK}"), json.loads((FOLDER / folder / "config.json").read_text())
