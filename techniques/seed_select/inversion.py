"""DDIM inversion: from a picture back to the noise from which the model would make it.

Denoising Diffusion Implicit Models (arXiv 2010.02502, section 4.3). With σ and x0 a step of DDIM (η = 0) is Euler's,
x + (x − x0) / σ (σ' − σ), the same for variance-exploding models, x = x0 + σ n, and flow models, x = (1 − σ) x0 + σ n;
inversion takes it upwards.
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
    """The noisy latent [B, C, *S] at ``sigmas[0]`` from which DDIM comes back to ``x0`` [B, C, *S].

    ``denoise(x, sigma)`` estimates x0 from x [B, C, *S] and sigma [B]. ``sigmas`` [N + 1] fall to 0.

    As NAO's authors do it (after Null-text Inversion, arXiv 2211.09794): a step up asks the model at the upper level,
    where the step down would, about the latent of the lower level; 50 steps and no guidance are theirs. Each of
    ``refinements`` asks once more with the latent just found (fixed-point inversion, AIDI, arXiv 2309.04907), which
    makes the way back exact where it converges. Each costs as many evaluations as there are steps.
    """
    _check_sigmas(sigmas)
    if refinements < 0:
        raise ValueError(f"refinements {refinements} is negative; use 0 as the authors do, or up to 5")
    x, levels = x0, sigmas.flip(0).to(x0.device)
    for lower, sigma in itertools.pairwise(levels):
        # the variance-preserving latent stays what it is when it is shown as one of the upper level
        guess = x if flow else vp_scale(x, lower) * (1 + sigma**2) ** 0.5
        for _ in range(1 + refinements):
            guess = x + (guess - denoise(guess, sigma.expand(len(x)))) / sigma * (sigma - lower)
        x = guess
    return x


def _check_sigmas(sigmas: Tensor) -> None:
    if sigmas.ndim != 1 or len(sigmas) < 2 or float(sigmas[-1]) != 0.0 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(
            f"sigmas {[round(s, 4) for s in sigmas.flatten().tolist()]} do not fall to 0 step by step; use at least one"
            " step and a scheduler whose sigmas all differ"
        )
