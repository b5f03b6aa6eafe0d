"""What SeedSelect is measured on: the demo's general checkpoint, or random networks of the sizes of SD 1.5, its VAE and
CLIP ViT-L."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.clip_vision
import comfy.ldm.models.autoencoder
import comfy.sd
import torch

from ...demo.modules import load_checkpoint, load_references, load_vision
from ...nodes.seed_select import run
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler, KSamplerInputs
from ...techniques.seed_select.comfy_scoring import ScoringSettings
from ...techniques.seed_select.comfy_session import SessionSettings
from ...techniques.seed_select.optimize import OptimizeSettings
from ...techniques.seed_select.select import SeedSelect, SeedSelectSettings
from .random_models import conditioning, fill, sd15

PLAIN, OPTIMIZE, KEPT = "one picture", "optimize", "optimize, activations of all steps kept"
SIGN, SEED, CFG = "cherries", 1000, {"demo": 4.0, "sd15": 7.5}


@dataclass(frozen=True)
class Setting:
    """``pixels``: side of the picture."""

    name: str
    pixels: int
    steps: int
    candidates: int
    iterations: int
    proxy_steps: int
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
    config = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_vitl.json")
    encoder = comfy.clip_vision.ClipVisionModel(config)
    fill(encoder.model, torch.Generator().manual_seed(4))
    return encoder


class Case:
    """The models of a setting, and what is measured on them."""

    def __init__(self, setting: Setting):
        self.setting, self.sizes = setting, {}
        if setting.name == "demo":
            self.model, clip, self.vae = load_checkpoint("general")
            self.vision, self.references = load_vision(), load_references(SIGN)[0]
            words = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (SIGN, "")]
        else:
            self.model, self.vae, self.vision = sd15(1, torch.float32), sd_vae(), clip_vit_l()
            draws = torch.Generator().manual_seed(5)
            self.references = torch.rand(4, setting.pixels, setting.pixels, 3, generator=draws)
            words = [conditioning(6), conditioning(7)]
        side, (positive, negative) = setting.pixels // 8, words
        latent = {"samples": torch.zeros(1, 4, side, side), "downscale_ratio_spacial": 8}
        wired = dict(model=self.model, positive=positive, negative=negative, latent_image=latent)
        widgets = dict(steps=setting.steps, cfg=CFG[setting.name], sampler_name="euler", scheduler="normal", seed=SEED)
        scoring = ScoringSettings(references=self.references, vae=self.vae, clip_vision=self.vision)
        self.sampler = ComfySeedSampler(KSamplerInputs(**wired, **widgets), scoring)

    def fresh(self, settings: SessionSettings) -> ComfySeedSampler:
        """A sampler that is open to gradients, on the same references, which need not be encoded again."""
        sampler = copy.copy(self.sampler)
        sampler.allow_gradients(settings)
        return sampler

    def weights(self) -> int:
        """Bytes of the weights of model, VAE and image encoder."""
        modules = self.model.model, self.vae.first_stage_model, self.vision.model
        return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    def kinds(self) -> dict[str, Callable]:
        """Each returns the model evaluations with guidance that it spent."""
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
        """The best of ``count`` seeds, each with all steps."""
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
        sampler = self.fresh(SessionSettings(steps=steps, last_steps=last_steps, seed=SEED, checkpoint=checkpoint))
        select = SeedSelect(settings, sampler)
        run(select, sampler)
        return select.evaluations

    def activations(self) -> dict[str, int]:
        """Bytes that the gradient of one call keeps: of the denoiser's step, of a decode, of an encoding."""
        found = {}

        def work(session):
            noise = self.sampler.noise_of(SEED).requires_grad_(True)
            session.score(session.unroll(noise)).sum().backward()
            found.update(session.activations)

        self.fresh(SessionSettings(steps=1)).gradients.run(work)
        return found
