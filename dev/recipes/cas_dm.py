"""Training of the Cas-DM head of the general checkpoint: a small network that corrects the checkpoint's guided x0.

The head predicts a second x0 and a gate r, which mixes the two predictions. The losses are those of
``techniques.cas_dm``: L2, and a perceptual metric in the features of the demo's image-text encoder. The general
checkpoint is frozen and runs at cfg 4, as in the example workflows. The canvases differ from those of the checkpoint's
training.
"""

import json
from dataclasses import dataclass

import torch

from ...demo.autoencoder import CHANNELS
from ...demo.text import token_rows
from ...techniques.cas_dm.mix import losses, mix, predict, total
from ...techniques.cas_dm.network import CasDMHeadConfig, Head, HeadFacts, new_head, to_file
from ...training.metrics import feature_distance
from . import autoencoder, banks, features, guided, loop, sheets, snapshots
from .device import autocast, device
from .scenes import Scenes

LATENT, PREDICTION, STYLE = "ChorusEmojiLatent", "v", "glossy"
UNSEEN, LEVELS = 10**6, 8  # index of the first canvas for evaluation; number of noise levels in the report of the gate
SHOWN = (900, 700, 500, 300)  # timesteps on the sample sheet


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    name: str = "cas_dm"
    snapshot: str = "cas_dm/chorus-demo-general"
    steps: int = 1550
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 50
    seed: int = 21
    hours: float = 0.6
    cfg: float = guided.CFG
    canvases: int = 30000
    evaluated: int = 64
    metric_weight: float = 2.0
    # share of a batch for which the metric is computed; decoding for the metric takes most of a step's time
    metric_share: float = 0.5
    widths: tuple = (40, 48, 64)
    embedding: int = 64
    gate: str = "pixel"

    def small(self, **changes):
        return super().small(**{"canvases": 32, "evaluated": 4, **changes})


PLAN = Plan()


def new(plan):
    config = CasDMHeadConfig(
        channels=CHANNELS,
        widths=plan.widths,
        embedding=plan.embedding,
        gate=plan.gate,
        condition_on_x_t=True,
    )
    facts = HeadFacts(latent_format=LATENT, prediction=PREDICTION, cfg=plan.cfg)
    return new_head(config, facts, torch.Generator().manual_seed(plan.seed))


class Task:
    def __init__(self, plan, report=print):
        self.plan = plan
        self.model = guided.Guided(guided.load(), plan.cfg)
        self.autoencoder = autoencoder.load()
        self.metric = feature_distance(features.LatentFeatures(self.autoencoder, features.load()))
        self.head = new(plan)
        self.network = self.head.network().requires_grad_(True)
        self.bank = banks.bank(plan.name, self.autoencoder, plan.canvases, report, style=STYLE, seed=plan.seed)

    def snapshot(self):
        return snapshots.load(self.plan.snapshot)

    def batch(self, step):
        """Latents [B, 8, 16, 16], tokens [B, 20], timesteps [B] (evenly spread over all noise levels) and noise of a
        batch."""
        count, generator = self.plan.batch, torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        rows = torch.randint(len(self.bank["latents"]), (count,), generator=generator)
        return self.bank["latents"][rows].float(), self.bank["tokens"][rows], *self.noise(count, generator)

    def noise(self, count, generator):
        t = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) * 1000 / count
        shape = self.bank["latents"].shape[1:]
        return t.long().clamp(0, 999), torch.randn(count, *shape, generator=generator)

    def predict(self, latents, tokens, t, noise):
        """x0 of the model, x0 of the head, and the gate. No gradient flows to the model."""
        sigma = guided.SIGMAS[t].to(device())
        x, t = latents + sigma.view(-1, 1, 1, 1) * noise, t.to(device())
        with torch.no_grad():
            x_theta = self.model.x0(x, sigma, t, self.model.encode(tokens))
        with autocast():
            x_phi, r = predict(self.network, x_theta, x, sigma, flow=False)
        return x_theta, x_phi.float(), r.float()

    def loss(self, step):
        latents, tokens, t, noise = self.batch(step)
        latents, noise = latents.to(device()), noise.to(device())
        x_theta, x_phi, r = self.predict(latents, tokens, t, noise)
        parts = losses(latents, x_theta, x_phi, r)
        if self.plan.metric_weight:
            # the first rows are a random sample, because the timesteps of a batch are in random order
            count = max(1, int(self.plan.metric_share * len(latents)))
            parts["metric"] = self.metric(x_phi[:count], latents[:count])
        return total(parts, metric_weight=self.plan.metric_weight)

    def unseen(self):
        """Latents, tokens, timesteps and noise of canvases that are not used in training."""
        pixels, captions, _ = Scenes(STYLE, seed=self.plan.seed).batch(UNSEEN, self.plan.evaluated)
        latents = autoencoder.encode(self.autoencoder, pixels).float()
        return latents, token_rows(captions), *self.noise(len(latents), torch.Generator().manual_seed(5))

    @torch.no_grad()
    def evaluate(self):
        """Mean L2 and mean metric of the model, the head and their mix on unseen canvases, and the mean gate by noise
        level."""
        latents, tokens, t, noise = self.unseen()
        found, gates = [], []
        for rows in torch.arange(len(latents)).split(self.plan.batch):
            x0, level = latents[rows].to(device()), LEVELS * (1 - (t[rows] + 0.5) / 1000)
            x_theta, x_phi, r = self.predict(x0, tokens[rows], t[rows], noise[rows].to(device()))
            row = {}
            for name, x in {"model": x_theta, "head": x_phi, "mix": mix(x_theta, x_phi, r)}.items():
                row[f"l2 {name}"] = (x - x0).square().flatten(1).mean(1)
                row[f"metric {name}"] = self.metric(x, x0)
            found.append(row)
            gates += zip(level.long().tolist(), r.flatten(1).mean(1).expand(len(x0)).tolist())
        means = {name: round(float(torch.cat([row[name] for row in found]).mean()), 5) for name in found[0]}
        by_level = [[value for level, value in gates if level == k] for k in range(LEVELS)]
        return means, tuple(((k + 0.5) / LEVELS, sum(part) / len(part)) for k, part in enumerate(by_level) if part)

    def sheet(self, network):
        """An image with two rows for each noise level of SHOWN (the model's x0, its mix with the head's x0), and
        a last row with the canvases."""
        count, rows = min(12, self.plan.evaluated), []
        latents, tokens, _, noise = (part[:count] for part in self.unseen())
        latents, noise = latents.to(device()), noise.to(device())
        for t in SHOWN:
            x_theta, x_phi, r = self.predict(latents, tokens, torch.full((count,), t), noise)
            rows += [x_theta, mix(x_theta, x_phi, r)]
        return sheets.to_image(torch.cat([self.autoencoder.decode(part) for part in (*rows, latents)]), count)

    def export(self, network, facts):
        found, gate = self.evaluate()
        print(f"{self.plan.name}: on unseen canvases: {found}", flush=True)
        head_facts = HeadFacts(
            latent_format=LATENT,
            prediction=PREDICTION,
            cfg=self.plan.cfg,
            steps=facts["step"],
            data=f"{self.plan.canvases} canvases in glossy style",
            gate=gate,
            details={
                "metric": "features of the demo world's image-text encoder",
                "metric_weight": str(self.plan.metric_weight),
                "unseen": json.dumps(found),
                **{name: str(facts[name]) for name in ("step", "samples", "seconds", "loss", "seed")},
            },
        )
        tensors, metadata = to_file(Head(self.head.config, network.state_dict(), head_facts))
        snapshots.save(self.plan.snapshot, tensors, style=STYLE, **metadata)
