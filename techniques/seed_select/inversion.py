"""DDIM inversion: from an image back to the noise from which the model generates it.

From Denoising Diffusion Implicit Models (arXiv 2010.02502, section 4.3). In terms of σ and x0, a step of DDIM (η = 0)
from σ to σ' is an Euler step, x + (x − x0) / σ (σ' − σ). This holds for variance-exploding models, x = x0 + σ n, and
for flow models, x = (1 − σ) x0 + σ n. Inversion takes these steps from low to high σ.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .losses import vp_scale


@torch.no_grad()
def invert(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    sigmas: Tensor,
    *,
    flow: bool = False,
    refinements: int = 0,
) -> Tensor:
    """Noisy latent [B, C, *S] at ``sigmas[0]`` from which DDIM sampling returns to ``x0`` [B, C, *S].

    ``denoise(x, sigma)`` estimates x0 from x [B, C, *S] and sigma [B]. ``sigmas`` [N + 1] decrease to 0.

    The method is that of NAO's code (after Null-text Inversion, arXiv 2211.09794), which uses 50 steps and no guidance.
    A step from a lower to an upper σ evaluates the model at the upper σ, as DDIM sampling does, but on the latent of
    the lower σ. ``refinements`` is the number of repetitions of each step on the latent that the step has just computed
    (fixed-point inversion, AIDI, arXiv 2309.04907). The inversion is exact if these repetitions converge. Each
    refinement costs one evaluation per step.
    """
    _check_sigmas(sigmas)
    if refinements < 0:
        raise ValueError(f"refinements {refinements} is negative; use 0 as the authors do, or up to 5")
    x, levels = x0, sigmas.flip(0).to(x0.device)
    for lower, sigma in itertools.pairwise(levels):
        # The first guess at the upper sigma is the latent of the lower sigma. For variance-exploding models, it is
        # rescaled so that the two are equal in VP scale.
        guess = x if flow else vp_scale(x, lower) * (1 + sigma**2) ** 0.5
        for _ in range(1 + refinements):
            guess = x + (guess - denoise(guess, sigma.expand(len(x)))) / sigma * (sigma - lower)
        x = guess
    return x


def _check_sigmas(sigmas: Tensor) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or float(sigmas[-1]) != 0.0 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"sigmas {[round(s, 4) for s in sigmas.flatten().tolist()]} do not decrease to 0 in every step; use at least"
            " one step and a scheduler without repeated sigmas"
        )
