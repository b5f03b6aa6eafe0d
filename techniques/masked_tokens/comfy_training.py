"""What training on a masked token model asks of the host: its weights as they are patched, a LoRA put on."""

from collections.abc import Mapping

import comfy.lora
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .comfy_model import MaskedTokenModel


def merged_weights(patcher: ModelPatcher, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the weights with the patches of ``patcher`` merged into them, whatever is loaded where."""
    weights = {}
    for key, ((weight, convert), *patches) in patcher.get_key_patches().items():
        weight = convert(weight.to(device, torch.float32, copy=True), inplace=True)
        weights[key] = comfy.lora.calculate_weight(patches, weight, key).to(dtype)
    return weights


def add_lora(
    model: MaskedTokenModel, changes: Mapping[str, tuple[Tensor, Tensor, float]], strength: float
) -> MaskedTokenModel:
    """``model`` with the weights of its modules changed by strength · alpha / rank · up @ down, as the host's patches.

    ``changes`` holds down [rank, in], up [out, rank] and alpha for the names of modules.
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
        raise RuntimeError(f"the host patched {len(added)} of {len(changes)} modules; this ComfyUI is not supported")
    return model.with_transformer(transformer)
