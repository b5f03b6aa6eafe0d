"""Finds the example seeds: for each of two rare concepts, the best of 64 noises, as a file for Load Seed.

Every rare concept is generated from the same 64 noises, with a prompt that only names the concept. The image-text
encoder scores each image by the probability of the concept's name among all names; the best noise has the highest
score. The independent classifier then chooses two concepts. It must recognise a chosen concept in the image of the best
noise; among such concepts, the two that it recognises least often are chosen.
"""

import functools
import json
from dataclasses import dataclass

import torch

from ...demo.autoencoder import CHANNELS, PATCH
from ...demo.concepts import DATA, load_concepts, load_frequency
from ...demo.text import token_rows
from . import autoencoder, banks, chunks, classifier, features, guided, loop, snapshots, state
from .networks.classifier import ConceptClassifier
from .scenes import CELL, SIZE
from .vision import SCALE, names

FOLDER = DATA.parent / "seeds"
# see techniques/seed_select/comfy_files.py
FORMAT, NOISE, ENDING = "chorus-seed-1", "noise", ".seed.safetensors"


@dataclass(frozen=True, kw_only=True)
class Plan(loop.Plan):
    """Settings of the search. A step generates one rare concept from all noises. ``count``: number of concepts with a
    seed file."""

    name: str = "seeds"
    steps: int = len([name for name, kind in load_frequency()["bin"].items() if kind == "rare"])
    batch: int = 64
    seed: int = 1000  # seed of the first noise; the other noises have the next integers
    hours: float = 0.15
    passes: int = 20
    cfg: float = guided.CFG
    count: int = 2

    def small(self, **changes):
        return super().small(**{"steps": 2, "passes": 2, **changes})


PLAN = Plan()
PLANS = (PLAN,)


def noise(seed):
    """The noise [1, 8, 16, 16] of an integer seed, equal to ComfyUI's noise for a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, CHANNELS, SIZE // CELL, SIZE // CELL, generator=generator)


class Search(chunks.Chunks):
    """Scores of a concept's images from N noises. Chunk n has the scores of concept n.

    'probabilities' [N]: probability of the concept's name among all names, by the image-text encoder. 'right' [N]:
    whether the classifier recognises the concept.
    """

    def __init__(self, plan):
        model, self.classifier = guided.load(), load_classifier()
        self.autoencoder, self.encoder = autoencoder.load(), features.load()
        parts = (model, self.autoencoder, self.encoder, self.classifier)
        digests = "-".join(banks.digest(part) for part in parts)
        super().__init__("seeds", f"{digests}-cfg{plan.cfg:g}-{plan.passes}-seed{plan.seed}-{plan.batch}")
        self.plan, self.guided = plan, guided.Guided(model, plan.cfg, exact=True)

    @torch.no_grad()
    def compute(self, number):
        tokens, found, right = token_rows([names()[number]]), [], []
        for seeds in torch.arange(self.plan.seed, self.plan.seed + self.plan.batch).split(32):
            rows = torch.cat([noise(seed) for seed in seeds.tolist()])
            latents = self.guided.sample(rows, tokens.expand(len(rows), -1), guided.normal(self.plan.passes))
            pixels = self.autoencoder.decode(latents).clamp(-1, 1)
            found.append((SCALE * self.encoder.similarity(pixels, names())).softmax(1)[:, number].cpu())
            right.append(classifier.named(self.classifier, pixels) == number)
        return {"probabilities": torch.cat(found), "right": torch.cat(right)}


def load_classifier():
    return snapshots.frozen(ConceptClassifier(), snapshots.load(classifier.NAME), "classifier", classifier.NAME)


def rare(plan):
    """Numbers of the rare concepts, the least frequent first."""
    frequency = load_frequency()
    concepts = [
        (frequency["rank"][c.name], n) for n, c in enumerate(load_concepts()) if frequency["bin"][c.name] == "rare"
    ]
    return [n for _, n in sorted(concepts, reverse=True)][: plan.steps]


def choose(found, count):
    """The ``count`` concepts that the classifier recognises least often, as keys of ``found`` ({number: chunk of
    ``Search``}).

    Concepts that it does not recognise in the image of the best noise come last.
    """

    def order(number):
        probabilities, right = found[number]["probabilities"], found[number]["right"]
        wrong = not right[probabilities.argmax()]
        return wrong, float(right.float().mean()), float(probabilities.mean() - probabilities.max())

    return sorted(found, key=order)[:count]


def write(plan, number, found, folder):
    """Write the best noise of a concept as a seed file; returns its path."""
    from ..weights import write_whole

    probabilities = found["probabilities"]
    place, name = int(probabilities.argmax()), load_concepts()[number].name
    seed = plan.seed + place
    facts = {
        "format": FORMAT,
        "seed": seed,
        "found": f"seed {seed}, best of {plan.batch}",
        "prompt": names()[number],
        "score": f"{float(probabilities[place]):.4f}",
        "mean_score": f"{float(probabilities.mean()):.4f}",
        "recognised": f"{float(found['right'].float().mean()):.4f} of all noises, by the classifier",
        "scoring": "probability of the name among all concepts, by the image-text encoder",
        "model": "ChorusEmojiUNet",
        "model_file": guided.GENERAL,
        "patched_weights": "0",
        "pixels_per_position": PATCH,
        "sampling": json.dumps(
            {"steps": plan.passes, "cfg": plan.cfg, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        ),
    }
    path = folder / f"{name.replace(' ', '-')}{ENDING}"
    write_whole(path, {NOISE: noise(seed)}, {key: str(value) for key, value in facts.items()})
    return path


def done():
    return len(list(FOLDER.glob(f"*{ENDING}"))) >= PLAN.count


def run(smoke=False, report=print):
    plan, folder = (PLAN.small(), state.folder() / "data") if smoke else (PLAN, FOLDER)
    search, numbers = Search(plan), rare(plan)
    jobs = [(search.path(n).exists, functools.partial(search.make, n, search.compute)) for n in numbers]
    chunks.make_all(plan, jobs, report)
    found = {number: search.load(number) for number in numbers}
    for number in choose(found, plan.count):
        path, scores = write(plan, number, found[number], folder), found[number]["probabilities"]
        share = float(found[number]["right"].float().mean())
        report(
            f"{path.name}: score {float(scores.max()):.3f}, mean of {plan.batch} noises {float(scores.mean()):.3f};"
            f" the classifier recognises {share:.0%} of them"
        )
