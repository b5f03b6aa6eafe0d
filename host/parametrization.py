"""Conversion of a noisy latent between variance-exploding, variance-preserving and flow models.

Every model in ComfyUI takes (x, sigma) and returns x0, but the definition of x differs:
- variance-exploding models (eps, v, EDM): x = x0 + sigma n;
- flow models: x = (1 - sigma) x0 + sigma n;
- variance-preserving models (CogVideoX): x = (x0 + sigma n) / sqrt(1 + sigma²).
Here x0 is the clean latent and n Gaussian noise. For the same image at the same signal-to-noise ratio, two models
differ only in the scale of x and in sigma. A mask computed from x0 predictions is therefore meaningful across these
models.
"""

import copy
from collections.abc import Callable
from typing import Protocol, cast

import comfy.model_sampling
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from torch import Tensor

VE, VP, FLOW = "variance exploding", "variance preserving", "flow"


class Sampling(Protocol):
    """Common interface of ComfyUI's model_sampling classes."""

    @property
    def sigma_min(self) -> Tensor: ...

    @property
    def sigma_max(self) -> Tensor: ...

    def percent_to_sigma(self, percent: float) -> float: ...


def sampling_of(model: ModelPatcher) -> Sampling:
    """Noise process of ``model``, as patched by the ModelSampling* nodes."""
    return cast(Sampling, model.get_model_object("model_sampling"))  # annotated as a Module in ComfyUI


def percent_to_sigma(sampling: Sampling) -> Callable[[float], float]:
    """Function from a sampling percent to sigma. It does not wait for a GPU: a copy on the CPU replaces ``sampling``.

    ComfyUI's function reads its result from the device of ``sampling``. A blend whose bias rises or falls over the run
    needs two dozen results per step.
    """
    on_cpu = sampling
    if isinstance(sampling, torch.nn.Module) and any(b.device.type != "cpu" for b in sampling.buffers()):
        on_cpu = copy.deepcopy(sampling).to("cpu")
    return lambda percent: float(on_cpu.percent_to_sigma(percent))


def latent_format_of(model: ModelPatcher) -> LatentFormat:
    """Latent space of ``model``."""
    return cast(LatentFormat, model.get_model_object("latent_format"))


def name_of_sampling(sampling: Sampling) -> str:
    """Name of a noise process for messages: the ComfyUI classes from which its class, made at run time, derives."""
    return " and ".join(base.__name__ for base in type(sampling).__bases__)


def unsupported(sampling: Sampling) -> str:
    """The error message for a noise process that a node does not support."""
    return f"the noise process {name_of_sampling(sampling)} is not supported; use a model of the SD or flow family"


def family(sampling: Sampling) -> str:
    """VE or FLOW: the noise process of the x that a model expects.

    Pass the patched object, so that ModelSampling* nodes are considered.

    Errors (ValueError): a noise process of another family.
    """
    found = any_family(sampling)
    if found == VP:
        raise ValueError(
            f"the noise process {name_of_sampling(sampling)} (variance-preserving, CogVideoX) is supported only by"
            " SaliencyNoiseBlend; use a model of the SD or flow family"
        )
    return found


def any_family(sampling: Sampling) -> str:
    """VE, VP or FLOW.

    Errors (ValueError): an image-to-image model, or a noise process that ComfyUI does not have.
    """
    if is_image_to_image(sampling):
        raise ValueError(
            "an image-to-image model does not start from noise and cannot be blended; use a text-to-image model"
        )
    if isinstance(sampling, comfy.model_sampling.CONST):
        return FLOW
    if isinstance(sampling, (comfy.model_sampling.EPS, comfy.model_sampling.COSMOS_RFLOW)):
        return VE
    # on ComfyUI 0.30 and later
    if isinstance(sampling, getattr(comfy.model_sampling, "V_PREDICTION_DDPM", ())):
        return VP
    raise ValueError(unsupported(sampling))


def is_image_to_image(sampling: Sampling) -> bool:
    """Whether a model starts from an image, not from noise."""
    names = ("IMG_TO_IMG", "IMG_TO_IMG_FLOW")
    kinds = tuple(getattr(comfy.model_sampling, name) for name in names if hasattr(comfy.model_sampling, name))
    return isinstance(sampling, kinds)


def _amplitudes(kind: str, sigma: Tensor, noise_scale: float) -> tuple[Tensor, Tensor]:
    """Amplitudes of signal and noise in x at ``sigma``."""
    if kind == FLOW:
        return 1.0 - sigma, sigma * noise_scale
    if kind == VP:
        signal = (1.0 + sigma**2).rsqrt()
        return signal, sigma * signal
    return torch.ones_like(sigma), sigma


class Conversion:
    """Converts (x, sigma) of the base's noise process to the expert's.

    The conversion is exact. It is the identity if both have the same family and noise scale.
    """

    def __init__(self, base: Sampling, expert: Sampling) -> None:
        self.source, self.target = any_family(base), any_family(expert)
        self.source_scale = getattr(base, "noise_scale", 1.0) if self.source == FLOW else 1.0
        self.target_scale = getattr(expert, "noise_scale", 1.0) if self.target == FLOW else 1.0
        self.identity = self.source == self.target and self.source_scale == self.target_scale
        self.same_sigma = self.identity or FLOW not in (self.source, self.target)
        self.sigma_min, self.sigma_max = float(expert.sigma_min), float(expert.sigma_max)

    def sigmas(self, sigma: Tensor) -> Tensor:
        """Sigma of the expert with the same ratio of noise to signal."""
        if self.same_sigma:
            return sigma
        s = sigma.double()
        signal, noise = _amplitudes(self.source, s, self.source_scale)
        if self.target == FLOW:
            return (noise / (self.target_scale * signal + noise)).to(sigma.dtype)
        ratio = torch.where(signal > 0, noise / signal.clamp(min=1e-20), self.sigma_max)
        return ratio.clamp(max=self.sigma_max).to(sigma.dtype)

    def covers(self, sigma: float) -> bool:
        """Whether ``sigma`` of the base, converted to the expert's, is at least the expert's sigma_min.

        Always true if base and expert have the same scale of sigma, because ComfyUI clamps sigma.
        """
        return self.same_sigma or float(self.sigmas(torch.tensor(sigma, dtype=torch.float64))) >= self.sigma_min

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, *S] and sigma [B] for the expert. Its x is scaled to the total amplitude of signal and noise."""
        if self.identity:
            return x, sigma
        target = self.sigmas(sigma)
        a, b = _amplitudes(self.source, sigma.double(), self.source_scale)
        a2, b2 = _amplitudes(self.target, target.double(), self.target_scale)
        factor = ((a2**2 + b2**2) / (a**2 + b**2)).sqrt().to(x.dtype)
        return x * factor.reshape(-1, *[1] * (x.ndim - 1)), target
