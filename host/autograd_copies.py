"""Copies of weights and tensors for gradients: autograd cannot save the inference tensors that the host makes."""

import copy
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .attachments import Attachment


def _same_objects(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] for k in a)


def same_weights(a: ModelPatcher, b: ModelPatcher) -> bool:
    """Whether two patchers ask the same of their modules; what differs only in model_options may share one."""
    return (
        a.patches_uuid == b.patches_uuid
        and _same_objects(a.object_patches, b.object_patches)
        and a.weight_wrapper_patches.keys() == b.weight_wrapper_patches.keys()
        and a.injections.keys() == b.injections.keys()
    )


def own_tensors(value: Any) -> Any:
    """``value`` with every tensor in its lists, tuples and dictionaries copied: autograd saves no inference tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {k: own_tensors(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(own_tensors(v) for v in value)
    return value


class NormalWeights:
    """Clones of patchers on modules whose weights autograd may save; patchers that share weights share a module.

    Where the host made the weights in inference mode, the module is a copy whose tensors lie on the same memory (of
    models that the host streams to the GPU, it is loaded again). Call it in ``gradients()``. Copies live as long as
    their patchers.
    """

    def __init__(self) -> None:
        self._made: list[tuple[ModelPatcher, tuple]] = []  # a patcher, what its clones take in place of its module

    def __call__(self, patcher: ModelPatcher) -> ModelPatcher:
        """A clone of ``patcher`` with its patches, on its own module if that may be saved, else on a copy."""
        override = next((o for p, o in self._made if patcher.is_clone(p) and same_weights(patcher, p)), None)
        if override is None and _needs_copy(patcher):
            override = _copied_module(patcher)
            self._made.append((patcher, override))
        clone = patcher.clone(disable_dynamic=patcher.is_dynamic(), model_override=override)
        if override is not None:
            clone.hook_backup = {}
            clone.parent = None  # the host would take the parent for what is loaded when the clone has gone
        for name, models in clone.additional_models.items():
            clone.additional_models[name] = [self(m) for m in models]
        return clone

    def with_attachments(self, model: ModelPatcher) -> ModelPatcher:
        """``__call__`` for a MODEL, and its attachments on copies of their models."""
        out = self(model)
        for key, attachment in model.attachments.items():
            if isinstance(attachment, Attachment):
                out.set_attachments(key, attachment.for_gradients(self))
        return out


def _needs_copy(patcher: ModelPatcher) -> bool:
    module = patcher.model
    # weights that want gradients of their own would have their layers' inputs saved, which nobody asks for
    weights = any(p.is_inference() or p.requires_grad for p in module.parameters())
    return patcher.is_dynamic() or weights or any(b.is_inference() for b in module.buffers())


def _copied_module(patcher: ModelPatcher) -> tuple:
    """A module of the same weights, unpatched, and the backups that belong to it."""
    if patcher.is_dynamic():
        if patcher.cached_patcher_init is None:
            raise ValueError(
                f"{type(patcher.model).__name__} cannot be copied for gradients, since its loader cannot load it again;"
                " use one of ComfyUI's own loaders, or mode search"
            )
        make, arguments, *place = patcher.cached_patcher_init
        made = make(*arguments, disable_dynamic=True)
        override = (made[place[0]] if place else made).get_clone_model_override()
        override[0].requires_grad_(False)
        return override
    comfy.model_management.unload_model_and_clones(patcher)  # the module goes back to its unpatched weights
    # the config answers None to every unknown attribute, __deepcopy__ included
    config = getattr(patcher.model, "model_config", None)
    kept = {id(config): config}
    for module in patcher.model.modules():
        kept |= {
            id(p): torch.nn.Parameter(_alias(p), requires_grad=False) for p in module._parameters.values() if _plain(p)
        }
        kept |= {id(b): _alias(b) for b in module._buffers.values() if _plain(b)}
    return copy.deepcopy(patcher.model, kept), ({}, {}, {}, set())


def _plain(tensor: Tensor | None) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _alias(tensor: Tensor) -> Tensor:
    """A normal tensor on the storage of one that may be an inference tensor; the host changes no weight in place."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
