"""Lets the injections of a patcher act on a copy of its module.

An injection changes the code of a module while its patcher is loaded (ComfyUI's bypass LoRAs do). Its functions hold
references to the submodules that they change. A copy of the module therefore needs copies of the functions, with
references to the copied submodules.
"""

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from torch import nn


def move_injections(clone: ModelPatcher, original: nn.Module, module: nn.Module) -> None:
    """Let the injections of ``clone`` act on its module ``module``, a copy of ``original``.

    Call it while neither module is injected, for example after an unload.
    """
    copies = dict(module.named_modules(remove_duplicate=False))
    known: dict[int, Any] = {
        id(part): copies[name] for name, part in original.named_modules(remove_duplicate=False) if name in copies
    }
    for key, injections in clone.injections.items():
        clone.injections[key] = [
            PatcherInjection(_moved(injection.inject, known), _moved(injection.eject, known))
            for injection in injections
        ]
    clone.is_injected = False


def _moved(function: Any, known: dict[int, Any]) -> Any:
    """A copy of ``function`` and of the objects it refers to; modules are replaced by their copies in ``known``."""
    if isinstance(function, MethodType):
        return MethodType(function.__func__, copy.deepcopy(function.__self__, known))
    if isinstance(function, FunctionType) and function.__closure__:
        cells = tuple(CellType(copy.deepcopy(cell.cell_contents, known)) for cell in function.__closure__)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        return made
    return function
