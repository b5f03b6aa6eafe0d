"""The masks that a real server sends to a client while a blend samples."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from chorus.common.sheets import model_colour
from chorus.dev.tools.client import Comfy
from chorus.techniques.saliency_blend.comfy_live import EVENT, SETTING, live_masks
from chorus.techniques.saliency_blend.live import INTERVAL

JITTER = 0.15  # seconds by which a message may arrive late
SAMPLER = {"sampler_name": "euler", "scheduler": "normal", "cfg": 4.0, "denoise": 1.0}
BLEND = {
    "expert_strength": 1.0,
    "bias": 0.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "ramp": "constant",
    "expert_cfg": 0.0,
    "region_mode": "compete",
    "refresh": 1,
    "label": "",
    "general_strength": 1.0,
    "softness": 1.0,
    "saliency": "own",
    "blur": 4,
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def blend(model, expert, mask_mode="hard"):
    return node("SaliencyNoiseBlend", model=model, expert=expert, mask_mode=mask_mode, **BLEND)


def sample(model, latent, seed, steps):
    prompts = {"positive": ["positive", 0], "negative": ["negative", 0]}
    return node("KSampler", model=[model, 0], latent_image=[latent, 0], seed=seed, steps=steps, **prompts, **SAMPLER)


def api_prompt(seed, steps=60, mask_mode="hard"):
    """A chain of two experts, sampled by one sampler; a further blend samples before it."""
    demo = [node("ChorusDemoCheckpoint", name=name) for name in ("general", "expert-animals", "general-4-steps")]
    return {
        "general": demo[0],
        "animals": demo[1],
        "student": demo[2],
        "positive": node("CLIPTextEncode", clip=["general", 1], text="a cat and a rainbow"),
        "negative": node("CLIPTextEncode", clip=["general", 1], text=""),
        "latent": node("EmptyLatentImage", width=64, height=48, batch_size=1),
        "earlier": blend(["general", 0], ["student", 0]),
        "draft": sample("earlier", "latent", seed, 1),
        "first": blend(["general", 0], ["animals", 0]),
        "second": blend(["first", 0], ["student", 0], mask_mode),
        "sample": sample("second", "draft", seed, steps),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="live"),
    }


def masks_of(client, prompt):
    """Run a prompt; returns (arrival time, running node, message) of its masks."""
    found, running = [], [""]

    def receive(kind, data):
        if kind == "executing":
            running[0] = data["node"]
        if kind == EVENT:
            found.append((time.monotonic(), running[0], data))

    assert client.run(prompt, receive).status == "success"
    return found


def pixels(message):
    image = Image.open(io.BytesIO(base64.b64decode(message["image"])))
    assert message["type"] == image.get_format_mimetype()
    return np.asarray(image.convert("RGB"))


@pytest.fixture
def setting(client):
    """Function that changes the page's setting; it is on again after the test."""
    yield lambda value: client.post("/settings", {SETTING: value})
    client.post("/settings", {SETTING: True})


def test_running_blend_sends_its_masks(client):
    masks = [(at, data) for at, running, data in masks_of(client, api_prompt(1)) if running == "sample"]
    assert len(masks) >= 2
    assert all(sorted(data["nodes"]) == ["first", "second"] for _, data in masks)
    seconds = masks[-1][0] - masks[0][0]
    assert len(masks) <= 2 + (seconds + JITTER) / INTERVAL  # the first at once, and the last at the end
    colours = set()
    for _, data in masks:
        image = pixels(data)
        assert image.shape == (96, 128, 3)
        assert len(data["image"]) < 4000
        colours |= {tuple(colour) for colour in image.reshape(-1, 3).tolist()}
    assert colours <= {model_colour(i) for i in range(3)}
    assert model_colour(0) in colours and len(colours) > 1


def test_soft_mask_has_mixed_colours(client):
    prompt = api_prompt(7, steps=2, mask_mode="soft")
    last = pixels(masks_of(client, prompt)[-1][2])
    colours = np.array([model_colour(i) for i in range(3)])
    assert (last >= colours.min(0) - 8).all() and (last <= colours.max(0) + 8).all()
    assert len(np.unique(last.reshape(-1, 3), axis=0)) > 20


def test_last_mask_is_that_of_the_record(client):
    """The mean mask of a run of one step, in the view, is the mask of that step."""
    prompt = api_prompt(2, steps=1)
    prompt["view"] = node("SaliencyBlendView", trace=["first", 1], samples=["sample", 0])
    prompt["mask"] = node("MaskToImage", mask=["view", 1])
    prompt["shown"] = node("PreviewImage", images=["mask", 0])
    masks = []

    def receive(kind, data):
        if kind == EVENT and "first" in data["nodes"]:
            masks.append(data)

    result = client.run(prompt, receive)
    (image,) = result.outputs["shown"]["images"]
    experts = Image.open(io.BytesIO(client.get(f"/view?filename={image['filename']}&type=temp"))).convert("L")
    shown = (pixels(masks[-1]) != model_colour(0)).any(-1)[8::16, 8::16]
    assert np.array_equal(shown, np.asarray(experts) > 127)


def test_setting_turns_masks_off(client, setting):
    setting(False)
    assert not masks_of(client, api_prompt(3, steps=2))
    setting(True)
    assert masks_of(client, api_prompt(4, steps=2))


def test_prompt_without_a_client_sends_no_mask(client, server):
    """An API request without client_id: the server would send events without a recipient to all clients."""
    with Comfy(server.address) as other:
        prompt_id = other.post("/prompt", {"prompt": api_prompt(5, steps=2)})["prompt_id"]
        received = []
        other.run({"wait": node("PreviewAny", source=json.dumps(prompt_id))}, lambda kind, data: received.append(kind))
        assert "outputs" in other.get_json(f"/history/{prompt_id}")[prompt_id]
    assert EVENT not in received


def test_seed_select_shows_none_of_its_runs(client):
    prompt = api_prompt(6)
    del prompt["sample"], prompt["draft"]
    required = client.get_json("/object_info/SeedSelect")["SeedSelect"]["input"]["required"]
    values = {name: spec[1]["default"] for name, spec in required.items() if "default" in spec[1]}
    prompt["samples"] = node(
        "SeedSelect",
        **values | {"candidates": 2, "steps": 2, "semantic_weight": 0.0, "model": ["second", 0]},
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        references=["image", 0],
        vae=["general", 2],
    )
    concepts = client.get_json("/object_info/ChorusDemoReferences")["ChorusDemoReferences"]["input"]["required"][
        "concept"
    ]
    options = concepts[1]["options"] if concepts[0] == "COMBO" else concepts[0]
    prompt["image"] = node("ChorusDemoReferences", concept=options[0])
    prompt["save"] = node("SaveLatent", samples=["samples", 2], filename_prefix="live")
    assert not masks_of(client, prompt)


def test_library_use_has_no_display():
    assert live_masks() is None
