"""Where a run can be stopped: whenever the pack or the host's sampling asks whether the user has cancelled, and whenever a
network begins. Counted, never timed."""

import contextlib

import comfy.model_management
import comfy.ops
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Interrupted = comfy.model_management.InterruptProcessingException
LAYERS = {"LoraLinear", "ConditionEmbedding"}  # that are called by themselves, and are no networks
_ask = comfy.model_management.throw_exception_if_processing_interrupted


def cancel(point: str) -> None:
    """As the button does."""
    comfy.model_management.interrupt_current_processing(True)


def run_out_of_memory(point: str) -> None:
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB ({point})")


def is_network(module: torch.nn.Module) -> bool:
    return type(module).__name__ not in LAYERS and next(module.children(), None) is not None


class Points:
    """While it is open: ``seen`` has the name of every point that was passed, and ``act`` is called at number ``at``.

    ``asked``: count the questions too, besides the networks. What layers ask is no point of its own, but answered.
    """

    def __init__(self, at: int | None = None, act=cancel, asked: bool = True):
        self.at, self.act, self.asked = at, act, asked
        self.seen: list[str] = []
        self.acted = False
        self._depth = 0  # of networks within networks: only the outermost is a point

    def _pass(self, name: str) -> None:
        self.seen.append(name)
        if len(self.seen) - 1 == self.at:
            self.acted = True
            self.act(name)

    def _question(self) -> None:
        if self.asked:
            self._pass("question")
        _ask()

    def _begin(self, module, inputs) -> None:
        self._depth += 1
        if self._depth == 1 and is_network(module):
            self._pass(type(module).__name__)
            _ask()  # as the layers of the host's networks do, which not all of ours are made of

    def _end(self, module, inputs, output) -> None:
        self._depth -= 1

    def __enter__(self) -> "Points":
        with contextlib.ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._begin).remove)
            # a network that raises has begun and ends, one whose hook raises too
            stack.callback(register_module_forward_hook(self._end, always_call=True).remove)
            stack.callback(_put, comfy.model_management, "throw_exception_if_processing_interrupted", _ask)
            _put(comfy.model_management, "throw_exception_if_processing_interrupted", self._question)
            stack.callback(_put, comfy.ops, "run_every_op", comfy.ops.run_every_op)
            _put(comfy.ops, "run_every_op", _ask)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        comfy.model_management.interrupt_current_processing(False)  # as the host does before a run


def _put(place, name: str, function) -> None:
    setattr(place, name, function)


class BackwardPoints(Points):
    """The points are where autograd reaches a network's result on its way back."""

    def __init__(self, at: int | None = None, act=run_out_of_memory):
        super().__init__(at, act, asked=False)

    def _begin(self, module, inputs) -> None:
        self._depth += 1

    def _end(self, module, inputs, output) -> None:
        if self._depth == 1 and is_network(module):
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._pass(f"backward of {type(module).__name__}"))
        self._depth -= 1
