"""Copies of a model's module whose weights may be tensor subclasses, such as the quantised weights of ComfyUI.

``copy.deepcopy`` fails on a tensor that only wraps others, because such a tensor has no storage of its own.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def map_tensors(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function`` to ``tensor``, or to each tensor that ``tensor`` wraps, and wrap the results again."""
    if not is_traceable_wrapper_subclass(tensor):
        return function(tensor)
    kind: Any = type(tensor)
    names, context = kind.__tensor_flatten__(tensor)
    inner = {name: map_tensors(getattr(tensor, name), function) for name in names}
    return kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


def copy_module(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of ``module``. ``function`` is applied to its weights and buffers that are plain tensors or wrappers.

    Weights of other subclasses are deep-copied, because their contents are unknown here. The weights of the copy
    require no gradients.
    """
    config = getattr(module, "model_config", None)
    # the config is not copied: it returns None for every unknown attribute, even for those that deepcopy looks up
    kept: dict[int, Any] = {id(config): config}
    for part in module.modules():
        for p in part._parameters.values():
            if p is not None and _can_map(p):
                kept[id(p)] = nn.Parameter(map_tensors(p, function), requires_grad=False)
        for b in part._buffers.values():
            if b is not None and _can_map(b):
                kept[id(b)] = map_tensors(b, function)
    return copy.deepcopy(module, kept)


def _can_map(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) or is_traceable_wrapper_subclass(tensor)
