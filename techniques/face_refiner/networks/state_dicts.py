"""State dicts of generators, found in the content of a file as people save it.

A training saves its generator inside dictionaries (``{"state_dict": ..., "optimizer": ...}``), under prefixes
(``netG.`` of a Lightning module) and with the names that DataParallel and torch.compile insert. The names of the layers
identify a generator at any place, so that no list of possible wrappers is needed.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ....common.weights import shorten

# parts of names from DataParallel and DistributedDataParallel, torch.compile, FSDP and activation checkpointing
INSERTED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# names that only one supported layout has; the part before them is the prefix
LAYOUTS = (
    re.compile(r"((?:.+\.)?)model\.[0-9]{1,9}\.conv_block\..+"),
    re.compile(r"((?:.+\.)?)model\.model\.1\.model\.1\..+"),
    re.compile(r"((?:.+\.)?)down\.0\.0\.attention\.squeeze\.weight"),
)
# averaged weights that the programs themselves load in preference: BasicSR's and StyleGAN2's
AVERAGED = {"params": "params_ema", "g": "g_ema"}
MAX_DEPTH = 16  # of nested dictionaries

StateDict = dict[str, Any]


def select(content: Mapping[Any, Any], name: str = "") -> tuple[str, StateDict]:
    """The name and the state dict of one generator in the ``content`` of a file.

    ``name``: one of the names in the file or its last part; "" selects the only generator. Without any generator the
    result is the largest state dict. Raises a ValueError with the names if none or several match.
    """
    found = generators_in(content)
    if name:
        matches = [key for key in found if key == name or key.endswith(f".{name}")]
        if len(matches) != 1:
            raise ValueError(f"there is no generator '{name[:80]}' in the file; {_choices(found)}")
        return matches[0], found[matches[0]]
    found = _without_averaged_twins(_without_equals(found))
    if len(found) > 1:
        raise ValueError(f"the file holds {len(found)} generators; {_choices(found)}")
    return next(iter(found.items())) if found else largest(content)


def _choices(found: Mapping[str, StateDict]) -> str:
    names = [name for name in found if name]
    if not names:
        return "leave 'generator' of Load Face Refiner empty"
    return f"enter one of these names as 'generator' of Load Face Refiner: {shorten(names)}"


def generators_in(content: Mapping[Any, Any]) -> dict[str, StateDict]:
    """The state dicts of all generators, by their place in the file, such as ``state_dict.netG``."""
    found: dict[str, StateDict] = {}
    for place, entries in _dictionaries(content):
        entries = _named(entries)
        prefixes = _prefixes(entries)
        for prefix in prefixes:
            longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
            part = {
                name.removeprefix(prefix): value
                for name, value in entries.items()
                if name.startswith(prefix) and not (longer and name.startswith(longer))
            }
            name = ".".join([*place, *prefix.split(".")]).strip(".")
            while name in found:  # {"a.b": ..., "a": {"b": ...}}
                name += "'"
            found[name] = {key: value for key, value in part.items() if _may_be_weight(key, value)}
    return found


def largest(content: Mapping[Any, Any]) -> tuple[str, StateDict]:
    """The place and the entries of the dictionary with most tensors, which an error message describes."""
    place, entries = max(
        _dictionaries(content), key=lambda found: sum(isinstance(value, Tensor) for value in found[1].values())
    )
    return ".".join(place), _named(entries)


def _dictionaries(content: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All nested dictionaries with their keys, the outermost first."""
    waiting: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), content)])
    seen = set()
    while waiting:
        place, entries = waiting.popleft()
        if id(entries) in seen:
            continue
        seen.add(id(entries))  # two names of one dictionary; a dictionary may even contain itself
        yield place, entries
        if len(place) < MAX_DEPTH:
            waiting.extend(((*place, str(key)), value) for key, value in entries.items() if isinstance(value, Mapping))


def _named(entries: Mapping[Any, Any]) -> StateDict:
    """The entries without the INSERTED parts of their names, unless two names would become equal."""
    short = {_without_inserted(str(name)): value for name, value in entries.items()}
    return short if len(short) == len(entries) else {str(name): value for name, value in entries.items()}


def _without_inserted(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSERTED) or name


def _prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes under which a layout occurs, in the order of the names."""
    matches = (layout.fullmatch(name) for name in names for layout in LAYOUTS)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _may_be_weight(name: str, value: Any) -> bool:
    """False for entries beside the weights: numbers, texts and counters, whose names have no dot, and dictionaries."""
    return not isinstance(value, Mapping) and ("." in name or (isinstance(value, Tensor) and value.ndim > 0))


def _without_equals(found: Mapping[str, StateDict]) -> dict[str, StateDict]:
    """The generators without those that are equal to an earlier one."""
    kept: dict[str, StateDict] = {}
    for name, entries in found.items():
        if not any(_equal(entries, other) for other in kept.values()):
            kept[name] = entries
    return kept


def _equal(a: StateDict, b: StateDict) -> bool:
    def same(x: Any, y: Any) -> bool:
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
        return x is y or (tensors and x.dtype == y.dtype and torch.equal(x, y))

    return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())


def _without_averaged_twins(found: Mapping[str, StateDict]) -> dict[str, StateDict]:
    """The generators without those beside which the file has their moving average, as AVERAGED lists them."""

    def averaged(name: str) -> str | None:
        *place, last = name.split(".")
        return ".".join([*place, AVERAGED[last]]) if last in AVERAGED else None

    return {name: entries for name, entries in found.items() if averaged(name) not in found}
