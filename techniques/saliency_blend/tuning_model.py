"""A model of the scores of a search: a Gaussian process over the settings, with an effect of each seed and noise.

The score of one image varies much more with the seed than with the settings, so that the mean of a few images is a poor
estimate. The model estimates a candidate from its images and from those of similar candidates (Rasmussen and Williams,
Gaussian Processes for Machine Learning, 2006, chapters 2 and 5):

    score(x, seed) = mean + f(x) + effect of the seed + noise,   f a Gaussian process with a squared exponential kernel

Images with few steps have a mean of their own and more noise. The length scale of each setting and the variances are
those of the highest likelihood on a small grid.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

Array = np.ndarray
LENGTHS = (0.15, 0.35, 0.8, 2.0)  # of the kernel, in widths of the space
SHARES = (0.03, 0.1, 0.3, 1.0)  # of the variance of the scores
FEW_STEPS_NOISE = 0.3  # variance that images with few steps have in addition, as a share of that of f
MOST = 300  # scores for which the likelihood is computed; with more, a part of them
LEAST_VARIANCE = 1e-12  # of the scores; below it they count as equal


@dataclass(frozen=True, eq=False)
class Scores:
    """N scores. ``places`` [N, D] in 0..1; ``seeds`` [N], the numbers of the seeds; ``few`` [N], whether with few steps."""

    places: Array
    values: Array
    seeds: Array
    few: Array

    def part(self, rows: Array) -> "Scores":
        return Scores(self.places[rows], self.values[rows], self.seeds[rows], self.few[rows])


@dataclass(frozen=True, eq=False)
class Variances:
    """The parameters of the model, relative to the variance of the scores. ``lengths`` [D]."""

    lengths: Array
    signal: float = 0.3
    seed: float = 0.3
    noise: float = 0.3


class ScoreModel:
    """The model, fitted to ``scores`` of at least one image with all steps."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self.mean = float(scores.values[~scores.few].mean())
        centred = scores.values - np.where(scores.few, _mean(scores, scores.few), self.mean)
        self._scale = float(centred.std()) if centred.var() > LEAST_VARIANCE else 0.0
        if not self._scale:
            return
        centred = centred / self._scale
        rows = np.random.default_rng(0).permutation(len(centred))[:MOST]
        self._variances = _fitted(scores.part(rows), centred[rows])
        factor = cholesky(_covariance(scores, self._variances), lower=True)
        self._factor, self._weights = factor, cho_solve((factor, True), centred)

    @property
    def lengths(self) -> Array | None:
        """The length scales [D] of the settings: the shorter, the more the score depends on the setting. None: not at all."""
        return self._variances.lengths if self._scale else None

    def estimate(self, places: Array) -> tuple[Array, Array]:
        """Means and standard deviations [M] of mean + f at ``places`` [M, D]."""
        if not self._scale:
            return np.full(len(places), self.mean), np.zeros(len(places))
        v = self._variances
        between = v.signal * _kernel(places, self._scores.places, v.lengths)
        inner = solve_triangular(self._factor, between.T, lower=True)
        variance = np.maximum(v.signal - (inner**2).sum(0), 0.0)
        return self.mean + self._scale * (between @ self._weights), self._scale * np.sqrt(variance)


def _mean(scores: Scores, rows: Array) -> float:
    return float(scores.values[rows].mean()) if rows.any() else 0.0


def _kernel(a: Array, b: Array, lengths: Array) -> Array:
    """[N, M] correlations of f at ``a`` [N, D] and ``b`` [M, D]."""
    a, b = a / lengths, b / lengths
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T  # without an array of [N, M, D]
    return np.exp(-0.5 * np.maximum(squares, 0.0))


def _covariance(scores: Scores, v: Variances) -> Array:
    same_seed = scores.seeds[:, None] == scores.seeds[None]
    noise = v.noise + np.where(scores.few, FEW_STEPS_NOISE * v.signal, 0.0)
    return v.signal * _kernel(scores.places, scores.places, v.lengths) + v.seed * same_seed + np.diag(noise + 1e-6)


def _likelihood(scores: Scores, centred: Array, v: Variances) -> float:
    """The log likelihood, up to a constant."""
    factor = cholesky(_covariance(scores, v), lower=True)
    inner = solve_triangular(factor, centred, lower=True)
    return float(-0.5 * inner @ inner - np.log(np.diag(factor)).sum())


def _fitted(scores: Scores, centred: Array) -> Variances:
    """The parameters of the highest likelihood; one after the other over its grid, twice."""
    best = Variances(np.full(scores.places.shape[1], LENGTHS[1]))
    value = _likelihood(scores, centred, best)
    for _ in range(2):
        tries = [("lengths", k, length) for k in range(len(best.lengths)) for length in LENGTHS]
        tries += [(name, 0, share) for name in ("signal", "seed", "noise") for share in SHARES]
        for name, k, new in tries:
            if name == "lengths":
                lengths = best.lengths.copy()
                lengths[k] = new
                tried = replace(best, lengths=lengths)
            else:
                tried = replace(best, **{name: new})
            if (found := _likelihood(scores, centred, tried)) > value:
                best, value = tried, found
    return best
