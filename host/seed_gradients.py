"""Gradients through the host's own sampling: weights that autograd may save, and steps that are computed twice.

The host runs its nodes in inference mode, with kernels that have no derivative and with x += ... in its networks.
What follows holds for one block ``with gradients()``; nothing of the host stays changed after it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_base
import comfy.model_management
import torch
from comfy.ldm.modules import attention
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from .blend_hook import KEY, BlendChain, blend_chain
from .experts import Expert, same_weights

NO_DERIVATIVE = ("CosmosPredict2", "Anima", "JoyImage")  # their rotary embedding is a fused kernel in training too
NO_DERIVATIVE_ATTENTION = {"attention_sage": "--use-sage-attention", "attention_flash": "--use-flash-attention"}
COMPARED = 4096  # numbers of an output that are kept to see whether a second computation gives the same
SAME = 1e-2  # of their norm; kernels that add up in varying order stay far below


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd inside a node, with the host's differentiable kernels."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True  # Flux, Lumina and others otherwise use kernels without a derivative
    try:
        # one thread: what is computed again in backward may not run beside itself on several devices
        with torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        comfy.model_management.in_training = before


def check_differentiable(model, positive: list, negative: list) -> None:
    """Refuse, with the reason, what has no gradient or would get a wrong one."""
    conditionings = positive, negative
    chain = blend_chain(model)
    for patcher in (model, *(e.patcher for e in chain.experts)):
        if (obstacle := _obstacle(patcher)) is not None:
            raise ValueError(f"{obstacle}; use mode search, which needs no gradient")
    for expert, (settings, *_) in zip(chain.experts, chain.settings, strict=True):
        _check_without_history(expert.label, settings)
    _check_conditionings(conditionings)
    for expert in chain.experts:
        wired = zip((expert.positive, expert.negative), conditionings, strict=True)
        _check_conditionings([theirs if own is None else own for own, theirs in wired])


def _check_conditionings(conditionings: Iterable[list]) -> None:
    entries = [options for conditioning in conditionings for _, options in conditioning]
    for options in entries:
        for kind, name in (("control", "a ControlNet"), ("gligen", "GLIGEN")):
            if kind in options:
                raise ValueError(
                    f"a conditioning carries {name}, which passes no gradient on; remove it or use mode search"
                )
    groups = {options.get("hooks") for options in entries}
    scheduled = any(len(h.hook_keyframe.keyframes) > 1 for group in groups if group for h in group.hooks)
    # the host writes hooked weights over one another, behind the back of autograd
    if len(groups) > 1 or scheduled:
        raise ValueError(
            "the conditionings' hooks change the weights within a run, and the gradient would be of the last ones only;"
            " put the LoRA on the MODEL, the same hooks without keyframes on all conditionings, or use mode search"
        )


def _obstacle(patcher) -> str | None:
    inner, name = patcher.model, type(patcher.model).__name__
    kinds = tuple(getattr(comfy.model_base, k) for k in NO_DERIVATIVE if hasattr(comfy.model_base, k))
    if isinstance(inner, kinds):
        return f"{name} computes its rotary embedding with a kernel that has no gradient"
    if patcher.get_additional_models_with_key("multigpu"):
        return "a model spread over several GPUs passes no gradient on; remove the MultiGPU node"
    if "easycache" in patcher.model_options.get("transformer_options", {}):
        return "EasyCache or LazyCache answers from earlier steps and its gradient would be wrong; remove it"
    used = getattr(attention.optimized_attention, "__name__", "")
    if used in NO_DERIVATIVE_ATTENTION:
        return f"the attention kernel has no gradient; start ComfyUI without {NO_DERIVATIVE_ATTENTION[used]}"
    return None


def _check_without_history(label: str, settings) -> None:
    """A blend's expert whose answer depends on earlier steps cannot be computed again out of their order."""
    for name, neutral in (("refresh", 1), ("skip_below", 0), ("crop", 0)):
        value = getattr(settings, name, neutral)
        if value != neutral:
            raise ValueError(
                f"{name} {value:g} of the expert '{label}' answers from earlier steps, and its gradient would be wrong;"
                f" set it to {neutral} for optimising, or use mode search"
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


class _Sizes:
    """Counts the bytes that autograd wants to keep, and keeps nothing."""

    def __init__(self, weights: set[int]):
        self._weights, self._seen = weights, {}

    def __enter__(self):
        self._hooks = saved_tensors_hooks(self._pack, lambda _: None)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
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


class Recorder:
    """Makes functions of tensors differentiable with the memory of one call at a time.

    ``checkpoint``: keep no activations, compute each call again in backward; else autograd keeps them all, which is
    for tests. ``check(what, size)`` is told the bytes that the backward pass of a call needs, once for each
    ``what``, before any is kept. Other than torch.utils.checkpoint, right for functions that change their own
    intermediate results in place. Call it, and backward, in ``recording()``.
    """

    def __init__(self, checkpoint: bool = True, check: Callable[[str, int], None] = lambda what, size: None):
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

    def run_and_forget(self, what: str, function, inputs) -> Tensor:
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


def _leaves(inputs, wanted) -> list[Tensor]:
    return [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]


def _sample(out: Tensor) -> Tensor:
    flat = out.detach().flatten()
    return flat[:: max(1, flat.numel() // COMPARED)].float().clone()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorder, what, function, *inputs):
        ctx.recorder, ctx.what, ctx.function = recorder, what, function
        ctx.wanted = ctx.needs_input_grad[3:]
        out = recorder.run_and_forget(what, function, _leaves(inputs, ctx.wanted))
        ctx.save_for_backward(_sample(out), *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
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


def make_room(what: str, size: int, device: torch.device, keep: list, remedy: str) -> None:
    """Have the host free ``size`` bytes on ``device`` without unloading the patchers ``keep``; MemoryError if it cannot."""
    if comfy.model_management.get_free_memory(device) < size:
        modules = [p.model for p in keep]
        loaded = [
            m
            for m in comfy.model_management.current_loaded_models
            if m.model is not None and any(m.model.model is k for k in modules)
        ]
        comfy.model_management.free_memory(size, device, keep_loaded=loaded)
    free = comfy.model_management.get_free_memory(device)
    if free < size:
        raise MemoryError(
            f"the gradient of the {what} needs {size / 2**30:.2f} GiB on {device} (measured), {free / 2**30:.2f} GiB"
            f" are free; {remedy}"
        )
