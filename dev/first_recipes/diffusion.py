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
from ...demo.latent import CHANNELS, PATCH, PatchPCA
from ...demo.text import TextModel, token_rows
from ..weights import save_weights
from . import loop
from .canvas import Canvases
from .device import autocast
from .unet import initialise, make_unet

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
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        self.register_buffer("alphas", alphas.float(), persistent=False)  # the host's discrete schedule (SD's)

    def forward(self, latents, tokens, t, noise):
        """latents and noise [B, 12, 16, 16], tokens [B, 20], t [B] -> mean squared error of v."""
        a = self.alphas[t].sqrt().view(-1, 1, 1, 1)
        b = (1 - self.alphas[t]).sqrt().view(-1, 1, 1, 1)
        with autocast(), torch.set_grad_enabled(self.train_text):
            states, _, pooled, _ = self.text(tokens)
        with autocast():
            v = self.unet(a * latents + b * noise, t, context=states, y=pooled)
        return (v.float() - (a * noise - b * latents)).square().mean()


class Data:
    """Batch k holds canvases k * batch ... (k + 1) * batch - 1 of the plan's data set, encoded by the PCA.

    With several workers each makes its part of the batch; the numbers are the same for any number of them.
    """

    def __init__(self, plan, pca, worker=0, workers=1):
        self.plan, self.pca = plan, pca
        self.canvases = Canvases(plan.style, seed=plan.seed, domain=plan.domain, one=plan.one, balanced=plan.balanced)
        part = plan.batch // workers
        self.part = slice(worker * part, (worker + 1) * part)

    def batch(self, k):
        """latents, tokens, t, noise"""
        start, stop = self.part.start, self.part.stop
        images, captions, _ = self.canvases.batch(k * self.plan.batch + start, stop - start)
        x = torch.from_numpy(images).movedim(3, 1).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + k)
        count = self.plan.batch
        drop = (torch.rand(count, generator=generator) < DROP)[self.part]
        captions = ["" if d else c for d, c in zip(drop.tolist(), captions)]
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
        noise = torch.randn(count, *self.pca_shape(x), generator=generator)
        return self.pca.encode(x), token_rows(captions), t[self.part], noise[self.part]

    def pca_shape(self, x):
        return CHANNELS, x.shape[2] // PATCH, x.shape[3] // PATCH


def job(plan, worker, workers):
    pca = PatchPCA()
    pca.load_state_dict(weights.load("pca"))
    student = Student(train_text=plan.start is None)
    begin(student, plan)
    return student, Data(plan, pca, worker, workers), functools.partial(export, plan)


def train(plan, minutes=None, workers=1):
    loop.train(plan, job, minutes, workers)


def begin(student, plan):
    if plan.start is None:
        generator = torch.Generator().manual_seed(plan.seed)
        initialise(student.unet, generator)
        return
    student.unet.load_state_dict(weights.load(plan.start))
    student.text.load_state_dict(weights.load("text"))


def export(plan, average, step, spent, log):
    """The averaged weights, as demo/weights/<name>.safetensors, at any time."""
    facts = {
        "steps": step,
        "canvases": step * plan.batch,
        "seconds": round(spent),
        "style": plan.style,
        "domain": plan.domain or "all",
        "loss": log[-1][1] if log else "",
        "prediction": "v",
        "seed": plan.seed,
        "start": plan.start or "",
        "license": "Apache-2.0" if plan.style == "noto" else "CC-BY-4.0",
    }
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)}  # noqa: E731
    save_weights(plan.name, part("unet."), **facts)
    if plan.start is None:
        save_weights("text", part("text."), **facts)
