"""Interfaces of SeedSelect to a model: two protocols, implemented for ComfyUI in comfy_sampler.py and comfy_session.py.

Shapes: B noises, C channels, S spatial axes (H, W). A score is a loss: lower is better. An evaluation is one guided call
of the denoiser for one candidate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GradientCost:
    """Number of evaluations of one sampling run."""

    forward: int = 1  # without a backward pass
    with_gradient: int = 1  # with a backward pass, including the recomputed evaluations


class SeedGradients(Protocol):
    """Differentiable sampling and scores."""

    def unroll(self, noise: Tensor) -> Sequence[Tensor]:
        """Latents [1, C, *S] after the last one to three steps of a run from ``noise`` [1, C, *S], the final latent last.

        They are the input of ``losses.ReferenceLoss``. ``noise`` is not changed.
        """

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """Differentiable score (one number) of the latents that ``unroll`` returned."""

    def to_latent(self, x: Tensor) -> Tensor:
        """Last latent ``x`` [1, C, *S] of ``unroll``, converted to the scale of ``SeedSampler.generate``."""


class SeedSampler(Protocol):
    """Sampling and scoring with fixed model, prompts, sampler and references; called without gradients."""

    @property
    def calls_per_step(self) -> int:
        """Largest number of calls of the denoiser per step."""

    @property
    def gradient_cost(self) -> GradientCost | None:
        """Cost of one run with gradients; None if gradients are not available."""

    @property
    def references(self) -> int:
        """Number of references that are used, which is also that of ``inversions``."""

    def noise_of(self, seed: int) -> Tensor:
        """Noise [1, C, *S] that a plain sampler draws for ``seed`` at batch 1."""

    def batch_size(self, count: int) -> int:
        """Number of noises, of ``count`` in total, to pass to ``generate`` at once."""

    def generate(self, noise: Tensor, steps: int, seeds: Sequence[int]) -> Tensor:
        """Final latents [B, C, *S] of a sampling run of ``steps`` steps from ``noise`` [B, C, *S].

        ``seeds``: one seed for each noise, from which a stochastic sampler draws the noise that it adds during the run.
        Each latent depends only on its initial noise and its seed.
        """

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """Scores [B] of ``latents``, a list with one element: the latents [B, C, *S] that ``generate`` returned."""

    def inversions(self) -> Mapping[int, Tensor]:
        """Inverted noises [1, C, *S] of the references that are used, by the numbers of the references from 1.

        Called once if ``start`` is not "noise".
        """
