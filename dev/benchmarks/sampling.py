"""Sampling with ComfyUI's sampler, and sheets of images, for the benchmarks that generate with the demo checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from PIL import Image
from torch import Tensor

from ...demo.autoencoder import CHANNELS
from ..recipes.scenes import CELL, SIZE

LATENT = (CHANNELS, SIZE // CELL, SIZE // CELL)  # shape of the latent of an image of the demo checkpoints


def encode(clip: CLIP, text: str) -> list:
    """The CONDITIONING of a prompt, as CLIPTextEncode returns it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def joined(conditionings: Sequence[list]) -> list:
    """A CONDITIONING with one row for each of the given CONDITIONINGs, each of one prompt."""
    rows = [c[0] for c in conditionings]
    pooled = torch.cat([options["pooled_output"] for _, options in rows])
    return [[torch.cat([states for states, _ in rows]), rows[0][1] | {"pooled_output": pooled}]]


def sample(
    model: ModelPatcher, positive: list, negative: list, seed: int, latent: Tensor, steps: int, cfg: float, *names: str
) -> Tensor:
    """Latents that KSampler makes of an empty ``latent``. ``names``: sampler, scheduler."""
    noise = comfy.sample.prepare_noise(latent, seed)
    given: tuple[Any, ...] = model, noise, steps, cfg, *names, positive, negative, latent
    return comfy.sample.sample(*given, seed=seed, disable_pbar=True)


def generate(model: ModelPatcher, clip: CLIP, captions: Sequence[str], seed: int, *settings: Any) -> Tensor:
    """Latents [N, 8, 16, 16] of N captions. ``settings``: steps, cfg, sampler, scheduler."""
    positive = joined([encode(clip, caption) for caption in captions])
    return sample(model, positive, encode(clip, ""), seed, torch.zeros(len(captions), *LATENT), *settings)


def save_rows(rows: Sequence, file: Path) -> None:
    """Save an image of rows of images [H, W, 3] in 0..1."""
    image = torch.cat([torch.cat(list(row), 1) for row in rows])
    Image.fromarray((image * 255).round().byte().numpy()).save(file)
