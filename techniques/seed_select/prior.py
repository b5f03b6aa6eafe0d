"""How likely the norm of a noise is: that of d standard normal numbers follows the χ distribution of d degrees.

Norm-guided latent space exploration for text-to-image generation (NAO, arXiv 2306.08687): diffusion models know noise
of such norms only, a shell of radius √d that is about 1.4 thick whatever d is.
"""

import math

import torch
from torch import Tensor

from ...common.shapes import size_of


def log_chi(norm: Tensor, d: int) -> Tensor:
    """log K(r) = (d − 1) ln r − r²/2 − [(d/2 − 1) ln 2 + ln Γ(d/2)], NAO's log density of a norm; in float64.

    In single precision the terms, near 80,000 for a latent of 4x64x64, cancel to an error of 0.01.
    """
    r = norm.double()
    return (d - 1) * r.log() - r**2 / 2 - ((d / 2 - 1) * math.log(2) + math.lgamma(d / 2))


def chi_shell(d: int, width: float) -> tuple[float, float]:
    """The norms within ``width`` standard deviations of the mean: √(d − 1/2) ± width √(1/2).

    Mean and deviation of χ_d up to 1/d; a width of 3 holds 99.7 % of all noises.
    """
    mean, reach = math.sqrt(d - 0.5), width * math.sqrt(0.5)
    return max(0.0, mean - reach), mean + reach


def onto_shell(noise: Tensor, width: float) -> Tensor:
    """``noise`` scaled to the nearest norm in the shell; bit for bit itself where it lies inside."""
    low, high = chi_shell(noise.numel(), width)
    norm = float(noise.detach().cpu().double().norm())
    if low <= norm <= high or norm == 0.0:
        return noise
    return noise * (min(max(norm, low), high) / norm)


def check_width(width: float) -> None:
    if not width > 0.0:
        raise ValueError(
            f"shell_width {width:g} is not above 0; use 3 for the norms of nearly all noises, infinity for no guard"
        )


def check_noise(noise: Tensor) -> None:
    """Refuse what is not one finite noise [1, C, *S]."""
    if noise.ndim < 3 or noise.shape[0] != 1:
        raise ValueError(f"noise of size {size_of(noise)} is not one sample; give one at a time")
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("the noise is not finite (NaN or infinite); start from another seed")
