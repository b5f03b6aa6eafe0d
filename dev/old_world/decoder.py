"""The decoder: learns to see the clean picture through latents as noisy as a small denoiser leaves them."""

import time

import torch
from torch import nn
from tqdm import tqdm

from ...demo import weights
from ...demo.latent import CHANNELS, PATCH, DemoVAE
from ..weights import save_weights
from .canvas import Canvases
from .device import DEVICE, autocast, to_device
from .vision import STYLES

STEPS, BATCH, SEED = 2500, 48, 11


class Batches:
    """pictures [B, 3, 64, 64] in -1..1 and their latents with noise of a strength of their own, none for a third of them."""

    def __init__(self, module):
        self.module = module
        self.canvases = [Canvases(style, seed=SEED, balanced=True) for style in STYLES]

    def __call__(self, k, noise=0.5):
        half = BATCH // 2
        pixels = [torch.from_numpy(c.batch(k * half, half)[0]) for c in self.canvases]
        x = torch.cat(pixels).movedim(3, 1).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + k)
        strength = (torch.rand(BATCH, 1, 1, 1, generator=generator) * 1.5 - 0.5).clamp(min=0) * noise
        noise = torch.randn(BATCH, CHANNELS, x.shape[2] // PATCH, x.shape[3] // PATCH, generator=generator)
        x, noise = to_device(x, strength * noise)
        return x, self.module.encode(x) + noise


@torch.no_grad()
def errors(module, batches):
    """Mean squared error of (linear decoder, ours) on clean and on noisy latents of canvases that training has not used."""
    result = {}
    for name, noise in (("clean", 0.0), ("noisy", 0.5)):
        x, z = batches(10**6, noise)
        result[name] = [round((d(z) - x).square().mean().item(), 5) for d in (module.pca.decode, module.decode)]
    return result


def main(minutes=None, lr=2e-3):
    torch.manual_seed(SEED)
    module = DemoVAE()
    module.pca.load_state_dict(weights.load("pca"))
    nn.init.zeros_(module.cleaner.last.weight)
    nn.init.zeros_(module.cleaner.last.bias)
    module.to(DEVICE)
    optimizer = torch.optim.AdamW(module.cleaner.parameters(), lr=lr, betas=(0.9, 0.99))
    batches, started, step, progress = Batches(module), time.time(), 0, 0.0
    bar = tqdm(total=STEPS, desc="decoder", mininterval=10)
    while step < STEPS and progress < 1:
        progress = (time.time() - started) / (60 * minutes) if minutes else step / STEPS
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * max(0.01, 1 - progress)
        x, z = batches(step)
        with autocast():
            correction = module.cleaner(z)
        difference = module.pca.decode(z) + correction.float() - x
        (difference.abs().mean() + difference.square().mean()).backward()
        nn.utils.clip_grad_norm_(module.cleaner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        bar.update()
        if step % 200 == 0:
            save(module, batches, step)
    bar.close()
    save(module, batches, step)


def save(module, batches, step):
    facts = errors(module, batches)
    print(f"\ndecoder step {step}: mean squared error of the linear decoder and of this one: {facts}", flush=True)
    save_weights("decoder", module.cleaner.state_dict(), steps=step, seed=SEED, license="CC-BY-4.0", **facts)
