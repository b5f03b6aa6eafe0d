"""Does SeedSelect find what a model rarely gets right? The general demo checkpoint on the signs that it saw least.

Every sign has four references that no training saw, a bare prompt ("an owl") and groups of seeds, one group for each
picture of a way:
  random:   the group's first seed;
  search:   the best of the group by successive halving;
  optimise: the gradient, from the group's first seed;
  both:     the gradient, from the one that the search found.
Two judges say whether a picture shows its sign. The image-text encoder is what the score looks at too, so that it may be
deceived; the classifier was trained apart from it, on other renderings, and no score knows it.

Pictures are kept in .cache/seed_rare_signs and not painted again; delete the folder to start anew.
"""

import argparse
import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import headless

headless.start()

import comfy.utils  # noqa: E402

from ...demo.modules import load_checkpoint, load_references, load_vision  # noqa: E402
from ...demo.signs import load_bins, load_signs, phrase  # noqa: E402
from ...nodes.seed_select import run  # noqa: E402
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler, KSamplerInputs  # noqa: E402
from ...techniques.seed_select.comfy_scoring import ScoringSettings  # noqa: E402
from ...techniques.seed_select.comfy_session import SessionSettings  # noqa: E402
from ...techniques.seed_select.optimize import OptimizeSettings  # noqa: E402
from ...techniques.seed_select.select import SeedSelect, SeedSelectSettings  # noqa: E402
from ..first_recipes.evaluate import encode, ranks_of  # noqa: E402
from ..first_recipes.sign_network import load_sign_classifier  # noqa: E402
from ..statistics import mean_of_groups, paired_difference, ratio_of_means  # noqa: E402
from .environment import RESULTS, facts, keep  # noqa: E402
from .fresh_process import in_fresh_process  # noqa: E402
from .generated_training import accuracies  # noqa: E402

PAINTED = Path(__file__).parents[2] / ".cache" / "seed_rare_signs"
BINS = ("rare", "medium", "frequent")
WAYS = ("random", "search", "optimise", "both")
JUDGES = ("classifier", "encoder")
SIZE = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}
ALL = 64  # seeds of a group that are painted in full, of the first group
KS = (1, 2, 4, 8, 16, 32, 64)
GROUP = 1000  # seeds from one group's first to the next one's


@dataclass(frozen=True)
class Setting:
    """Of every picture; part of the names under which they are kept."""

    steps: int = 20
    cfg: float = 4.0
    sampler: str = "euler"
    scheduler: str = "normal"
    candidates: int = 16
    first_steps: int = 4
    iterations: int = 6
    optimize_steps: int = 10
    learning_rate: float = 0.1

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self))


class Painter:
    """Pictures of one sign."""

    def __init__(self, setting: Setting, sign: str):
        self.setting = setting
        model, clip, self.vae = load_checkpoint("general")
        self.vision, self.references = load_vision(), load_references(sign)[0]
        self.words = encode(clip, phrase(sign)), encode(clip, "")
        self.model = model

    def sampler(self, seed: int) -> ComfySeedSampler:
        s, (positive, negative) = self.setting, self.words
        wired = dict(model=self.model, positive=positive, negative=negative, latent_image=SIZE)
        widgets = dict(steps=s.steps, cfg=s.cfg, sampler_name=s.sampler, scheduler=s.scheduler, seed=seed)
        scoring = ScoringSettings(references=self.references, vae=self.vae, clip_vision=self.vision)
        return ComfySeedSampler(KSamplerInputs(**wired, **widgets), scoring)

    def select(self, mode: str, seed: int) -> SeedSelect:
        s, sampler = self.setting, self.sampler(seed)
        optimize = OptimizeSettings(iterations=s.iterations, learning_rate=s.learning_rate)
        search = dict(candidates=s.candidates, steps=s.steps, first_steps=s.first_steps)
        settings = SeedSelectSettings(mode=mode, seed=seed, **search, optimize=optimize)
        if settings.optimizes:
            sampler.allow_gradients(SessionSettings(sampler=s.sampler, steps=s.optimize_steps, seed=seed))
        select = SeedSelect(settings, sampler)
        run(select, sampler)
        return select

    def in_full(self, seed: int, count: int) -> dict:
        """The finished pictures of ``count`` seeds."""
        sampler = self.sampler(seed)
        noise = torch.cat([sampler.noise_of(seed + k) for k in range(count)])
        latents = torch.cat([sampler.generate(part, seeds=[seed] * len(part)) for part in noise.split(16)])
        scores = torch.cat([sampler.score([part]) for part in latents.split(16)])
        return {"latents": latents, "scores": scores.tolist(), "evaluations": count * self.setting.steps}


def kept(picture, evaluations: int) -> dict:
    return {"latents": picture.latent, "scores": [picture.score], "evaluations": evaluations}


def paint(setting: dict, sign: str, group: int, ways: list[str]) -> None:
    """What is missing of one group; called in a process of its own, on one thread."""
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    setting, seed, painter = Setting(**setting), GROUP * (group + 1), None
    with torch.inference_mode():
        for way in ways:
            file = place(setting, sign, group, way)
            if file.exists():
                continue
            painter = painter or Painter(setting, sign)
            if way == "random":
                found = {way: painter.in_full(seed, 1)}
            elif way == "all":
                found = {way: painter.in_full(seed, ALL)}
            elif way == "optimise":
                select = painter.select("optimize", seed)
                found = {way: kept(select.best, select.evaluations)}
            else:  # the search is the first half of both
                select = painter.select("search" if way == "search" else "search+optimize", seed)
                found = {"search": kept(select.search.best, select.search.evaluations)}
                if way == "both":
                    found[way] = kept(select.best, select.evaluations)
            for name, values in found.items():
                write(values, place(setting, sign, group, name))


def paint_groups(setting: dict, jobs: list) -> None:
    for sign, group, ways in jobs:
        paint(setting, sign, group, ways)


def place(setting: Setting, sign: str, group: int, way: str) -> Path:
    return PAINTED / setting.name / f"{sign}-{group}-{way}.pt"


def write(values: dict, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(values, part)
    os.replace(part, file)


def paint_all(setting: Setting, plan: dict, workers: int) -> None:
    """``plan``: the ways of (sign, group)."""
    jobs = [
        (sign, group, [w for w in ways if not place(setting, sign, group, w).exists()])
        for (sign, group), ways in plan.items()
    ]
    jobs = [job for job in jobs if job[2]]
    # a process takes a while to start, and optimising takes longer than that
    slow, quick = ([job for job in jobs if ("both" in job[2]) is is_slow] for is_slow in (True, False))
    parts = [slow[i : i + 8] for i in range(0, len(slow), 8)] + [quick[i : i + 66] for i in range(0, len(quick), 66)]
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda part: in_fresh_process(paint_groups, dataclasses.asdict(setting), part), parts):
            done += 1
            print(f"painted {done} of {len(parts)} parts", flush=True)


class Judges:
    def __init__(self):
        self.vision, self.classifier = load_vision(), load_sign_classifier()
        self.names = [s.name for s in load_signs()]
        _, _, self.vae = load_checkpoint("general")

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 64, 64, 3] in 0..1"""
        return torch.cat([self.vae.decode(part) for part in latents.split(64)])

    def right(self, pictures: torch.Tensor, signs: list[str]) -> dict[str, np.ndarray]:
        truth = torch.tensor([self.names.index(s) for s in signs])
        logits = torch.cat([self.classifier(part.movedim(-1, 1)) for part in pictures.split(64)])
        found = {"classifier": logits.argmax(1) == truth, "encoder": ranks_of(self.vision, pictures, truth)[0] == 0}
        return {name: hits.numpy().astype(float) for name, hits in found.items()}


def share(hits: np.ndarray, groups: np.ndarray) -> dict:
    mean, low, high = mean_of_groups(hits, groups)
    return {"share": mean, "interval": [low, high], "pictures": len(hits)}


def measure(setting: Setting, plan: dict, judges: Judges) -> tuple[dict, dict]:
    """The table, and the pictures of each way of the rare signs [signs, groups, 64, 64, 3]."""
    bins, table, pictures = load_bins()["bin"], {}, {}
    for name in BINS:
        found = {}
        for way in WAYS:
            cells = [(sign, group) for (sign, group), ways in plan.items() if bins[sign] == name and way in ways]
            if not cells:
                continue
            made = [torch.load(place(setting, *cell, way), weights_only=True) for cell in cells]
            images = judges.pictures(torch.cat([m["latents"] for m in made]))
            signs, groups = [c[0] for c in cells], np.unique([c[0] for c in cells], return_inverse=True)[1]
            right = judges.right(images, signs)
            found[way] = {
                **{judge: share(right[judge], groups) for judge in JUDGES},
                "score": float(np.mean([m["scores"][0] for m in made])),
                "evaluations": float(np.mean([m["evaluations"] for m in made])),
                "hits": right,
                "groups": groups,
            }
            if name == "rare":
                pictures[way] = images.unflatten(0, (-1, len(set(signs)))).transpose(0, 1)  # cells go by groups
        table[name] = found
    return table, pictures


def gains(table: dict) -> dict:
    """Points of right pictures over random seeds, and of both over the frequent signs' random seeds."""
    rare, out = table["rare"], {}
    for way in WAYS[1:]:
        if way in rare:
            out[f"{way} - random"] = {
                judge: paired_difference(rare[way]["hits"][judge], rare["random"]["hits"][judge], rare[way]["groups"])
                for judge in JUDGES
            }
    return out


def against_best_of_all(setting: Setting, signs: list[str]) -> dict:
    """What each way scores in the first group, beside the best of that group's seeds in full."""
    everything = [torch.load(place(setting, sign, 0, "all"), weights_only=True) for sign in signs]
    scores = np.sort([e["scores"] for e in everything])  # [signs, ALL]
    mean, best, index = scores.mean(1), scores[:, 0], np.arange(len(signs))
    found = {}
    for way in WAYS[1:]:
        made = [torch.load(place(setting, sign, 0, way), weights_only=True) for sign in signs]
        own = np.array([m["scores"][0] for m in made])
        evaluations = float(np.mean([m["evaluations"] for m in made]))
        found[way] = {
            "score": float(own.mean()),
            "evaluations": evaluations,
            "of all in full": evaluations / everything[0]["evaluations"],
            "of the way from the mean to the best of all": ratio_of_means(mean - own, mean - best, index),
        }
    # the mean of the best of k drawn without putting back
    expected = {k: sum(scores[:, i] * comb(ALL - 1 - i, k - 1) for i in range(ALL - k + 1)) / comb(ALL, k) for k in KS}
    return {**found, "best of k in full": {k: float(v.mean()) for k, v in expected.items()}}


def sheet(pictures: dict, file: Path, rows: int = 8) -> None:
    """Of every fourth rare sign a row: eight pictures by random seeds, by search, by optimising, by both."""
    gap = torch.ones(64, 8, 3)
    chosen = range(0, len(next(iter(pictures.values()))), 4)
    lines = []
    for sign in list(chosen)[:rows]:
        parts = [torch.cat([*pictures[way][sign], gap], 1) for way in WAYS if way in pictures]
        lines.append(torch.cat(parts, 1))
    Image.fromarray((torch.cat(lines) * 255).round().byte().numpy()).save(file)


def markdown(table: dict) -> str:
    lines = [
        "| signs | noise by | right, classifier (95 %) | right, encoder (95 %) | score | evaluations |",
        "|---" * 6 + "|",
    ]
    for name, ways in table.items():
        for way, row in ways.items():
            cells = [
                f"{100 * row[j]['share']:.1f} % ({100 * row[j]['interval'][0]:.0f}-{100 * row[j]['interval'][1]:.0f})"
                for j in JUDGES
            ]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} | {row['score']:.2f} | {row['evaluations']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="groups, that is pictures of every sign and way")
    parser.add_argument("--searches", type=int, default=4, help="groups of the other signs that are searched too")
    parser.add_argument("--signs", type=int, help="of each bin; all if not given")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--paint-only", action="store_true", help="judge later")
    for field in dataclasses.fields(Setting):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    parser.add_argument("--name", default="seed_rare_signs", help="of the result files")
    options = parser.parse_args()
    setting = Setting(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setting)})

    of_bin = {b: [s.name for s in load_signs() if load_bins()["bin"][s.name] == b][: options.signs] for b in BINS}
    # group by group, so that what an early end leaves is even
    plan = {}
    for group in range(options.seeds):
        for sign in of_bin["rare"]:
            plan[sign, group] = ["random", "both", "search", "optimise", *(["all"] if group == 0 else [])]
    for group in range(options.seeds):
        for sign in (*of_bin["medium"], *of_bin["frequent"]):
            plan[sign, group] = ["random", *(["search"] if group < options.searches else [])]
    paint_all(setting, plan, options.workers)
    if options.paint_only:
        return

    with torch.inference_mode():
        judges = Judges()
        table, pictures = measure(setting, plan, judges)
        found = {"gains": gains(table), "best of all": against_best_of_all(setting, of_bin["rare"])}
        sheet(pictures, RESULTS / f"{options.name}.png")
    found["classifiers"] = accuracies(pictures, of_bin["rare"])
    lines = markdown(table)
    rows = {
        b: {w: {k: v for k, v in row.items() if k not in ("hits", "groups")} for w, row in ways.items()}
        for b, ways in table.items()
    }
    path = keep(options.name, {"settings": vars(options), "table": rows, **found})
    print(lines)
    print(json.dumps(found, indent=1))
    print(f"\n{facts()['device']}; kept in {path.name}")


if __name__ == "__main__":
    main()
