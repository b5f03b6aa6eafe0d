"""Models for the benchmarks of SeedSelect.

They are the general demo checkpoint, or networks with random weights of the sizes of SD 1.5, its VAE and CLIP ViT-L.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.model_patcher
import comfy.sd
import torch

from ...demo.concepts import phrase
from ...demo.modules import load_checkpoint, load_references, load_vision
from ...nodes.seed_select import run
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler, KSamplerInputs
from ...techniques.seed_select.comfy_scoring import ScoringSettings
from ...techniques.seed_select.comfy_session import SessionSettings
from ...techniques.seed_select.optimize import OptimizeSettings
from ...techniques.seed_select.select import SeedSelect, SeedSelectSettings
from .random_models import conditioning, sd15
from .random_weights import fill
from .sampling import encode

PLAIN, OPTIMIZE, KEPT = "one picture", "optimize", "optimize, activations of all steps kept"
CONCEPT, SEED, CFG = "rabbit", 1000, {"demo": 4.0, "sd15": 7.5}


@dataclass(frozen=True)
class Setting:
    """The models and the settings of SeedSelect."""

    name: str
    pixels: int  # side of the image
    steps: int
    candidates: int
    iterations: int
    proxy_steps: int  # the input optimize_steps, in the runs that compute the gradient with fewer steps
    last_steps: int


def kinds_of(s: Setting) -> list[str]:
    return [
        PLAIN,
        f"best of {s.candidates}, all in full",
        f"search among {s.candidates}",
        OPTIMIZE,
        f"optimize, {s.proxy_steps}-step proxy",
        f"optimize, gradient through the last {s.last_steps} steps",
        "search+optimize",
        KEPT,
    ]


def sd_vae() -> comfy.sd.VAE:
    """A VAE of the size and structure of SD 1.5's, with random weights."""
    layers = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    layers |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    network = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=layers, embed_dim=4)
    fill(network, torch.Generator().manual_seed(3))
    return comfy.sd.VAE(sd=network.state_dict())


def clip_vit_l():
    """A CLIP_VISION of the size and structure of CLIP ViT-L/14, with random weights."""
    config = Path(inspect.getfile(comfy.clip_vision)).with_name("clip_vision_config_vitl.json")
    encoder = comfy.clip_vision.ClipVisionModel(config)
    fill(encoder.model, torch.Generator().manual_seed(4))
    return encoder


@dataclass(frozen=True)
class Models:
    """The inputs of SeedSelect; ``prompts`` are the positive and the negative CONDITIONING."""

    model: comfy.model_patcher.ModelPatcher
    vae: comfy.sd.VAE
    vision: comfy.clip_vision.ClipVisionModel
    references: torch.Tensor
    prompts: tuple

    def sampler(self, pixels: int, **widgets) -> ComfySeedSampler:
        """A sampler for images of ``pixels`` x ``pixels``, with the values ``widgets`` of KSampler's widgets."""
        channels = self.model.get_model_object("latent_format").latent_channels
        latent = {"samples": torch.zeros(1, channels, pixels // 8, pixels // 8), "downscale_ratio_spacial": 8}
        inputs = dict(model=self.model, positive=self.prompts[0], negative=self.prompts[1], latent_image=latent)
        scoring = ScoringSettings(references=self.references, vae=self.vae, clip_vision=self.vision)
        return ComfySeedSampler(KSamplerInputs(**inputs, **widgets), scoring)


def demo_models(concept: str) -> Models:
    """The general checkpoint with the prompt and the references of a concept."""
    model, clip, vae = load_checkpoint("general")
    return Models(
        model, vae, load_vision(), load_references(concept)[0], (encode(clip, phrase(concept)), encode(clip, ""))
    )


def random_models(pixels: int) -> Models:
    references = torch.rand(4, pixels, pixels, 3, generator=torch.Generator().manual_seed(5))
    return Models(sd15(1, torch.float32), sd_vae(), clip_vit_l(), references, (conditioning(6), conditioning(7)))


class Case:
    """The models of a setting, and the runs that are measured."""

    def __init__(self, setting: Setting):
        self.setting, cfg = setting, CFG[setting.name]
        self.models = demo_models(CONCEPT) if setting.name == "demo" else random_models(setting.pixels)
        widgets = dict(steps=setting.steps, cfg=cfg, sampler_name="euler", scheduler="normal", seed=SEED)
        self.sampler = self.models.sampler(setting.pixels, **widgets)

    def sampler_for_gradients(self, settings: SessionSettings) -> ComfySeedSampler:
        """A sampler with gradients that shares the encoded references."""
        sampler = copy.copy(self.sampler)
        sampler.allow_gradients(settings)
        return sampler

    def weights(self) -> int:
        """Bytes of the weights of model, VAE and image encoder."""
        modules = self.models.model.model, self.models.vae.first_stage_model, self.models.vision.model
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    def kinds(self) -> dict[str, Callable]:
        """{name: run}. A run returns its number of evaluations, i.e. guided calls of the model."""
        s = self.setting
        runs = (
            lambda: self.plain(1),
            lambda: self.plain(s.candidates),
            lambda: self.select("search"),
            lambda: self.select("optimize"),
            lambda: self.select("optimize", steps=s.proxy_steps),
            lambda: self.select("optimize", last_steps=s.last_steps),
            lambda: self.select("search+optimize"),
            lambda: self.select("optimize", checkpoint=False),
        )
        return dict(zip(kinds_of(s), runs, strict=True))

    def plain(self, count: int) -> int:
        """The best of ``count`` seeds, each sampled with all steps."""
        noise = torch.cat([self.sampler.noise_of(SEED + k) for k in range(count)])
        best = math.inf
        for part in noise.split(self.sampler.batch_size(count)):
            latents = self.sampler.generate(part, seeds=[SEED] * len(part))
            best = min(best, float(self.sampler.score([latents]).min()))
        return count * self.setting.steps

    def select(
        self, mode: str, steps: int | None = None, last_steps: int | None = None, checkpoint: bool = True
    ) -> int:
        s = self.setting
        optimize = OptimizeSettings(iterations=s.iterations, patience=0)
        first = min(4, s.steps)  # the node's default
        settings = SeedSelectSettings(
            mode=mode, seed=SEED, candidates=s.candidates, steps=s.steps, first_steps=first, optimize=optimize
        )
        sampler = self.sampler_for_gradients(
            SessionSettings(steps=steps, last_steps=last_steps, seed=SEED, checkpoint=checkpoint)
        )
        select = SeedSelect(settings, sampler)
        run(select, sampler)
        return select.evaluations

    def activations(self) -> dict[str, int]:
        """Bytes of activations that the gradient needs for one denoiser step, one decode and one encoding."""
        found = {}

        def work(session):
            noise = self.sampler.noise_of(SEED).requires_grad_(True)
            session.score(session.unroll(noise)).sum().backward()
            found.update(session.activations)

        self.sampler_for_gradients(SessionSettings(steps=1)).gradients.run(work)
        return found
