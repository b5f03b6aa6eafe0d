"""The general checkpoint as the later stages use it: its prediction with guidance, and the host's Euler sampling.

Noisy latents are x = x0 + sigma noise, as the host's samplers have them; the network takes x / sqrt(1 + sigma²) and
predicts v. Shapes: B samples, h and w positions of the latent, L levels.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...demo.emoji import denoisers
from ...demo.emoji.text import token_rows
from . import denoiser, snapshots
from .device import autocast, device
from .errors import RecipeError

GENERAL = denoiser.GENERAL.name
CFG = 4.0
BARS = denoiser.Diffusion().bars
SIGMAS = ((1 - BARS) / BARS).sqrt()  # [1000] of the host's discrete schedule


class Levels(NamedTuple):
    """The noise levels of a sampling: ``times`` int64 [L] for the network, ``sigmas`` [L + 1], of which the last is 0."""

    times: Tensor
    sigmas: Tensor


def at(times):
    """The levels of given times."""
    times = torch.tensor(times)
    return Levels(times, torch.cat([SIGMAS[times], torch.zeros(1)]))


def simple(count):
    """The host's scheduler simple."""
    return at([999 - int(k * 1000 / count) for k in range(count)])


def normal(count):
    """The host's scheduler normal: even times, between which sigmas are interpolated; the network gets the nearest time."""
    places = torch.linspace(999, 0, count)
    low, high, share = places.floor().long(), places.ceil().long(), places.frac()
    logs = SIGMAS.log()
    found = (1 - share) * logs[low] + share * logs[high]
    times = (found[:, None] - logs).abs().argmin(1)
    return Levels(times, torch.cat([found.exp(), torch.zeros(1)]))


def load(stage=GENERAL, remedy="general"):
    """The frozen general checkpoint with its text encoder, or with the LoRA of ``stage`` in its weights.

    ``remedy``: the stage that makes what is missing.
    """
    base, found = snapshots.load(GENERAL), snapshots.load(stage)
    for name, part, recipe in ((GENERAL, base, GENERAL), (stage, found, remedy)):
        if part is None:
            raise RecipeError(f"{name} is not trained yet: run `python run.py train-demo {recipe}` first")
    state = base[0]
    if stage != GENERAL:
        from ...demo.weights import with_lora

        state = with_lora(state, found[0])
    model = denoiser.Model(denoisers.GENERAL, seed=0)
    model.net.load_state_dict(state)
    model.text.load_state_dict(denoiser.load_text())
    return model.to(device()).eval().requires_grad_(False)


class Guided:
    """``model`` (a denoiser.Model of a U-Net) with classifier-free guidance (arXiv 2207.12598); cfg 1: one pass, none.

    ``exact``: in float32, as the host computes, also where bfloat16 is faster.
    """

    def __init__(self, model, cfg=CFG, exact=False):
        self.model, self.cfg, self.exact = model, cfg, exact

    @torch.no_grad()
    def read(self, tokens):
        """Prompts for ``v``: states [B, 20, 96] and summaries [B, 96]; with guidance those of the empty prompt follow."""
        tokens = tokens.to(device())
        if self.cfg != 1:
            tokens = torch.cat([tokens, token_rows([""]).to(tokens).expand_as(tokens)])
        states, _, summary, _ = self.model.text(tokens)
        return states, summary

    def v(self, x, sigma, t, text):
        """The prediction [B, 8, h, w] for x at ``sigma`` and times ``t``, both [B]."""
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
        """The predicted latents without noise."""
        return x0_of(x, self.v(x, sigma, t, text), sigma)

    @torch.no_grad()
    def sample(self, noise, tokens, levels):
        """Latents [B, 8, h, w] by Euler's steps from unit ``noise``."""
        text, x = self.read(tokens), start(noise.to(device()), levels)
        for time, now, after in zip(levels.times, levels.sigmas[:-1].tolist(), levels.sigmas[1:].tolist()):
            x0 = self.x0(x, torch.full((len(x),), now, device=x.device), time.expand(len(x)).to(x.device), text)
            x = x0 + after / now * (x - x0)
        return x


def start(noise, levels):
    """The first x of a sampling at full denoise: sqrt(1 + sigma²) noise, as the host's samplers begin."""
    return noise * math.hypot(1, float(levels.sigmas[0]))


def x0_of(x, v, sigma):
    sigma = sigma.view(-1, 1, 1, 1)
    scale = (1 + sigma**2).rsqrt()
    return scale**2 * x - sigma * scale * v


def v_of(x, x0, sigma):
    """The v that predicts ``x0``."""
    sigma = sigma.view(-1, 1, 1, 1)
    scale = (1 + sigma**2).rsqrt()
    return (scale**2 * x - x0) / (sigma * scale)
