"""What do short runs tell of whole ones? SeedSelect's search compares seeds after a few steps; this asks how well that
order is the order after all steps, by number of steps and scheduler.

For some rare signs 64 seeds are painted in full and with few steps, and scored against the references as the search does.
1 is the same order, 0 is chance (Spearman's rank correlation, mean over signs, 95 % bootstrap interval).
"""

import argparse
import dataclasses

import numpy as np
import torch
from scipy.stats import spearmanr

from .. import headless

headless.start()

import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402

from ...demo.signs import load_bins, load_signs  # noqa: E402
from ..statistics import mean_of_groups  # noqa: E402
from . import seed_rare_signs  # noqa: E402
from .environment import facts, keep  # noqa: E402

SCHEDULERS = ("normal", "karras", "simple", "beta")


def likeness(sign: str, seeds: int, steps: list[int]) -> dict[tuple[str, int], float]:
    painter = seed_rare_signs.Painter(seed_rare_signs.Setting(), sign)
    sampler = painter.sampler(seed_rare_signs.GROUP)
    noise = torch.cat([sampler.noise_of(seed_rare_signs.GROUP + k) for k in range(seeds)])
    sampling = sampler.model.get_model_object("model_sampling")

    def scores(scheduler: str, number: int) -> list[float]:
        sampler.sigmas = lambda *_: comfy.samplers.calculate_sigmas(sampling, scheduler, number)
        latents = [sampler.generate(part, number, [0] * len(part)) for part in noise.split(16)]
        return torch.cat([sampler.score([part]) for part in latents]).tolist()

    full = scores(painter.setting.scheduler, painter.setting.steps)
    return {
        (scheduler, number): float(spearmanr(scores(scheduler, number), full).statistic)
        for scheduler in SCHEDULERS
        for number in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--name", default="seed_ranking", help="of the result file")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    rare = [s.name for s in load_signs() if load_bins()["bin"][s.name] == "rare"][:: max(1, 32 // options.signs)]
    found = {}
    with torch.inference_mode():
        for sign in rare[: options.signs]:
            found[sign] = likeness(sign, options.seeds, options.steps)
            print(f"{len(found)} of {options.signs} signs", flush=True)
    table = {}
    for scheduler in SCHEDULERS:
        for steps in options.steps:
            values = np.array([row[scheduler, steps] for row in found.values()])
            table.setdefault(scheduler, {})[steps] = mean_of_groups(values, np.arange(len(values)))
    path = keep(
        options.name,
        {
            "settings": vars(options) | {"sampling": dataclasses.asdict(seed_rare_signs.Setting())},
            "signs": list(found),
            "rank correlation": table,
        },
    )
    print("| scheduler of the short run |", " | ".join(f"{n} steps" for n in options.steps), "|")
    print("|---" * (len(options.steps) + 1) + "|")
    for scheduler, row in table.items():
        cells = [f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in row.values()]
        print(f"| {scheduler} | {' | '.join(cells)} |")
    print(f"\n{facts()['device']}; kept in {path.name}")


if __name__ == "__main__":
    main()
