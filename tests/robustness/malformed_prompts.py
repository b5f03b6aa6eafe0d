"""Invalid values for the inputs of nodes, and prompts with them."""

from __future__ import annotations

import random
from collections.abc import Iterator

NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**40
ODD_TEXT = {
    "unicode": "猫 😺 \u202e\u0000 e\u0301",
    "a megabyte": "ж" * 500_000,  # two bytes per character
    "a path": "../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a control character": "a\x1b[31mb\nc",
    "a format": "%s %n {0} {who} %year%",
}
NOT_A_SCALAR = {"null": None, "an object": {"a": 1}, "an empty object": {}, "a wrapped list": {"__value__": [1, "two"]}}
NOT_A_NUMBER = {"NaN": NAN, "a word": "many", "no word": "", **NOT_A_SCALAR}
INVALID_LINKS = {
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
# nodes that take seconds to run. They are tested without the values that ComfyUI converts and accepts: ComfyUI converts
# any text to a boolean, and any object to a text
SLOW = {"TrainCasDMHead", "TrainFaceRefiner", "TrainMaskedTokenLora", "SaveMaskedTokenLora", "LoadMaskedTokenLora"}
# the first input of a node is tested with all values and links; every other input with the values ALWAYS and with
# SAMPLED random ones of the rest
ALWAYS = {"below", "above", "NaN", "not offered", "a path"}
SAMPLED = 4


def out_of_range(least: float, most: float, whole: bool) -> dict:
    """Values slightly and far outside the limits."""
    low, high = (1, 1) if whole else (max(abs(least), 1e-6) * 1e-3, max(abs(most), 1.0) * 1e-3)
    near = {"below": least - low, "above": most + high}
    return {**near, "far below": -HUGE, "far above": HUGE, "infinity": INFINITY, "minus infinity": -INFINITY}


def bad_values(kind: str, options: dict, slow: bool) -> dict:
    """Invalid values for an input of type ``kind``, by description."""
    if kind in ("INT", "FLOAT"):
        return {**out_of_range(options["min"], options["max"], kind == "INT"), **NOT_A_NUMBER}
    if kind == "COMBO":
        return {"not offered": "nothing such", "a number": 5, "NaN": NAN, "true": True, **ODD_TEXT, **NOT_A_SCALAR}
    if kind == "STRING":
        texts = {**ODD_TEXT, "a number": 5, "NaN": NAN, "true": True, **NOT_A_SCALAR}
        return {k: texts[k] for k in ("unicode", "a megabyte", "a path", "an absolute path")} if slow else texts
    if kind == "BOOLEAN":
        return {} if slow else {"a word": "maybe", "NaN": NAN, **NOT_A_SCALAR}
    return {"a number": 5, "a word": "general", "true": True, "NaN": NAN, **NOT_A_SCALAR}


def bad_widgets_and_links(graph, name: str, rng: random.Random) -> Iterator[tuple[str, str, dict]]:
    """(input, description of the invalid value, prompt) for every input of the node ``name`` of the ``graph``."""
    links, slow = {**INVALID_LINKS, "a wire to itself": [name, 0]}, name in SLOW
    for place, (field, (kind, options)) in enumerate(graph.inputs(name)):
        values = {**bad_values(kind, options, slow), **links}
        if slow and kind not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and graph.optional(name, field):
            values.pop("null", None)  # valid for an optional socket
        if place:
            rest = sorted(set(values) - ALWAYS)
            chosen = ALWAYS | set(rng.sample(rest, SAMPLED))
            values = {what: value for what, value in values.items() if what in chosen}
        for what, value in values.items():
            prompt = graph.around(name)
            prompt[name]["inputs"][field] = value
            yield field, what, prompt


def links_of_other_types(graph, name: str) -> Iterator[tuple[str, str, dict]]:
    """Every input linked to an output of another type."""
    kinds = {  # output types, each with a node and the index of its output
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
    """Each required input left out, then all of them, then unknown inputs."""
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
