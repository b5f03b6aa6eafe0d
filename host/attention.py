"""Attention with a derivative in runs with gradients, whatever kernel ComfyUI or a node has chosen.

Fast kernels (sage, flash, int8) are not differentiable: their result has no autograd graph. The gradient of a network
would lack the part that flows through its attention, without an error. With this module, a forward pass returns the
kernel's result, so a run with gradients generates the same image as a run without gradients. The derivative is that of
ComfyUI's pytorch attention at the same queries, keys and values (straight-through).
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .patch_names import OVERRIDE, name_of

# ComfyUI's kernels with a derivative; all others are treated as kernels without a derivative
DIFFERENTIABLE = frozenset(f"attention_{kind}" for kind in ("basic", "sub_quad", "split", "pytorch", "xformers"))
GLOBALS = ("optimized_attention", "optimized_attention_masked")  # names by which ComfyUI's networks import the kernel
# Largest difference from exact attention that is explained by the rounding of a 4-bit or 8-bit kernel, relative to the
# norm of exact attention. A kernel that computes another function differs by far more and has another derivative.
LOW_PRECISION = 0.2

Attention = Callable[..., Tensor]


def straight_through(kernel: Attention, *args: Any, **kwargs: Any) -> Tensor:
    """``kernel(*args, **kwargs)`` with the derivative of pytorch attention.

    The arguments are those of ComfyUI's attention functions. ValueError if the kernel computes a function other than
    attention, since its derivative is unknown.
    """
    with torch.no_grad():
        value = kernel(*args, **kwargs)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args, kwargs))):
        return value
    exact = attention.attention_pytorch(*args, **{**kwargs, "_inside_attn_wrapper": True})
    difference = (value - exact).detach()
    if float(difference.norm()) > LOW_PRECISION * float(exact.detach().norm()):
        raise ValueError(
            f"the attention of {name_of(kernel)} has no derivative, and its result differs from exact attention by more"
            f" than {100 * LOW_PRECISION:g} %, so the gradient is unknown; remove it from the MODEL, or use mode search"
        )
    return value + (exact - exact.detach())  # adds exactly 0, which has the derivative of ``exact``


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def with_derivative(override: Attention | None) -> Attention:
    """Attention override with a derivative, for runs with gradients.

    ``override``: the MODEL's attention override, or None. If it already has a derivative, it is called unchanged.
    """
    differentiable: list[bool] = []  # whether ``override`` has a derivative; empty before its first call

    def attend(func: Attention, *args: Any, **kwargs: Any) -> Tensor:
        if override is None:
            if getattr(func, "__name__", "") in DIFFERENTIABLE:
                return func(*args, **kwargs)
            return straight_through(func, *args, **kwargs)
        if not differentiable:
            differentiable.append(_has_derivative(override, func, *args, **kwargs))
        if differentiable[0]:
            return override(func, *args, **kwargs)
        return straight_through(_Named(override, func), *args, **kwargs)

    return attend


class _Named:
    """``override`` applied to the kernel ``func``; has the name of the override, for messages."""

    def __init__(self, override: Attention, func: Attention) -> None:
        self._call = functools.partial(override, func)
        self.__qualname__ = getattr(override, "__qualname__", type(override).__qualname__)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(*args, **kwargs)


def _has_derivative(override: Attention, func: Attention, *args: Any, **kwargs: Any) -> bool:
    """Whether a gradient reaches the first tensor, the queries, through the override."""

    def leaf(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x

    # these hooks save tensors unchanged; they replace the caller's hooks, which may save nothing
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
        args, kwargs = tuple(leaf(x) for x in args), {k: leaf(x) for k, x in kwargs.items()}
        out = override(func, *args, **kwargs)
        if not out.requires_grad:
            return False
        try:
            return torch.autograd.grad(out.float().sum(), _tensors(args, kwargs)[0], allow_unused=True)[0] is not None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return False  # a custom operation without a registered derivative raises


def set_attention(patcher: ModelPatcher) -> None:
    """Set an attention override with a derivative on ``patcher``, the clone of a MODEL for a run with gradients."""
    options = patcher.model_options.setdefault("transformer_options", {})
    options[OVERRIDE] = with_derivative(options.get(OVERRIDE))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Replace ComfyUI's default attention kernel in all loaded Python modules, if the kernel has no derivative.

    ComfyUI's start options select this kernel. Overrides do not reach all networks: many image encoders and some
    diffusion models call the kernel by its global name.
    """
    replaced: list[tuple[Any, str, Attention]] = []
    try:
        for kernel in {getattr(attention, name) for name in GLOBALS}:
            bare = getattr(kernel, "__wrapped__", kernel)
            if getattr(bare, "__name__", "") in DIFFERENTIABLE:
                continue
            substitute = attention.wrap_attn(functools.wraps(bare)(functools.partial(straight_through, bare)))
            for module in list(sys.modules.values()):
                for name in GLOBALS:
                    if getattr(module, "__dict__", {}).get(name) is kernel:
                        replaced.append((module, name, kernel))
                        setattr(module, name, substitute)
        yield
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)
