"""Contrastive training of the image-text encoder, on canvases of both styles in which all concepts are equally
frequent.

The loss has three terms, each the cross entropy of a softmax over cosine similarities:

1. the image against all captions of the batch, and the caption against all images (CLIP, arXiv 2103.00020);
2. the image against the names of all concepts;
3. the image against all names with a style ("a cat in glossy style").
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...demo.concepts import STYLES, load_concepts, phrase
from ...demo.text import token_rows
from . import autoencoder, loop, snapshots
from .autoencoder import to_tensor
from .classifier import evaluation_sets
from .device import autocast, device
from .networks.vision import ImageText
from .scenes import Scenes

NAME = "vision"
SCALE = 16.0  # inverse temperature of the three softmaxes


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    name: str = NAME
    steps: int = 6000
    batch: int = 96
    lr: float = 2e-3
    warmup: int = 100
    ema_decay: float = 0.995
    weight_decay: float = 0.02
    seed: int = 7
    canvases: int = 8000  # of each style
    hours: float = 0.4

    def small(self, **changes):
        return super().small(**{"canvases": 24, **changes})


PLAN = Plan()


def names(style=None):
    """The names of all concepts in order, such as 'a cat', or with a style 'a cat in glossy style'."""
    found = [phrase(c.name) for c in load_concepts()]
    return [f"{name} in {style} style" for name in found] if style else found


def initialise(model, generator):
    for name, p in model.image.named_parameters():
        if p.ndim > 1:
            std = 0.02 if "position_embedding" in name else p[0].numel() ** -0.5
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)
        else:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
    tower = model.image.vision_model.embeddings
    tower.class_embedding.data.copy_(torch.randn(tower.class_embedding.shape, generator=generator) * 0.02)


class Task:
    def __init__(self, plan):
        torch.manual_seed(plan.seed)
        self.plan, self.network = plan, ImageText()
        initialise(self.network, torch.Generator().manual_seed(plan.seed))
        pixels, captions, present = [], [], []
        for style in STYLES:
            drawn, texts, scenes = Scenes(style, seed=plan.seed, balanced=True, alone=0.65).batch(0, plan.canvases)
            pixels.append(drawn)
            captions += [f"{text} in {style} style" for text in texts]
            present += [[item.concept for item in scene.items] for scene in scenes]
        self.pool, self.captions, self.present = np.concatenate(pixels), captions, present
        self.pool[1::2] = decoded(self.pool[1::2], plan.seed)
        self.tokens = token_rows(captions)
        self.plain = token_rows(names()).to(device())
        self.styled = token_rows(names(STYLES[0]) + names(STYLES[1])).to(device())

    def snapshot(self):
        return snapshots.load(NAME)

    def loss(self, step):
        """The loss of a batch. The first half has the first style, the second half the second style."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        half = self.plan.batch // 2
        rows = torch.randint(self.plan.canvases, (2, half), generator=generator)
        rows = (rows + torch.tensor([[0], [self.plan.canvases]])).flatten()
        x = distort(to_tensor(self.pool[rows.numpy()]), generator).to(device())
        tokens, present = self.tokens[rows].to(device()), torch.zeros(len(rows), len(self.plain))
        for row, k in zip(present, rows.tolist()):
            row[self.present[k]] = 1 / len(self.present[k])
        with autocast(), plain_attention():
            image = self.network.image_embeds(x)
            captions, plain = self.network.text_embeds(tokens), self.network.text_embeds(self.plain)
            styled = self.network.text_embeds(self.styled)
        return loss_of(image, captions.float(), tokens, plain.float(), styled.float(), present.to(device()))

    def sheet(self, network):
        return None

    def export(self, network, facts):
        found = accuracies(network, self.plan.evaluated)
        print(f"{NAME}: retrieval {found}", flush=True)
        snapshots.save(NAME, network.state_dict(), style="flat", **found, **facts)


def loss_of(image, captions, tokens, plain, styled, present):
    """The loss of a batch whose first half has the first style.

    ``image`` and ``captions`` [B, E], ``plain`` [C, E] and ``styled`` [2 C, E]: embeddings. ``tokens`` [B, T]: to find
    equal captions. ``present`` [B, C]: the concepts of each image, with rows of sum 1.
    """
    logits = SCALE * image @ captions.T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    contrast = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    loss = 0.5 * contrast + F.cross_entropy(SCALE * image @ plain.T, present)
    return loss + F.cross_entropy(SCALE * image @ styled.T, torch.block_diag(*present.chunk(2)))


def plain_attention():
    """A context in which attention on a CPU does not use the fused kernel.

    In bfloat16, the kernel's backward pass is slow (see networks/attention.py).
    """
    return sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else contextlib.nullcontext()


def decoded(pixels, seed):
    """The images after encoding, adding noise of up to 0.3 to the latents, and decoding."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(z):
        return z + 0.3 * torch.rand(len(z), 1, 1, 1, generator=generator) * torch.randn(z.shape, generator=generator)

    return autoencoder.pass_through(pixels, disturb)


def distort(x, generator):
    """Randomly shift, zoom, blur and recolour images [B, 3, H, W] in -1..1, and add noise.

    The results resemble generated images.
    """
    count = len(x)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    some = lambda share: uniform(count, 1, 1, 1) < share  # noqa: E731
    theta, zoom = torch.zeros(count, 2, 3), 1 + 0.2 * (uniform(count) - 0.5)
    theta[:, 0, 0], theta[:, 1, 1] = zoom, zoom
    theta[:, :, 2] = 0.16 * (uniform(count, 2) - 0.5)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = torch.where(some(0.5), F.grid_sample(x, grid, padding_mode="border", align_corners=False), x)
    x = torch.where(some(0.3), F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
    x = x * (1 + 0.3 * (uniform(count, 3, 1, 1) - 0.5)) + 0.2 * (uniform(count, 3, 1, 1) - 0.5)
    noise = torch.randn(x.shape, generator=generator) * 0.15 * uniform(count, 1, 1, 1)
    return (x + torch.where(some(0.5), noise, 0.0)).clamp(-1, 1)


@torch.no_grad()
def accuracies(network, count):
    """{evaluation set: [top-1 accuracy, top-5 accuracy]} of finding an image's concept among all names."""
    text, found = network.text_embeds(token_rows(names()).to(device())), {}
    for name, x, concepts in evaluation_sets(count):
        images = torch.cat([network.image_embeds(part.to(device())) for part in x.split(100)])
        hit = (images @ text.T).argsort(1, descending=True).cpu() == concepts[:, None]
        found[name] = [round(hit[:, :k].any(1).float().mean().item(), 4) for k in (1, 5)]
    return found
