"""SeedSelect with the demo's checkpoint in a real server: the seed in a plain KSampler, what the user sees, Cancel."""

import pytest
import torch
from safetensors.torch import load_file

from chorus.nodes.seed_select import SeedSelect
from chorus.tests.support.tiny_models import defaults

SAMPLING = {"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def queue(**inputs) -> dict:
    """A search whose seed a plain KSampler takes, and whose noise SamplerCustomAdvanced takes; all three are saved."""
    common = {
        "model": ["load", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["empty", 0],
    }
    wires = {**common, "references": ["references", 0], "vae": ["load", 2], "clip_vision": ["vision", 0]}
    widgets = {**defaults(SeedSelect), **SAMPLING, "seed": 40, "candidates": 4, "first_steps": 2, **inputs}
    scheduler = {"model": ["load", 0], "scheduler": "normal", "steps": 4, "denoise": 1.0}
    advanced = {
        "noise": ["select", 0],
        "guider": ["guider", 0],
        "sampler": ["sampler", 0],
        "sigmas": ["sigmas", 0],
        "latent_image": ["empty", 0],
    }
    nodes = {
        "load": ("ChorusDemoCheckpoint", {"name": "general"}),
        "vision": ("ChorusDemoVision", {}),
        "references": ("ChorusDemoReferences", {"sign": "carrot"}),
        "positive": ("CLIPTextEncode", {"clip": ["load", 1], "text": "a carrot"}),
        "negative": ("CLIPTextEncode", {"clip": ["load", 1], "text": ""}),
        "empty": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "select": ("SeedSelect", {**wires, **widgets}),
        "plain": ("KSampler", {**common, **SAMPLING, "seed": ["select", 1]}),
        "guider": ("CFGGuider", {**{k: common[k] for k in ("model", "positive", "negative")}, "cfg": 4.0}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": ("BasicScheduler", scheduler),
        "advanced": ("SamplerCustomAdvanced", advanced),
        "pictures": ("PreviewImage", {"images": ["select", 4]}),
    }
    for name, source in {"select": ["select", 2], "plain": ["plain", 0], "advanced": ["advanced", 0]}.items():
        nodes[f"save {name}"] = ("SaveLatent", {"samples": source, "filename_prefix": f"seed/{name}"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.fixture
def run(server, comfy):
    """The latents of a queue by name, and its result."""

    def run(on_event=None, **inputs):
        result = comfy.run(queue(**inputs), on_event, extra_data={"preview_method": "latent2rgb"})
        folder, latents = server.base / "output" / "seed", {}
        for name in ("select", "plain", "advanced"):
            newest = max(folder.glob(f"{name}_*.latent"), key=lambda file: file.name)
            latents[name] = load_file(newest)["latent_tensor"]
        return latents, result

    return run


def test_the_seed_and_the_noise_give_the_samples_bit_for_bit(run, comfy):
    latents, result = run()
    assert torch.equal(latents["plain"], latents["select"])
    assert torch.equal(latents["advanced"], latents["select"])
    [(_, _, picture)] = comfy.images(result, "temp")
    assert picture[:4] == b"\x89PNG"
    told = [data for kind, data in result.events if kind == "progress" and data["node"] == "select"]
    # 4 x 2, 1 x 4: a search of four keeps a quarter
    assert told[-1]["value"] == told[-1]["max"] == 4 * 2 + 4
    assert [t["value"] for t in told] == sorted(t["value"] for t in told)
    assert len(result.previews) > 4


def test_an_optimised_noise_gives_its_samples(run):
    latents, _ = run(mode="optimize", iterations=4)
    assert torch.equal(latents["advanced"], latents["select"])
    assert not torch.equal(latents["plain"], latents["select"])


def test_cancel_keeps_the_best_so_far_and_the_queue_goes_on(run, comfy):
    stopped = []

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == "select" and data["value"] >= 2 * 2 and not stopped:
            stopped.append(data["value"])
            comfy.interrupt()

    latents, result = run(interrupt, candidates=2000, sampler_name="euler_ancestral", seed=90)
    assert result.status == "success" and stopped[0] < 100
    assert torch.isfinite(latents["select"]).all() and latents["select"].abs().max() > 0
    again, _ = run(seed=40, first_steps=3)
    assert torch.equal(again["plain"], again["select"])
