"""Is a picture of a named sign that sign? Retrieval of the prompt among all names, through the host's own KSampler.

Writes demo/results/retrieval.json and a picture grid per checkpoint, prints a Markdown table.
"""

import json
import platform
import time

import comfy.sample
import comfy.utils
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ...demo import modules, weights
from ...demo.concepts import load_concepts, load_frequency
from ..recipes.state import ROOT
from ..statistics import wilson
from .canvas import Canvases
from .vision import STYLES, names

RESULTS = ROOT / "demo" / "results"
SETTINGS = {"steps": 20, "cfg": 4.0, "sampler": "dpmpp_2m", "scheduler": "karras", "size": 64, "seeds": 4}


def encode(clip, text):
    """CONDITIONING, as CLIPTextEncode gives it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def joined(conditionings):
    """One CONDITIONING with a row for each of those of a single prompt."""
    rows = [c[0] for c in conditionings]
    pooled = torch.cat([options["pooled_output"] for _, options in rows])
    return [[torch.cat([tensor for tensor, _ in rows]), rows[0][1] | {"pooled_output": pooled}]]


def sample(model, positive, negative, seed, latent, steps, cfg, sampler, scheduler):
    """Latents, as KSampler makes them of an empty ``latent``."""
    noise = comfy.sample.prepare_noise(latent, seed)
    given = model, noise, steps, cfg, sampler, scheduler, positive, negative, latent
    return comfy.sample.sample(*given, seed=seed, disable_pbar=True)


def generate(model, clip, captions, seed, *settings):
    """Latents [N, 12, 16, 16] of N captions, of pictures of 64x64 pixels; ``settings``: steps, cfg, sampler, scheduler."""
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(len(captions), 4, 8, 8), 8)
    positive = joined([encode(clip, caption) for caption in captions])
    return sample(model, positive, encode(clip, ""), seed, latent, *settings)


def ranks_of(vision, images, truth):
    """The place of the true sign (0 = first) among all names for every picture, and the place of its style (0 or 1)."""
    order = vision.similarity(images, names()).argsort(1, descending=True)
    place = (order == truth[:, None]).float().argmax(1)
    styled = torch.stack(
        [vision.similarity(images, names(style)).gather(1, truth[:, None])[:, 0] for style in STYLES], 1
    )
    return place, styled.argmax(1)


def share(places, chosen, first):
    hit = int((places[chosen] < first).sum())
    return {
        "share": round(hit / int(chosen.sum()), 4),
        "interval": [round(v, 3) for v in wilson(hit, int(chosen.sum()))],
        "pictures": int(chosen.sum()),
    }


def measure(name, vision, seeds):
    """All signs, `seeds` pictures each: a dict of shares, and the pictures [signs, seeds, 64, 64, 3]."""
    model, clip, vae = modules.load_checkpoint(name)
    signs, bins = load_concepts(), load_frequency()["bin"]
    started = time.time()
    settings = [SETTINGS[name] for name in ("steps", "cfg", "sampler", "scheduler")]
    latents = (generate(model, clip, [text] * seeds, 1000 + n, *settings) for n, text in enumerate(names()))
    images = torch.stack([vae.decode(part) for part in tqdm(latents, desc=name, total=len(signs))])
    seconds = time.time() - started
    truth = torch.arange(len(signs)).repeat_interleave(seeds)
    place, style = ranks_of(vision, images.flatten(0, 1), truth)
    animal = torch.tensor([s.domain == "animal" for s in signs]).repeat_interleave(seeds)
    groups = {"all": torch.ones_like(animal), "in domain (animals)": animal, "out of domain": ~animal}
    for bin_name in ("frequent", "medium", "rare"):
        chosen = torch.tensor([bins[s.name] == bin_name for s in signs]).repeat_interleave(seeds)
        groups |= {bin_name: chosen, f"{bin_name} animals": chosen & animal}
    result = {g: {"top1": share(place, chosen, 1), "top5": share(place, chosen, 5)} for g, chosen in groups.items()}
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(truth.numpy()))
    place_of_other, _ = ranks_of(vision, images.flatten(0, 1), shuffled)
    result["shuffled prompts"] = {
        "top1": share(place_of_other, groups["all"], 1),
        "top5": share(place_of_other, groups["all"], 5),
    }
    wanted = STYLES.index("noto" if name == "general" else "twemoji")
    result["own style"] = {"in domain": round((style[animal] == wanted).float().mean().item(), 4)}
    result["seconds per picture"] = round(seconds / len(truth), 3)
    return result, images


def accuracies(vision):
    """Of the encoder itself, on renderings of the held-out split and as trained."""
    table = {}
    for style in STYLES:
        for kind, unseen in (("unseen", True), ("seen", False)):
            pixels, _, scenes = Canvases(style, seed=99, balanced=True, unseen=unseen, one=1.0).batch(0, 980)
            truth = torch.tensor([s.items[0].sign for s in scenes])
            place, said = ranks_of(vision, torch.from_numpy(pixels).float() / 255, truth)
            everything = torch.ones(len(truth), dtype=torch.bool)
            table[f"{style}, {kind} renderings"] = {
                "top1": share(place, everything, 1),
                "top5": share(place, everything, 5),
                "style": round((said == STYLES.index(style)).float().mean().item(), 4),
            }
    return table


def grid(images, file, columns=14):
    """The first picture of every sign."""
    save_rows([images[i : i + columns, 0] for i in range(0, len(images) - columns + 1, columns)], file)


def save_rows(rows, file):
    """An image file of rows of pictures [H, W, 3] in 0..1."""
    image = torch.cat([torch.cat(list(row), 1) for row in rows])
    Image.fromarray((image * 255).round().byte().numpy()).save(file)


def table_of(report):
    lines = ["| checkpoint | prompts | top-1 | top-5 | pictures |", "|---|---|---|---|---|"]
    for name, result in {**report["checkpoints"], "evaluator": report["evaluator"]}.items():
        for group, value in result.items():
            if isinstance(value, dict) and "top1" in value:
                low, high = value["top1"]["interval"]
                lines.append(
                    f"| {name} | {group} | {value['top1']['share']:.1%} ({low:.0%}-{high:.0%}) | {value['top5']['share']:.1%} | {value['top1']['pictures']} |"
                )
    return "\n".join(lines)


@torch.inference_mode()
def main(seeds=SETTINGS["seeds"]):
    RESULTS.mkdir(exist_ok=True)
    vision = modules.load_vision()
    report = {
        "command": "python run.py train-demo --old evaluate",
        "settings": {**SETTINGS, "seeds": seeds},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "weights": {n: weights.metadata(n) for n in ("general", "expert-animals", "text", "vision", "pca")},
        "checkpoints": {},
        "evaluator": accuracies(vision),
    }
    for name in modules.CHECKPOINTS:
        report["checkpoints"][name], images = measure(name, vision, seeds)
        grid(images, RESULTS / f"{name}.png")
        (RESULTS / "retrieval.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table_of(report))
