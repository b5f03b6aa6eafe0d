"""Merges ComfyUI patches into the weights of a masked token model for training, and adds LoRAs as ComfyUI patches."""

from collections.abc import Mapping

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .comfy_model import MaskedTokenModel


def merged_weights(patcher: ModelPatcher, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the weights with the patches of ``patcher`` merged, whether or not the model is loaded."""
    weights = {}
    for key, ((weight, convert), *patches) in patcher.get_key_patches().items():
        weight = convert(weight.to(device, torch.float32, copy=True), inplace=True)
        weights[key] = comfy.lora.calculate_weight(patches, weight, key).to(dtype)
    return weights


def add_lora(
    model: MaskedTokenModel, changes: Mapping[str, tuple[Tensor, Tensor, float]], strength: float
) -> MaskedTokenModel:
    """``model`` with ComfyUI patches that add strength · alpha / rank · up @ down to the weights of modules.

    ``changes``: down [rank, in], up [out, rank] and alpha by module name.
    """
    tensors, keys = {}, {}
    for name, (down, up, alpha) in changes.items():
        keys[name] = f"{name}.weight"
        tensors |= {
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.weight": up,
            f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64),
        }
    transformer = model.transformer.clone()
    added = transformer.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    if len(added) != len(changes):
        raise RuntimeError(
            f"ComfyUI patched {len(added)} of {len(changes)} modules, so this version of ComfyUI is not supported; update ComfyUI"
        )
    return model.with_transformer(transformer)
