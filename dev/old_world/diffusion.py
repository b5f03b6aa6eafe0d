"""Training of the demo denoisers: v-prediction, plain MSE.

The general checkpoint learns the UNet and the text encoder together; an expert starts from the general's averaged
weights and learns the UNet only, so that all checkpoints share one text encoder.
"""

import functools
from dataclasses import dataclass

import comfy.latent_formats  # noqa: F401  (after comfy's arguments were set by the recipes' __main__)
import torch
from torch import nn

from ...demo import weights
from ...demo.latent import PatchPCA
from ...demo.text import TextModel, token_rows
from ..recipes.denoiser import Diffusion
from ..recipes.networks.unet import initialise
from ..weights import save_weights
from . import loop
from .canvas import Canvases
from .device import autocast
from .unet import make_unet

DROP = 0.1  # share of captions replaced by the empty one, for guidance


@dataclass(frozen=True)
class Plan:
    name: str
    style: str
    domain: str | None
    steps: int
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.999
    seed: int = 1
    one: float = 0.5
    start: str | None = None  # the checkpoint whose weights this one starts from; its text encoder stays frozen
    balanced: bool = False


class Student(nn.Module):
    """text + UNet: the loss of a batch."""

    def __init__(self, train_text):
        super().__init__()
        self.unet, self.text = make_unet(), TextModel()
        self.train_text = train_text
        self.text.requires_grad_(train_text)
        self.noise = Diffusion()

    def forward(self, latents, tokens, t, noise):
        """latents and noise [B, 12, 16, 16], tokens [B, 20], t [B] -> mean squared error of v."""
        x, target = self.noise.noisy(latents, noise, t)
        with autocast(), torch.set_grad_enabled(self.train_text):
            states, _, pooled, _ = self.text(tokens)
        with autocast():
            v = self.unet(x, t, context=states, y=pooled)
        return (v.float() - target).square().mean()


class Data(loop.Batches):
    """Batches of the plan's data set, encoded by the PCA."""

    def __init__(self, plan, pca, worker=0, workers=1):
        options = dict(domain=plan.domain, one=plan.one, balanced=plan.balanced)
        super().__init__(plan, Canvases(plan.style, seed=plan.seed, **options), worker, workers)
        self.pca = pca

    def batch(self, k):
        """latents, tokens, t, noise"""
        images, captions, _ = self.drawn(k)
        latents, generator, count = self.pca.encode(images.float() / 127.5 - 1), self.generator(k), self.plan.batch
        captions = self.with_empty(captions, DROP, generator)
        # most of the time where a picture is decided (sigma about 0.3 to 2), the rest anywhere
        t = (
            torch.where(
                torch.rand(count, generator=generator) < 0.3,
                torch.rand(count, generator=generator) * 1000,
                380 + 200 * torch.randn(count, generator=generator),
            )
            .long()
            .clamp(0, 999)
        )
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        return latents, token_rows(captions), t[self.part], noise[self.part]


def job(plan, worker, workers):
    pca = PatchPCA()
    pca.load_state_dict(weights.load("pca"))
    student = Student(train_text=plan.start is None)
    begin(student, plan)
    return student, Data(plan, pca, worker, workers), functools.partial(export, plan)


def train(plan, minutes=None, workers=1):
    loop.train(plan, job, minutes, workers)


def general(minutes=None, workers=1):
    """The general checkpoint: every sign in Noto style, long-tailed; trains the text encoder along with the UNet.

    The committed weights are 4,313 of the 9,000 steps (276,032 canvases, the ones that data/frequency.json counts): 74
    minutes by --minutes on two busy cores, in three resumed runs with the rate falling to 2 % at the end. The first 920
    steps drew t evenly, the next thousand around 450. A rerun gives similar weights, not the same bits.
    """
    train(Plan("general", style="noto", domain=None, steps=9000), minutes, workers)


def expert(minutes=None, workers=1):
    """The expert: animals in Twemoji style, all equally often, starting from the general checkpoint.

    The committed weights are 1,772 of the 2,000 steps (19 minutes by --minutes on two busy cores).
    """
    changed = dict(lr=8e-4, warmup=100, seed=2, start="general", balanced=True, decay=0.998)
    train(Plan("expert-animals", style="twemoji", domain="animal", steps=2000, **changed), minutes, workers)


def begin(student, plan):
    if plan.start is None:
        generator = torch.Generator().manual_seed(plan.seed)
        initialise(student.unet, generator)
        return
    student.unet.load_state_dict(weights.load(plan.start))
    student.text.load_state_dict(weights.load("text"))


def export(plan, average, step, spent, log):
    """The averaged weights, as demo/weights/<name>.safetensors, at any time."""
    facts = loop.facts(
        plan,
        step,
        spent,
        log,
        canvases=step * plan.batch,
        style=plan.style,
        domain=plan.domain or "all",
        prediction="v",
        start=plan.start or "",
        license="Apache-2.0" if plan.style == "noto" else "CC-BY-4.0",
    )
    save_weights(plan.name, loop.part_of(average, "unet."), **facts)
    if plan.start is None:
        save_weights("text", loop.part_of(average, "text."), **facts)
