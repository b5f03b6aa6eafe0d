"""Conditionings, latents and memory limits for tests of SeedSelect."""

import comfy.model_management
import comfy.samplers
import nodes as host_nodes
import torch

from chorus.tests.support.tiny_models import (
    conditioning,
    controlnet,
    in_inference_mode,
)

WORDS = conditioning(10), conditioning(11)


@in_inference_mode
def content(mask=False):
    """A random latent, with a noise mask over its left half if ``mask``."""
    out = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)) * 4}
    if mask:
        out["noise_mask"] = (torch.arange(16) < 8).float().expand(1, 1, 16, 16).clone()
    return out


def limit_free_memory(free, monkeypatch):
    """Make ComfyUI report ``free`` bytes of free memory."""

    def get_free_memory(device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)


@in_inference_mode
def with_control(words):
    """The prompts ``words`` (positive, negative) with a ControlNet that has a batch of two hint images."""
    hint = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(3))
    node = host_nodes.ControlNetApplyAdvanced()
    return node.apply_controlnet(*words, controlnet(3), hint, 1.0, 0.0, 1.0)
