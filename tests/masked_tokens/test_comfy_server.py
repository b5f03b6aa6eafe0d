"""The demo's masked token model on a real server: preview methods, interrupts, caching."""

import pytest
import torch
from safetensors.torch import load_file

from chorus.techniques.masked_tokens.comfy_files import FROM_FOLDER

SAMPLING = {
    "cfg": 0.0,
    "temperature": 2.0,
    "width": 64,
    "height": 48,
    "batch_size": 2,
    "denoise": 1.0,
    "order": "confidence",
    "schedule": "cosine",
    "aesthetic_score": 6.0,
    "cfg_ramp": "constant",
    "feather": 8,
}


def queue(seed=1, steps=6, prefix="server/a") -> dict:
    files = dict.fromkeys(("transformer_file", "vq_file", "text_encoder_file"), FROM_FOLDER)
    return {
        "load": {"class_type": "LoadMaskedTokenModel", "inputs": {"model_folder": "chorus-demo", **files}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "a cat on blue"}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": ""}},
        "sample": {
            "class_type": "MaskedTokenSampler",
            "inputs": {
                "model": ["load", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "seed": seed,
                "steps": steps,
                **SAMPLING,
            },
        },
        "save": {"class_type": "SaveMaskedTokens", "inputs": {"tokens": ["sample", 1], "filename_prefix": prefix}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["sample", 0]}},
    }


@pytest.fixture
def run(server, client):
    """A function that runs the workflow and returns its ids and its result."""

    def run(method="none", **options):
        result = client.run(queue(**options), extra_data={"preview_method": method})
        [saved] = result.outputs["save"]["tokens"]
        return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["ids"], result

    return run


@pytest.mark.slow
def test_previews_follow_requested_method(run, client):
    ids = {}
    for method, previews in {"none": 0, "latent2rgb": 6, "taesd": 6, "auto": 6}.items():
        client.free()
        ids[method], result = run(method)
        assert len(result.previews) == previews, method
        assert len(client.images(result, "temp")) == 2
    assert ids["none"].shape == (2, 6, 8) and len(ids["none"].unique()) > 1
    assert all(torch.equal(ids["none"], other) for other in ids.values())


@pytest.mark.slow
def test_interrupt_does_not_affect_next_run(run, client):
    first, _ = run(seed=7)

    def interrupt(kind, data):
        if kind == "progress" and data["node"] == "sample" and data["value"] == 2:
            client.interrupt()

    # with previews, every step is reported
    stopped = client.run(queue(seed=8, steps=500), interrupt, extra_data={"preview_method": "latent2rgb"})
    assert stopped.status == "interrupted" and "save" not in stopped.outputs
    client.free()
    assert torch.equal(run(seed=7, prefix="server/b")[0], first)


def test_new_seed_runs_only_sampler(run):
    first, _ = run(seed=3)
    other, result = run(seed=4)
    assert {"load", "positive", "negative"} <= result.cached() and "sample" not in result.cached()
    # sample i has seed + i
    assert torch.equal(other[0], first[1])
