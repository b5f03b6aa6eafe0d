"""Rank correlation between short and full runs.

SeedSelect's search compares seeds by short runs with few steps. This script measures how well their order agrees with
the order by full runs, for several numbers of steps and schedulers. For some rare concepts, the same seeds are sampled with
all steps and with few steps, and scored against the references as in the search. The result is Spearman's rank
correlation (1: same order, 0: chance), as a mean over concepts with a 95 % bootstrap interval.
"""

import dataclasses

import numpy as np
import torch
from scipy.stats import spearmanr

from .. import headless

headless.start()

import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo.concepts import load_concepts, load_frequency  # noqa: E402
from ..statistics import mean_of_groups  # noqa: E402
from . import seed_rare_concepts as rare_concepts  # noqa: E402
from .environment import publish, script_parser  # noqa: E402

SETTING = rare_concepts.Setting(steps=20)
SCHEDULERS = ("normal", "karras", "simple", "beta")


def rank_correlations(concept: str, seeds: int, steps: list[int]) -> dict[tuple[str, int], float]:
    generator = rare_concepts.Generator(SETTING, concept)
    sampler = generator.sampler(rare_concepts.GROUP)
    noise = torch.cat([sampler.noise_of(rare_concepts.GROUP + k) for k in range(seeds)])
    sampling = sampler.model.get_model_object("model_sampling")

    def scores(scheduler: str, number: int) -> list[float]:
        sampler.sigmas = lambda *_: comfy.samplers.calculate_sigmas(sampling, scheduler, number)
        latents = [sampler.generate(part, number, [0] * len(part)) for part in noise.split(16)]
        return torch.cat([sampler.score([part]) for part in latents]).tolist()

    full = scores(generator.setting.scheduler, generator.setting.steps)
    return {
        (scheduler, number): float(spearmanr(scores(scheduler, number), full).statistic)
        for scheduler in SCHEDULERS
        for number in steps
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--concepts", type=int, default=6, help="number of concepts")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--name", default="seed_ranking", help="name of the result file")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    rare = [s.name for s in load_concepts() if load_frequency()["bin"][s.name] == "rare"][
        :: max(1, 32 // options.concepts)
    ]
    found = {}
    with torch.inference_mode():
        for concept in rare[: options.concepts]:
            found[concept] = rank_correlations(concept, options.seeds, options.steps)
            print(f"{len(found)} of {options.concepts} concepts", flush=True)
    table = {}
    for scheduler in SCHEDULERS:
        for steps in options.steps:
            values = np.array([row[scheduler, steps] for row in found.values()])
            table.setdefault(scheduler, {})[steps] = mean_of_groups(values, np.arange(len(values)))
    lines = [f"| scheduler of the short run | {' | '.join(f'{n} steps' for n in options.steps)} |"]
    lines.append("|---" * (len(options.steps) + 1) + "|")
    for scheduler, row in table.items():
        cells = [f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in row.values()]
        lines.append(f"| {scheduler} | {' | '.join(cells)} |")
    settings = vars(options) | {"sampling": dataclasses.asdict(SETTING)}
    results = dict(settings=settings, concepts=list(found)) | {"rank correlation": table}
    publish(options.name, results, "\n".join(lines))


if __name__ == "__main__":
    main()
