"""Hand one noisy latent to a model of another parametrisation.

Every host model takes (x, sigma) and returns x0, but x itself differs: variance-exploding models (eps, v, EDM) see
x = x0 + sigma n, flow models x = (1 - sigma) x0 + sigma n. The same picture at the same signal-to-noise ratio is a
rescaled x at another sigma, so a mask computed from x0 predictions is meaningful across them.
"""

from typing import Protocol, cast

import comfy.model_sampling
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from torch import Tensor

VE, FLOW = "variance exploding", "flow"


class Sampling(Protocol):
    """What every kind of the host's model_sampling has in common."""

    @property
    def sigma_min(self) -> Tensor: ...

    @property
    def sigma_max(self) -> Tensor: ...

    def percent_to_sigma(self, percent: float) -> float: ...


def sampling_of(model: ModelPatcher) -> Sampling:
    """The noise process of ``model``, as patched by the host's ModelSampling* nodes."""
    return cast(Sampling, model.get_model_object("model_sampling"))  # the host calls all objects modules


def latent_format_of(model: ModelPatcher) -> LatentFormat:
    """The latent space of ``model``."""
    return cast(LatentFormat, model.get_model_object("latent_format"))


def family(sampling: Sampling) -> str:
    """Which x a model expects; sees the host's ModelSampling* nodes because it asks the patched object."""
    image_to_image = tuple(
        getattr(comfy.model_sampling, name)
        for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW")
        if hasattr(comfy.model_sampling, name)
    )
    if isinstance(sampling, image_to_image):
        raise ValueError("an image-to-image model has no noise process to share; it cannot be blended")
    if isinstance(sampling, comfy.model_sampling.CONST):
        return FLOW
    if isinstance(sampling, (comfy.model_sampling.EPS, comfy.model_sampling.COSMOS_RFLOW)):
        return VE
    raise ValueError(f"unknown kind of model sampling {type(sampling).__name__}; it cannot be blended")


def _amplitudes(kind: str, sigma: Tensor, noise_scale: float) -> tuple[Tensor, Tensor]:
    """Signal and noise amplitude of x at ``sigma``."""
    if kind == FLOW:
        return 1.0 - sigma, sigma * noise_scale
    return torch.ones_like(sigma), sigma


class Conversion:
    """Maps (x, sigma) of the base's sampling to the expert's; exact, and the identity within one family."""

    def __init__(self, base: Sampling, expert: Sampling) -> None:
        self.source, self.target = family(base), family(expert)
        self.source_scale = getattr(base, "noise_scale", 1.0) if self.source == FLOW else 1.0
        self.target_scale = getattr(expert, "noise_scale", 1.0) if self.target == FLOW else 1.0
        self.identity = self.source == self.target and self.source_scale == self.target_scale
        self.sigma_min, self.sigma_max = float(expert.sigma_min), float(expert.sigma_max)

    def sigmas(self, sigma: Tensor) -> Tensor:
        """The expert's sigma with the same ratio of noise to signal."""
        if self.identity:
            return sigma
        s = sigma.double()
        signal, noise = _amplitudes(self.source, s, self.source_scale)
        if self.target == FLOW:
            return (noise / (self.target_scale * signal + noise)).to(sigma.dtype)
        ratio = torch.where(signal > 0, noise / signal.clamp(min=1e-20), self.sigma_max)
        return ratio.clamp(max=self.sigma_max).to(sigma.dtype)

    def covers(self, sigma: float) -> bool:
        """Whether the expert was made for so little noise; within one family the host clamps by itself."""
        return self.identity or float(self.sigmas(torch.tensor(sigma, dtype=torch.float64))) >= self.sigma_min

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, *S] and sigma [B] for the expert; x keeps its direction and takes the target's total amplitude."""
        if self.identity:
            return x, sigma
        target = self.sigmas(sigma)
        a, b = _amplitudes(self.source, sigma.double(), self.source_scale)
        a2, b2 = _amplitudes(self.target, target.double(), self.target_scale)
        factor = ((a2**2 + b2**2) / (a**2 + b**2)).sqrt().to(x.dtype)
        return x * factor.reshape(-1, *[1] * (x.ndim - 1)), target
