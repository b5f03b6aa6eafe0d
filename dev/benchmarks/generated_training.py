"""SeedSelect's use in the paper: a classifier learns rare signs from generated pictures alone and meets real renderings."""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ...demo.signs import load_signs
from ..first_recipes.canvas import Canvases
from ..first_recipes.sign_network import SignClassifier

STEPS, BATCH, RATE, REPEATS = 200, 64, 3e-3, 3


def renderings(signs: list[str], each: int, unseen: bool, seed: int) -> torch.Tensor:
    """[signs, each, 64, 64, 3] in 0..1, alone on white as the bare prompts ask for."""
    canvases = Canvases("noto", seed=seed, balanced=True, unseen=unseen, one=1.0)
    places = {next(i for i, s in enumerate(load_signs()) if s.name == name): n for n, name in enumerate(signs)}
    found, index = [[] for _ in signs], 0
    while min(map(len, found)) < each:
        scene = canvases.scene(index)
        mine = found[places[scene.items[0].sign]] if scene.items[0].sign in places else None
        if mine is not None and len(mine) < each:
            mine.append(torch.from_numpy(canvases.draw(replace(scene, colors=("white",)))))
        index += 1
    return torch.stack([torch.stack(pictures) for pictures in found]).float() / 255


def spoiled(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moved, zoomed, in other light: [B, 3, 64, 64]."""
    n = len(x)
    draw = lambda *s: torch.rand(*s, generator=generator) - 0.5  # noqa: E731
    theta = torch.zeros(n, 2, 3)
    zoom = 1 + 0.5 * draw(n)
    theta[:, 0, 0], theta[:, 1, 1] = zoom, zoom
    theta[:, :, 2] = 0.4 * draw(n, 2)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return (
        x * (1 + 0.3 * draw(n, 3, 1, 1)) + 0.2 * draw(n, 3, 1, 1) + 0.05 * torch.randn(x.shape, generator=generator)
    ).clamp(0, 1)


@torch.inference_mode(False)
@torch.enable_grad()
def learn(pictures: torch.Tensor, seed: int) -> SignClassifier:
    """A classifier whose first logits are the signs of ``pictures`` [signs, n, 64, 64, 3]."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = SignClassifier()
    x = pictures.flatten(0, 1).movedim(-1, 1).clone()
    truth = torch.arange(len(pictures)).repeat_interleave(pictures.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        logits = model(spoiled(x[rows], generator))[:, : len(pictures)]
        loss = F.cross_entropy(logits, truth[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracies(pictures: dict[str, torch.Tensor], signs: list[str]) -> dict:
    """Top-1 on renderings that nothing was trained on, by the pictures that a classifier learned from: mean, lowest and
    highest of the repeats. ``pictures``: by way, [signs, n, 64, 64, 3]; real ones are added, as many."""
    each = next(iter(pictures.values())).shape[1]
    test = renderings(signs, 20, unseen=True, seed=6).flatten(0, 1).movedim(-1, 1)
    truth = torch.arange(len(signs)).repeat_interleave(20)
    found = {}
    for way, made in {**pictures, "renderings": renderings(signs, each, unseen=False, seed=8)}.items():
        shares = []
        for repeat in range(REPEATS):
            model = learn(made, repeat)
            with torch.no_grad():
                shares.append(float((model(test)[:, : len(signs)].argmax(1) == truth).float().mean()))
            print(f"a classifier learned from {way}: {100 * shares[-1]:.1f} %", flush=True)
        found[way] = {"mean": float(np.mean(shares)), "lowest": min(shares), "highest": max(shares)}
    return {"pictures of each sign": each, "of real test renderings": len(test), **found}
