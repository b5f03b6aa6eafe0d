"""Sampling of the general checkpoint for later stages: classifier-free guidance and ComfyUI's Euler sampler.

Noisy latents are x = x0 + sigma noise, as in ComfyUI's samplers. The input of the network is x / sqrt(1 + sigma²), and
its prediction is v. In shapes, B is the number of samples, h and w the size of the latent, L the number of noise
levels.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...demo import denoisers
from ...demo.text import token_rows
from . import denoiser, snapshots
from .device import autocast, device
from .errors import RecipeError

GENERAL = denoiser.GENERAL.name
CFG = 4.0
BARS = denoiser.Diffusion().bars
SIGMAS = ((1 - BARS) / BARS).sqrt()  # [1000], ComfyUI's discrete schedule


class Levels(NamedTuple):
    """Noise levels of a sampling run: timesteps ``times``, int64 [L], and ``sigmas`` [L + 1], where the last is 0."""

    times: Tensor
    sigmas: Tensor


def at(times):
    """The noise levels of the given timesteps."""
    times = torch.tensor(times)
    return Levels(times, torch.cat([SIGMAS[times], torch.zeros(1)]))


def simple(count):
    """The noise levels of ComfyUI's scheduler "simple"."""
    return at([999 - int(k * 1000 / count) for k in range(count)])


def normal(count):
    """The noise levels of ComfyUI's scheduler "normal".

    Its sigmas are interpolated at evenly spaced timesteps. The network gets the nearest integer timestep.
    """
    places = torch.linspace(999, 0, count)
    low, high, share = places.floor().long(), places.ceil().long(), places.frac()
    logs = SIGMAS.log()
    found = (1 - share) * logs[low] + share * logs[high]
    times = (found[:, None] - logs).abs().argmin(1)
    return Levels(times, torch.cat([found.exp(), torch.zeros(1)]))


def load(stage=GENERAL, remedy="general"):
    """The frozen general checkpoint with its text encoder.

    If ``stage`` is another snapshot, it is a LoRA that is merged into the weights. ``remedy``: the stage that trains
    the LoRA, for the error if the LoRA is missing.
    """
    base, found = snapshots.load(GENERAL), snapshots.load(stage)
    for name, part, recipe in ((GENERAL, base, GENERAL), (stage, found, remedy)):
        if part is None:
            raise RecipeError(f"{name} is not trained yet; run `python run.py train-demo {recipe}` first")
    state = base[0]
    if stage != GENERAL:
        from ...demo.weights import with_lora

        state = with_lora(state, found[0])
    model = denoiser.Model(denoisers.GENERAL, seed=0)
    model.net.load_state_dict(state)
    model.text.load_state_dict(denoiser.load_text())
    return model.to(device()).eval().requires_grad_(False)


class Guided:
    """A U-Net ``model`` (denoiser.Model) with classifier-free guidance (arXiv 2207.12598).

    With cfg 1 there is no guidance, and a prediction takes one forward pass. ``exact``: compute in float32, as ComfyUI
    does, even if bfloat16 is faster.
    """

    def __init__(self, model, cfg=CFG, exact=False):
        self.model, self.cfg, self.exact = model, cfg, exact

    @torch.no_grad()
    def encode(self, tokens):
        """Text states [B, 20, 96] and pooled texts [B, 96], the argument ``text`` of ``v``.

        With guidance, those of the empty prompt are appended, so that the batch has 2 B rows.
        """
        tokens = tokens.to(device())
        if self.cfg != 1:
            tokens = torch.cat([tokens, token_rows([""]).to(tokens).expand_as(tokens)])
        states, _, summary, _ = self.model.text(tokens)
        return states, summary

    def v(self, x, sigma, t, text):
        """The predicted v [B, 8, h, w] for x with noise levels ``sigma`` [B] and timesteps ``t`` [B]."""
        x = x * (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
        if self.cfg != 1:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        with contextlib.nullcontext() if self.exact else autocast():
            found = self.model.net(x, t, *text).float()
        if self.cfg == 1:
            return found
        conditional, empty = found.chunk(2)
        return empty + self.cfg * (conditional - empty)

    def x0(self, x, sigma, t, text):
        """The predicted x0; arguments as for ``v``."""
        return x0_of(x, self.v(x, sigma, t, text), sigma)

    @torch.no_grad()
    def sample(self, noise, tokens, levels):
        """Latents [B, 8, h, w] sampled with Euler from unit ``noise``."""
        text, x = self.encode(tokens), start(noise.to(device()), levels)
        for time, now, after in zip(levels.times, levels.sigmas[:-1].tolist(), levels.sigmas[1:].tolist()):
            x0 = self.x0(x, torch.full((len(x),), now, device=x.device), time.expand(len(x)).to(x.device), text)
            x = x0 + after / now * (x - x0)
        return x


def start(noise, levels):
    """The first x of a sampling run at denoise 1, as in ComfyUI: sqrt(1 + sigma²) times the unit noise."""
    return noise * math.hypot(1, float(levels.sigmas[0]))


def x0_of(x, v, sigma):
    sigma = sigma.view(-1, 1, 1, 1)
    scale = (1 + sigma**2).rsqrt()
    return scale**2 * x - sigma * scale * v


def v_of(x, x0, sigma):
    """The v that corresponds to ``x0``: the inverse of ``x0_of``."""
    sigma = sigma.view(-1, 1, 1, 1)
    scale = (1 + sigma**2).rsqrt()
    return (scale**2 * x - x0) / (sigma * scale)
