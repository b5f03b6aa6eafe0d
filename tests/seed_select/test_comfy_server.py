"""SeedSelect with the demo checkpoint on a real server: reproduction by other samplers, progress, previews, cancelling."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chorus.dev.tools.client import Comfy
from chorus.dev.tools.setup import ROOT
from chorus.nodes.seed_select import SeedSelect
from chorus.tests.support.real_comfyui import fresh_server
from chorus.tests.support.tiny_models import defaults

SAMPLING = {"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def workflow(**inputs) -> dict:
    """Workflow with SeedSelect, a KSampler with its seed, and a SamplerCustomAdvanced with its noise.

    The workflow saves the three latents.
    """
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
        "references": ("ChorusDemoReferences", {"concept": "carrot"}),
        "positive": ("CLIPTextEncode", {"clip": ["load", 1], "text": "a carrot"}),
        "negative": ("CLIPTextEncode", {"clip": ["load", 1], "text": ""}),
        "empty": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "select": ("SeedSelect", {**wires, **widgets}),
        "plain": ("KSampler", {**common, **SAMPLING, "seed": ["select", 1]}),
        "guider": ("CFGGuider", {**{k: common[k] for k in ("model", "positive", "negative")}, "cfg": 4.0}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": ("BasicScheduler", scheduler),
        "advanced": ("SamplerCustomAdvanced", advanced),
        "images": ("PreviewImage", {"images": ["select", 4]}),
        "report": ("PreviewAny", {"source": ["select", 5]}),
    }
    for name, source in {"select": ["select", 2], "plain": ["plain", 0], "advanced": ["advanced", 0]}.items():
        nodes[f"save {name}"] = ("SaveLatent", {"samples": source, "filename_prefix": f"seed/{name}"})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.fixture
def run(server, client):
    """Function that runs ``workflow`` and returns its three latents by name, and the result with all events."""

    def run(on_event=None, **inputs):
        result = client.run(workflow(**inputs), on_event, extra_data={"preview_method": "latent2rgb"})
        folder, latents = server.base / "output" / "seed", {}
        for name in ("select", "plain", "advanced"):
            newest = max(folder.glob(f"{name}_*.latent"), key=lambda file: file.name)
            latents[name] = load_file(newest)["latent_tensor"]
        return latents, result

    return run


@pytest.mark.slow
def test_seed_and_noise_reproduce_the_samples_bit_for_bit(run, client):
    latents, result = run()
    assert torch.equal(latents["plain"], latents["select"])
    assert torch.equal(latents["advanced"], latents["select"])
    [(_, _, image)] = client.images(result, "temp")
    assert image[:4] == b"\x89PNG"
    progress = [data for kind, data in result.events if kind == "progress" and data["node"] == "select"]
    # two rounds: four candidates with 2 steps, then one survivor with 4 steps
    assert progress[-1]["value"] == progress[-1]["max"] == 4 * 2 + 4
    assert [p["value"] for p in progress] == sorted(p["value"] for p in progress)
    assert len(result.previews) > 4


@pytest.mark.slow
def test_seed_and_noise_reproduce_the_samples_of_the_connected_guider_and_sigmas(run):
    connected = {name: [name, 0] for name in ("guider", "sigmas", "sampler")}
    latents, _ = run(**connected, cfg=9.0, steps=7, scheduler="beta", seed=60)
    assert torch.equal(latents["plain"], latents["select"])
    assert torch.equal(latents["advanced"], latents["select"])


@pytest.mark.slow
def test_only_the_optimised_noise_reproduces_the_samples(run):
    latents, _ = run(mode="optimize", iterations=4)
    assert torch.equal(latents["advanced"], latents["select"])
    assert not torch.equal(latents["plain"], latents["select"])


@pytest.mark.slow
def test_example_optimises_to_another_image_than_that_of_its_start(client):
    file = ROOT / "example_workflows" / "Rare concept by optimising the noise.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    prompt = client.to_api(content)
    [select] = (entry for entry in prompt.values() if entry["class_type"] == "SeedSelect")
    select["inputs"]["iterations"] = 3  # the others take minutes
    result = client.run(prompt)
    titles = {str(node["id"]): node.get("title") for node in content["nodes"]}
    images = {titles[node]: data for node, _, data in client.images(result)}
    start, optimised = (
        torch.from_numpy(np.asarray(Image.open(io.BytesIO(images[name]))).astype(int))
        for name in ("start", "optimised")
    )
    assert float((start - optimised).abs().float().mean()) > 5  # of 255: another image, not a rounding
    [report] = (output["text"][0] for node, output in result.outputs.items() if titles[node] == "Report")
    before, after = re.search(r"^optimised seed \d+: score (\S+) to (\S+) in", report, re.M).groups()
    assert float(after) < float(before) and "found nothing better" not in report


@pytest.mark.slow
def test_cancel_returns_the_best_so_far_and_the_queue_continues(run, client):
    stopped = []

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == "select" and data["value"] >= 2 * 2 and not stopped:
            stopped.append(data["value"])
            client.interrupt()

    latents, result = run(interrupt, candidates=1024, sampler_name="euler_ancestral", seed=90)
    assert result.status == "success" and stopped[0] < 100
    assert torch.isfinite(latents["select"]).all() and latents["select"].abs().max() > 0
    again, _ = run(seed=40, first_steps=3)
    assert torch.equal(again["plain"], again["select"])


@pytest.mark.exhaustive
def test_two_servers_find_the_best_seed_of_one(run, client, tmp_path):
    """With all steps in the first round, no candidate is dropped early, so the best is the same."""

    def found(result) -> tuple[set[int], int, float]:
        """Searched seeds, best seed and its score."""
        [report] = result.outputs["report"]["text"]
        seed, score = re.search(r"^image 1, seed (\d+): score (\S+)$", report, re.M).groups()
        return {int(n) for n in re.findall(r"^\d+\. seed (\d+):", report, re.M)}, int(seed), float(score)

    exact = dict(seed=1008, first_steps=4)
    whole_latents, whole = run(candidates=16, **exact)
    part = dict(candidates=8, shares=2, **exact)
    with fresh_server(tmp_path) as other, Comfy(other.address) as second:
        parts = [found(run(share=0, **part)[1]), found(second.run(workflow(share=1, **part)))]
    assert parts[0][0] == set(range(1008, 1024, 2)) and parts[1][0] == set(range(1009, 1024, 2))
    seeds = [seed for _, seed, _ in parts]
    best = min(parts, key=lambda one: one[2])
    assert best[1:] == found(whole)[1:]
    # the inputs seed, candidates and share are not used
    latents, compared = run(seeds=f"{seeds[0]}, {seeds[1]}", first_steps=4)
    assert found(compared) == ({*seeds}, *best[1:])
    assert torch.equal(latents["select"], whole_latents["select"])
