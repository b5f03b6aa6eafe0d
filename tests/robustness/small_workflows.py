"""A small graph with every node of the pack, and prompts made of parts of it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from chorus.demo.modules import FACE_PAIRS

SAMPLING = {"seed": 3, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
QUICK = {"steps": 2, "batch_size": 1, "learning_rate": 1e-3}
ANY = "PreviewAny"  # ComfyUI's output node for values of any type


class Graph:
    """Nodes in API format by name.

    Nodes of the pack are named after their class. Widgets that are not set in ``HOST`` or ``PACK`` have their defaults.
    """

    def __init__(self, object_info: dict):
        self.info = object_info
        self.nodes = {
            name: self._node(kind, inputs) for name, (kind, inputs) in {**HOST, **named_by_class(PACK)}.items()
        }

    def _node(self, kind: str, inputs: dict) -> dict:
        return {"class_type": kind, "inputs": {**self.widgets(kind), **inputs}}

    def widgets(self, kind: str) -> dict:
        """Default widget values of a class. A combo without a default has its first option."""
        values = {}
        for name, (_, options) in self.inputs(kind):
            if "default" in options:
                values[name] = options["default"]
            elif options.get("options"):
                values[name] = options["options"][0]
        return values

    def inputs(self, kind: str) -> Iterable[tuple[str, tuple[str, dict]]]:
        """(name, (type, options)) of each input of a class."""
        for category in ("required", "optional"):
            for name, spec in self.info[kind]["input"].get(category, {}).items():
                yield name, (spec[0], spec[1] if len(spec) > 1 else {})

    def optional(self, kind: str, field: str) -> bool:
        return field in self.info[kind]["input"].get("optional", {})

    def pack(self) -> list[str]:
        """Ids of the pack's nodes that the server offers."""
        return [kind for kind, info in self.info.items() if info["python_module"].endswith("ComfyUI-Chorus")]

    def prompt(self, *outputs: str) -> dict:
        """A new prompt with these output nodes and all nodes that they need."""
        needed, pending = {}, list(outputs)
        while pending:
            name = pending.pop()
            if name not in needed:
                needed[name] = copy.deepcopy(self.nodes[name])
                pending += [v[0] for v in needed[name]["inputs"].values() if isinstance(v, list)]
        return needed

    def around(self, name: str) -> dict:
        """A prompt that runs the node ``name``."""
        if name in ENDS or self.info[name]["output_node"]:
            return self.prompt(ENDS.get(name, name))
        return {**self.prompt(name), "show": {"class_type": ANY, "inputs": {"source": [name, 0]}}}

    def work(self, technique: str, prefix: str, seed: int, **widgets) -> dict:
        """A prompt of one of the ``TECHNIQUES`` that saves its result under ``prefix``.

        ``widgets`` are set on every node that has them.
        """
        node, links, default_widgets = TECHNIQUES[technique]
        self.nodes["out"] = {"class_type": node, "inputs": {**links, "filename_prefix": prefix}}
        prompt = self.prompt("out")
        for entry in prompt.values():
            known = dict(self.inputs(entry["class_type"]))
            for name, value in {"seed": seed, **default_widgets, **widgets}.items():
                if name in known:
                    entry["inputs"][name] = value
        return prompt


def digest(folder: Path, prefix: str) -> str:
    """Digest of all files in the output ``folder`` whose names begin with ``prefix``.

    It covers tensors and pixels, but not metadata.
    """
    files = sorted(folder.glob(f"{prefix}_*"))
    assert files, f"nothing was saved as {prefix}"
    result = hashlib.sha256()
    for file in files:
        if file.suffix == ".png":
            result.update(np.asarray(Image.open(file)).tobytes())
        else:
            for name, tensor in sorted(load_file(file).items()):
                result.update(name.encode() + tensor.contiguous().flatten().view(-1).numpy().tobytes())
    return result.hexdigest()


def named_by_class(nodes: dict) -> dict:
    return {kind: (kind, inputs) for kind, inputs in nodes.items()}


HOST = {
    "expert": ("ChorusDemoCheckpoint", {"name": "expert-animals"}),
    "positive": ("CLIPTextEncode", {"clip": ["ChorusDemoCheckpoint", 1], "text": "a cat on blue"}),
    "negative": ("CLIPTextEncode", {"clip": ["ChorusDemoCheckpoint", 1], "text": ""}),
    "words": ("CLIPTextEncode", {"clip": ["LoadMaskedTokenModel", 1], "text": "a cat on blue"}),
    "no words": ("CLIPTextEncode", {"clip": ["LoadMaskedTokenModel", 1], "text": ""}),
    "empty": ("EmptyLatentImage", {"width": 64, "height": 48, "batch_size": 1}),
    "mask": ("SolidMask", {"value": 1.0, "width": 64, "height": 64}),
    "image": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0x407060}),
    "sample": (
        "KSampler",
        {
            "model": ["ChorusDemoCheckpoint", 0],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["empty", 0],
            **SAMPLING,
        },
    ),
}
_CONDS = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["empty", 0]}
HOST |= {
    "sample blend": ("KSampler", {"model": ["SaliencyNoiseBlend", 0], **_CONDS, **SAMPLING}),
    "sample head": ("KSampler", {"model": ["CasDMHead", 0], **_CONDS, **SAMPLING}),
    "save head": ("SaveLatent", {"samples": ["sample head", 0], "filename_prefix": "small/head"}),
}
_MODEL, _TOKENS = ["LoadMaskedTokenModel", 0], ["MaskedTokenEncode", 0]
_TOKEN_SAMPLING = {
    "model": _MODEL,
    "positive": ["words", 0],
    "negative": ["no words", 0],
    "steps": 2,
    "width": 64,
    "height": 64,
}
_TRAINING = {**QUICK, "metric": "clip_vision", "clip_vision": ["ChorusDemoVision", 0], "gradient_checkpointing": False}
PACK = {
    "ChorusDemoCheckpoint": {},
    "ChorusDemoVision": {},
    "ChorusDemoReferences": {"concept": "carrot"},
    "SaliencyNoiseBlend": {
        "model": ["ChorusDemoCheckpoint", 0],
        "expert": ["expert", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "label": "animals",
    },
    "SaliencyBlendView": {"trace": ["SaliencyNoiseBlend", 1], "samples": ["sample blend", 0]},
    "SeedSelect": {
        "model": ["ChorusDemoCheckpoint", 0],
        **_CONDS,
        "references": ["ChorusDemoReferences", 0],
        "vae": ["ChorusDemoCheckpoint", 2],
        "clip_vision": ["ChorusDemoVision", 0],
        "candidates": 2,
        "steps": 2,
        "first_steps": 1,
        "iterations": 1,
        "cfg": 4.0,
        "grid_size": 2,
    },
    "BlendGrid": {
        "model": ["SaliencyNoiseBlend", 0],
        **_CONDS,
        "vae": ["ChorusDemoCheckpoint", 2],
        "rows": "bias = 0 | 1",
        "columns": "",
        "steps": 2,
        "cfg": 4.0,
    },
    "SeedMap": {
        "model": ["ChorusDemoCheckpoint", 0],
        **_CONDS,
        "noise": ["SeedSelect", 0],
        "references": ["ChorusDemoReferences", 0],
        "vae": ["ChorusDemoCheckpoint", 2],
        "clip_vision": ["ChorusDemoVision", 0],
        "patches": 2,
        "pairs": 2,
        "checks": 1,
        "steps": 2,
        "cfg": 4.0,
    },
    "CombineNoise": {"noise": ["SeedSelect", 0], "other": ["LoadSeed", 0], "mask": ["SeedMap", 1]},
    "SaveSeed": {"noise": ["SeedSelect", 0], "filename_prefix": "small/seed"},
    "LoadSeed": {},
    "VaryPrompt": {"conditioning": ["positive", 0], "strength": 0.5},
    "LoadCasDMHead": {},
    "SaveCasDMHead": {"head": ["LoadCasDMHead", 0], "filename_prefix": "small/head"},
    "CasDMHead": {"model": ["ChorusDemoCheckpoint", 0], "head": ["LoadCasDMHead", 0]},
    "TrainCasDMHead": {
        "model": ["ChorusDemoCheckpoint", 0],
        "samples": ["sample", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "vae": ["ChorusDemoCheckpoint", 2],
        **_TRAINING,
        "cfg": 4.0,
        "size": "small",
        "crop": 32,
    },
    "LoadMaskedTokenModel": {},
    "MaskedTokenSampler": _TOKEN_SAMPLING,
    "MaskedTokenVideo": {**_TOKEN_SAMPLING, "frames": 2},
    "MaskedTokenEncode": {"image": ["image", 0], "model": _MODEL},
    "MaskedTokenDecode": {"tokens": _TOKENS, "model": _MODEL},
    "MaskedTokenEdit": {"tokens": _TOKENS, "mask": ["mask", 0]},
    "SaveMaskedTokens": {"tokens": _TOKENS, "filename_prefix": "small/tokens"},
    "LoadMaskedTokens": {"file": "small/tokens_00001_.tokens.safetensors [output]"},
    "TrainMaskedTokenLora": {
        "model": _MODEL,
        "images": ["image", 0],
        "positive": ["words", 0],
        **QUICK,
        "rank": 2,
        "resolution": 32,
    },
    "LoadMaskedTokenLora": {"model": _MODEL, "lora": ["TrainMaskedTokenLora", 0]},
    "SaveMaskedTokenLora": {"lora": ["TrainMaskedTokenLora", 0], "filename_prefix": "small/lora"},
    "LoadFaceRefiner": {},
    "SaveFaceRefiner": {"refiner": ["LoadFaceRefiner", 0], "filename_prefix": "small/refiner"},
    "FaceRefiner": {"image": ["LoadTrainingPairs", 0], "refiner": ["LoadFaceRefiner", 0]},
    "TrainFaceRefiner": {
        "source": ["LoadTrainingPairs", 0],
        "target": ["LoadTrainingPairs", 1],
        **_TRAINING,
        "crop": 32,
    },
    "SaveTrainingPairs": {
        "source": ["LoadTrainingPairs", 0],
        "target": ["LoadTrainingPairs", 1],
        "folder": "small/pairs",
    },
    "LoadTrainingPairs": {"folder": FACE_PAIRS, "count": 4},
    "PromptCombinations": {},
    "FaceRealismScore": {
        "refined": ["LoadTrainingPairs", 0],
        "target": ["LoadTrainingPairs", 1],
        "clip_vision": ["ChorusDemoVision", 0],
        "blocks": 10,
    },
}
TECHNIQUES = {
    "blend": ("SaveLatent", {"samples": ["sample blend", 0]}, {}),
    "head": ("SaveLatent", {"samples": ["sample head", 0]}, {}),
    "search": ("SaveLatent", {"samples": ["SeedSelect", 2]}, {}),
    "optimize": ("SaveLatent", {"samples": ["SeedSelect", 2]}, {"mode": "optimize"}),
    "tokens": ("SaveMaskedTokens", {"tokens": ["MaskedTokenSampler", 1]}, {}),
    "faces": ("SaveImage", {"images": ["FaceRefiner", 0]}, {"faithful": True}),
    "train a head": ("SaveCasDMHead", {"head": ["TrainCasDMHead", 0]}, {}),
    "train a refiner": ("SaveFaceRefiner", {"refiner": ["TrainFaceRefiner", 0]}, {}),
    "train a LoRA": ("SaveMaskedTokenLora", {"lora": ["TrainMaskedTokenLora", 0]}, {}),
}
# nodes that take effect only in later nodes, each with the output node to run for it
ENDS = {"SaliencyNoiseBlend": "SaliencyBlendView", "CasDMHead": "save head"}
