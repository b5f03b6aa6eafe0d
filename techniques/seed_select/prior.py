"""Prior of the norm of a noise: the norm of d standard normal numbers has the χ distribution with d degrees of freedom.

From Norm-guided latent space exploration for text-to-image generation (NAO, arXiv 2306.08687). Diffusion models are
trained only on noises with such norms. These noises lie in a shell of radius √d, whose thickness is about 1.4 for any d.
"""

import math

import torch
from torch import Tensor

from ...common.shapes import size_of


def log_chi(norm: Tensor, d: int) -> Tensor:
    """log K(r) = (d − 1) ln r − r²/2 − [(d/2 − 1) ln 2 + ln Γ(d/2)], NAO's log density of a norm, in float64.

    For a latent of 4x64x64 the terms are near 80,000 and almost cancel; in float32 this leaves an error of 0.01.
    """
    r = norm.double()
    return (d - 1) * r.log() - r**2 / 2 - ((d / 2 - 1) * math.log(2) + math.lgamma(d / 2))


def chi_shell(d: int, width: float) -> tuple[float, float]:
    """Range of norms within ``width`` standard deviations of the mean: √(d − 1/2) ± width √(1/2).

    √(d − 1/2) and √(1/2) are the mean and standard deviation of χ_d up to terms of order 1/d. A width of 3 includes 99.7 %
    of all noises.
    """
    mean, margin = math.sqrt(d - 0.5), width * math.sqrt(0.5)
    return max(0.0, mean - margin), mean + margin


def onto_shell(noise: Tensor, width: float) -> Tensor:
    """``noise`` scaled to the nearest norm in the shell; returned unchanged if its norm is in the shell or 0."""
    low, high = chi_shell(noise.numel(), width)
    norm = float(noise.detach().cpu().double().norm())
    if low <= norm <= high or norm == 0.0:
        return noise
    return noise * (min(max(norm, low), high) / norm)


def check_width(width: float) -> None:
    if not width > 0.0:
        raise ValueError(
            f"shell_width {width:g} is not above 0; use 3 to allow the norms of nearly all noises, or infinity for no limit"
        )


def check_noise(noise: Tensor) -> None:
    """Raise a ValueError if ``noise`` is not finite or not one sample [1, C, *S]."""
    if noise.ndim < 3 or noise.shape[0] != 1:
        raise ValueError(f"noise of size {size_of(noise)} is not one sample; use a batch size of 1")
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("the noise is not finite (NaN or infinite); start from another seed")
