"""SeedSelect's application in the paper: a classifier is trained only on generated images of rare concepts, and tested
on real renderings."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ..recipes.networks.classifier import ConceptClassifier
from ..recipes.scenes import Scenes, first_of_each

STEPS, BATCH, RATE, REPEATS = 200, 64, 3e-3, 3
EACH = "images of each concept"


def renderings(concepts: list[str], each: int, unseen: bool, seed: int) -> torch.Tensor:
    """Images [concepts, each, 128, 128, 3] in 0..1 of single concepts on white, as in the bare prompts."""
    scenes = Scenes("glossy", seed=seed, balanced=True, unseen=unseen, alone=1.0)
    index = {concept.name: n for n, concept in enumerate(scenes.concepts)}
    found = first_of_each(scenes, [index[name] for name in concepts], each)
    drawn = [[scenes.draw(replace(scene, colors=("white",))) for scene in shown] for shown in found]
    return torch.from_numpy(np.array(drawn)).float() / 255


def augmented(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [B, 3, 128, 128] with random shifts, zoom, brightness and noise."""
    n = len(x)
    uniform = lambda *s: torch.rand(*s, generator=generator) - 0.5  # noqa: E731
    theta = torch.zeros(n, 2, 3)
    zoom = 1 + 0.5 * uniform(n)
    theta[:, 0, 0], theta[:, 1, 1] = zoom, zoom
    theta[:, :, 2] = 0.4 * uniform(n, 2)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return (
        x * (1 + 0.3 * uniform(n, 3, 1, 1))
        + 0.2 * uniform(n, 3, 1, 1)
        + 0.05 * torch.randn(x.shape, generator=generator)
    ).clamp(0, 1)


@torch.inference_mode(False)
@torch.enable_grad()
def train(images: torch.Tensor, seed: int) -> ConceptClassifier:
    """A classifier of ``images`` [concepts, n, 128, 128, 3]. Its first logits belong to these concepts, in this order."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = ConceptClassifier()
    x = images.flatten(0, 1).movedim(-1, 1).clone()
    truth = torch.arange(len(images)).repeat_interleave(images.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        logits = model(augmented(x[rows], generator))[:, : len(images)]
        loss = F.cross_entropy(logits, truth[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracies(images: dict[str, torch.Tensor], concepts: list[str]) -> dict:
    """Top-1 accuracy on unseen renderings by training images: mean, lowest and highest of the repeats.

    The training images are ``images``, {way: [concepts, n, 128, 128, 3]}, or as many real renderings.
    """
    each = next(iter(images.values())).shape[1]
    test = renderings(concepts, 20, unseen=True, seed=6).flatten(0, 1).movedim(-1, 1)
    truth = torch.arange(len(concepts)).repeat_interleave(20)
    found = {}
    for way, made in {**images, "renderings": renderings(concepts, each, unseen=False, seed=8)}.items():
        shares = []
        for repeat in range(REPEATS):
            model = train(made, repeat)
            with torch.no_grad():
                shares.append(float((model(test)[:, : len(concepts)].argmax(1) == truth).float().mean()))
            print(f"accuracy of a classifier trained on {way}: {100 * shares[-1]:.1f} %", flush=True)
        found[way] = {"mean": float(np.mean(shares)), "lowest": min(shares), "highest": max(shares)}
    return {EACH: each, "of real test renderings": len(test), **found}
