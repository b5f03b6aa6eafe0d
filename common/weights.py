"""Strict loading of state dicts: the error lists every missing, unexpected or invalid weight."""

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .operations import Operations

N = TypeVar("N", bound=nn.Module)
Number = TypeVar("Number", int, float)

MAX_LISTED = 8  # names per list in an error; a wrong file may have hundreds of wrong names
MAX_CHARACTERS = 120  # of a name or a value in an error
CONFIG_REMEDY = "use the config.json that came with the weights"
PACKED = getattr(torch, "float4_e2m1fn_x2", None)  # dtype with two numbers per byte; torch cannot compute with it
MAX_SETTING = 2**16  # upper limit of sizes and counts in a config.json; published values are far smaller


def load(network: type[N], config: Any, state_dict: Mapping[str, Tensor], operations: Operations = torch.nn) -> N:
    """A frozen ``network(config, operations)`` whose parameters are the tensors of ``state_dict``, in their dtype."""
    with torch.device("meta"):
        # shapes come from plain layers, since ComfyUI's casting layers may have no weights before loading
        expected = {name: weight.shape for name, weight in network(config).state_dict().items()}
        module = network(config, operations)
    check(state_dict, expected)
    module.load_state_dict(state_dict, assign=True)
    return module.eval().requires_grad_(False)


def check(state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError that lists all missing, unexpected and invalid weights (those with a ``weight_error``)."""
    wrong = {name: weight_error(state_dict[name], expected[name]) for name in expected if name in state_dict}
    lists = {
        "missing": [f"{name} {tuple(shape)}" for name, shape in expected.items() if name not in state_dict],
        "unexpected": [f"{name} {describe(value)}" for name, value in state_dict.items() if name not in expected],
        "wrong": [f"{name}: {text}" for name, text in wrong.items() if text],
    }
    if any(lists.values()):
        parts = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in lists.items() if names]
        raise ValueError(
            f"the weights do not fit the network: expected {len(expected)} tensors, got {len(state_dict)};"
            f" {'; '.join(parts)}; use another file"
        )


def weight_error(weight: Tensor, shape: torch.Size) -> str | None:
    """Error text for a weight that is not a finite floating-point tensor of ``shape``; None for a valid one."""
    if not isinstance(weight, Tensor) or weight.shape != shape:
        return f"expected {tuple(shape)}, got {describe(weight)}"
    if not weight.numel():
        return f"expected numbers, got the empty tensor {describe(weight)}"
    if not weight.is_floating_point() or weight.dtype == PACKED:
        return f"expected floating point numbers, got {weight.dtype}"
    # aminmax propagates NaN. On float16 and float32 it is 18 to 45 times as fast as isfinite on every number. torch
    # does not implement aminmax for 8-bit floats
    extremes = torch.stack((weight.float() if weight.element_size() == 1 else weight).aminmax())
    if not extremes.isfinite().all():
        return "expected finite numbers, got NaN or infinity"
    if not extremes.float().isfinite().all():  # networks run in float32 or narrower dtypes
        return f"expected numbers within the range of float32, got numbers up to {float(extremes.abs().max()):.3g}"
    return None


def describe(value: Any) -> str:
    """Shape of a tensor, type of anything else, for error messages."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def shorten(names: list[str]) -> str:
    """The first MAX_LISTED names, each cut to MAX_CHARACTERS, and the number of those left out."""
    more = len(names) - MAX_LISTED
    return ", ".join(name[:MAX_CHARACTERS] for name in names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def refuse_weights(network: str, why: str) -> NoReturn:
    """Raise the ValueError for a state dict that does not belong to ``network``. ``why``: the reason."""
    raise ValueError(f"this is not the state dict of {network}: {why}; use another file")


def shape_of(state_dict: Mapping[str, Tensor], name: str, dims: int, network: str) -> torch.Size:
    """Shape of the weight ``name``, which must have ``dims`` axes.

    A ValueError that names ``network`` if the weight is missing, empty or has another number of axes.
    """
    if name not in state_dict:
        first = (
            f"; the first of its {len(state_dict)} keys is {next(iter(state_dict))[:MAX_CHARACTERS]!r}"
            if state_dict
            else ", it is empty"
        )
        refuse_weights(network, f"it has no {name!r}{first}")
    weight = state_dict[name]
    if not isinstance(weight, Tensor) or weight.ndim != dims:
        refuse_weights(network, f"{name!r} should have {dims} dimensions, got {describe(weight)}")
    if not weight.numel():
        # the other axes of an empty tensor may have any size, so a network of that size must not be built
        refuse_weights(network, f"expected numbers in {name!r}, got the empty tensor {describe(weight)}")
    return weight.shape


def count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Number of modules directly below ``prefix``."""
    return len({name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)})


def check_config(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise a ValueError if a published config.json contradicts the ``sizes`` read from the weights."""
    given = {key: config[key] for key in sizes if config.get(key) is not None}  # null means the default
    wrong = [
        f"{key} is {given[key]!r:.{MAX_CHARACTERS}}, not {sizes[key]!r}" for key in given if given[key] != sizes[key]
    ]
    if wrong:
        raise ValueError(f"the config does not belong to these weights: {', '.join(wrong)}; {CONFIG_REMEDY}")


def setting(config: Mapping[str, Any], key: str, default: Number) -> Number:
    """The positive number ``key`` of a config.json, of the type of ``default``, or ``default`` if it is not set."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in {type(default), int} or not 0 < value <= MAX_SETTING:
        raise ValueError(
            f"the config's {key} is {value!r:.{MAX_CHARACTERS}}, not a positive {type(default).__name__} up to"
            f" {MAX_SETTING}; {CONFIG_REMEDY}"
        )
    return value
