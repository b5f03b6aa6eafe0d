"""A decorator of nodes that rejects invalid inputs which ComfyUI's own validation accepts.

Such inputs are plain values in place of a link, NaN (ComfyUI only checks minimum and maximum), and empty images, masks,
latents and conditionings.
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
CHECKED_BY_NODE = {
    "BOUNDING_BOX,SEGS"
}  # a prompt may contain a box as a plain value; the node that uses the box checks it
JSON_TYPES = (bool, int, float, str, list, dict, type(None))

Node = TypeVar("Node", bound=type[io.ComfyNode])


def checks_inputs(node: Node) -> Node:
    """Make ``execute`` of a node check its inputs first. A ValueError names the input, its value and the remedy."""
    execute = node.execute.__func__
    signature = inspect.signature(execute)

    @functools.cache
    def schema() -> tuple[bool, dict[str, tuple[str, bool]]]:
        defined = node.define_schema()
        return defined.is_input_list, {i.id: (i.get_io_type(), bool(i.optional)) for i in defined.inputs}

    @functools.wraps(execute)
    def checked_execute(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        lists, kinds = schema()
        for name, value in _arguments(signature.bind(cls, *args, **kwargs)):
            if name in kinds and not (value is None and kinds[name][1]):
                for item in value if lists else [value]:
                    check_type(name, item, *kinds[name])
                    if item is not None:
                        check_not_empty(name, item, kinds[name][0])
        return execute(cls, *args, **kwargs)

    node.execute = classmethod(checked_execute)  # ty: ignore[invalid-assignment]  # same signature as execute
    node.checks_inputs = True  # ty: ignore[missing-attribute]  # read by a test of all nodes
    return node


def _arguments(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Names and values of the arguments, with those of ``**kwargs``."""
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def check_type(name: str, value: Any, kind: str, optional: bool = False) -> None:
    """Raise ValueError unless an input of the type ``kind`` accepts ``value``."""
    if kind == "FLOAT" and isinstance(value, float) and math.isnan(value):
        raise ValueError(f"expected a number for {name}, got NaN; enter a value within the widget's limits")
    if kind in WIDGETS | CHECKED_BY_NODE or (optional and value is None) or _has_type(kind, value):
        return
    raise ValueError(f"expected {kind} for {name}, got {_shorten(value)}; connect {_with_article(kind)}")


def check_not_empty(name: str, value: Any, kind: str) -> None:
    """Raise ValueError for an image, mask, latent or conditioning without elements."""
    tensors = []
    if kind in ("IMAGE", "MASK"):
        tensors = [value]
    elif kind == "LATENT" and isinstance(value["samples"], Tensor):
        tensors = [value["samples"]]
    elif kind == "CONDITIONING":
        if not value:
            raise ValueError(f"expected a prompt for {name}, got an empty list; connect a text encoder")
        tensors = [tensor for tensor, _ in value if isinstance(tensor, Tensor)]
    for tensor in tensors:
        if not tensor.numel():
            raise ValueError(f"{name} is empty, its size is {size_of(tensor)}; check the node connected to it")


def _has_type(kind: str, value: Any) -> bool:
    match kind:
        case "IMAGE":
            return isinstance(value, Tensor)
        case "MASK":
            return isinstance(value, Tensor) and value.ndim > 1
        case "LATENT":
            return isinstance(value, dict) and hasattr(value.get("samples"), "shape")
        case "CONDITIONING":
            return isinstance(value, list) and all(map(_is_prompt, value))
    return not isinstance(value, JSON_TYPES)


def _is_prompt(entry: Any) -> bool:
    """Whether ``entry`` is a tensor with its options; ComfyUI permits None as the tensor for some text encoders."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    return isinstance(entry[0], (Tensor, type(None))) and isinstance(entry[1], dict)


def _shorten(value: Any) -> str:
    text = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return "null" if value is None else text if len(text) <= 60 else f"{text[:60]}..."


def _with_article(kind: str) -> str:
    name = kind.lower().replace("_", " ")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
