"""Copies of weights and tensors for gradients, since autograd cannot save the inference tensors that ComfyUI makes."""

from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from .attachments import Attachment
from .attention import set_attention
from .injections import move_injections
from .module_copies import copy_module
from .patcher_differences import same_module


def clone_tensors(value: Any) -> Any:
    """Clone all tensors in nested tensors, lists, tuples and dictionaries, since autograd cannot save inference tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, NestedTensor):
        return NestedTensor([part.clone() for part in value.unbind()])
    if type(value) is dict:
        return {k: clone_tensors(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(clone_tensors(v) for v in value)
    return value


class AutogradCopies:
    """Clones patchers for runs with gradients: autograd can save the clones' weights, and attention has a derivative.

    The clones of patchers that share weights also share a module. If the weights were made in inference mode, this
    module is a copy, and its tensors share the memory of the original tensors. A model that ComfyUI streams to the GPU
    is loaded again instead. Use this class inside ``gradients()``. A copied module is freed with its last clone and
    this object.
    """

    def __init__(self) -> None:
        self._made: list[tuple[ModelPatcher, tuple]] = []  # a patcher and the model_override of its clones

    def __call__(self, patcher: ModelPatcher) -> ModelPatcher:
        """Clone of ``patcher`` with its patches.

        The clone has the module of ``patcher`` if autograd can save its weights, otherwise a copy of the module.
        """
        override = next((o for p, o in self._made if patcher.is_clone(p) and same_module(patcher, p)), None)
        if override is None and _needs_copy(patcher):
            override = _copied_module(patcher)
            self._made.append((patcher, override))
        clone = patcher.clone(disable_dynamic=patcher.is_dynamic(), model_override=override)
        if override is not None:
            clone.hook_backup = {}
            move_injections(clone, patcher.model, override[0])
            clone.parent = None  # otherwise ComfyUI would treat the parent as loaded once the clone is freed
        set_attention(clone)
        for name, models in clone.additional_models.items():
            clone.additional_models[name] = [self(m) for m in models]
        return clone

    def unload(self) -> None:
        """Unload the copies and remove their patches. Call it inside ``gradients()``, before the copies are freed.

        Otherwise ComfyUI would unload the copies later, in inference mode. There it cannot remove patches from
        quantised weights that are not inference tensors, such as the weights of the copies.
        """
        for patcher, _ in self._made:
            comfy.model_management.unload_model_and_clones(patcher, unload_additional_models=False)

    def with_attachments(self, model: ModelPatcher) -> ModelPatcher:
        """As ``__call__``, but also clones the models of the attachments of ``model``."""
        out = self(model)
        for key, attachment in model.attachments.items():
            if isinstance(attachment, Attachment):
                out.set_attachments(key, attachment.for_gradients(self))
        return out


def _needs_copy(patcher: ModelPatcher) -> bool:
    module = patcher.model
    # weights that require gradients would make autograd save the inputs of their layers, which are not needed
    weights = any(p.is_inference() or p.requires_grad for p in module.parameters())
    return patcher.is_dynamic() or weights or any(b.is_inference() for b in module.buffers())


def _copied_module(patcher: ModelPatcher) -> tuple:
    """The ``model_override`` of a clone: an unpatched module with the same weights, and its backups."""
    if patcher.is_dynamic():
        if patcher.cached_patcher_init is None:
            raise ValueError(
                f"{type(patcher.model).__name__} cannot be copied for gradients, since its loader cannot load it again;"
                " load it with a loader node of ComfyUI, or use mode search"
            )
        make, arguments, *place = patcher.cached_patcher_init
        made = make(*arguments, disable_dynamic=True)
        override = (made[place[0]] if place else made).get_clone_model_override()
        override[0].requires_grad_(False)
        return override
    comfy.model_management.unload_model_and_clones(patcher)  # the module goes back to its unpatched weights
    return copy_module(patcher.model, _alias), ({}, {}, {}, set())


def _alias(tensor: Tensor) -> Tensor:
    """Normal tensor that shares the storage of ``tensor``, which may be an inference tensor.

    This is safe, since ComfyUI changes no weight in place.
    """
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
