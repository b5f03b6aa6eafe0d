"""Gradients through ComfyUI's sampling, with gradient checkpointing: the backward pass recomputes each step.

ComfyUI runs nodes in inference mode. Some of its kernels have no derivative, and its networks contain in-place
operations. ``with gradients()`` makes gradients possible in its block and then restores ComfyUI's state.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from .attention import differentiable_attention
from .gradient_check import Comparison, direction_like, disagreement

COMPARED = 4096  # number of values of an output that are compared with the recomputed output
SAME = 1e-2  # largest accepted difference, relative to the norm of these values; rounding differences are far smaller


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd inside a node, with ComfyUI's differentiable kernels and attention that has a derivative."""
    before = comfy.model_management.in_training
    # Flux, Lumina and others otherwise use kernels without a derivative
    comfy.model_management.in_training = True  # ty: ignore[invalid-assignment]  # ty expects False, but any bool is valid
    try:
        # one thread: the recomputation must not run concurrently on several devices
        single_thread = torch.autograd.set_multithreading_enabled(False)
        with torch.inference_mode(False), torch.enable_grad(), single_thread, differentiable_attention():
            yield
    finally:
        comfy.model_management.in_training = before


class _Sizes:
    """Counts the bytes of activations that autograd would save, without saving them."""

    def __init__(self, weights: set[int]) -> None:
        self._weights = weights
        self._seen: dict[tuple[int, int], tuple[StorageWeakRef, int]] = {}  # (storage, version) -> bytes

    def __enter__(self) -> "_Sizes":
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # a weak reference prevents reuse of the address of a freed storage; a tensor that was changed in place since it
        # was last saved is counted twice
        ref = StorageWeakRef(storage)
        if ref.cdata not in self._weights:
            self._seen[ref.cdata, tensor._version] = ref, storage.nbytes()

    @property
    def total(self) -> int:
        return sum(size for _, size in self._seen.values())


def _unpack(packed: None) -> Tensor:
    raise RuntimeError("a backward pass needs activations that were counted but not saved")


class Recorder:
    """Makes functions of tensors differentiable.

    ``checkpoint``: save no activations and recompute each call in the backward pass, so that only one call's
    activations are in memory at a time. Otherwise autograd saves the activations of all calls. Unlike
    torch.utils.checkpoint, both ways are correct for functions that change their intermediate results in place. Call
    the recorder and the backward pass inside ``recording()``.

    ``what`` is the name of a function in messages, for example "denoiser". ``check(what, size)`` receives the bytes
    that the backward pass of a call needs. It is called once for each ``what``, before activations are saved.
    ``compare``: settings, by ``what``, for comparing the gradient of the first call with finite differences.
    """

    def __init__(
        self,
        checkpoint: bool = True,
        check: Callable[[str, int], None] = lambda what, size: None,
        compare: Mapping[str, Comparison] | None = None,
    ) -> None:
        self.checkpoint, self._check = checkpoint, check
        self.sizes: dict[str, int] = {}
        self.recomputing = self.comparing = False
        self._compare = dict(compare or {})
        self._weights: set[int] = set()

    def add_weights(self, module: torch.nn.Module) -> None:
        """Exclude the weights and buffers of ``module`` from the size of activations."""
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
    def _recompute(self) -> Iterator[None]:
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    def __call__(self, what: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``, differentiable if an input requires gradients."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            with torch.no_grad():
                return function(*inputs)
        if self.checkpoint:
            out = _Recomputed.apply(self, what, function, *inputs)
        else:
            if what not in self.sizes:
                # A blend recognises a repeated call by the identity of the tensor x. Measuring on copies of the inputs
                # lets it treat the call below as a new step.
                self.measure_activations(what, function, _leaves(inputs, [x.requires_grad for x in inputs]))
            out = function(*inputs)
        if inputs[0].requires_grad and (comparison := self._compare.pop(what, None)) is not None:
            self.comparing = True
            try:
                self._compare_gradient(comparison, what, function, inputs, out)
            finally:
                self.comparing = False
        return out

    def _compare_gradient(
        self, comparison: Comparison, what: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], out: Tensor
    ) -> None:
        """ValueError if the derivative of ``out`` with respect to the first input disagrees with finite differences.

        Calls ``function`` twice more, and a third time if the activations of ``out`` are not saved.
        """
        x, *others = (v.detach() for v in inputs)
        direction, step, needed = direction_like(x), comparison.step(x), [v.requires_grad for v in inputs]
        # measure_activations enables autograd, so torch selects the same kernels as for ``out``
        up, down = (
            self.measure_activations(what, function, _leaves([x + h * direction, *others], needed))
            for h in (step, -step)
        )

        def derivative(cotangent: Tensor) -> Tensor:
            try:
                return torch.autograd.grad(out, inputs[0], cotangent.to(out), retain_graph=True)[0]
            except RuntimeError as error:
                if "derivative" in str(error) or "autograd" in str(error):
                    # a custom operation that has not registered a derivative
                    raise ValueError(
                        f"no gradient flows through the {what} ({error}): {comparison.causes()}"
                    ) from error
                raise

        if found := disagreement(out.detach(), up, down, direction, step, derivative):
            raise ValueError(f"the gradient of the {what} is wrong: {found}; {comparison.causes()}")

    def measure_activations(self, what: str, function: Callable[..., Tensor], inputs: Iterable[Tensor]) -> Tensor:
        """``function(*inputs)`` without its graph; the first call for ``what`` passes the activations' size to ``check``."""
        # autograd stays enabled, so that torch selects the same kernels here and in the recomputation
        with torch.enable_grad(), _Sizes(self._weights) as sizes:
            out = function(*inputs)
        if not out.requires_grad:
            raise ValueError(f"no gradient flows through the {what}: a part of it runs under no_grad; use mode search")
        if what not in self.sizes:
            self._check(what, sizes.total)
            self.sizes[what] = sizes.total
        return out.detach()


def _leaves(inputs: Iterable[Tensor], needs_grad: Iterable[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(needed) for x, needed in zip(inputs, needs_grad, strict=True)]


def _sample(out: Tensor) -> Tensor:
    flat = out.detach().flatten()
    return flat[:: max(1, flat.numel() // COMPARED)].float().clone()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, what: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.recorder, ctx.what, ctx.function = recorder, what, function
        ctx.needs_grad = ctx.needs_input_grad[3:]
        out = recorder.measure_activations(what, function, _leaves(inputs, ctx.needs_grad))
        ctx.save_for_backward(_sample(out), *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        before, *inputs = ctx.saved_tensors
        what, recorder = ctx.what, ctx.recorder
        with torch.enable_grad(), allow_mutation_on_saved_tensors(), recorder._recompute():
            leaves = _leaves(inputs, ctx.needs_grad)
            out = ctx.function(*leaves)
            _check_same(what, before, _sample(out))
            # small gradients would underflow in float16; scaling by a power of two is exact
            scale = _power_of_two(gradient)
            grads = iter(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], gradient * scale))
        return None, None, None, *(next(grads) / scale if needed else None for needed in ctx.needs_grad)


def _power_of_two(gradient: Tensor) -> float:
    """The power of two that scales the largest absolute value of ``gradient`` to at least 1 and below 2.

    It is 1 if that value is zero or not finite.
    """
    largest = float(gradient.abs().max()) if gradient.numel() else 0.0
    return 2.0 ** -math.floor(math.log2(largest)) if 0.0 < largest < math.inf else 1.0


def _check_same(what: str, before: Tensor, after: Tensor) -> None:
    if not torch.isfinite(after).all():
        raise ValueError(f"the output of the {what} is not finite (NaN or infinite); run the model in a wider dtype")
    off = float((after - before).norm() / before.norm().clamp(min=1e-20))
    if not off <= SAME:
        cause = "a patch on the MODEL is random or depends on earlier steps; remove the patch, or use mode search"
        if what != "denoiser":
            cause = f"the {what} adds random noise; use mode search"
        raise ValueError(
            f"the {what} returned another result when it was recomputed for its gradient ({100 * off:.2g} % off;"
            f" rounding explains up to {100 * SAME:g} %): {cause}"
        )


def free_memory_for(size: int, device: torch.device, keep: Sequence[ModelPatcher] = ()) -> None:
    """Have ComfyUI unload models other than ``keep`` from ``device`` until ``size`` bytes are free there."""
    if comfy.model_management.get_free_memory(device) < size:
        modules = [p.model for p in keep]
        loaded = [
            m
            for m in comfy.model_management.current_loaded_models
            if m.model is not None and any(m.model.model is k for k in modules)
        ]
        comfy.model_management.free_memory(size, device, keep_loaded=loaded)


def require_memory(what: str, size: int, device: torch.device, keep: Sequence[ModelPatcher], remedy: str) -> None:
    """Free memory for the gradient of ``what``; MemoryError if less than ``size`` bytes are free afterwards."""
    free_memory_for(size, device, keep)
    free = comfy.model_management.get_free_memory(device)
    if free < size:
        raise MemoryError(
            f"the gradient of the {what} needs {size / 2**30:.2f} GiB on {device} (measured), {free / 2**30:.2f} GiB"
            f" are free; {remedy}"
        )
