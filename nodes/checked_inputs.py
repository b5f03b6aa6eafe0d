"""A decorator of nodes that refuses inputs which ComfyUI lets through and no node can use.

These are values in a prompt where a link belongs, non-finite numbers, which are neither below a minimum nor above a
maximum, and images, masks, latents and conditionings without content.
"""

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, TypeVar

from comfy_api.latest import io
from torch import Tensor

from ..common.shapes import size_of

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
OWN_READER = {"BOUNDING_BOX"}  # a box may stand in the prompt itself, and its reader says what it lacks
JSON = (bool, int, float, str, list, dict, type(None))

Node = TypeVar("Node", bound=type[io.ComfyNode])


def checks_inputs(node: Node) -> Node:
    """Let ``execute`` of a node check its inputs first. A ValueError names the input, its value and the remedy."""
    execute = node.execute.__func__
    signature = inspect.signature(execute)

    @functools.cache
    def schema() -> tuple[bool, dict[str, tuple[str, bool]]]:
        made = node.define_schema()
        return made.is_input_list, {i.id: (i.get_io_type(), bool(i.optional)) for i in made.inputs}

    @functools.wraps(execute)
    def checking(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        lists, kinds = schema()
        for name, value in _named(signature.bind(cls, *args, **kwargs)):
            if name in kinds and not (value is None and kinds[name][1]):
                for one in value if lists else [value]:
                    check(name, one, *kinds[name])
                    if one is not None:
                        check_holds_something(name, one, kinds[name][0])
        return execute(cls, *args, **kwargs)

    node.execute = classmethod(checking)  # ty: ignore[invalid-assignment]  # it takes what execute takes
    node.checks_inputs = True  # ty: ignore[missing-attribute]  # for the test that all nodes do
    return node


def _named(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def check(name: str, value: Any, kind: str, optional: bool = False) -> None:
    """Raise ValueError unless ``value`` can be what an input of that ``kind`` takes."""
    if kind == "FLOAT" and isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} is NaN, which is no number; give one within the widget's limits")
    if kind in WIDGETS | OWN_READER or (optional and value is None) or _is(kind, value):
        return
    raise ValueError(f"{name} is {_short(value)}, which is no {kind}; wire the output of a node that gives one")


def check_holds_something(name: str, value: Any, kind: str) -> None:
    """Raise ValueError for pictures, masks, latents and prompts without a single number."""
    tensors = []
    if kind in ("IMAGE", "MASK"):
        tensors = [value]
    elif kind == "LATENT" and isinstance(value["samples"], Tensor):
        tensors = [value["samples"]]
    elif kind == "CONDITIONING":
        if not value:
            raise ValueError(f"{name} holds no prompt; wire a text encoder's output")
        tensors = [tensor for tensor, _ in value if isinstance(tensor, Tensor)]
    for tensor in tensors:
        if not tensor.numel():
            raise ValueError(f"{name} holds nothing, its size is {size_of(tensor)}; look at what is wired to it")


def _is(kind: str, value: Any) -> bool:
    match kind:
        case "IMAGE":
            return isinstance(value, Tensor)
        case "MASK":
            return isinstance(value, Tensor) and value.ndim > 1
        case "LATENT":
            return isinstance(value, dict) and hasattr(value.get("samples"), "shape")
        case "CONDITIONING":
            return isinstance(value, list) and all(map(_is_prompt, value))
    return not isinstance(value, JSON)


def _is_prompt(entry: Any) -> bool:
    """A tensor with what goes along; the host lets the tensor be missing where a text encoder gives none."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    return isinstance(entry[0], (Tensor, type(None))) and isinstance(entry[1], dict)


def _short(value: Any) -> str:
    text = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return "null" if value is None else text if len(text) <= 60 else f"{text[:60]}..."
