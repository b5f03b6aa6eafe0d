"""Which parts of a noise carry the concept, for SeedMap: a map over patches of the noise. Ours, not from the papers.

In each pair of images, half of the patches, chosen at random, keep the found noise in the first image, and the other half
in the second. All other patches get the noise of another seed. The map is the mean difference of the two scores, as seen
from each patch. Two random noises that are mixed by patches are again a random noise, so the model gets no unusual input.

The scores are those of losses.ReferenceLoss: lower is better. Shapes: P patches, K pairs of images, C channels, S spatial
axes (h, w), of a video (T, h, w). A patch extends over all channels and frames.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .prior import check_noise
from .records import SeedResult
from .sampler import SeedSampler
from .search import counted

MOST_ROWS = 8  # images in one batch; an interrupt loses at most these
MOST_PATCHES = 4096  # whose splits and differences of 1024 pairs fit in 32 MB

Progress = Callable[[int], None]  # argument: evaluations so far


@dataclass(frozen=True)
class Patches:
    """A grid of ``rows`` x ``columns`` patches over ``height`` x ``width`` positions, numbered row by row."""

    height: int
    width: int
    rows: int
    columns: int

    @classmethod
    def of(cls, height: int, width: int, patches: int) -> "Patches":
        """Grid with ``patches`` patches along the longer side, about square. ValueError if they do not fit."""
        longer, shorter = max(height, width), min(height, width)
        if not 2 <= patches <= longer:
            raise ValueError(
                f"patches {patches} is not between 2 and {longer}, the positions of the latent along its longer side; use 4"
            )
        fewer = max(1, round(patches * shorter / longer))
        if fewer * patches > MOST_PATCHES:
            raise ValueError(f"{fewer} x {patches} patches are more than {MOST_PATCHES}; use fewer patches")
        rows, columns = (patches, fewer) if height >= width else (fewer, patches)
        return cls(height, width, rows, columns)

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def numbers(self) -> Tensor:
        """Number of the patch of each position, [height, width]. The sizes of two patches differ by at most 1."""
        row = torch.arange(self.height) * self.rows // self.height
        column = torch.arange(self.width) * self.columns // self.width
        return row[:, None] * self.columns + column[None]

    def spread(self, values: Tensor) -> Tensor:
        """Values [P] of the patches at their positions, [height, width]."""
        return values[self.numbers()]


def ranks(values: Tensor) -> Tensor:
    """Ranks of ``values`` [P] from 0 (lowest) to 1 (highest), float32; equal values get their mean rank."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return (below + (equal - 1) / 2).float() / max(1, len(values) - 1)


def random_halves(patches: int, pairs: int, seed: int) -> Tensor:
    """Booleans [K, P]: which patches keep the found noise in the first image of each pair, half of them."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.zeros(pairs, patches, dtype=torch.bool)
    for k in range(pairs):
        # of an odd number of patches, the first image keeps one more in every other pair
        kept = patches // 2 if k % 2 else patches - patches // 2
        halves[k, torch.randperm(patches, generator=generator)[:kept]] = True
    return halves


@dataclass(frozen=True, kw_only=True)
class SeedMapSettings:
    """Settings of a map. ValueError for values outside of their limits."""

    pairs: int = 24  # of images
    checks: int = 4  # noises in which the marked and the unmarked half are tried; 0: no check
    seed: int = 0  # of the first other noise
    steps: int = 20

    def __post_init__(self) -> None:
        for name, least in (("pairs", 2), ("checks", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} is less than {least}; use at least {least}")


@dataclass(frozen=True, eq=False)
class Check:
    """Results of one other noise: as it is, with the marked half of the found noise, and with the unmarked half."""

    other: SeedResult
    marked: SeedResult
    unmarked: SeedResult


@dataclass(eq=False)
class SeedMap:
    """One map of ``noise`` [1, C, *S]. Its attributes are valid at any time, so an interrupted map has what was measured.

    ``patch_of``: number of the patch of each element of the noise, with the noise's shape; -1: the element always keeps the
    found noise.
    """

    settings: SeedMapSettings
    sampler: SeedSampler
    noise: Tensor
    patch_of: Tensor
    patches: Patches
    sampler_seed: int = 0  # of noise that a stochastic sampler adds, the same in all images
    found: SeedResult | None = None  # the image of the noise
    checks: list[Check] = field(default_factory=list)
    evaluations: int = 0
    _differences: list[float] = field(default_factory=list)  # of the two scores of each pair
    _progress: Progress | None = None

    def __post_init__(self) -> None:
        check_noise(self.noise)
        self._halves = random_halves(self.patches.count, self.settings.pairs, self.settings.seed)

    @property
    def planned(self) -> int:
        """Evaluations of the whole map."""
        return (1 + 2 * self.settings.pairs + 3 * self.settings.checks) * self._cost

    @property
    def _cost(self) -> int:
        return self.settings.steps * self.sampler.calls_per_step

    @property
    def pairs(self) -> int:
        """Pairs that were measured."""
        return len(self._differences)

    @property
    def values(self) -> Tensor | None:
        """Map [P], float64: how much more the score rises if the patch is exchanged than if an average other patch is.

        None before two pairs were measured.
        """
        return None if self.pairs < 2 else self._seen_from_patches().mean(0)

    @property
    def errors(self) -> Tensor | None:
        """Standard errors [P] of ``values`` over the pairs; None before two pairs were measured."""
        return None if self.pairs < 2 else self._seen_from_patches().std(0) / math.sqrt(self.pairs)

    def _seen_from_patches(self) -> Tensor:
        """Difference [K, P] between the score of the image that exchanges the patch and the one that keeps it."""
        direction = torch.where(self._halves[: self.pairs], 1.0, -1.0).double()
        return direction * torch.tensor(self._differences, dtype=torch.float64)[:, None]

    @property
    def marked(self) -> Tensor:
        """Booleans [P]: the half of the patches with the highest values, with the middle one if their number is odd.

        Of equal values, the first patches are marked.
        """
        values = self.values
        if values is None:
            raise ValueError("the map has not been measured yet; run it first")
        marked = torch.zeros(self.patches.count, dtype=torch.bool)
        order = torch.argsort(values, descending=True, stable=True)
        marked[order[: (self.patches.count + 1) // 2]] = True
        return marked

    def mixed(self, kept: Tensor, other: Tensor) -> Tensor:
        """The noise [1, C, *S] that has the found noise in the patches ``kept`` [P], and ``other`` [1, C, *S] elsewhere."""
        # the last element is that of patch_of -1
        return torch.where(torch.cat([kept, kept.new_ones(1)])[self.patch_of], self.noise, other)

    @torch.no_grad()
    def run(self, progress: Progress | None = None) -> None:
        """Measure the map and check it. Calls ``progress`` after each batch; an exception raised by it ends the run."""
        self._progress = progress
        self.found = self._results([self.noise], ["found noise"])[0]
        self._advance(self._cost)
        self._exchange()
        self._check()

    def _exchange(self) -> None:
        pairs = range(self.settings.pairs)
        per_batch = max(1, min(MOST_ROWS, self.sampler.batch_size(MOST_ROWS)) // 2)
        for first in pairs[::per_batch]:
            noises, labels = [], []
            for k in pairs[first : first + per_batch]:
                _, other = self._other(k)
                noises += [self.mixed(kept, other) for kept in (self._halves[k], ~self._halves[k])]
                labels += [f"half {n} of pair {k + 1}" for n in (1, 2)]
            scores = [result.score for result in self._results(noises, labels)]
            self._differences += [second - first for first, second in zip(scores[::2], scores[1::2], strict=True)]
            self._advance(len(noises) * self._cost)

    def _check(self) -> None:
        marked = self.marked
        for k in range(self.settings.checks):
            seed, other = self._other(self.settings.pairs + k)  # a noise that the map has not seen
            noises = [other, self.mixed(marked, other), self.mixed(~marked, other)]
            labels = [f"seed {seed}", "marked half kept", "other half kept"]
            self.checks.append(Check(*self._results(noises, labels)))
            self._advance(len(noises) * self._cost)

    def _other(self, k: int) -> tuple[int, Tensor]:
        """Seed and noise of other noise ``k``. If that is the found noise itself, the seed after all others replaces it."""
        for offset in (k, self.settings.pairs + self.settings.checks):
            seed = (self.settings.seed + offset) % 2**64
            noise = self.sampler.noise_of(seed)
            if not torch.equal(noise, self.noise):
                break
        return seed, noise

    def _results(self, noises: list[Tensor], labels: list[str]) -> list[SeedResult]:
        seeds = [self.sampler_seed] * len(noises)
        latents = self.sampler.generate(torch.cat(noises), self.settings.steps, seeds)
        scores = self.sampler.score([latents]).detach().flatten().tolist()
        for label, score in zip(labels, scores, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"the score of the {label} is {score}; run the model and the VAE in a wider dtype")
        return [
            SeedResult(label=label, seed=None, noise=noise, latent=latent, score=score, sampler_seed=self.sampler_seed)
            for label, noise, latent, score in zip(labels, noises, latents.cpu().split(1), scores, strict=True)
        ]

    def _advance(self, evaluations: int) -> None:
        """Count ``evaluations`` and report them; called after their results are stored, since it may raise."""
        self.evaluations += evaluations
        if self._progress is not None:
            self._progress(self.evaluations)

    def report(self) -> str:
        """Text with the map, what it was measured from, and the check."""
        p, lines = self.patches, []
        if self.found is not None:
            lines.append(f"score of the found noise: {self.found.score:.4f} (lower is better)")
        values, errors = self.values, self.errors
        if values is None or errors is None:
            return "\n".join([*lines, "no map yet: fewer than 2 pairs were measured"])
        lines.append(
            f"map of {p.rows} x {p.columns} patches from {self.pairs} pairs of images, {self.evaluations} model evaluations"
        )
        lines.append("rise of the score if a patch is exchanged, compared with an average patch, row by row:")
        lines += ["  " + "  ".join(f"{v:.3g}" for v in row) for row in values.reshape(p.rows, p.columns).tolist()]
        clear = int((values.abs() > 2 * errors).sum())
        lines.append(f"{clear} of {p.count} patches differ from the average by more than 2 standard errors")
        if not clear:
            lines.append("each of them may be chance: see the check, use more pairs, or fewer patches")
        if self.checks:
            means = [
                math.fsum(getattr(c, name).score for c in self.checks) / len(self.checks)
                for name in ("other", "marked", "unmarked")
            ]
            lines.append(
                f"check in {counted(len(self.checks), 'other noise')}: score {means[0]:.4f}, with the marked half of the found noise"
                f" {means[1]:.4f}, with the other half {means[2]:.4f}"
            )
            if means[1] >= means[2]:
                lines.append("the marked half is not better than the other one, so the map shows little")
        return "\n".join(lines)
