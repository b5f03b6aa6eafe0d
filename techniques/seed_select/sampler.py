"""What SeedSelect asks of a model: two protocols, which comfy_sampler.py and comfy_session.py answer with ComfyUI.

Shapes: B noises, C channels, S spatial axes (H, W). A score is a loss: lower is better. An evaluation is one call of
the denoiser with its guidance, per candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GradientCost:
    """Evaluations of one run through the sampler, for the report: forward only, and with what backward repeats."""

    forward: int = 1
    with_gradient: int = 1


class SeedGradients(Protocol):
    """A model that is open to gradients."""

    def unroll(self, noise: Tensor) -> Sequence[Tensor]:
        """The latents [1, C, *S] after the last one to three steps of the run of ``noise`` [1, C, *S], the finished one
        last, as ``losses.ReferenceLoss`` takes them; ``noise`` stays as it is."""

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """The score of what ``unroll`` gave: one number, differentiable."""

    def to_latent(self, x: Tensor) -> Tensor:
        """The last of ``unroll``'s latents [1, C, *S] as ``SeedSampler.generate`` gives it."""


class SeedSampler(Protocol):
    """A model with its prompts, its sampler and the references; called without gradients."""

    @property
    def calls_per_step(self) -> int:
        """How often the denoiser is called in a step, at most."""

    @property
    def gradient_cost(self) -> GradientCost | None:
        """Of one run; None: not open to gradients."""

    def noise_of(self, seed: int) -> Tensor:
        """The noise [1, C, *S] that a plain sampler draws for ``seed`` at batch 1."""

    def batch_size(self, count: int) -> int:
        """How many of ``count`` noises ``generate`` should get at once."""

    def generate(self, noise: Tensor, steps: int, seeds: Sequence[int]) -> Tensor:
        """The finished latents [B, C, *S] of a fresh plain run of ``noise`` [B, C, *S] in ``steps``.

        ``seeds``: one for each noise, of what a stochastic sampler draws besides; the same noise and seed give the same.
        """

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """The scores [B] of a list of one: latents [B, C, *S] as ``generate`` gives them."""

    def inversions(self) -> Sequence[Tensor]:
        """The noises [1, C, *S] of the references, in their order; asked once, by starts other than noise."""
