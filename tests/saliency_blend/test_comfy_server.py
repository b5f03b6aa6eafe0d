"""The blend of the demo checkpoints in a real server: the same queue gives the same bits, whatever came before."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chorus.dev.tools.client import Comfy
from chorus.tests.support.real_comfyui import fresh_server

SAMPLING = {"cfg": 4.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}


def queue(seed: int = 5, steps: int = 4) -> dict:
    """Two checkpoints, one picture of two samples, saved as a latent; API format."""
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
    """The latent that a queue ends in, and the nodes that were answered from cache."""
    folder = base / "output"
    before = set(folder.glob("*.latent"))
    result = client.run(queue(**options), extra_data={"preview_method": "latent2rgb"})
    (new,) = set(folder.glob("*.latent")) - before
    return load_file(new)["latent_tensor"], result.cached()


@pytest.fixture(scope="module")
def first(server):
    with Comfy(server.address) as client:
        return run(client, server.base)[0]


def test_both_checkpoints_paint(first):
    assert first.shape == (2, 12, 12, 16)
    assert torch.isfinite(first).all()


def test_again_after_freeing_all_models(server, comfy, first):
    assert not torch.equal(run(comfy, server.base, seed=6)[0], first)
    comfy.free()
    again, cached = run(comfy, server.base)
    assert "sample" not in cached
    assert torch.equal(again, first)


def test_after_an_interrupt_in_the_middle_of_a_run(server, comfy, first):
    steps = []

    def stop(kind, data):
        state = data["nodes"].get("sample", {}) if kind == "progress_state" else {}
        if not steps and state.get("state") == "running" and state["value"] >= 2:
            steps.append(state["value"])
            comfy.interrupt()

    status = comfy.run(queue(seed=7, steps=200), stop).status
    comfy.free()
    assert status == "interrupted"
    assert steps[0] < 100
    assert torch.equal(run(comfy, server.base)[0], first)


@pytest.mark.slow
def test_in_a_fresh_server(tmp_path, first):
    with fresh_server(tmp_path) as fresh, Comfy(fresh.address) as client:
        assert torch.equal(run(client, fresh.base)[0], first)


def test_previews_show_the_blended_picture(comfy):
    assert comfy.run(queue(seed=8), extra_data={"preview_method": "latent2rgb"}).previews
