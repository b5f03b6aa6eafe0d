"""Invalid values of the right type for sockets, and functions that run a node with otherwise valid inputs."""

from functools import cache

import comfy_extras.nodes_custom_sampler as custom
import nodes as host_nodes
import torch

from chorus.nodes import NODES
from chorus.tests.support.tiny_models import CONTEXT, defaults, flux, ksample, unet

NODE = {node.define_schema().node_id: node for node in NODES}
NAN, INFINITY = float("nan"), float("inf")
BOX = {"x": 1, "y": 1, "width": 30, "height": 30}
LATENT, CHANNELS, SIDE = (1, 12, 16, 16), 12, 64


def execute(name: str, /, **inputs):
    """Outputs of a node, run as ComfyUI runs it. Widgets that are not in ``inputs`` have their defaults."""
    with torch.inference_mode():
        return NODE[name].execute(**{**defaults(NODE[name]), **inputs}).args


@cache
def loaded(name: str, /, **widgets):
    return execute(name, **widgets)


@cache
def prompt(loader: str, text: str):
    with torch.inference_mode():
        return host_nodes.CLIPTextEncode().encode(loaded(loader)[1], text)[0]


def words(text: str = "a cat"):
    return prompt("ChorusDemoCheckpoint", text)


def token_words(text: str = "a cat"):
    return prompt("LoadMaskedTokenModel", text)


def references():
    return loaded("ChorusDemoReferences", concept="carrot")[0]


def models() -> dict:
    return {"a flow model": flux(), "four channels": unet()}


def conditionings() -> dict:
    [[states, more]] = words()
    return {
        "of another width": [[torch.randn(1, 5, CONTEXT), {"pooled_output": torch.randn(1, 16)}]],
        "without pooled output": [[states, {}]],
        "pooled output null": [[states, {"pooled_output": None}]],
        "without a tensor": [[None, {}]],
        "NaN": [[torch.full_like(states, NAN), more]],
        "no token": [[states[:, :0], more]],
        "a text": [["a cat", {}]],
        "no entry": [],
        "half an entry": [[states]],
        "of masked tokens": token_words(),
    }


def images() -> dict:
    return {
        "no image": torch.rand(0, SIDE, SIDE, 3),
        "no width": torch.rand(1, SIDE, 0, 3),
        "a pixel": torch.rand(1, 1, 1, 3),
        "a row": torch.rand(1, 1, SIDE, 3),
        "odd sides": torch.rand(1, 37, 53, 3),
        "RGBA": torch.rand(1, SIDE, SIDE, 4),
        "grey": torch.rand(1, SIDE, SIDE, 1),
        "grey with alpha": torch.rand(1, SIDE, SIDE, 2),
        "no batch": torch.rand(SIDE, SIDE, 3),
        "a video": torch.rand(1, 2, SIDE, SIDE, 3),
        "NaN": torch.full((1, SIDE, SIDE, 3), NAN),
        "infinite": torch.full((1, SIDE, SIDE, 3), INFINITY),
        "above 1": torch.rand(1, SIDE, SIDE, 3) * 1e6,
        "bytes": torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8),
        "half precision": torch.rand(1, SIDE, SIDE, 3).half(),
    }


def masks() -> dict:
    return {
        "no mask": torch.ones(0, SIDE, SIDE),
        "no width": torch.ones(1, SIDE, 0),
        "a pixel": torch.ones(1, 1, 1),
        "another size": torch.ones(1, 32, 96),
        "three": torch.ones(3, SIDE, SIDE),
        "a row of numbers": torch.ones(SIDE),
        "a number": torch.tensor(1.0),
        "four axes": torch.ones(1, 1, SIDE, SIDE),
        "boolean": torch.ones(1, SIDE, SIDE, dtype=torch.bool),
        "NaN": torch.full((1, SIDE, SIDE), NAN),
    }


def latents() -> dict:
    tensors = {
        "four channels": torch.randn(1, 4, 16, 16),
        "sixteen channels": torch.randn(1, 16, 16, 16),
        "a video": torch.randn(1, CHANNELS, 3, 16, 16),
        "no batch": torch.randn(CHANNELS, 16, 16),
        "no latent": torch.zeros(0, CHANNELS, 16, 16),
        "no width": torch.zeros(1, CHANNELS, 16, 0),
        "a position": torch.randn(1, CHANNELS, 1, 1),
        "NaN": torch.full(LATENT, NAN),
        "two": torch.zeros(2, *LATENT[1:]),
    }
    return {
        **{what: {"samples": samples} for what, samples in tensors.items()},
        "no samples": {},
        "with a mask of another size": {"samples": torch.zeros(LATENT), "noise_mask": torch.ones(1, 5, 7)},
    }


def boxes() -> dict:
    return {
        "for two images": [[], []],
        "a text": "x",
        "numbers": [1, 2, 3, 4],
        "with null": [None],
        "a tensor": torch.rand(2, 4),
        "nested deeper": [[[BOX]]],
        "mixed": [[BOX, [1]]],
        "with a text": {**BOX, "x": "left"},
        "no width": {"x": 1, "y": 1, "height": 3},
        "NaN": {**BOX, "x": NAN},
        "infinite": {**BOX, "width": INFINITY},
        "negative": {**BOX, "width": -9},
        "outside": {**BOX, "x": 500},
        "zero width": {**BOX, "width": 0},
        "huge": {"x": -1e30, "y": -1e30, "width": 3e30, "height": 3e30},
    }


def sampled(model, latent=None):
    return ksample(model, words(), words(""), latent or {"samples": torch.zeros(LATENT)}, steps=1, cfg=4.0)


def blend(samples=None, **inputs):
    """Sample a blend of two checkpoints and render its view."""
    inputs = {"model": general(), "expert": other(), "positive": words(), "negative": words(""), **inputs}
    model, trace = execute("SaliencyNoiseBlend", **inputs)
    return execute("SaliencyBlendView", trace=trace, samples={"samples": sampled(model, samples)})


def general():
    return loaded("ChorusDemoCheckpoint", name="general")[0]


def other():
    return loaded("ChorusDemoCheckpoint", name="expert-animals")[0]


def head(samples=None, model=None):
    loaded_head = loaded("LoadCasDMHead", file="chorus-demo-general.safetensors")[0]
    return sampled(execute("CasDMHead", model=model or general(), head=loaded_head)[0], samples)


def select(**inputs):
    valid = {"positive": words(), "negative": words(""), "latent_image": {"samples": torch.zeros(LATENT)}}
    valid |= {"model": general(), "references": references(), "vae": loaded("ChorusDemoCheckpoint")[2]}
    valid |= {"clip_vision": loaded("ChorusDemoVision")[0], "candidates": 2, "steps": 2, "first_steps": 1}
    return execute("SeedSelect", **{**valid, "grid_size": 2, **inputs})


def noise_map(**inputs):
    valid = {"positive": words(), "negative": words(""), "latent_image": {"samples": torch.zeros(LATENT)}}
    valid |= {"model": general(), "references": references(), "vae": loaded("ChorusDemoCheckpoint")[2]}
    valid |= {"clip_vision": loaded("ChorusDemoVision")[0], "steps": 2, "patches": 2, "pairs": 2, "checks": 0}
    return execute("SeedMap", **{**valid, "noise": random_noise(1), **inputs})


def random_noise(seed):
    return custom.RandomNoise.execute(seed).args[0]


def combined(mask, samples=None):
    noise = execute("CombineNoise", noise=random_noise(1), other=random_noise(2), mask=mask)[0]
    return noise.generate_noise(samples or {"samples": torch.zeros(LATENT)})


def grid(model=None, expert=None, **inputs):
    blended = execute("SaliencyNoiseBlend", model=model or general(), expert=expert or other())[0]
    valid = {"positive": words(), "negative": words(""), "latent_image": {"samples": torch.zeros(LATENT)}}
    valid |= {"vae": loaded("ChorusDemoCheckpoint")[2], "steps": 2, "rows": "bias = 0 | 1", "columns": ""}
    return execute("BlendGrid", **{**valid, "model": blended, **inputs})


def train_head(**inputs):
    valid = {
        "model": general(),
        "samples": {"samples": torch.zeros(LATENT)},
        "positive": words(),
        "negative": words(""),
    }
    valid |= {"cfg": 4.0, "steps": 2, "size": "small", "metric": "none", **inputs}
    widgets = defaults(NODE["TrainCasDMHead"])
    with torch.inference_mode():
        return NODE["TrainCasDMHead"].execute(**{name: [value] for name, value in {**widgets, **valid}.items()}).args


def tokens(**inputs):
    valid = {"positive": token_words(), "negative": token_words(""), "steps": 2, "width": SIDE, "height": SIDE}
    return execute("MaskedTokenSampler", **{**valid, "model": token_model(), **inputs})


def token_video(**inputs):
    valid = {"positive": token_words(), "negative": token_words(""), "steps": 2, "frames": 2}
    return execute("MaskedTokenVideo", **{**valid, "model": token_model(), "images": references()[:1], **inputs})


def token_model():
    return loaded("LoadMaskedTokenModel")[0]


def encoded():
    return execute("MaskedTokenEncode", image=references()[:1], model=token_model())[0]


def train_lora(**inputs):
    valid = {"model": token_model(), "images": references(), "positive": token_words(), "rank": 2, "steps": 2}
    return execute("TrainMaskedTokenLora", **{**valid, "resolution": 32, **inputs})


def faces(**inputs):
    refiner = loaded("LoadFaceRefiner", file="chorus-demo-faces.safetensors")[0]
    return execute("FaceRefiner", **{"image": references()[:2], "refiner": refiner, **inputs})


def subset(values: dict, *names: str) -> dict:
    return {name: values[name] for name in names}
