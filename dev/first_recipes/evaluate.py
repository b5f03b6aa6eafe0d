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
from ...demo.signs import load_bins, load_signs
from ..statistics import wilson
from .data_source import ROOT
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


def sample(model, positive, negative, seed, count, steps, cfg, sampler, scheduler):
    """Latents [count, 12, 16, 16], as KSampler makes them of an empty latent of 64x64 pixels."""
    latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros(count, 4, 8, 8), 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    given = model, noise, steps, cfg, sampler, scheduler, positive, negative, latent
    return comfy.sample.sample(*given, seed=seed, disable_pbar=True)


def paint(model, clip, vae, text, seed, count=1):
    """IMAGE [count, 64, 64, 3] of a prompt with the settings above."""
    settings = [SETTINGS[name] for name in ("steps", "cfg", "sampler", "scheduler")]
    return vae.decode(sample(model, encode(clip, text), encode(clip, ""), seed, count, *settings))


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
    signs, bins = load_signs(), load_bins()["bin"]
    started = time.time()
    images = torch.stack(
        [paint(model, clip, vae, text, 1000 + n, seeds) for n, text in enumerate(tqdm(names(), desc=name))]
    )
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


def judge(vision):
    """The judge's own accuracy on renderings of the held-out split."""
    from .canvas import Canvases

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
    rows = [torch.cat(list(images[i : i + columns, 0]), 1) for i in range(0, len(images) - columns + 1, columns)]
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(file)


def table_of(report):
    lines = ["| checkpoint | prompts | top-1 | top-5 | pictures |", "|---|---|---|---|---|"]
    for name, result in {**report["checkpoints"], "judge": report["judge"]}.items():
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
        "judge": judge(vision),
    }
    for name in modules.CHECKPOINTS:
        report["checkpoints"][name], images = measure(name, vision, seeds)
        grid(images, RESULTS / f"{name}.png")
        (RESULTS / "retrieval.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table_of(report))
