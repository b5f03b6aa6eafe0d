"""Inputs renamed before the first release, and the conversion of prompts (API format) that use the old names.

Saved workflows are converted by web/renames.js when the page opens them.
"""

from typing import Any

from server import PromptServer

_TRAINING = {"accumulation": "gradient_accumulation", "average": "ema_decay", "held_out": "validation_fraction"}
RENAMED_INPUTS = {
    "SaliencyNoiseBlend": {"crop": "crop_margin"},
    "SeedSelect": {"keep": "survivors"},
    "ChorusDemoReferences": {"sign": "concept"},
    "TrainCasDMHead": _TRAINING | {"sees_x": "condition_on_x_t"},
    "TrainFaceRefiner": _TRAINING,
}
RENAMED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "ChorusDemoReferences": {"concept": {"all signs": "all concepts"}},
    # the seed of the earlier demo checkpoints, whose latents had another size
    "LoadSeed": {"file": {"chorus-demo carrot": "chorus-demo rabbit"}},
}


def renamed(prompt: dict[str, Any]) -> dict[str, Any]:
    """``prompt`` (API format: nodes by id) with the current names of inputs and values; other entries are unchanged."""
    return {id: _renamed_node(node) for id, node in prompt.items()}


def _renamed_node(node: Any) -> Any:
    if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
        return node  # ComfyUI's validation reports the error
    kind = node.get("class_type")
    if not isinstance(kind, str) or kind not in RENAMED_INPUTS | RENAMED_VALUES:
        return node
    names, values = RENAMED_INPUTS.get(kind, {}), RENAMED_VALUES.get(kind, {})
    inputs = {}
    for name, value in node["inputs"].items():
        new = names.get(name, name)
        if new != name and new in node["inputs"]:
            continue  # if both names are present, the new one is used
        inputs[new] = values.get(new, {}).get(value, value) if isinstance(value, str) else value
    return {**node, "inputs": inputs}


def _on_prompt(request: dict[str, Any]) -> dict[str, Any]:
    prompt = request.get("prompt")
    return {**request, "prompt": renamed(prompt)} if isinstance(prompt, dict) else request


def register() -> None:
    """Make the server accept prompts with old names. Does nothing if ComfyUI runs as a library, without a server."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(_on_prompt)
