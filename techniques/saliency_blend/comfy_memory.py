"""Says before a run which models of the blend ComfyUI will load together, and whether it will offload weights."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management as management
import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher

from .memory import ALL, DYNAMIC, FIT, MAIN, NONE, DeviceMemory, ModelMemory

log = logging.getLogger("comfyui-chorus")


def memory_notes(
    model: ModelPatcher,
    experts: Sequence[tuple[str, ModelPatcher]],
    noise_shape: Sequence[int],
    conds: dict[str, list[dict]],
    options: Mapping[str, Any],
) -> tuple[str, ...]:
    """One sentence for each device of the run. It is logged, too, unless all weights are on the device already.

    ``experts``: label and patcher of each expert that is not off. The other arguments are those of ComfyUI's
    prepare_sampling, of which this function asks the same estimates: ``noise_shape`` of the latent, ``conds`` with the
    additional models of the experts, ``options`` as keyword arguments. Empty if the run is a training that offloads all
    weights, or if ComfyUI does not know the free memory (DirectML).
    """
    if options.get("force_offload") or management.directml_enabled:
        return ()
    found = devices(model, experts, noise_shape, conds, options)
    notes = tuple(str(device) for device in found)
    for device, note in zip(found, notes, strict=True):
        if not device.is_loaded:
            log.info("%s", note)
    return notes


def devices(
    model: ModelPatcher,
    experts: Sequence[tuple[str, ModelPatcher]],
    noise_shape: Sequence[int],
    conds: dict[str, list[dict]],
    options: Mapping[str, Any],
) -> list[DeviceMemory]:
    """The memory of each device of the run; for the arguments see ``memory_notes``."""
    additional, further = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
    additional = [
        *additional,
        *comfy.sampler_helpers.get_additional_models_from_model_options(options.get("model_options") or {}),
        *model.get_nested_additional_models(),
    ]
    _, least = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)
    kept = management.minimum_inference_memory()
    working = max(kept, least + further + management.extra_reserved_memory())

    names: dict[torch.nn.Module, list[str]] = {model.model: ["base"]}
    for label, patcher in experts:
        names.setdefault(patcher.model, []).append(f"'{label}'")
    loaded = [model, *(patcher for _, patcher in experts), *additional]
    # ComfyUI also loads the models of the patches on these MODELs
    loaded += [extra for patcher in loaded for extra in patcher.model_patches_models()]
    modules: dict[torch.nn.Module, ModelPatcher] = {}
    for patcher in loaded:
        modules.setdefault(patcher.model, patcher)

    by_device: dict[torch.device, dict[torch.nn.Module, ModelPatcher]] = {}
    for module, patcher in modules.items():
        by_device.setdefault(patcher.load_device, {})[module] = patcher
    found = []
    for device, here in by_device.items():
        memories = tuple(
            ModelMemory(
                tuple(names.get(module, (type(module).__name__,))), patcher.model_size(), _loaded(patcher, device)
            )
            for module, patcher in here.items()
        )
        dynamic = any(patcher.is_dynamic() for patcher in here.values())
        others = [
            p
            for p in management.loaded_models()
            if p is not None and p.load_device == device and p.model not in modules
        ]
        found.append(
            DeviceMemory(
                str(device),
                memories,
                working,
                management.get_free_memory(device),
                sum(p.loaded_size() for p in others),
                _placement(device, dynamic, bool(options.get("force_full_load"))),
                management.MIN_WEIGHT_MEMORY_RATIO,
                kept,
            )
        )
    return found


def _loaded(patcher: ModelPatcher, device: torch.device) -> int:
    """Bytes of the weights of ``patcher`` that are on ``device``."""
    return patcher.loaded_size() if patcher.current_loaded_device() == device else 0


def _placement(device: torch.device, dynamic: bool, full: bool) -> str:
    """How ComfyUI places weights on ``device``, by its start options.

    ``dynamic``: whether they are loaded during the run. ``full``: whether the run asks for all weights.
    """
    state = management.vram_state
    if management.is_device_cpu(device):
        return MAIN
    if dynamic:
        return DYNAMIC
    if state == management.VRAMState.NO_VRAM:
        return NONE
    limited = state in (management.VRAMState.LOW_VRAM, management.VRAMState.NORMAL_VRAM)
    return FIT if limited and management.lowvram_available and not full else ALL
