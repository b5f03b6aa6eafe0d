"""Gradients through the host's own sampling, by steps that are computed twice.

The host runs its nodes in inference mode, with kernels that have no derivative and with x += ... in its networks.
What follows holds for one block ``with gradients()``; nothing of the host stays changed after it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

COMPARED = 4096  # numbers of an output that are kept to see whether a second computation gives the same
SAME = 1e-2  # of their norm; kernels that add up in varying order stay far below


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd inside a node, with the host's differentiable kernels."""
    before = comfy.model_management.in_training
    # Flux, Lumina and others otherwise use kernels without a derivative
    comfy.model_management.in_training = True  # ty: ignore[invalid-assignment]  # any bool will do
    try:
        # one thread: what is computed again in backward may not run beside itself on several devices
        with torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        comfy.model_management.in_training = before


class _Sizes:
    """Counts the bytes that autograd wants to keep, and keeps nothing."""

    def __init__(self, weights: set[int]) -> None:
        self._weights = weights
        self._seen: dict[tuple[int, int], tuple[StorageWeakRef, int]] = {}  # by storage and version, with its bytes

    def __enter__(self) -> "_Sizes":
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # a weak reference keeps the address of a freed storage from being given away again; what was changed in place
        # since it was last saved is kept twice
        ref = StorageWeakRef(storage)
        if ref.cdata not in self._weights:
            self._seen[ref.cdata, tensor._version] = ref, storage.nbytes()

    @property
    def total(self) -> int:
        return sum(size for _, size in self._seen.values())


def _unpack(nothing: None) -> Tensor:
    raise RuntimeError("a backward pass asks for activations that were counted and not kept")


class Recorder:
    """Makes functions of tensors differentiable with the memory of one call at a time.

    ``checkpoint``: keep no activations, compute each call again in backward; else autograd keeps them all, which is
    for tests. ``check(what, size)`` is told the bytes that the backward pass of a call needs, once for each
    ``what``, before any is kept. Other than torch.utils.checkpoint, right for functions that change their own
    intermediate results in place. Call it, and backward, in ``recording()``.
    """

    def __init__(self, checkpoint: bool = True, check: Callable[[str, int], None] = lambda what, size: None) -> None:
        self.checkpoint, self._check = checkpoint, check
        self.sizes: dict[str, int] = {}
        self.recomputing = False
        self._weights: set[int] = set()

    def add_weights(self, module: torch.nn.Module) -> None:
        """Storages that are there anyway and count as no activations."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._weights.add(tensor.untyped_storage()._cdata)

    @contextmanager
    def recording(self) -> Iterator[None]:
        if self.checkpoint:
            yield
        else:
            with allow_mutation_on_saved_tensors():
                yield

    @contextmanager
    def again(self) -> Iterator[None]:
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    def __call__(self, what: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``; differentiable where an input wants gradients."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            with torch.no_grad():
                return function(*inputs)
        if self.checkpoint:
            return _Recomputed.apply(self, what, function, *inputs)
        if what not in self.sizes:
            # on tensors of its own: a blend tells a repeated question by its x
            self.run_and_forget(what, function, _leaves(inputs, [x.requires_grad for x in inputs]))
        return function(*inputs)

    def run_and_forget(self, what: str, function: Callable[..., Tensor], inputs: Iterable[Tensor]) -> Tensor:
        """``function(*inputs)`` as it is computed for a gradient, with nothing kept for it."""
        # with autograd on, since kernels differ with it and the second computation must agree
        with torch.enable_grad(), _Sizes(self._weights) as sizes:
            out = function(*inputs)
        if not out.requires_grad:
            raise ValueError(f"the {what} passes no gradient on: a part of it runs under no_grad; use mode search")
        if what not in self.sizes:
            self._check(what, sizes.total)
            self.sizes[what] = sizes.total
        return out.detach()


def _leaves(inputs: Iterable[Tensor], wanted: Iterable[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]


def _sample(out: Tensor) -> Tensor:
    flat = out.detach().flatten()
    return flat[:: max(1, flat.numel() // COMPARED)].float().clone()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, what: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.recorder, ctx.what, ctx.function = recorder, what, function
        ctx.wanted = ctx.needs_input_grad[3:]
        out = recorder.run_and_forget(what, function, _leaves(inputs, ctx.wanted))
        ctx.save_for_backward(_sample(out), *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        before, *inputs = ctx.saved_tensors
        what, recorder = ctx.what, ctx.recorder
        with torch.enable_grad(), allow_mutation_on_saved_tensors(), recorder.again():
            leaves = _leaves(inputs, ctx.wanted)
            out = ctx.function(*leaves)
            _check_same(what, before, _sample(out))
            found = iter(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], gradient))
        return None, None, None, *(next(found) if want else None for want in ctx.wanted)


def _check_same(what: str, before: Tensor, after: Tensor) -> None:
    if not torch.isfinite(after).all():
        raise ValueError(f"the result of the {what} is not finite (NaN or infinite); run it in a wider dtype")
    off = float((after - before).norm() / before.norm().clamp(min=1e-20))
    if not off <= SAME:
        raise ValueError(
            f"the {what} gave another result ({100 * off:.2g} % off, up to {100 * SAME:g} % may be rounding) when it was"
            " computed again for its gradient: a patch on the MODEL draws at random or remembers earlier steps; remove"
            " the patch, or use mode search"
        )


def make_room(size: int, device: torch.device, keep: Sequence[ModelPatcher] = ()) -> None:
    """Have the host take models off ``device`` until ``size`` bytes are free there, all but the patchers ``keep``."""
    if comfy.model_management.get_free_memory(device) < size:
        modules = [p.model for p in keep]
        loaded = [
            m
            for m in comfy.model_management.current_loaded_models
            if m.model is not None and any(m.model.model is k for k in modules)
        ]
        comfy.model_management.free_memory(size, device, keep_loaded=loaded)


def require_room(what: str, size: int, device: torch.device, keep: Sequence[ModelPatcher], remedy: str) -> None:
    """``make_room`` for the gradient of ``what``; a MemoryError where less is free after it."""
    make_room(size, device, keep)
    free = comfy.model_management.get_free_memory(device)
    if free < size:
        raise MemoryError(
            f"the gradient of the {what} needs {size / 2**30:.2f} GiB on {device} (measured), {free / 2**30:.2f} GiB"
            f" are free; {remedy}"
        )
