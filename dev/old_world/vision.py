"""The image-text encoder: contrastive training on canvases of both styles, all signs equally often.

Three terms, each a softmax over cosines: the whole caption against the batch's captions (both ways), the signs in the
picture against all names, and the same with the style said ("a cat in noto style").
"""

import os
import time

import comfy.clip_model
import comfy.ops
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ...demo import weights
from ...demo.concepts import load_concepts
from ...demo.emoji.comfy_vision import replace_stem_and_layers
from ...demo.emoji.vision import EMBED, WIDTH
from ...demo.latent import PatchPCA
from ...demo.text import TextModel, token_rows
from ...demo.vision import ChorusDemoClipVision
from ..recipes.vision import distort
from ..weights import save_weights
from .canvas import Canvases
from .device import DEVICE, autocast, to_device
from .loop import STATES

STYLES = ("noto", "twemoji")
STEPS, BATCH, SEED = 4000, 128, 7


def make_tower():
    """The host's CLIPVisionModelProjection with our stem, fp32 on the CPU, weights undefined."""
    operations = comfy.ops.disable_weight_init
    tower = comfy.clip_model.CLIPVisionModelProjection(ChorusDemoClipVision.settings, torch.float32, "cpu", operations)
    replace_stem_and_layers(tower, operations, ChorusDemoClipVision.widths)
    return tower


class ImageText(nn.Module):
    """Both towers, as they are trained: image [B, 3, 64, 64] in -1..1 and captions to unit vectors [B, 64]."""

    def __init__(self):
        super().__init__()
        self.image, self.text = make_tower(), TextModel()
        self.text_project = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)

    def image_embeds(self, x):
        return F.normalize(self.image(pixel_values=x)[2].float(), dim=-1)

    def text_embeds(self, tokens):
        return F.normalize(self.text(tokens)[2].float() @ self.text_project, dim=-1)


def names(style=None):
    """'a cat', or 'a cat in noto style', of all signs in order."""
    canvases = [f"{'an' if s.name[0] in 'aeiou' else 'a'} {s.name}" for s in load_concepts()]
    return [f"{n} in {style} style" for n in canvases] if style else canvases


def initialise(model):
    for name, p in model.image.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02 if "embedding.weight" in name and p.ndim == 2 else p[0].numel() ** -0.5)
        else:
            p.data.fill_(1.0 if name.endswith("weight") else 0.0)
    nn.init.normal_(model.image.vision_model.embeddings.class_embedding, std=0.02)


class Batches:
    """Batch k: half the pictures of each style, with what a generated picture may suffer: noise, blur, colour, shift."""

    def __init__(self, pca):
        self.pca = pca
        self.canvases = [Canvases(style, seed=SEED, balanced=True, one=0.65) for style in STYLES]

    def __call__(self, k):
        half = BATCH // 2
        images, captions, signs = [], [], []
        for n, canvases in enumerate(self.canvases):
            pixels, texts, scenes = canvases.batch(k * half, half)
            images.append(torch.from_numpy(pixels))
            captions += [f"{t} in {STYLES[n]} style" for t in texts]
            signs += [[i.sign for i in s.items] for s in scenes]
        x = torch.cat(images).movedim(3, 1).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + k)
        decoded = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        return distort(torch.where(decoded, self.pca.decode(self.pca.encode(x)), x), generator), captions, signs


def loss_of(model, scale, x, captions, signs, plain, styled=None):
    """plain: tokens of all names; styled: tokens of all names in each style, one after the other."""
    image, text = model.image_embeds(x), model.text_embeds(token_rows(captions).to(x.device))
    logits = scale * image @ text.T
    same = torch.tensor([[a == b for b in captions] for a in captions], device=x.device).float()
    target = same / same.sum(1, keepdim=True)
    contrast = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    present = torch.zeros(len(x), len(plain))
    for row, ids in zip(present, signs):
        row[ids] = 1 / len(ids)
    present = present.to(x.device)
    loss = 0.5 * contrast + F.cross_entropy(scale * image @ model.text_embeds(plain).T, present)
    if styled is not None:
        first, second = present.chunk(2)  # half of the pictures of each style
        target = torch.block_diag(first, second)
        loss = loss + F.cross_entropy(scale * image @ model.text_embeds(styled).T, target)
    return loss


@torch.no_grad()
def accuracy(model, style, unseen=True, count=980):
    """Share of single-sign canvases whose name is first, and among the first five, of all names."""
    canvases = Canvases(style, seed=99, balanced=True, unseen=unseen, one=1.0)
    pixels, _, scenes = canvases.batch(0, count)
    text = model.text_embeds(token_rows(names()))
    x = torch.from_numpy(pixels).movedim(3, 1).float() / 127.5 - 1
    order = (torch.cat([model.image_embeds(part) for part in x.split(196)]) @ text.T).argsort(1, descending=True)
    hit = order == torch.tensor([s.items[0].sign for s in scenes])[:, None]
    return hit[:, 0].float().mean().item(), hit[:, :5].any(1).float().mean().item()


def main(minutes=None, lr=2e-3):
    torch.manual_seed(SEED)
    pca = PatchPCA()
    pca.load_state_dict(weights.load("pca"))
    model, batches = ImageText(), Batches(pca)
    initialise(model)
    model.to(DEVICE)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.02)
    plain, styled = to_device(token_rows(names()), token_rows(names(STYLES[0]) + names(STYLES[1])))
    file, step = STATES / "vision.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    started = saved = time.time()
    bar = tqdm(total=STEPS, initial=step, desc="vision", mininterval=10)
    while step < STEPS:
        done = (time.time() - started) / (60 * minutes) if minutes else step / STEPS
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * max(0.01, 1 - done)
        x, captions, signs = batches(step)
        with autocast():
            loss = loss_of(model, 16.0, x.to(DEVICE), captions, signs, plain, styled if step % 2 else None)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        current = model.state_dict()
        torch._foreach_lerp_(
            [average[k] for k in current],
            [v.detach() for v in current.values()],
            1 - min(0.995, (1 + step) / (10 + step)),
        )
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        over = done >= 1 or step == STEPS
        if over or time.time() - saved > 120:
            saved = time.time()
            STATES.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step},
                file.with_suffix(".part"),
            )
            os.replace(file.with_suffix(".part"), file)
            export(average, step)
        if over:
            break
    bar.close()


def export(average, step):
    model = ImageText()
    model.load_state_dict(average)
    scores = {
        f"{style}_{kind}": [round(v, 4) for v in accuracy(model, style, unseen)]
        for style in STYLES
        for kind, unseen in (("unseen", True), ("seen", False))
    }
    print(f"\nstep {step} top-1/top-5 on single signs:", scores, flush=True)
    save_weights("vision", average, steps=step, pictures=step * BATCH, seed=SEED, license="CC-BY-4.0", **scores)
