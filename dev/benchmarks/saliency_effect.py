"""Effect of the blend on images: the demo checkpoints on compositions that are not used in training.

Every prompt names a subject, a concept of the expert's domain, and another concept. No training saw the two together.
The general checkpoint was trained on all concepts in glossy style, each expert on one domain in flat style:
expert-animals is a U-Net like general, expert-food is a small Flux with flow matching. An image is measured by two
evaluators that no training and no score uses, an independent classifier and template matching (evaluators.py):
  subject: the subject is in the image, in the expert's style
  scene:   both concepts are in the image, side by side or one above the other
  both:    scene, with the subject in the expert's style
  placed:  both, and the concepts are where the prompt places them
The ways of generation:
  general, expert: one checkpoint alone
  blend:           SaliencyNoiseBlend with its default values
  recommended:     SaliencyNoiseBlend with the values of RULES[RECOMMENDED]
  region:          SaliencyNoiseBlend with the subject's half as a forced region; no saliency decides. It shows what
                   these two checkpoints can reach together; the results of the blends are also given relative to it.

`python run.py bench saliency_effect --rules` compares RULES, with other seeds than those of the reported images. The
rule with the most images with "placed", averaged over both evaluators, is RECOMMENDED.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import headless

headless.start()

import comfy.sample  # noqa: E402

from ...demo.autoencoder import CHANNELS  # noqa: E402
from ...demo.concepts import load_concepts, phrase  # noqa: E402
from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.saliency_noise_blend import SaliencyNoiseBlend  # noqa: E402
from ..recipes.lists import RELATIONS, load_held_out  # noqa: E402
from ..recipes.scenes import CELL, SIZE, Item, Scene, background, corner, paste, region_of  # noqa: E402
from ..recipes.sprites import Sprites  # noqa: E402
from ..statistics import paired_difference, proportion, ratio_of_means  # noqa: E402
from . import sampling  # noqa: E402
from .environment import publish, script_parser  # noqa: E402
from .evaluators import PairEvaluators, numbers_of  # noqa: E402

DOMAINS = {"expert-animals": "animal", "expert-food": "food"}
EXPERT_STYLE, BASE_STYLE = "flat", "glossy"
METRICS = {
    "subject": "subject in the expert's style",
    "scene": "both concepts",
    "both": "both, subject in style",
    "placed": "both, subject in style, placed as in the prompt",
}
BACKGROUNDS = ("blue", "green", "yellow", "pink", "grey")
EMOJI = 60  # side of an emoji in composed images, in pixels
LATENT = SIZE // CELL  # side of a latent
FIRST_SEED, FIRST_TUNING_SEED = 1000, 50_000
AREA = "area"  # stands for the mean area of a subject, as a share of the image
# inputs of the node. With mask_refresh 20 and 20 steps, the first mask that is computed is used in all later steps.
RULES: dict[str, dict[str, Any]] = {
    "own": {},
    "shared": {"saliency": "shared"},
    "own, momentum 0.8": {"mask_momentum": 0.8},
    "shared, momentum 0.8": {"saliency": "shared", "mask_momentum": 0.8},
    "own, share": {"expert_share": AREA},
    "own, start 0.1": {"start_percent": 0.1},
    "own, end 0.8": {"end_percent": 0.8},
    "own, first mask held": {"mask_refresh": 20},
    "own, mask held from 0.05": {"mask_refresh": 20, "start_percent": 0.05},
    "own, mask held from 0.1": {"mask_refresh": 20, "start_percent": 0.1},
    "own, mask held from 0.15": {"mask_refresh": 20, "start_percent": 0.15},
    "shared, mask held from 0.1": {"saliency": "shared", "mask_refresh": 20, "start_percent": 0.1},
}
RECOMMENDED = "own, mask held from 0.05"


class Task(NamedTuple):
    """An image to generate."""

    subject: str
    other: str
    relation: str
    color: str

    @property
    def prompt(self) -> str:
        return f"{phrase(self.subject)} {self.relation} {phrase(self.other)} on {self.color}"


def compositions(count: int, domain: str = "animal", shift: int = 0) -> list[Task]:
    """``count`` compositions of a subject of ``domain`` and another concept that no training saw together.

    Every pass through the pairs has other relations. ``shift`` changes relations and backgrounds.
    """
    domains = {c.name: c.domain for c in load_concepts()}
    pairs = [p for p in load_held_out()["pairs"] if (domains[p[0]] == domain) != (domains[p[1]] == domain)]
    order = np.random.default_rng(5).permutation(len(pairs))
    found = []
    for n in range(count):
        subject, other = sorted(pairs[order[n % len(pairs)]], key=lambda name: domains[name] != domain)
        turn = n + n // len(pairs) + shift
        found.append(Task(subject, other, RELATIONS[turn % 4], BACKGROUNDS[turn % 5]))
    return found


def pairs_of(tasks: Sequence[Task]) -> np.ndarray:
    """The number [N] of each task's pair, for intervals in which the images of a pair are resampled together."""
    names = [(task.subject, task.other) for task in tasks]
    return np.unique([" ".join(pair) for pair in names], return_inverse=True)[1]


def composed(tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Images [N, 128, 128, 3] in 0..1 composed of the emoji, and the coverage [N, 128, 128] of their subjects.

    Subjects are in the expert's style, the other concepts in the base's.
    """
    sprites = [Sprites(EXPERT_STYLE), Sprites(BASE_STYLE)]
    images, coverage = [], []
    for task in tasks:
        numbers = numbers_of([task.subject, task.other]).tolist()
        items = tuple(Item(number, "", EMOJI, (0.5, 0.5)) for number in numbers)
        scene = Scene(items, task.relation, (task.color,))
        canvas, covered = background(scene.colors, SIZE), np.zeros((SIZE, SIZE), np.float32)
        for n, (item, style) in enumerate(zip(items, sprites)):
            sprite, (x, y) = style.get(item.concept, "", EMOJI), corner(scene, n, SIZE)
            paste(canvas, sprite, x, y)
            if n == 0:
                covered[y : y + EMOJI, x : x + EMOJI] = sprite[..., 3] / 255
        images.append(canvas)
        coverage.append(covered)
    return torch.from_numpy(np.stack(images)).float() / 255, torch.from_numpy(np.stack(coverage))


def subject_halves(tasks: Sequence[Task]) -> Tensor:
    """Masks [N, 16, 16] of the halves in which the prompts place the subjects."""
    masks = torch.zeros(len(tasks), LATENT, LATENT)
    for mask, task in zip(masks, tasks):
        x0, y0, x1, y1 = region_of(task.relation, 0, LATENT)
        mask[y0:y1, x0:x1] = 1
    return masks


def encode(clip, texts: Sequence[str]):
    """One CONDITIONING with a row for each text."""
    return sampling.joined([sampling.encode(clip, text) for text in texts])


def noises(channels: int, seeds: range) -> Tensor:
    """Noise [B, channels, 16, 16], with a seed for each image."""
    make = torch.Generator
    return torch.cat([torch.randn(1, channels, LATENT, LATENT, generator=make().manual_seed(s)) for s in seeds])


def generate(model, positive, negative, noise, options) -> Tensor:
    return comfy.sample.sample(
        model,
        noise,
        options.steps,
        options.cfg,
        options.sampler,
        options.scheduler,
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )


def blend(general, expert, positive, negative, inputs: Mapping[str, Any]):
    """(MODEL, BLEND_TRACE) of SaliencyNoiseBlend with ``inputs``, and defaults for all other widgets."""
    schema = {
        i.id: i.default for i in SaliencyNoiseBlend.define_schema().inputs if getattr(i, "default", None) is not None
    }
    return SaliencyNoiseBlend.execute(
        general, expert, positive=positive, negative=negative, **{**schema, **inputs}
    ).args


class Found:
    """Hits of one way of generation, collected over the batches."""

    def __init__(self) -> None:
        self.hits: dict[str, dict[str, list[bool]]] = {}
        self.shares: list[float] = []  # of the expert in the blend's mask
        self.costs: list[float] = []  # evaluations of both models, relative to those of the base alone

    def add(self, measured: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        for evaluator, metrics in measured.items():
            mine = self.hits.setdefault(evaluator, {metric: [] for metric in METRICS})
            for metric, values in metrics.items():
                mine[metric] += values.tolist()

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        return {e: {m: np.array(v) for m, v in metrics.items()} for e, metrics in self.hits.items()}

    def table(self) -> dict[str, Any]:
        """{evaluator: {metric: share with its interval}}"""
        return {e: {m: proportion(v) for m, v in metrics.items()} for e, metrics in self.arrays().items()}

    def mean(self, metric: str) -> float:
        """The share of images with ``metric``, averaged over the evaluators."""
        return float(np.mean([metrics[metric].mean() for metrics in self.arrays().values()]))


class Experiment:
    """The two checkpoints of a blend, the evaluators, and the sampling options."""

    def __init__(self, expert: str, evaluators: PairEvaluators, options: Any) -> None:
        self.general, self.clip, self.vae = load_checkpoint("general")
        self.expert, self.evaluators, self.options = load_checkpoint(expert)[0], evaluators, options
        self.domain = DOMAINS[expert]

    @functools.cached_property
    def area(self) -> float:
        """The mean area of the domain's subjects, as a share of a composed image."""
        return round(float(composed(compositions(100, self.domain))[1].mean()), 2)

    def run(self, ways: Mapping[str, Mapping[str, Any] | None], tasks: Sequence[Task], seed: int) -> dict[str, Found]:
        """Generate all tasks in each of ``ways``, from the same noise: inputs of the blend, or None for the checkpoint
        of this name alone."""
        found = {name: Found() for name in ways}
        for start in range(0, len(tasks), self.options.batch):
            part = tasks[start : start + self.options.batch]
            noise = noises(CHANNELS, range(seed + start, seed + start + len(part)))
            for name, inputs in ways.items():
                images = self._images(name, inputs, part, noise, found[name])
                found[name].add(self.measure(images, part))
            print(f"{self.domain}: {start + len(part)} of {len(tasks)} images in {len(ways)} ways", flush=True)
        return found

    def measure(self, images: Tensor, tasks: Sequence[Task]) -> dict[str, dict[str, np.ndarray]]:
        subjects, others, relations, _ = zip(*tasks)
        return self.evaluators.measure(images, subjects, others, relations, EXPERT_STYLE)

    def _images(self, name: str, inputs: Any, tasks: Sequence[Task], noise: Tensor, found: Found) -> Tensor:
        positive = encode(self.clip, [task.prompt for task in tasks])
        negative = encode(self.clip, [""] * len(tasks))
        if inputs is None:
            model = {"general": self.general, "expert": self.expert}[name]
            return self.vae.decode(generate(model, positive, negative, noise, self.options))
        inputs = dict(inputs)
        if inputs.get("region_mode") == "force":
            inputs["region"] = subject_halves(tasks)
        if inputs.get("expert_share") == AREA:
            inputs["expert_share"] = self.area
        model, trace = blend(self.general, self.expert, positive, negative, inputs)
        images = self.vae.decode(generate(model, positive, negative, noise, self.options))
        found.shares += trace.record.mean_shares()[1].flatten(1).mean(1).tolist()
        found.costs.append(sum(trace.record.cost) / trace.record.cost[0])
        return images


def compare_rules(options: argparse.Namespace) -> None:
    """Measure RULES with seeds that are not reported, and write the result file."""
    experiment = Experiment(options.expert, PairEvaluators(), options)
    found = experiment.run(RULES, compositions(options.count, experiment.domain, shift=3), FIRST_TUNING_SEED)
    best = max(found, key=lambda name: found[name].mean("placed"))
    rules = {
        name: {
            "scores": f.table(),
            "placed": f.mean("placed"),
            "share": float(np.mean(f.shares)),
            "cost": float(np.mean(f.costs)),
        }
        for name, f in found.items()
    }
    results = {"settings": vars(options), "images": options.count, "area": experiment.area, "best": best}
    publish(
        options.name or "saliency_effect_rules", {**results, "rules": rules}, rule_markdown(rules, options.count, best)
    )


def report(experiment: Experiment, ways: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The reported results of one expert."""
    tasks = compositions(count, experiment.domain)
    found = experiment.run(ways, tasks, FIRST_SEED)
    limit, groups = Found(), pairs_of(tasks)
    for start in range(0, count, experiment.options.batch):
        part = tasks[start : start + experiment.options.batch]
        limit.add(experiment.measure(composed(part)[0], part))
    arrays = {name: f.arrays() for name, f in found.items()}
    evaluators = list(arrays["blend"])

    def compared(way: str, other: str, statistic: Any) -> dict[str, Any]:
        return {e: {m: statistic(arrays[way][e][m], arrays[other][e][m], groups) for m in METRICS} for e in evaluators}

    blends = [name for name, inputs in ways.items() if inputs is not None]
    chosen = [name for name in blends if name != "region"]
    return {
        "images": count,
        "pairs": len(set(groups.tolist())),
        "area": experiment.area,
        "scores": {name: f.table() for name, f in found.items()},
        "ceiling": {e: {m: v["share"] for m, v in metrics.items()} for e, metrics in limit.table().items()},
        "gains": {
            f"{way} - {other}": compared(way, other, paired_difference)
            for way in chosen
            for other in ("general", "expert")
        },
        "share of region": {way: compared(way, "region", share_of) for way in chosen},
        "expert_share": {
            n: {
                "mean": float(np.mean(found[n].shares)),
                "lowest": min(found[n].shares),
                "highest": max(found[n].shares),
            }
            for n in blends
        },
    }


def share_of(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> tuple[float, float, float] | None:
    """Ratio of the means and its interval; None if no image of ``b`` is a hit."""
    return ratio_of_means(a.astype(float), b.astype(float), groups) if b.any() else None


def parsed(text: str) -> int | float | str:
    """The value of a ``--blend`` option as int, float or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parser() -> argparse.ArgumentParser:
    found = script_parser(__doc__)
    found.add_argument("--rules", action="store_true", help="compare RULES, with other seeds")
    found.add_argument("--count", type=int, default=300, help="images of each way or rule")
    found.add_argument("--expert", choices=tuple(DOMAINS), default="expert-animals")
    found.add_argument("--steps", type=int, default=20)
    found.add_argument("--cfg", type=float, default=4.0)
    found.add_argument("--sampler", default="euler")
    found.add_argument("--scheduler", default="normal")
    found.add_argument("--batch", type=int, default=20, help="images per batch; affects the images only by rounding")
    found.add_argument(
        "--blend",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input of SaliencyNoiseBlend in the way 'blend'; may be repeated",
    )
    found.add_argument("--name", help="name of the result file")
    return found


def main() -> None:
    options = parser().parse_args()
    with torch.inference_mode():
        if options.rules:
            compare_rules(options)
            return
        inputs = {k: parsed(v) for k, v in (item.split("=", 1) for item in options.blend)}
        ways: dict[str, Any] = {
            "general": None,
            "expert": None,
            "blend": inputs,
            "recommended": RULES[RECOMMENDED],
            "region": {"region_mode": "force"},
        }
        if ways["recommended"] == inputs:
            del ways["recommended"]
        found = report(Experiment(options.expert, PairEvaluators(), options), ways, options.count)
    recommended = {"name": RECOMMENDED, "inputs": RULES[RECOMMENDED]}
    names = {"expert-animals": "saliency_effect", "expert-food": "saliency_effect_food"}
    publish(
        options.name or names[options.expert],
        {"settings": vars(options), "recommended": recommended, **found},
        markdown(options.expert, found),
    )


def percent(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['share']:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def rule_markdown(rules: Mapping[str, Any], count: int, best: str) -> str:
    lines = [f"| rule, {count} images | evaluator | {' | '.join(METRICS.values())} | expert's share | cost |"]
    lines.append("|---" * (len(METRICS) + 4) + "|")
    for name, row in rules.items():
        for evaluator, metrics in row["scores"].items():
            cells = " | ".join(percent(v) for v in metrics.values())
            lines.append(f"| {name} | {evaluator} | {cells} | {100 * row['share']:.0f} % | {row['cost']:.2f} |")
    return "\n".join([*lines, f"\nrecommended: {best}"])


def markdown(expert: str, found: Mapping[str, Any]) -> str:
    head = f"| {expert}, {found['images']} images of {found['pairs']} pairs, % | evaluator |"
    lines = [f"{head} {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 2) + "|"]
    for way, evaluators in found["scores"].items():
        for evaluator, metrics in evaluators.items():
            lines.append(f"| {way} | {evaluator} | {' | '.join(percent(v) for v in metrics.values())} |")
    for evaluator, metrics in found["ceiling"].items():
        cells = " | ".join(f"{100 * v:.1f}" for v in metrics.values())
        lines.append(f"| composed of the emoji (upper limit) | {evaluator} | {cells} |")
    for title, part, plus in (("", "gains", "+"), ("share of region: ", "share of region", "")):
        for name, evaluators in found[part].items():
            for evaluator, metrics in evaluators.items():
                cells = " | ".join(bounds(v, plus) for v in metrics.values())
                lines.append(f"| {title}{name} | {evaluator} | {cells} |")
    for way, share in found["expert_share"].items():
        lines.append(
            f"\nThe expert's share of the mask, {way}: mean {100 * share['mean']:.0f} %, {100 * share['lowest']:.0f} to"
            f" {100 * share['highest']:.0f} %."
        )
    return "\n".join(lines)


def bounds(figure: Sequence[float] | None, plus: str) -> str:
    if figure is None:
        return ""
    middle, low, high = (f"{100 * v:{plus}.1f}" for v in figure)
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
