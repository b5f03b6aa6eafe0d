"""SeedMap: do the marked patches of a found noise carry the concept, and does the noise help neighbouring prompts?

For each rare concept, a search finds the best of 16 seeds with few steps, as in seed_rare_concepts. SeedMap measures the
4 x 4 patches of its noise, from two numbers of pairs. For comparison, another map is the mean of |dscore / dnoise| in each
patch, from one backward pass. In noises that no map has seen, half of the patches then keep the found noise:

  marked half:   the patches with the highest values
  random half:   patches chosen at random, the mean of several choices
  other half:    the patches with the lowest values

"none" keeps none. For the neighbouring prompts, the found noise is compared with random seeds under the concept's own
prompt, with words for the background, with a second concept, and for another concept of the same domain
(with that concept's references). Scores are distances to the references: lower is better. The classifier and the template
matching do not take part in the score.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import headless

headless.start()

import comfy.utils  # noqa: E402

from ...demo.concepts import load_concepts, load_frequency, phrase  # noqa: E402
from ...demo.modules import load_checkpoint  # noqa: E402
from ...techniques.seed_select.comfy_sampler import ComfySeedSampler  # noqa: E402
from ...techniques.seed_select.comfy_seed_map import patch_numbers  # noqa: E402
from ...techniques.seed_select.comfy_session import OpenSession, SessionSettings  # noqa: E402
from ...techniques.seed_select.noise_patches import Patches, SeedMap, SeedMapSettings  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import publish, script_parser  # noqa: E402
from .evaluators import numbers_of  # noqa: E402
from .sampling import encode  # noqa: E402
from .seed_case import demo_models  # noqa: E402
from .seed_rare_concepts import GROUP, ImageEvaluators  # noqa: E402

STEPS, CFG, CANDIDATES, PIXELS = 3, 4.0, 16, 128
PAIRS, SIDE = (24, 96), 4  # SeedMap's pairs, and patches along a side
GRADIENT = "gradient"
MAPS = (*(f"{pairs} pairs" for pairs in PAIRS), GRADIENT)
CHOICES = 4  # random halves
FIRST_OTHER, FIRST_TEST = 5 * GROUP, 6 * GROUP  # first seeds of the noises that are exchanged, and of the tests
SECOND = "pizza"  # the second concept of a neighbouring prompt
MEASURES = ("score", "classifier", "templates")


class Concept:
    """The found noise of one concept, and what is generated from it."""

    def __init__(self, name: str, tests: int, evaluators: ImageEvaluators) -> None:
        self.name, self.evaluators = name, evaluators
        self.sampler = self._sampler(name)
        self.sampler.allow_gradients(SessionSettings(sampler="euler"))
        seeds = torch.cat([self.sampler.noise_of(seed) for seed in range(GROUP, GROUP + CANDIDATES)])
        self.found = seeds[int(self._scores(self.sampler, seeds).argmin())][None]
        self.tests = [self.sampler.noise_of(FIRST_TEST + k) for k in range(tests)]
        self.grid = Patches.of(*self.found.shape[-2:], SIDE)

    @staticmethod
    def _sampler(name: str, prompt: str = "") -> ComfySeedSampler:
        models = demo_models(name)
        if prompt:
            models = replace(models, prompts=(encode(load_checkpoint("general")[1], prompt), models.prompts[1]))
        return models.sampler(PIXELS, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="normal", seed=0)

    @staticmethod
    def _scores(sampler: ComfySeedSampler, noises: Tensor) -> np.ndarray:
        latents = sampler.generate(noises, seeds=[0] * len(noises))
        return sampler.score([latents]).double().numpy()

    def measure(self, sampler: ComfySeedSampler, noises: Sequence[Tensor], name: str) -> dict[str, np.ndarray]:
        """MEASURES of the images of ``noises`` with the concept ``name``."""
        latents = sampler.generate(torch.cat([*noises]), seeds=[0] * len(noises))
        hits = self.evaluators.measure(sampler.decode(latents), numbers_of([name] * len(noises)))
        return {"score": sampler.score([latents]).double().numpy(), **{m: hits[m] for m in MEASURES[1:]}}

    def map(self, pairs: int) -> SeedMap:
        settings = SeedMapSettings(pairs=pairs, checks=0, seed=FIRST_OTHER, steps=STEPS)
        found = SeedMap(settings, self.sampler, self.found, patch_numbers(self.sampler.layout, self.grid), self.grid)
        found.run()
        return found

    def by_gradient(self) -> Tensor:
        """Booleans [P]: the half of the patches in which the gradient of the score is largest."""

        def gradient(session: OpenSession) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                noise = self.found.clone().requires_grad_(True)
                session.score(session.unroll(noise)).sum().backward()
            assert noise.grad is not None
            return noise.grad

        assert self.sampler.gradients is not None  # the constructor has allowed them
        sizes = self.sampler.gradients.run(gradient).abs().sum((0, 1)).flatten()
        sums = torch.zeros(self.grid.count).index_add_(0, self.grid.numbers().flatten(), sizes)
        return sums >= sums.sort().values[self.grid.count // 2]

    def halves(self) -> dict[str, dict[str, float]]:
        """Means of MEASURES over the test noises, by what is kept."""
        maps = [self.map(pairs) for pairs in PAIRS]
        marked = dict(zip(MAPS, [*(found.marked for found in maps), self.by_gradient()], strict=True))
        kept = {"none": [torch.zeros(self.grid.count, dtype=torch.bool)]}
        rng = np.random.default_rng(0)
        kept["random half"] = [
            torch.from_numpy(rng.permutation(self.grid.count) < self.grid.count // 2) for _ in range(CHOICES)
        ]
        for name, half in marked.items():
            kept |= {f"{name}: marked half": [half], f"{name}: other half": [~half]}
        rows = {}
        for name, choices in kept.items():
            found = [
                self.measure(self.sampler, [maps[0].mixed(choice, test) for test in self.tests], self.name)
                for choice in choices
            ]
            rows[name] = {m: float(np.mean([f[m] for f in found])) for m in MEASURES}
        rows["found noise"] = {m: float(v[0]) for m, v in self.measure(self.sampler, [self.found], self.name).items()}
        return rows

    def neighbours(self, neighbour: str) -> dict[str, dict[str, dict[str, float]]]:
        """Means of MEASURES of the found noise and of the test noises, by the prompt."""
        prompts = {
            "the concept's prompt": (self.name, ""),
            "with a background": (self.name, f"{phrase(self.name)} on green"),
            "with a second concept": (self.name, f"{phrase(self.name)} left of {phrase(SECOND)}"),
            "another concept of the domain": (neighbour, ""),
        }
        rows = {}
        for label, (name, prompt) in prompts.items():
            sampler = self.sampler if label == "the concept's prompt" else self._sampler(name, prompt)
            ways = {"found noise": [self.found], "random seeds": self.tests}
            rows[label] = {
                way: {m: float(v.mean()) for m, v in self.measure(sampler, noises, name).items()}
                for way, noises in ways.items()
            }
        return rows


def neighbour_of(name: str, rare: Sequence[str]) -> str:
    """The next rare concept of the same domain, or the next of any domain."""
    domains = {c.name: c.domain for c in load_concepts()}
    later = [*rare[rare.index(name) + 1 :], *rare[: rare.index(name)]]
    return next((n for n in later if domains[n] == domains[name]), later[0])


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    return mean_of_groups(np.array(values), np.arange(len(values)))


def difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    return paired_difference(np.array(a), np.array(b), np.arange(len(a)))


def summary(per_concept: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the concepts and paired differences, with 95 % intervals bootstrapped over the concepts."""

    def column(table: str, *keys: str) -> list[float]:
        found = []
        for row in per_concept:
            value = row[table]
            for key in keys:
                value = value[key]
            found.append(value)
        return found

    halves = partial(column, "halves")
    kept = list(per_concept[0]["halves"])
    means = {name: {m: interval(halves(name, m)) for m in MEASURES} for name in kept}
    gains = {}
    for source in MAPS:
        for other in ("random half", f"{source}: other half", "none"):
            name = f"{source}: marked half"
            gains[f"{name} - {other}"] = {m: difference(halves(name, m), halves(other, m)) for m in MEASURES}
    prompts = {}
    for label in per_concept[0]["neighbours"]:
        found, plain = (
            {m: column("neighbours", label, way, m) for m in MEASURES} for way in ("found noise", "random seeds")
        )
        prompts[label] = {
            "found noise": {m: interval(found[m]) for m in MEASURES},
            "random seeds": {m: interval(plain[m]) for m in MEASURES},
            "difference": {m: difference(found[m], plain[m]) for m in MEASURES},
        }
    return {"kept": means, "gains": gains, "prompts": prompts}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--concepts", type=int, help="number of rare concepts (default: all)")
    parser.add_argument("--tests", type=int, default=8, help="noises in which the halves are tried")
    parser.add_argument("--name", default="seed_map", help="name of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    frequency, evaluators = load_frequency(), ImageEvaluators()
    rare = sorted((n for n, b in frequency["bin"].items() if b == "rare"), key=lambda n: -frequency["rank"][n])
    per_concept = []
    with torch.inference_mode():
        for name in rare[: options.concepts]:
            concept = Concept(name, options.tests, evaluators)
            row = {"halves": concept.halves(), "neighbours": concept.neighbours(neighbour_of(name, rare))}
            per_concept.append({"concept": name, **row})
            shown = {k: round(v["score"], 2) for k, v in row["halves"].items()}
            print(f"{len(per_concept)} {name}: {shown}", flush=True)
    settings = dict(steps=STEPS, cfg=CFG, candidates=CANDIDATES, pairs=PAIRS, side=SIDE, choices=CHOICES)
    found = summary(per_concept)
    publish(
        options.name,
        {"settings": settings | vars(options), **found, "per_concept": per_concept},
        json.dumps({k: found[k] for k in ("kept", "gains", "prompts")}, indent=1),
    )


if __name__ == "__main__":
    main()
