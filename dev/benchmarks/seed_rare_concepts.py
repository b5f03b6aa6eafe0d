"""SeedSelect on the concepts that are least frequent in the training data of the general demo checkpoint.

Every concept has four unseen references, a bare prompt ("an owl") and groups of seeds. From each group, four ways
choose one noise each:

  random:   the noise of the group's first seed
  search:   the noise of the group's best seed, by successive halving
  optimise: optimised by the gradient, starting from the group's first seed
  both:     optimised by the gradient, starting from the seed that the search found

Two evaluators recognise the concept of an image. The score of SeedSelect uses the image-text encoder, so the encoder's
accuracy is biased. The classifier was trained independently on other renderings, and no score uses it.

Images are cached in a folder of .cache named after this script; delete it to generate them again.
"""

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
import torch

from .. import headless

headless.start()

import comfy.utils  # noqa: E402

from ...demo.concepts import load_concepts, load_frequency  # noqa: E402
from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.seed_select import run  # noqa: E402
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler  # noqa: E402
from ...techniques.seed_select.comfy_session import SessionSettings  # noqa: E402
from ...techniques.seed_select.optimize import OptimizeSettings  # noqa: E402
from ...techniques.seed_select.select import SeedSelect, SeedSelectSettings  # noqa: E402
from ..old_world.evaluate import save_rows  # noqa: E402
from ..recipes.state import write_whole  # noqa: E402
from ..statistics import mean_of_groups, paired_difference, ratio_of_means  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import Evaluators  # noqa: E402
from .fresh_process import in_fresh_process  # noqa: E402
from .generated_training import accuracies  # noqa: E402
from .seed_case import demo_models  # noqa: E402

NAME = Path(__file__).stem
IMAGE_CACHE = Path(__file__).parents[2] / ".cache" / NAME
BINS = ("rare", "medium", "frequent")
WAYS = ("random", "search", "optimise", "both")
EVALUATORS = ("classifier", "encoder")
ALL = 64  # number of seeds of the first group that are sampled with all steps
KS = (1, 2, 4, 8, 16, 32, 64)  # numbers of seeds for which the expected best score is computed
GROUP = 1000  # distance between the first seeds of two groups


@dataclass(frozen=True)
class Setting:
    """Settings of all images. They are part of the names of the cached files."""

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


class Generator:
    """Generates images of one concept."""

    def __init__(self, setting: Setting, concept: str):
        self.setting, self.models = setting, demo_models(concept)

    def sampler(self, seed: int) -> ComfySeedSampler:
        s = self.setting
        widgets = dict(steps=s.steps, cfg=s.cfg, sampler_name=s.sampler, scheduler=s.scheduler, seed=seed)
        return self.models.sampler(64, **widgets)

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
        """Latents and scores of ``count`` seeds, sampled with all steps."""
        sampler = self.sampler(seed)
        noise = torch.cat([sampler.noise_of(seed + k) for k in range(count)])
        latents = torch.cat([sampler.generate(part, seeds=[seed] * len(part)) for part in noise.split(16)])
        scores = torch.cat([sampler.score([part]) for part in latents.split(16)])
        return {"latents": latents, "scores": scores.tolist(), "evaluations": count * self.setting.steps}


def result(image, evaluations: int) -> dict:
    return {"latents": image.latent, "scores": [image.score], "evaluations": evaluations}


def generate(setting: dict, concept: str, group: int, ways: list[str]) -> None:
    """Generate the missing images of one group. Called in a new process with one thread."""
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    setting, seed, generator = Setting(**setting), GROUP * (group + 1), None
    with torch.inference_mode():
        for way in ways:
            file = image_file(setting, concept, group, way)
            if file.exists():
                continue
            generator = generator or Generator(setting, concept)
            if way == "random":
                found = {way: generator.in_full(seed, 1)}
            elif way == "all":
                found = {way: generator.in_full(seed, ALL)}
            elif way == "optimise":
                select = generator.select("optimize", seed)
                found = {way: result(select.best, select.evaluations)}
            else:  # a run of "both" contains the search
                select = generator.select("search" if way == "search" else "search+optimize", seed)
                found = {"search": result(select.search.best, select.search.evaluations)}
                if way == "both":
                    found[way] = result(select.best, select.evaluations)
            for name, values in found.items():
                write_whole(image_file(setting, concept, group, name), functools.partial(torch.save, values))


def generate_groups(setting: dict, jobs: list) -> None:
    for concept, group, ways in jobs:
        generate(setting, concept, group, ways)


def image_file(setting: Setting, concept: str, group: int, way: str) -> Path:
    return IMAGE_CACHE / setting.name / f"{concept}-{group}-{way}.pt"


def generate_all(setting: Setting, plan: dict, workers: int) -> None:
    """Generate all missing images of ``plan``, {(concept, group): ways}."""
    jobs = [
        (concept, group, [w for w in ways if not image_file(setting, concept, group, w).exists()])
        for (concept, group), ways in plan.items()
    ]
    jobs = [job for job in jobs if job[2]]
    # a process takes a while to start, so it runs several jobs: few slow ones or many quick ones
    slow, quick = ([job for job in jobs if ("both" in job[2]) is is_slow] for is_slow in (True, False))
    parts = [slow[i : i + 8] for i in range(0, len(slow), 8)] + [quick[i : i + 66] for i in range(0, len(quick), 66)]
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda part: in_fresh_process(generate_groups, dataclasses.asdict(setting), part), parts):
            done += 1
            print(f"generated {done} of {len(parts)} parts", flush=True)


def share(hits: np.ndarray, groups: np.ndarray) -> dict:
    mean, low, high = mean_of_groups(hits, groups)
    return {"share": mean, "interval": [low, high], "pictures": len(hits)}


def measure(setting: Setting, plan: dict) -> tuple[dict, dict]:
    """The table, and {way: images of the rare concepts [concepts, groups, 64, 64, 3]}."""
    bins, numbers, table, rare = load_frequency()["bin"], {s.name: n for n, s in enumerate(load_concepts())}, {}, {}
    evaluators, (_, _, vae) = Evaluators(), load_checkpoint("general")
    for name in BINS:
        found = {}
        for way in WAYS:
            cells = [
                (concept, group) for (concept, group), ways in plan.items() if bins[concept] == name and way in ways
            ]
            if not cells:
                continue
            made = [torch.load(image_file(setting, *cell, way), weights_only=True) for cell in cells]
            images = torch.cat([vae.decode(part) for part in torch.cat([m["latents"] for m in made]).split(64)])
            concepts, groups = [c[0] for c in cells], np.unique([c[0] for c in cells], return_inverse=True)[1]
            right = evaluators.measure(images, torch.tensor([numbers[concept] for concept in concepts]))
            found[way] = {
                **{evaluator: share(right[evaluator], groups) for evaluator in EVALUATORS},
                "score": float(np.mean([m["scores"][0] for m in made])),
                "evaluations": float(np.mean([m["evaluations"] for m in made])),
                "hits": right,
                "groups": groups,
            }
            if name == "rare":
                rare[way] = images.unflatten(0, (-1, len(set(concepts)))).transpose(0, 1)  # cells are ordered by group
        table[name] = found
    return table, rare


def gains(table: dict) -> dict:
    """Gains in accuracy over random seeds, on rare concepts."""
    rare, out = table["rare"], {}
    for way in WAYS[1:]:
        if way in rare:
            out[f"{way} - random"] = {
                name: paired_difference(rare[way]["hits"][name], rare["random"]["hits"][name], rare[way]["groups"])
                for name in EVALUATORS
            }
    return out


def against_best_of_all(setting: Setting, concepts: list[str]) -> dict:
    """Scores of each way in the first group, compared with the best of this group's seeds sampled with all steps."""
    everything = [torch.load(image_file(setting, concept, 0, "all"), weights_only=True) for concept in concepts]
    scores = np.sort([e["scores"] for e in everything])  # [concepts, ALL]
    mean, best, index = scores.mean(1), scores[:, 0], np.arange(len(concepts))
    found = {}
    for way in WAYS[1:]:
        made = [torch.load(image_file(setting, concept, 0, way), weights_only=True) for concept in concepts]
        own = np.array([m["scores"][0] for m in made])
        evaluations = float(np.mean([m["evaluations"] for m in made]))
        found[way] = {
            "score": float(own.mean()),
            "evaluations": evaluations,
            "of all in full": evaluations / everything[0]["evaluations"],
            "of the way from the mean to the best of all": ratio_of_means(mean - own, mean - best, index),
        }
    # expected best score of k of the seeds, chosen without replacement
    expected = {k: sum(scores[:, i] * comb(ALL - 1 - i, k - 1) for i in range(ALL - k + 1)) / comb(ALL, k) for k in KS}
    return {**found, "best of k in full": {k: float(v.mean()) for k, v in expected.items()}}


def sheet(images: dict, file: Path, rows: int = 8) -> None:
    """Save a sheet with a row for every fourth rare concept.

    From left, a row has the images by random seeds, search, optimisation and both.
    """
    gap, chosen = torch.ones(64, 8, 3), range(0, len(next(iter(images.values()))), 4)[:rows]
    ways = [way for way in WAYS if way in images]
    save_rows([[part for way in ways for part in (*images[way][concept], gap)] for concept in chosen], file)


def markdown(table: dict) -> str:
    lines = [
        "| concepts | noise by | accuracy, classifier (95 %) | accuracy, encoder (95 %) | score | evaluations |",
        "|---" * 6 + "|",
    ]
    for name, ways in table.items():
        for way, row in ways.items():
            cells = [
                f"{100 * row[j]['share']:.1f} % ({100 * row[j]['interval'][0]:.0f}-{100 * row[j]['interval'][1]:.0f})"
                for j in EVALUATORS
            ]
            lines.append(f"| {name} | {way} | {' | '.join(cells)} | {row['score']:.2f} | {row['evaluations']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="number of groups, i.e. images of every concept and way")
    parser.add_argument(
        "--searches",
        type=int,
        default=4,
        help="number of groups of medium and frequent concepts that are also searched",
    )
    parser.add_argument("--concepts", type=int, help="concepts of each bin (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each")
    parser.add_argument("--generate-only", action="store_true", help="do not evaluate")
    for field in dataclasses.fields(Setting):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    parser.add_argument("--name", default=NAME, help="name of the result files")
    options = parser.parse_args()
    setting = Setting(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Setting)})

    of_bin = {
        b: [s.name for s in load_concepts() if load_frequency()["bin"][s.name] == b][: options.concepts] for b in BINS
    }
    # group by group, so that after an interruption all concepts have about equally many images
    plan = {}
    for group in range(options.seeds):
        for concept in of_bin["rare"]:
            plan[concept, group] = ["random", "both", "search", "optimise", *(["all"] if group == 0 else [])]
    for group in range(options.seeds):
        for concept in (*of_bin["medium"], *of_bin["frequent"]):
            plan[concept, group] = ["random", *(["search"] if group < options.searches else [])]
    generate_all(setting, plan, options.workers)
    if options.generate_only:
        return

    with torch.inference_mode():
        table, images = measure(setting, plan)
        found = {"gains": gains(table), "best of all": against_best_of_all(setting, of_bin["rare"])}
        sheet(images, RESULTS / f"{options.name}.png")
    found["classifiers"] = accuracies(images, of_bin["rare"])
    rows = {
        b: {w: {k: v for k, v in row.items() if k not in ("hits", "groups")} for w, row in ways.items()}
        for b, ways in table.items()
    }
    text = f"{markdown(table)}\n{json.dumps(found, indent=1)}"
    publish(options.name, {"settings": vars(options), "table": rows, **found}, text)


if __name__ == "__main__":
    main()
