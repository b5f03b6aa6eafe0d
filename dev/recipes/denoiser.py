"""Training of the denoisers: the general checkpoint and its text encoder, and the experts, which keep that text encoder.

U-Nets learn v (arXiv 2202.00512, appendix D) on SD's discrete schedule; the transformer learns the velocity of a flow
(arXiv 2210.02747), noise less image. All have one latent space and read the same text states.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ...demo.emoji import denoisers
from ...demo.emoji.concepts import PAD, START
from ...demo.emoji.text import TextModel, token_rows
from . import autoencoder, banks, loop, sheets, snapshots
from .device import autocast, device
from .errors import RecipeError
from .networks import flux, unet
from .scenes import SIZE, SMALL

DROP = 0.1  # share of captions replaced by the empty one, for guidance
TEXT = "text"  # the snapshot of the general checkpoint's text encoder
PROMPTS = (
    "a koala above a rainbow on blue",
    "a fox",
    "a house left of a tree on yellow",
    "a tiger on pink",
    "a carrot",
    "a girl on green",
    "a crab right of a car on grey",
    "an owl on purple",
    "a rocket on black",
    "a penguin below an umbrella on orange",
    "a burger",
    "an octopus on blue",
)
SHEET_STEPS, SHEET_CFG = 25, 3.0


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """``small_until``: share of the steps with small canvases of one concept, which teach the concepts several times faster;
    every fourth of these steps has a large one."""

    network: dict
    style: str
    domain: str | None = None
    balanced: bool = False
    bystanders: float = 0.0
    alone: float = 0.45
    trains_text: bool = False
    small_until: float = 0.0
    small_batch: int = 64
    canvases: int = 40000
    small_canvases: int = 12000
    ema_decay: float = 0.9995
    prompts: tuple = PROMPTS

    def small(self, **changes):
        return super().small(**{"canvases": 32, "small_canvases": 32, "small_batch": 4, **changes})


class Model(nn.Module):
    """A denoiser with its text encoder: noisy latents [B, 8, h, w], times [B] and tokens [B, 20] to its prediction."""

    def __init__(self, network, seed):
        super().__init__()
        self.is_flow = network.get("image_model") == "flux"
        kind = flux if self.is_flow else unet
        self.net = kind.Flux(network) if self.is_flow else kind.UNet(network)
        kind.initialise(self.net, torch.Generator().manual_seed(seed))
        self.text = TextModel()
        self.noise = Flow() if self.is_flow else Diffusion()

    def forward(self, x, t, tokens):
        states, _, summary, _ = self.text(tokens)
        return self.net(x, t, states, summary)


class Diffusion:
    """SD's discrete schedule with v-prediction: x = a x0 + b noise, v = a noise - b x0."""

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.bars = torch.cumprod(1 - betas, 0).float()

    def times(self, count, generator):
        """Mostly where a picture takes shape, the rest anywhere."""
        anywhere = torch.rand(count, generator=generator) * 1000
        middle = 500 + 220 * torch.randn(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.4, anywhere, middle).long().clamp(0, 999)

    def factors(self, t):
        bars = self.bars.to(t.device)[t].view(-1, 1, 1, 1)
        return bars.sqrt(), (1 - bars).sqrt()

    def noisy(self, x0, noise, t):
        """(input of the network, its target)"""
        a, b = self.factors(t)
        return a * x0 + b * noise, a * noise - b * x0

    def steps(self, count):
        """Times of a sampling, without the end."""
        return torch.linspace(999, 0, count + 1).long()[:-1]

    def weight(self, t):
        """Change of x0 by a change of v."""
        return (1 - self.bars[t.cpu()]).sqrt().to(t.device)

    def move(self, x, v, t, after):
        """A DDIM step; ``after``: the next time or None at the end."""
        a, b = self.factors(t[:1])
        x0 = a * x - b * v
        if after is None:
            return x0
        c, d = self.factors(after[:1])
        return c * x0 + d * (b * x + a * v)


class Flow:
    """x = (1 - t) x0 + t noise; the target is noise - x0."""

    def times(self, count, generator):
        """Logit-normal (arXiv 2403.03206, equation 19), a fifth of them anywhere."""
        middle = torch.sigmoid(torch.randn(count, generator=generator))
        anywhere = torch.rand(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.2, anywhere, middle)

    def noisy(self, x0, noise, t):
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * noise, noise - x0

    def steps(self, count):
        return torch.linspace(1, 0, count + 1)[:-1]

    def weight(self, t):
        """Change of x0 by a change of the velocity."""
        return t

    def move(self, x, v, t, after):
        end = 0.0 if after is None else after.view(-1, 1, 1, 1)
        return x + (end - t.view(-1, 1, 1, 1)) * v


@torch.no_grad()
def sample(model, prompts, *, seed=0, steps=SHEET_STEPS, cfg=SHEET_CFG, side=SIZE // 8):
    """Latents [B, 8, side, side] of prompts from seeded noise, by DDIM or Euler, and the model's saliency [B, side, side]:
    the mean over steps and channels of the absolute difference that the prompt makes to x0."""
    tokens = torch.cat([token_rows(prompts), token_rows([""] * len(prompts))]).to(device())
    x = torch.randn(len(prompts), 8, side, side, generator=torch.Generator().manual_seed(seed)).to(device())
    times, saliency = model.noise.steps(steps).to(device()), 0.0
    for k, t in enumerate(times):
        with autocast():
            v = model(torch.cat([x, x]), t.expand(2 * len(x)), tokens).float()
        conditional, empty = v.chunk(2)
        saliency = saliency + model.noise.weight(t) * (conditional - empty).abs().mean(1) / steps
        after = times[k + 1].expand(len(x)) if k + 1 < steps else None
        x = model.noise.move(x, empty + cfg * (conditional - empty), t.expand(len(x)), after)
    return x, saliency


class Task:
    def __init__(self, plan, report=print):
        self.plan = plan
        torch.manual_seed(plan.seed)  # of the text encoder's first weights
        self.autoencoder = autoencoder.load()
        self.network = Model(plan.network, plan.seed)
        if not plan.trains_text:
            self.network.text.load_state_dict(load_text())
            self.network.text.requires_grad_(False)
        options = dict(style=plan.style, domain=plan.domain, balanced=plan.balanced, seed=plan.seed)
        large = dict(alone=plan.alone, bystanders=plan.bystanders)
        self.large = banks.bank(f"{plan.name}", self.autoencoder, plan.canvases, report, **options, **large)
        self.little = None
        if plan.small_until:
            name = f"{plan.name}-small"
            self.little = banks.bank(name, self.autoencoder, plan.small_canvases, report, size=SMALL, **options)

    def snapshot(self):
        """The network of the stage and the text encoder, which has a file of its own."""
        found = snapshots.load(self.plan.name)
        if found is None:
            return None
        state = {f"net.{k}": v for k, v in found[0].items()}
        return state | {f"text.{k}": v for k, v in load_text().items()}, found[1]

    def chosen(self, step):
        """(bank, batch size) of a step."""
        small = self.little is not None and step < self.plan.small_until * self.plan.steps
        if small and step % 4 != 3:
            return self.little, self.plan.small_batch
        return self.large, self.plan.batch

    def batch_size(self, step):
        return self.chosen(step)[1]

    def loss(self, step):
        bank, count = self.chosen(step)
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        rows = torch.randint(len(bank["latents"]), (count,), generator=generator)
        x0, tokens = bank["latents"][rows].float(), bank["tokens"][rows].clone()
        tokens[torch.rand(count, generator=generator) < DROP] = torch.tensor([START, *[PAD] * (tokens.shape[1] - 1)])
        t = self.network.noise.times(count, generator)
        noise = torch.randn(x0.shape, generator=generator)
        x0, tokens, t, noise = (part.to(device()) for part in (x0, tokens, t, noise))
        x, target = self.network.noise.noisy(x0, noise, t)
        with autocast():
            prediction = self.network(x, t, tokens)
        return (prediction.float() - target).square().mean()

    def sheet(self, network):
        """Two rows of pictures by two seeds; below each the saliency, white where it is largest."""
        prompts, rows = list(self.plan.prompts), []
        for seed in (0, 1):
            latents, saliency = sample(network, prompts, seed=seed)
            shown = saliency / saliency.amax((1, 2), keepdim=True).clamp(min=1e-6)
            rows.append(self.autoencoder.decode(latents))
            rows.append(F.interpolate(shown[:, None].expand(-1, 3, -1, -1), scale_factor=8) * 2 - 1)
        return sheets.to_image(torch.cat(rows), len(prompts))

    def export(self, network, facts):
        # first the text encoder: a network without it would be of no use
        if self.plan.trains_text:
            snapshots.save(TEXT, network.text.state_dict(), style=self.plan.style, **facts)
        kind = "flow" if network.is_flow else "v"
        snapshots.save(self.plan.name, network.net.state_dict(), style=self.plan.style, prediction=kind, **facts)


def load_text():
    """The state dict of the text encoder that all checkpoints share."""
    found = snapshots.load(TEXT)
    if found is None:
        raise RecipeError("the text encoder is not trained yet: run `python run.py train-demo general` first")
    return found[0]


GENERAL = Plan(
    name="general",
    network=denoisers.GENERAL,
    style="glossy",
    trains_text=True,
    small_until=0.07,
    steps=45000,
    batch=32,
    lr=1e-3,
    seed=1,
    hours=4.5,
)
ANIMAL_PROMPTS = (
    *(
        "a koala above a rainbow on blue",
        "a fox",
        "a fox left of a tree on yellow",
        "a tiger on pink",
        "a bee",
        "a cat",
    ),
    *(
        "a crab right of an owl on grey",
        "an owl on purple",
        "a panda on black",
        "a penguin below an umbrella on orange",
    ),
    *("a frog above a dog", "an octopus on blue"),
)
ANIMALS = Plan(
    name="expert-animals",
    network=denoisers.ANIMALS,
    style="flat",
    domain="animal",
    balanced=True,
    bystanders=0.5,
    small_until=0.15,
    steps=16000,
    batch=32,
    lr=1e-3,
    seed=2,
    canvases=20000,
    small_canvases=6000,
    prompts=ANIMAL_PROMPTS,
    hours=1.5,
)
FOOD_PROMPTS = (
    *(
        "a burger above a rainbow on blue",
        "a carrot",
        "a pizza left of a tree on yellow",
        "an avocado on pink",
        "a banana",
    ),
    *("an apple", "a doughnut right of a pineapple on grey", "grapes on purple", "a strawberry on black"),
    *("a carrot below an umbrella on orange", "cherries above an egg", "a watermelon on blue"),
)
FOOD = replace(
    ANIMALS, name="expert-food", network=denoisers.FOOD, domain="food", seed=3, prompts=FOOD_PROMPTS, hours=1.2
)
