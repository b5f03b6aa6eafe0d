"""The blend of the demo checkpoints in a real server: a prompt produces the same bits, whatever ran before."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chorus.dev.tools.client import Comfy, WorkflowError
from chorus.techniques.saliency_blend.view import draw_no_blend
from chorus.tests.support.real_comfyui import fresh_server

SAMPLING = {"cfg": 4.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}


def api_prompt(seed: int = 5, steps: int = 4) -> dict:
    """A prompt in API format that blends two checkpoints in a batch of two and saves the latent."""
    blend = {
        "expert_strength": 1.0,
        "bias": 0.1,
        "start_percent": 0.0,
        "end_percent": 0.9,
        "ramp": "constant",
        "expert_cfg": 3.0,
        "region_mode": "compete",
        "refresh": 1,
        "label": "animals",
        "general_strength": 1.0,
        "mask_mode": "hard",
        "softness": 1.0,
        "saliency": "own",
        "blur": 4,
    }
    return {
        "general": {"class_type": "ChorusDemoCheckpoint", "inputs": {"name": "general"}},
        "expert": {"class_type": "ChorusDemoCheckpoint", "inputs": {"name": "expert-animals"}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["general", 1], "text": "a cat on blue"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["general", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 2}},
        "blend": {
            "class_type": "SaliencyNoiseBlend",
            "inputs": {"model": ["general", 0], "expert": ["expert", 0], "positive": ["positive", 0], **blend},
        },
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["blend", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": steps,
                **SAMPLING,
            },
        },
        "view": {"class_type": "SaliencyBlendView", "inputs": {"trace": ["blend", 1], "samples": ["sample", 0]}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "blend"}},
    }


def run(client: Comfy, base: Path, **options) -> tuple[torch.Tensor, set[str]]:
    """Run the prompt. Returns the saved latent, and the nodes whose output was cached."""
    folder = base / "output"
    before = set(folder.glob("*.latent"))
    result = client.run(api_prompt(**options), extra_data={"preview_method": "latent2rgb"})
    (new,) = set(folder.glob("*.latent")) - before
    return load_file(new)["latent_tensor"], result.cached()


@pytest.fixture(scope="module")
def first(server):
    with Comfy(server.address) as client:
        return run(client, server.base)[0]


@pytest.mark.slow
def test_latent_is_finite_and_of_the_batch_shape(first):
    assert first.shape == (2, 8, 6, 8)
    assert torch.isfinite(first).all()


@pytest.mark.slow
def test_same_bits_after_freeing_all_models(server, client, first):
    assert not torch.equal(run(client, server.base, seed=6)[0], first)
    client.free()
    again, cached = run(client, server.base)
    assert "sample" not in cached
    assert torch.equal(again, first)


@pytest.mark.slow
def test_same_bits_after_an_interrupted_run(server, client, first):
    steps = []

    def stop(kind, data):
        state = data["nodes"].get("sample", {}) if kind == "progress_state" else {}
        if not steps and state.get("state") == "running" and state["value"] >= 2:
            steps.append(state["value"])
            client.interrupt()

    status = client.run(api_prompt(seed=7, steps=200), stop).status
    client.free()
    assert status == "interrupted"
    assert steps[0] < 100
    assert torch.equal(run(client, server.base)[0], first)


@pytest.mark.slow
def test_same_bits_in_a_new_server(tmp_path, first):
    with fresh_server(tmp_path) as fresh, Comfy(fresh.address) as client:
        assert torch.equal(run(client, fresh.base)[0], first)


def without_blend() -> dict:
    """The prompt that the page sends while SaliencyNoiseBlend is bypassed: no node provides the trace."""
    prompt = api_prompt(seed=9, steps=2)
    del prompt["blend"], prompt["view"]["inputs"]["trace"]
    prompt["sample"]["inputs"]["model"] = ["general", 0]
    return prompt


def test_view_of_a_bypassed_blend_shows_why_and_the_prompt_runs(client, server):
    result = client.run(without_blend())
    expected = (255 * draw_no_blend(1)[0].numpy()).astype(np.uint8)
    shown = result.outputs["view"]["images"]
    assert len(shown) == 2  # one sheet per sample
    for image in shown:
        pixels = Image.open(server.base / "temp" / image["subfolder"] / image["filename"]).convert("RGB")
        assert np.array_equal(np.asarray(pixels), expected)


def test_view_without_samples_is_refused_before_the_prompt_runs(client):
    prompt = api_prompt(seed=9)
    del prompt["view"]["inputs"]["samples"], prompt["save"]
    message = "samples is not connected; connect the sampler's latent"
    with pytest.raises(WorkflowError, match=message) as refused:
        client.run(prompt)
    assert "trace - " not in str(refused.value)


def test_previews_of_a_blend_are_sent(client):
    assert client.run(api_prompt(seed=8), extra_data={"preview_method": "latent2rgb"}).previews
