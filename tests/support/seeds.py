"""Conditionings, latents, references, scores and memory limits for tests of SeedSelect and SeedMap."""

import comfy.model_management
import comfy.samplers
import nodes as host_nodes
import torch
import torch.nn.functional as F

from chorus.tests.support.tiny_models import (
    conditioning,
    controlnet,
    in_inference_mode,
)

WORDS = conditioning(10), conditioning(11)
SIDE = 64  # pixels along a side of the image, for a latent of 8x8


def references(count=2):
    """Smooth random images [count, 50, 40, 3]."""
    coarse = torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(4))
    return F.interpolate(coarse, (50, 40), mode="bilinear").movedim(1, -1).contiguous()


@in_inference_mode
def score_of(model, vae, vision, latents):
    """Score of each latent, computed with ComfyUI's VAE and image encoder.

    10 (1 - cosine similarity of the embeddings) + mean squared difference of the latents.
    """

    def embedding(images):
        return torch.cat([vision.encode_image(image)["image_embeds"] for image in images.split(1)]).double()

    squashed = F.interpolate(references().movedim(-1, 1), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    appearance = model.model.process_latent_in(vae.encode(squashed.movedim(1, -1))).mean(0).double()
    semantic = embedding(references()).mean(0)
    cosine = F.cosine_similarity(embedding(vae.decode(latents)), semantic[None])
    difference = ((model.model.process_latent_in(latents).double() - appearance) ** 2).flatten(1).mean(1)
    return (10 * (1 - cosine) + difference).tolist()


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
