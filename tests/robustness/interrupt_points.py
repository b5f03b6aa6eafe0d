"""Points at which a run can be interrupted: every check for an interrupt, and the start of every network.

The checks are in the code of the pack and of ComfyUI's sampling. Tests number the points, so that results do not depend
on time.
"""

import contextlib

import comfy.model_management
import comfy.ops
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Interrupted = comfy.model_management.InterruptProcessingException
LAYERS = {"LoraLinear", "ConditionEmbedding"}  # modules that run outside a network but are not networks
_check_interrupted = comfy.model_management.throw_exception_if_processing_interrupted


def cancel(point: str) -> None:
    """Request an interrupt, as the Cancel button does."""
    comfy.model_management.interrupt_current_processing(True)


def run_out_of_memory(point: str) -> None:
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB ({point})")


def is_network(module: torch.nn.Module) -> bool:
    return type(module).__name__ not in LAYERS and next(module.children(), None) is not None


class InterruptPoints:
    """Context that records the name of every point in ``names`` and calls ``act`` at point number ``at``.

    ``count_checks``: count interrupt checks as well as networks. The interrupt checks of layers take effect but are not
    counted.
    """

    def __init__(self, at: int | None = None, act=cancel, count_checks: bool = True):
        self.at, self.act, self.count_checks = at, act, count_checks
        self.names: list[str] = []
        self.acted = False
        self._depth = 0  # depth of nested modules; only the outermost network is a point

    def _pass(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            self.acted = True
            self.act(name)

    def _interrupt_check(self) -> None:
        if self.count_checks:
            self._pass("interrupt check")
        _check_interrupted()

    def _begin(self, module, inputs) -> None:
        self._depth += 1
        if self._depth == 1 and is_network(module):
            self._pass(type(module).__name__)
            _check_interrupted()  # ComfyUI's layers check too, but some networks of the pack have other layers

    def _end(self, module, inputs, output) -> None:
        self._depth -= 1

    def __enter__(self) -> "InterruptPoints":
        with contextlib.ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._begin).remove)
            # ``_end`` is also called when the network or its first hook raises
            stack.callback(register_module_forward_hook(self._end, always_call=True).remove)
            stack.callback(
                _replace, comfy.model_management, "throw_exception_if_processing_interrupted", _check_interrupted
            )
            _replace(comfy.model_management, "throw_exception_if_processing_interrupted", self._interrupt_check)
            stack.callback(_replace, comfy.ops, "run_every_op", comfy.ops.run_every_op)
            _replace(comfy.ops, "run_every_op", _check_interrupted)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        comfy.model_management.interrupt_current_processing(False)  # as ComfyUI does before a run


def _replace(place, name: str, function) -> None:
    setattr(place, name, function)


class BackwardPoints(InterruptPoints):
    """Points at which the backward pass reaches the output of a network."""

    def __init__(self, at: int | None = None, act=run_out_of_memory):
        super().__init__(at, act, count_checks=False)

    def _begin(self, module, inputs) -> None:
        self._depth += 1

    def _end(self, module, inputs, output) -> None:
        if self._depth == 1 and is_network(module):
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._pass(f"backward of {type(module).__name__}"))
        self._depth -= 1
