"""Strict loading: a state dict holds exactly the weights that a network asks for, or the error lists what differs."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .operations import Operations

N = TypeVar("N", bound=nn.Module)
Number = TypeVar("Number", int, float)

SHOWN = 8  # names per list of an error; a wrong file differs in hundreds
WIDEST = 120  # characters of a name or a value there
PACKED = getattr(torch, "float4_e2m1fn_x2", None)  # two numbers in a byte; torch has no arithmetic for it
MOST = 2**16  # of a size or a count in a config.json; the published ones stay far below


def load(network: type[N], config: Any, state_dict: Mapping[str, Tensor], operations: Operations = torch.nn) -> N:
    """``network(config, operations)`` with these weights: in their own dtype, sharing their memory, frozen."""
    with torch.device("meta"):
        # the sizes come from plain layers: the host's casting layers may have no weights before they are loaded
        expected = {name: weight.shape for name, weight in network(config).state_dict().items()}
        module = network(config, operations)
    check(state_dict, expected)
    module.load_state_dict(state_dict, assign=True)
    return module.eval().requires_grad_(False)


def check(state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise a ValueError that lists every weight that is missing, not asked for, of the wrong shape, or no number."""
    wrong = {name: complaint(state_dict[name], expected[name]) for name in expected if name in state_dict}
    lists = {
        "missing": [f"{name} {tuple(shape)}" for name, shape in expected.items() if name not in state_dict],
        "unexpected": [f"{name} {seen(value)}" for name, value in state_dict.items() if name not in expected],
        "wrong": [f"{name}: {text}" for name, text in wrong.items() if text],
    }
    if any(lists.values()):
        parts = [f"{len(names)} {kind}: {shorten(names)}" for kind, names in lists.items() if names]
        raise ValueError(
            f"The weights do not fit: {len(expected)} tensors expected, {len(state_dict)} seen; " + "; ".join(parts)
        )


def complaint(weight: Tensor, shape: torch.Size) -> str | None:
    """What is wrong with one weight, or None."""
    if not isinstance(weight, Tensor) or weight.shape != shape:
        return f"expected {tuple(shape)}, seen {seen(weight)}"
    if not weight.numel():
        return f"expected numbers, seen none in {seen(weight)}"
    if not weight.is_floating_point() or weight.dtype == PACKED:
        return f"expected floating point numbers, seen {weight.dtype}"
    # the extremes keep a NaN, and are found 18 to 45 times as fast as isfinite looks at every number (float16, float32);
    # torch finds them in no 8-bit float
    extremes = (weight.float() if weight.element_size() == 1 else weight).aminmax()
    if not torch.stack(extremes).isfinite().all():
        return "expected finite numbers, seen NaN or infinity"
    return None


def seen(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def shorten(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(name[:WIDEST] for name in names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def shape_of(state_dict: Mapping[str, Tensor], name: str, dims: int, network: str) -> torch.Size:
    """The shape of a weight from which sizes are read; ``network`` is for the error only."""
    if name not in state_dict:
        first = (
            f"; its first of {len(state_dict)} is {next(iter(state_dict))[:WIDEST]!r}"
            if state_dict
            else ", nor any other"
        )
        raise ValueError(f"This is not the state dict of {network}: it has no {name!r}{first}")
    weight = state_dict[name]
    if not isinstance(weight, Tensor) or weight.ndim != dims:
        raise ValueError(f"This is not {network}: {name!r} should have {dims} dimensions, seen {seen(weight)}")
    if not weight.numel():
        # sizes that no number stands behind may be of any size
        raise ValueError(f"This is not {network}: {name!r} {seen(weight)} holds no numbers")
    return weight.shape


def count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules there are below ``prefix``."""
    return len({name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)})


def check_config(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise a ValueError where a published config.json contradicts what the weights show."""
    told = {key: config[key] for key in sizes if config.get(key) is not None}  # null is the default
    wrong = [f"{key} is {told[key]!r:.{WIDEST}}, not {sizes[key]!r}" for key in told if told[key] != sizes[key]]
    if wrong:
        raise ValueError(f"The config does not belong to these weights: {', '.join(wrong)}")


def setting(config: Mapping[str, Any], key: str, default: Number) -> Number:
    """A positive number that only the config.json tells, of the kind of ``default``, which null and nothing stand for."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in {type(default), int} or not 0 < value <= MOST:
        raise ValueError(
            f"The config's {key} is {value!r:.{WIDEST}}, not a positive {type(default).__name__} up to {MOST};"
            " take the config.json that came with the weights"
        )
    return value
