"""Is a picture of a named sign that sign? Retrieval of the prompt among all names for the small masked-token model, over
its sampling settings, and what its tokens can show at most.

Writes demo/results/masked_tokens.json and a picture grid, prints Markdown tables. The settings of each table that it does
not vary are the best ones of the tables before it.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from ...demo import modules, weights
from ...demo.concepts import load_concepts, load_frequency
from ...demo.text import TextModel, token_rows
from ...techniques.masked_tokens.decode import MaskedTokenSettings
from ...techniques.masked_tokens.networks.uvit import load_uvit
from ...techniques.masked_tokens.networks.vq import load_vq
from ..recipes.masked_tokens import generate
from . import masked_tokens, vq
from .canvas import Canvases
from .evaluate import RESULTS, grid, ranks_of, share
from .vision import names

SEEDS, FIRST_SEED = 4, 1000
PART = 56  # pictures per forward pass: more do not fit a CPU's cache


@dataclass(frozen=True)
class Sampling:
    steps: int = 12
    guidance: float = 3.0
    temperature: float = 2.0
    order: str = "confidence"


TABLES = {
    "guidance": (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
    "temperature": (0.5, 1.0, 2.0, 4.0),
    "order": ("confidence", "halton", "random"),
    "steps": (4, 8, 12, 16),
}
CHOSEN = ("guidance", "temperature")  # of these tables the best value goes on; the papers' 12 steps and order stay


class Generator:
    """pictures(captions, sampling): the networks and techniques/masked_tokens/decode.py alone, without the host's sampling."""

    def __init__(self):
        self.uvit = load_uvit(*weights.load_network(masked_tokens.FOLDER))
        self.vq = load_vq(*weights.load_network(vq.FOLDER))
        self.text = TextModel().eval().requires_grad_(False)
        self.text.load_state_dict(weights.load("text"))

    def condition(self, captions):
        text, _, pooled, _ = self.text(token_rows(captions))
        return self.uvit.condition(text, pooled, torch.tensor(masked_tokens.MICRO).expand(len(captions), -1))

    def pictures(self, captions, sampling):
        """[B, 64, 64, 3], 0..1; picture i has the seed FIRST_SEED + i."""
        parts = range(0, len(captions), PART)
        return torch.cat([self.part(captions[i : i + PART], sampling, FIRST_SEED + i) for i in parts])

    def part(self, captions, sampling, seed):
        config, count = self.uvit.config, len(captions)
        wanted, empty = self.condition(captions), self.condition([""] * count)
        settings = MaskedTokenSettings(
            codebook=config.codebook_size,
            mask_id=config.vocab_size - 1,
            steps=sampling.steps,
            temperature=sampling.temperature,
            order=sampling.order,
        )
        ids = generate(self.uvit, wanted, empty, settings, sampling.guidance, count, seed)
        return self.vq.decode(ids).clamp(0, 1).movedim(1, -1)


class Evaluator:
    """Retrieval by the demo's image-text encoder."""

    def __init__(self, seeds):
        self.vision, self.seeds = modules.load_vision(), seeds
        self.truth = torch.arange(len(names())).repeat_interleave(seeds)
        self.captions = [names()[i] for i in self.truth]
        bins = load_frequency()["bin"]
        self.bins = [bins[sign.name] for sign in load_concepts() for _ in range(seeds)]

    def score(self, images, truth=None, chosen=None):
        truth = self.truth if truth is None else truth
        place, _ = ranks_of(self.vision, images, truth)
        chosen = torch.ones(len(truth), dtype=torch.bool) if chosen is None else chosen
        return {"top1": share(place, chosen, 1), "top5": share(place, chosen, 5)}

    def groups(self, images):
        """By how often training has seen the sign, and against the prompts of other pictures (chance)."""
        result = {
            group: self.score(images, chosen=torch.tensor([b == group for b in self.bins]))
            for group in ("frequent", "medium", "rare")
        }
        shuffled = torch.from_numpy(np.random.default_rng(0).permutation(self.truth.numpy()))
        return {"all": self.score(images), **result, "shuffled prompts": self.score(images, shuffled)}


def reconstruction(generator, evaluator, count=490):
    """Single signs of the held-out split, before and after the tokens."""
    pixels, _, scenes = Canvases("noto", seed=99, balanced=True, unseen=True, one=1.0).batch(0, count)
    truth = torch.tensor([s.items[0].sign for s in scenes])
    images = torch.from_numpy(pixels).float() / 255
    tokens = [generator.vq.encode(part.movedim(-1, 1)) for part in images.split(98)]
    again = torch.cat([generator.vq.decode(part) for part in tokens]).clamp(0, 1).movedim(1, -1)
    return {
        "unseen": vq.quality(generator.vq, unseen=True),
        "seen": vq.quality(generator.vq, unseen=False),
        "pictures": evaluator.score(images, truth),
        "reconstructions": evaluator.score(again, truth),
    }


def table_of(report):
    lines = []
    for name, rows in report["tables"].items():
        lines += [f"| {name} | top-1 | top-5 |", "|---|---|---|"]
        for value, row in rows.items():
            low, high = row["top1"]["interval"]
            lines.append(
                f"| {value} | {row['top1']['share']:.1%} ({low:.0%}-{high:.0%}) | {row['top5']['share']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


@torch.inference_mode()
def main(seeds=SEEDS):
    RESULTS.mkdir(exist_ok=True)
    generator, evaluator, best = Generator(), Evaluator(seeds), Sampling()
    scores, pictures, seconds = {}, {}, {}

    def measure(sampling):
        if sampling not in scores:
            started = time.time()
            pictures[sampling] = generator.pictures(evaluator.captions, sampling)
            seconds[sampling] = time.time() - started
            scores[sampling] = evaluator.score(pictures[sampling])
            print(f"{sampling} {seconds[sampling]:.0f} s: {scores[sampling]['top1']['share']:.1%}", flush=True)
        return scores[sampling]

    tables = {}
    for name, values in TABLES.items():
        tables[name] = {value: measure(replace(best, **{name: value})) for value in values}
        print(table_of({"tables": {name: tables[name]}}), flush=True)
        if name in CHOSEN:
            best = replace(best, **{name: max(values, key=lambda value: tables[name][value]["top1"]["share"])})
    measure(best)
    report = {
        "command": "python run.py train-demo --old evaluate_masked_tokens",
        "default": {**asdict(best), "seeds": seeds},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "weights": {n: weights.metadata(f"{n}/{weights.NETWORK}") for n in (masked_tokens.FOLDER, vq.FOLDER)},
        "seconds per picture": round(seconds[best] / len(evaluator.captions), 3),
        "reconstruction": reconstruction(generator, evaluator),
        "tables": {**tables, "prompts": evaluator.groups(pictures[best])},
    }
    grid(pictures[best].unflatten(0, (-1, seeds)), RESULTS / "masked_tokens.png")
    (RESULTS / "masked_tokens.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table_of(report))
    print(report["default"], report["reconstruction"])
