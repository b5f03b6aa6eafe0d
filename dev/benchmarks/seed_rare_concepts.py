"""SeedSelect on the concepts that are least frequent in the training data of the general demo checkpoint.

With 20 steps, the checkpoint draws every concept recognisably from nearly every seed, so a search for seeds has nothing
to win there. With 3 steps, it fails more often on rare concepts than on frequent ones. Every concept has four
references that no training used, a bare prompt ("an owl") and groups of seeds. From each group, four ways choose one
noise each, which is sampled with few steps:

  random:   the noise of the group's first seed
  search:   the noise of the group's best seed
  optimise: optimised by the gradient, starting from the group's first seed
  both:     optimised by the gradient, starting from the seed that the search found

For comparison, "20 steps" samples the noise of the group's first seed with 20 steps.

Three evaluators recognise the concept of an image. The score of SeedSelect uses the image-text encoder, so the encoder's
accuracy is biased. The classifier and template matching are independent of it. "likeness" is the share of the image's
contents that the emoji explains, by template matching (0 if the image is nearer to the plain background).

Images are cached in a folder of .cache named after this script; delete it to generate them again.
"""

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .. import headless

headless.start()

import comfy.utils  # noqa: E402

from ...demo.concepts import STYLES, load_concepts, load_frequency  # noqa: E402
from ...demo.modules import load_checkpoint  # noqa: E402
from ...nodes.seed_select import run  # noqa: E402
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler  # noqa: E402
from ...techniques.seed_select.comfy_session import SessionSettings  # noqa: E402
from ...techniques.seed_select.optimize import OptimizeSettings  # noqa: E402
from ...techniques.seed_select.select import SeedSelect, SeedSelectSettings  # noqa: E402
from ..recipes.scenes import SIZE  # noqa: E402
from ..recipes.state import write_whole  # noqa: E402
from ..statistics import RESAMPLES, group_means, mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import Evaluators, Templates  # noqa: E402
from .fresh_process import in_fresh_process  # noqa: E402
from .generated_training import accuracies  # noqa: E402
from .sampling import save_rows  # noqa: E402
from .seed_case import demo_models  # noqa: E402

NAME = Path(__file__).stem
IMAGE_CACHE = Path(__file__).parents[2] / ".cache" / NAME
BINS = ("rare", "medium", "frequent")
WAYS = ("random", "search", "optimise", "both", "20 steps")
SEARCHED = WAYS[1:4]
EVALUATORS = ("classifier", "templates", "encoder")
STYLE = STYLES.index("glossy")  # the style of the checkpoint
GROUP = 1000  # distance between the first seeds of two groups


@dataclass(frozen=True)
class Setting:
    """Settings of all images. They are part of the names of the cached files."""

    steps: int = 3
    more_steps: int = 20
    cfg: float = 4.0
    sampler: str = "euler"
    scheduler: str = "normal"
    candidates: int = 16
    first_steps: int = 3  # all steps, so that the search samples every candidate as the image is sampled
    iterations: int = 6
    learning_rate: float = 0.1

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in dataclasses.astuple(self))


class Generator:
    """Generates images of one concept."""

    def __init__(self, setting: Setting, concept: str):
        self.setting, self.models = setting, demo_models(concept)

    def sampler(self, seed: int, steps: int | None = None) -> ComfySeedSampler:
        s = self.setting
        widgets = dict(steps=steps or s.steps, cfg=s.cfg, sampler_name=s.sampler, scheduler=s.scheduler, seed=seed)
        return self.models.sampler(SIZE, **widgets)

    def select(self, mode: str, seed: int) -> SeedSelect:
        s, sampler = self.setting, self.sampler(seed)
        optimize = OptimizeSettings(iterations=s.iterations, learning_rate=s.learning_rate)
        search = dict(candidates=s.candidates, steps=s.steps, first_steps=s.first_steps)
        settings = SeedSelectSettings(mode=mode, seed=seed, **search, optimize=optimize)
        if settings.optimizes:
            sampler.allow_gradients(SessionSettings(sampler=s.sampler, seed=seed))
        select = SeedSelect(settings, sampler)
        run(select, sampler)
        return select

    def plain(self, seed: int, steps: int) -> dict:
        """The latent and the score of a seed."""
        sampler = self.sampler(seed, steps)
        latents = sampler.generate(sampler.noise_of(seed), seeds=[seed])
        return {"latents": latents, "scores": sampler.score([latents]).tolist(), "evaluations": steps}


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
            if way in ("random", "20 steps"):
                found = {way: generator.plain(seed, setting.steps if way == "random" else setting.more_steps)}
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


class ImageEvaluators:
    """The three evaluators of images with one concept."""

    def __init__(self):
        self.evaluators, self.templates = Evaluators(), Templates("alone")

    def measure(self, images: torch.Tensor, concepts: torch.Tensor) -> dict[str, np.ndarray]:
        """Hits of EVALUATORS, and the likeness, of images [N, 128, 128, 3] in 0..1."""
        found, matches = self.evaluators.measure(images, concepts), self.templates.match(images)
        likeness = matches.explained[:, 0, STYLE].gather(1, concepts[:, None])[:, 0]
        hits = {name: found[name] for name in ("classifier", "encoder")}
        right = matches.concepts()[:, 0] == concepts
        return {**hits, "templates": right.double().numpy(), "likeness": likeness.clamp(min=0).double().numpy()}


def measure(setting: Setting, plan: dict) -> tuple[dict, dict]:
    """The table, and {way: images of the rare concepts [concepts, groups, 128, 128, 3]}."""
    bins, numbers, table, rare = load_frequency()["bin"], {s.name: n for n, s in enumerate(load_concepts())}, {}, {}
    evaluators, (_, _, vae) = ImageEvaluators(), load_checkpoint("general")
    for name in BINS:
        table[name] = {}
        for way in WAYS:
            cells = [(c, group) for (c, group), ways in plan.items() if bins[c] == name and way in ways]
            if not cells:
                continue
            made = [torch.load(image_file(setting, *cell, way), weights_only=True) for cell in cells]
            images = torch.cat([vae.decode(part) for part in torch.cat([m["latents"] for m in made]).split(64)])
            concepts, groups = [c[0] for c in cells], np.unique([c[0] for c in cells], return_inverse=True)[1]
            found = evaluators.measure(images, torch.tensor([numbers[concept] for concept in concepts]))
            table[name][way] = {
                **{evaluator: share(found[evaluator], groups) for evaluator in EVALUATORS},
                "likeness": mean_of_groups(found["likeness"], groups),
                "score": float(np.mean([m["scores"][0] for m in made])),
                "evaluations": float(np.mean([m["evaluations"] for m in made])),
                "hits": found,
                "groups": groups,
            }
            if name == "rare":
                rare[way] = images.unflatten(0, (-1, len(set(concepts)))).transpose(0, 1)  # cells are ordered by group
    return table, rare


def gains(table: dict) -> dict:
    """Gains over random seeds on rare concepts, and differences from frequent concepts with random seeds."""
    rare, out = table["rare"], {}
    frequent = table["frequent"]["random"]
    for way in SEARCHED:
        hits, groups = rare[way]["hits"], rare[way]["groups"]
        # rows are ordered by group, so the first rows of all ways are of the same cells
        plain = {name: rare["random"]["hits"][name][: len(groups)] for name in (*EVALUATORS, "likeness")}
        out[f"{way} - random"] = {name: paired_difference(hits[name], plain[name], groups) for name in plain}
    for way in ("random", *SEARCHED):
        out[f"rare, {way} - frequent, random"] = {
            name: unpaired_difference(rare[way], frequent, name) for name in (*EVALUATORS, "likeness")
        }
    return out


def unpaired_difference(a: dict, b: dict, name: str) -> tuple[float, float, float]:
    """Difference of the means of two rows of the table, with its 95 % bootstrap interval over the concepts."""
    one, other = (group_means(row["hits"][name], row["groups"]) for row in (a, b))
    rng = np.random.default_rng(0)
    drawn = [rng.choice(v, (RESAMPLES, len(v))).mean(1) for v in (one, other)]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return float(one.mean() - other.mean()), float(low), float(high)


def sheet(images: dict, file: Path, rows: int = 8) -> None:
    """Save a sheet with a row for every fourth rare concept.

    From left, a row has the images of each of WAYS.
    """
    gap, chosen = torch.ones(SIZE, 8, 3), range(0, len(next(iter(images.values()))), 4)[:rows]
    ways = [way for way in WAYS if way in images]
    save_rows([[part for way in ways for part in (*images[way][concept], gap)] for concept in chosen], file)


def markdown(table: dict) -> str:
    titles = [
        "concepts",
        "noise by",
        *(f"accuracy, {e} (95 %)" for e in EVALUATORS),
        "likeness",
        "score",
        "evaluations",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, ways in table.items():
        for way, row in ways.items():
            cells = [
                f"{100 * row[j]['share']:.1f} % ({100 * row[j]['interval'][0]:.0f}-{100 * row[j]['interval'][1]:.0f})"
                for j in EVALUATORS
            ]
            cells.append("{:.3f} ({:.3f}-{:.3f})".format(*row["likeness"]))
            lines.append(f"| {name} | {way} | {' | '.join(cells)} | {row['score']:.2f} | {row['evaluations']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of groups, i.e. images of every concept and way")
    parser.add_argument(
        "--searches",
        type=int,
        default=1,
        help="number of groups of medium and frequent concepts that are also searched",
    )
    parser.add_argument("--optimised", type=int, default=1, help="number of groups of rare concepts that are optimised")
    parser.add_argument("--concepts", type=int, help="concepts of each bin (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--training", action="store_true", help="also train classifiers on the generated images")
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
            optimised = ["both", "optimise"] if group < options.optimised else []
            plan[concept, group] = ["random", "20 steps", *optimised, "search"]
    for group in range(options.seeds):
        for concept in (*of_bin["medium"], *of_bin["frequent"]):
            plan[concept, group] = ["random", "20 steps", *(["search"] if group < options.searches else [])]
    generate_all(setting, plan, options.workers)
    if options.generate_only:
        return

    with torch.inference_mode():
        table, images = measure(setting, plan)
        found = {"gains": gains(table)}
        sheet(images, RESULTS / f"{options.name}.png")
    if options.training:
        found["classifiers"] = accuracies(images, of_bin["rare"])
    rows = {
        b: {w: {k: v for k, v in row.items() if k not in ("hits", "groups")} for w, row in ways.items()}
        for b, ways in table.items()
    }
    text = f"{markdown(table)}\n{json.dumps(found, indent=1)}"
    publish(options.name, {"settings": vars(options), "table": rows, **found}, text)


if __name__ == "__main__":
    main()
