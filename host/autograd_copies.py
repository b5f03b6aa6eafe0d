"""Weights and tensors that autograd may save: the host makes its own in inference mode, of which nothing may be saved."""

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..techniques.saliency_blend.comfy_hook import KEY, BlendChain, blend_chain
from ..techniques.saliency_blend.comfy_experts import Expert, same_weights


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

    def __init__(self):
        self._made: list[tuple] = []  # a patcher, what its clones take in place of its module

    def __call__(self, patcher):
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

    def blended(self, model):
        """``__call__`` for a MODEL that may carry a blend: its experts come along, its trace stays as it is."""
        out, chain = self(model), blend_chain(model)
        if chain.experts:
            experts = tuple(
                Expert(self(e.patcher), own_tensors(e.positive), own_tensors(e.negative), e.label)
                for e in chain.experts
            )
            settings = tuple((own, *(_Untraced() for _ in traces)) for own, *traces in chain.settings)
            out.set_attachments(KEY, BlendChain(experts, settings, _without_record(chain.begin)))
        return out


class _Untraced:
    """Takes a trace's place: what an optimisation tries is no run that a user wants to see."""

    def clear(self) -> None:
        pass

    def finish(self, record) -> None:
        pass


class _Forgetful(list):
    def append(self, item) -> None:
        pass


def _without_record(begin: Callable) -> Callable:
    """``begin`` of a technique that keeps no steps: soft masks would keep the graph of every prediction alive."""

    def begun(*args, **kwargs):
        technique = begin(*args, **kwargs)
        technique.record.steps = _Forgetful()
        return technique

    return begun


def _needs_copy(patcher) -> bool:
    module = patcher.model
    # weights that want gradients of their own would have their layers' inputs saved, which nobody asks for
    weights = any(p.is_inference() or p.requires_grad for p in module.parameters())
    return patcher.is_dynamic() or weights or any(b.is_inference() for b in module.buffers())


def _copied_module(patcher) -> tuple:
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
