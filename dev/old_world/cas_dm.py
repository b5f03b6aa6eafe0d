"""The Cas-DM head of the general checkpoint: repaints its guided x0 on fresh training canvases, by squares and by the
features of the demo's image encoder.

θ is the checkpoint as the examples sample it, at cfg 4; the losses are those of ``training/``, the loop that of the other
recipes (AdamW, warm-up and cosine, moving average, resumable). ``python run.py train-demo --old cas_dm`` writes
demo/weights/cas_dm/chorus-demo-general.safetensors, under 2 MB in float16, which Load Cas-DM Head offers.

Chosen in trials of 400 steps: condition_on_x_t (the metric of held-out canvases, 0.331 for θ, fell to 0.207 with x_t and to 0.264
without), and the metric's weight (of 0, 1 and 4 the highest gave the best pictures in 4 steps, the lowest the worst).
"""

import functools
import json
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...demo import modules, weights
from ...demo.latent import CHANNELS
from ...demo.text import TextModel, token_rows
from ...techniques.cas_dm.mix import losses, mix, predict, total
from ...techniques.cas_dm.network import CasDMHeadConfig, Head, HeadFacts, new_head, to_file
from ...training.metrics import feature_distance
from ..recipes.guided import SIGMAS, x0_of
from ..weights import save_weights
from . import loop
from .canvas import Canvases
from .device import DEVICE
from .encoder import seen_by
from .unet import make_unet

LATENT, PREDICTION, STYLE = "ChorusDemoLatent", "v", "noto"
HELD_OUT, LEVELS = 10**6, 8  # the canvas with which the held-out batch begins; levels at which r is told
PASS = 64  # pictures in one pass of the checkpoint


@dataclass(frozen=True)
class Plan:
    name: str = "cas_dm-general"
    file: str = "cas_dm/chorus-demo-general"
    cfg: float = 4.0
    steps: int = 1200
    batch: int = 32
    lr: float = 1.5e-3
    warmup: int = 50
    decay: float = 0.999
    seed: int = 21
    metric_weight: float = 2.0  # of the encoder's features; 0: none
    gate: str = "pixel"
    condition_on_x_t: bool = True


PLAN = Plan()
# what it is compared with; for dev/benchmarks/cas_dm_quality.py, not shipped
ABLATIONS = {
    "without metric": replace(PLAN, name="cas_dm-no_metric", file=f"{loop.STATES}/cas_dm-no_metric", metric_weight=0.0),
    "unguided": replace(PLAN, name="cas_dm-unguided", file=f"{loop.STATES}/cas_dm-unguided", cfg=1.0),
}


class Guided:
    """x̂_θ of the general checkpoint by its networks: what the host's guidance predicts, in float32."""

    def __init__(self, cfg: float):
        self.cfg = cfg
        self.unet, self.text = make_unet(), TextModel()
        self.unet.load_state_dict(weights.load("general"))
        self.text.load_state_dict(weights.load("text"))
        for network in (self.unet, self.text):
            network.to(DEVICE).eval().requires_grad_(False)
        self.empty = self._read(token_rows([""]).to(DEVICE))

    def _read(self, tokens):
        states, _, pooled, _ = self.text(tokens)
        return states, pooled

    @torch.no_grad()
    def __call__(self, x, t, tokens):
        """x_t = x0 + sigma noise [B, 12, h, w] -> x0 [B, 12, h, w]"""
        sigma = SIGMAS[t.cpu()].to(x)
        scale = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
        v = self._passes(scale * x, t, *self._read(tokens))
        if self.cfg != 1:
            none = (part.expand(len(x), *part.shape[1:]) for part in self.empty)
            v_none = self._passes(scale * x, t, *none)
            v = v_none + self.cfg * (v - v_none)
        return x0_of(x, v, sigma)

    def _passes(self, x, t, states, pooled):
        parts = zip(*(part.split(PASS) for part in (x, t, states, pooled)))
        return torch.cat([self.unet(a, b, context=c, y=d) for a, b, c, d in parts])


class Features:
    """The demo encoder's layers of decoded latents, joined as the training node joins them; open to gradients."""

    def __init__(self):
        self.decoder = modules.load_vae_module().to(DEVICE).eval().requires_grad_(False)
        self.encoder = modules.load_vision().model.to(DEVICE).eval().requires_grad_(False)

    def __call__(self, latents):
        pictures = self.decoder.decode(latents).clamp(-1, 1)
        return seen_by(self.encoder, pictures)[0]


class Student(nn.Module):
    """φ: the loss of a batch. θ and the encoder are held so that they are no part of its state."""

    def __init__(self, plan):
        super().__init__()
        self.plan, self.theta = plan, Guided(plan.cfg)
        self.metric = feature_distance(Features()) if plan.metric_weight else None
        self.head = new(plan)
        self.network = self.head.network().requires_grad_(True)

    def forward(self, latents, tokens, t, noise):
        """latents and noise [B, 12, 16, 16], tokens [B, 20], t [B] -> the loss"""
        return total(self.parts(latents, tokens, t, noise)[0], metric_weight=self.plan.metric_weight)

    def parts(self, latents, tokens, t, noise):
        """The parts of the loss by name, [B] each; x̂_θ, x_φ, r."""
        sigma = SIGMAS[t.cpu()].to(latents)
        x = latents + sigma.view(-1, 1, 1, 1) * noise
        x_theta = self.theta(x, t, tokens)
        x_phi, r = predict(self.network, x_theta, x, sigma, flow=False)
        return losses(latents, x_theta, x_phi, r, metric=self.metric), x_theta, x_phi, r


def new(plan):
    config = CasDMHeadConfig(channels=CHANNELS, gate=plan.gate, condition_on_x_t=plan.condition_on_x_t)
    facts = HeadFacts(latent_format=LATENT, prediction=PREDICTION, cfg=plan.cfg)
    return new_head(config, facts, torch.Generator().manual_seed(plan.seed))


class Batches(loop.Batches):
    """Batches of canvases like those that the checkpoint learned from, other ones; t even over all levels."""

    def __init__(self, plan, pca, worker=0, workers=1):
        super().__init__(plan, Canvases(STYLE, seed=plan.seed), worker, workers)
        self.pca = pca

    def batch(self, k):
        """latents, tokens, t, noise"""
        images, captions, _ = self.drawn(k)
        latents, generator, count = self.pca.encode(images.float() / 127.5 - 1), self.generator(k), self.plan.batch
        t = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) * 1000 / count
        noise = torch.randn(count, *latents.shape[1:], generator=generator)
        return latents, token_rows(captions), t.long().clamp(0, 999)[self.part], noise[self.part]


def job(plan, worker, workers):
    student, data = Student(plan), Batches(plan, modules.load_pca(), worker, workers)
    return student, data, functools.partial(export, plan, student, data)


def train(plan, minutes=None, workers=1):
    loop.train(plan, job, minutes, workers)


def main(minutes=None, workers=1):
    train(PLAN, minutes, workers)


def ablations(minutes=None, workers=1):
    """The heads that the shipped one is compared with, into .cache/train: without metric, and of the unguided model."""
    for plan in ABLATIONS.values():
        train(plan, minutes, workers)


@torch.no_grad()
def examine(student, data):
    """Means over a batch that training does not reach: of the parts, of squares to the truth; r by level."""
    batch = [part.to(DEVICE) for part in data.batch(HELD_OUT // data.plan.batch)]
    parts, x_theta, x_phi, r = student.parts(*batch)
    found = {name: float(part.mean()) for name, part in parts.items()}
    for name, x in {"theta": x_theta, "phi": x_phi, "mix": mix(x_theta, x_phi, r)}.items():
        found[f"l2 {name}"] = float((x - batch[0]).square().mean())
        if student.metric is not None:
            found[f"metric {name}"] = float(student.metric(x, batch[0]).mean())
    shares = r.flatten(1).mean(1).expand(len(batch[0])).cpu()
    level = (1 - (batch[2].cpu() + 0.5) / 1000) * LEVELS
    gate = [((k + 0.5) / LEVELS, float(shares[level.long() == k].mean())) for k in range(LEVELS)]
    return found, gate


def export(plan, student, data, average, step, spent, log):
    """The averaged weights as demo/weights/<file>.safetensors, and how they do on pictures that training does not reach."""
    with loop.averaged(student, average):
        found, gate = examine(student, data)
    kept = {name.removeprefix("network."): value.detach().cpu() for name, value in average.items()}
    facts = HeadFacts(
        latent_format=LATENT,
        prediction=PREDICTION,
        cfg=plan.cfg,
        steps=step,
        data=f"{step * plan.batch} canvases in Noto style",
        gate=tuple(gate),
        details={
            "metric": "features of the demo encoder" if plan.metric_weight else "none",
            "metric_weight": str(plan.metric_weight),
            "seconds": str(round(spent)),
            "loss": str(log[-1][1] if log else ""),
            "held_out": json.dumps({name: round(value, 5) for name, value in found.items()}),
            "seed": str(plan.seed),
            "license": "Apache-2.0",
        },
    )
    tensors, metadata = to_file(Head(student.head.config, kept, facts))
    save_weights(plan.file, tensors, **metadata)
    print(f"step {step}:", json.dumps({name: round(value, 5) for name, value in found.items()}), flush=True)
