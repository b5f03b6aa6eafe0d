"""Values that an input of a node must not have, and prompts that hold them."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**40
ODD_TEXT = {
    "unicode": "猫 😺 \u202e\u0000 e\u0301",
    "a megabyte": "ж" * 500_000,  # two bytes each
    "a path": "../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a control character": "a\x1b[31mb\nc",
    "a format": "%s %n {0} {who} %year%",
}
NO_VALUE = {"null": None, "an object": {"a": 1}, "an empty object": {}, "a wrapped list": {"__value__": [1, "two"]}}
NO_NUMBER = {"NaN": NAN, "a word": "many", "no word": "", **NO_VALUE}
NO_WIRE = {
    "an empty list": [],
    "a list of one": [1],
    "a list of three": ["ChorusDemoCheckpoint", 0, 0],
    "a wire to nowhere": ["no such node", 0],
    "a wire to null": [None, 0],
    "a wire to a list": [["ChorusDemoCheckpoint"], 0],
    "output 99": ["ChorusDemoCheckpoint", 99],
    "output -99": ["ChorusDemoCheckpoint", -99],
    "output 'zero'": ["ChorusDemoCheckpoint", "zero"],
    "output null": ["ChorusDemoCheckpoint", None],
}
# it takes seconds to run them, so what the host makes fitting (any word is a yes, any object a text) is left out
SLOW = {"TrainCasDMHead", "TrainFaceRefiner", "TrainMaskedTokenLora", "SaveMaskedTokenLora", "LoadMaskedTokenLora"}
# every input gets these, and a node's first all values and wires; the other inputs draw some of the rest
ALWAYS = {"below", "above", "NaN", "not offered", "a path"}
DRAWN = 4


def beside(least: float, most: float, whole: bool) -> dict:
    """Outside of the limits, a little and far."""
    low, high = (1, 1) if whole else (max(abs(least), 1e-6) * 1e-3, max(abs(most), 1.0) * 1e-3)
    near = {"below": least - low, "above": most + high}
    return {**near, "far below": -HUGE, "far above": HUGE, "infinity": INFINITY, "minus infinity": -INFINITY}


def bad_values(kind: str, options: dict, slow: bool) -> dict:
    """By name, what is wrong for an input of that type, beside wires."""
    if kind in ("INT", "FLOAT"):
        return {**beside(options["min"], options["max"], kind == "INT"), **NO_NUMBER}
    if kind == "COMBO":
        return {"not offered": "nothing such", "a number": 5, "NaN": NAN, "true": True, **ODD_TEXT, **NO_VALUE}
    if kind == "STRING":
        texts = {**ODD_TEXT, "a number": 5, "NaN": NAN, "true": True, **NO_VALUE}
        return {k: texts[k] for k in ("unicode", "a megabyte", "a path", "an absolute path")} if slow else texts
    if kind == "BOOLEAN":
        return {} if slow else {"a word": "maybe", "NaN": NAN, **NO_VALUE}
    return {"a number": 5, "a word": "general", "true": True, "NaN": NAN, **NO_VALUE}


def bad_widgets_and_wires(graph, name: str, rng: random.Random) -> Iterator[tuple[str, str, dict]]:
    """(input, what is wrong, prompt) for every input of a node of the ``graph``."""
    wires, slow = {**NO_WIRE, "a wire to itself": [name, 0]}, name in SLOW
    for place, (field, (kind, options)) in enumerate(graph.inputs(name)):
        values = {**bad_values(kind, options, slow), **wires}
        if slow and kind not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and graph.optional(name, field):
            values.pop("null", None)  # not wired
        if place:
            rest = sorted(set(values) - ALWAYS)
            chosen = ALWAYS | set(rng.sample(rest, DRAWN))
            values = {what: value for what, value in values.items() if what in chosen}
        for what, value in values.items():
            prompt = graph.around(name)
            prompt[name]["inputs"][field] = value
            yield field, what, prompt


def wires_of_other_types(graph, name: str) -> Iterator[tuple[str, str, dict]]:
    """Every input wired to an output of a type that it does not take."""
    kinds = {  # of outputs, by a node that gives one
        kind: [node, place] for node in graph.pack() for place, kind in enumerate(graph.info[node]["output"])
    }
    for place, (field, (kind, _)) in enumerate(graph.inputs(name)):
        others = sorted(k for k in kinds if k != kind)
        other = others[(place + len(name)) % len(others)]
        if kinds[other][0] == name:
            continue
        prompt = {**graph.prompt(kinds[other][0]), **graph.around(name)}
        prompt[name]["inputs"][field] = kinds[other]
        yield field, f"a wire of {other}", prompt


def without_inputs(graph, name: str) -> Iterator[tuple[str, str, dict]]:
    """Every required input left out, then all, then inputs that do not exist."""
    needed = graph.info[name]["input"].get("required", {})
    for field in needed:
        prompt = graph.around(name)
        prompt[name]["inputs"].pop(field, None)
        yield field, "left out", prompt
    if needed:
        prompt = graph.around(name)
        prompt[name]["inputs"] = {}
        yield "all", "left out", prompt
    if name not in SLOW:
        prompt = graph.around(name)
        prompt[name]["inputs"] |= {"unknown": 5, "": None, "😺": {"a": []}, "self": "x", "cls": "x"}
        yield "others", "that do not exist", prompt
