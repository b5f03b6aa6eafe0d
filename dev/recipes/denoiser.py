"""Training of the denoisers: the general checkpoint with its text encoder, and the experts.

The U-Nets predict v (arXiv 2202.00512, appendix D) on SD's discrete schedule. The transformer predicts the velocity of
a flow (arXiv 2210.02747), which is the noise minus the clean latent. All denoisers share the latent space and the text
encoder.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ...demo import denoisers
from ...demo.concepts import PAD, START
from ...demo.text import TextModel, token_rows
from . import autoencoder, banks, loop, sheets, snapshots
from .device import autocast, device
from .errors import RecipeError
from .networks import flux, unet
from .scenes import SIZE, SMALL

DROP = 0.1  # share of captions replaced by the empty caption, for classifier-free guidance
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
SHEET_CFG = 3.0


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """Settings of a denoiser's training; ``domain``, ``balanced``, ``bystanders`` and ``alone`` are those of
    ``Scenes``.

    ``small_steps``: in this number of first steps, three of four steps use small canvases of one concept, which train
    several times faster. Every fourth step uses large canvases.
    """

    network: dict
    style: str
    domain: str | None = None
    balanced: bool = False
    bystanders: float = 0.0
    alone: float = 0.45
    trains_text: bool = False
    small_steps: int = 0
    small_batch: int = 1024
    canvases: int = 160000
    small_canvases: int = 40000
    ema_decay: float = 0.999
    prompts: tuple = PROMPTS
    sheet_steps: int = 25  # sampling steps of the images on the sheet

    def small(self, **changes):
        few = dict(canvases=32, small_canvases=32, small_batch=4, small_steps=2, sheet_steps=2)
        return super().small(**{**few, **changes})


class Model(nn.Module):
    """A denoiser with its text encoder: noisy latents [B, 8, h, w], timesteps [B] and tokens [B, 20] -> prediction."""

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
        """Timesteps of a batch: 60 % normally distributed around 500, where the layout is decided, and 40 % uniform."""
        uniform = torch.rand(count, generator=generator) * 1000
        middle = 500 + 220 * torch.randn(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.4, uniform, middle).long().clamp(0, 999)

    def factors(self, t):
        bars = self.bars.to(t.device)[t].view(-1, 1, 1, 1)
        return bars.sqrt(), (1 - bars).sqrt()

    def noisy(self, x0, noise, t):
        """(input of the network, target of its prediction)"""
        a, b = self.factors(t)
        return a * x0 + b * noise, a * noise - b * x0

    def steps(self, count):
        """Timesteps of a sampling run; the final noise level 0 is not included."""
        return torch.linspace(999, 0, count + 1).long()[:-1]

    def weight(self, t):
        """|d x0 / d v|: how much x0 changes with the prediction."""
        return (1 - self.bars[t.cpu()]).sqrt().to(t.device)

    def move(self, x, v, t, after):
        """A DDIM step from timestep ``t`` to ``after``, or to x0 if ``after`` is None."""
        a, b = self.factors(t[:1])
        x0 = a * x - b * v
        if after is None:
            return x0
        c, d = self.factors(after[:1])
        return c * x0 + d * (b * x + a * v)


class Flow:
    """Flow matching: x = (1 - t) x0 + t noise, and the target is noise - x0. The methods are those of ``Diffusion``."""

    def times(self, count, generator):
        """Times of a batch: four fifths logit-normal (arXiv 2403.03206, equation 19), one fifth uniform."""
        middle = torch.sigmoid(torch.randn(count, generator=generator))
        uniform = torch.rand(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < 0.2, uniform, middle)

    def noisy(self, x0, noise, t):
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * noise, noise - x0

    def steps(self, count):
        return torch.linspace(1, 0, count + 1)[:-1]

    def weight(self, t):
        """|d x0 / d velocity|: how much x0 changes with the prediction."""
        return t

    def move(self, x, v, t, after):
        end = 0.0 if after is None else after.view(-1, 1, 1, 1)
        return x + (end - t.view(-1, 1, 1, 1)) * v


@torch.no_grad()
def sample(model, prompts, *, seed=0, steps, cfg=SHEET_CFG, side=SIZE // 8):
    """Latents [B, 8, side, side] sampled from seeded noise (DDIM for v, Euler for a flow), and the saliency [B, side,
    side].

    The saliency is the absolute difference between the x0 predictions with and without the prompt, averaged over steps
    and channels.
    """
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
        torch.manual_seed(plan.seed)  # initial weights of the text encoder
        self.autoencoder = autoencoder.load()
        self.network = Model(plan.network, plan.seed)
        if not plan.trains_text:
            self.network.text.load_state_dict(load_text())
            self.network.text.requires_grad_(False)
        options = dict(style=plan.style, domain=plan.domain, balanced=plan.balanced, seed=plan.seed)
        large = dict(alone=plan.alone, bystanders=plan.bystanders)
        self.large_bank = banks.bank(f"{plan.name}", self.autoencoder, plan.canvases, report, **options, **large)
        self.small_bank = None
        if plan.small_steps:
            name = f"{plan.name}-small"
            self.small_bank = banks.bank(name, self.autoencoder, plan.small_canvases, report, size=SMALL, **options)

    def snapshot(self):
        """The weights of the stage's network and of the text encoder, which are in separate files."""
        found = snapshots.load(self.plan.name)
        if found is None:
            return None
        state = {f"net.{k}": v for k, v in found[0].items()}
        return state | {f"text.{k}": v for k, v in load_text().items()}, found[1]

    def chosen(self, step):
        """(bank, batch size) of a step."""
        small = self.small_bank is not None and step < self.plan.small_steps
        if small and step % 4 != 3:
            return self.small_bank, self.plan.small_batch
        return self.large_bank, self.plan.batch

    def batch_size(self, step):
        return self.chosen(step)[1]

    def batch(self, step):
        """A batch on the CPU: latents [B, 8, h, w], tokens [B, 20], timesteps [B] and noise."""
        bank, count = self.chosen(step)
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        rows = torch.randint(len(bank["latents"]), (count,), generator=generator)
        x0, tokens = bank["latents"][rows].float(), bank["tokens"][rows].clone()
        tokens[torch.rand(count, generator=generator) < DROP] = torch.tensor([START, *[PAD] * (tokens.shape[1] - 1)])
        t = self.network.noise.times(count, generator)
        return x0, tokens, t, torch.randn(x0.shape, generator=generator)

    def loss(self, step):
        x0, tokens, t, noise = (part.to(device()) for part in self.batch(step))
        x, target = self.network.noise.noisy(x0, noise, t)
        with autocast():
            prediction = self.network(x, t, tokens)
        return (prediction.float() - target).square().mean()

    def sheet(self, network):
        """An image with two rows for each of two seeds: sampled images, and below them their saliency (largest:
        white)."""
        prompts, rows = list(self.plan.prompts), []
        for seed in (0, 1):
            latents, saliency = sample(network, prompts, seed=seed, steps=self.plan.sheet_steps)
            shown = saliency / saliency.amax((1, 2), keepdim=True).clamp(min=1e-6)
            rows.append(self.autoencoder.decode(latents))
            rows.append(F.interpolate(shown[:, None].expand(-1, 3, -1, -1), scale_factor=8) * 2 - 1)
        return sheets.to_image(torch.cat(rows), len(prompts))

    def export(self, network, facts):
        # the text encoder is saved first, because the network cannot be used without it
        if self.plan.trains_text:
            snapshots.save(TEXT, network.text.state_dict(), style=self.plan.style, **facts)
        kind = "flow" if network.is_flow else "v"
        snapshots.save(self.plan.name, network.net.state_dict(), style=self.plan.style, prediction=kind, **facts)


def load_text():
    """The state dict of the text encoder that all checkpoints share."""
    found = snapshots.load(TEXT)
    if found is None:
        raise RecipeError("the text encoder is not trained yet; run `python run.py train-demo general` first")
    return found[0]


GENERAL = Plan(
    name="general",
    network=denoisers.GENERAL,
    style="glossy",
    trains_text=True,
    small_steps=800,
    steps=2600,
    batch=512,
    lr=1.5e-3,
    seed=1,
    hours=5.3,
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
    small_steps=600,
    steps=1950,
    batch=512,
    lr=1.5e-3,
    seed=2,
    canvases=80000,
    small_canvases=20000,
    prompts=ANIMAL_PROMPTS,
    hours=3.0,
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
    ANIMALS, name="expert-food", network=denoisers.FOOD, domain="food", seed=3, prompts=FOOD_PROMPTS, hours=2.4
)
