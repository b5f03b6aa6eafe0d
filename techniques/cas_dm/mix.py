"""A cascade: a frozen model θ predicts the noise, a head φ refines the x0 of θ, and a gate r mixes the two x0.

Cas-DM (arXiv 2401.02414), after Dual-Output Diffusion (arXiv 2203.04304). The paper has no public code and leaves
several choices open; this is a reimplementation. In the paper, θ is trained only to predict the noise, as usual. The
metric (LPIPS or another image distance) applies to x_φ only, and no gradient passes from φ to θ. Therefore θ can be any
frozen model: training only φ leaves the objective of φ unchanged.

A hook after guidance implements the paper's sampler. The reverse step from x_t mixes the means of two posteriors,

    μ = r μ_x(x_φ) + (1 − r) μ_ε(ε_θ),    μ_x(x_φ) = A_t x_φ + B_t x_t,

with A_t and B_t from ``posterior``. With x̂_θ = (x_t − √(1−ᾱ_t) ε_θ) / √ᾱ_t, the other mean μ_ε is exactly
A_t x̂_θ + B_t x_t. Hence

    μ = A_t x̂ + B_t x_t    with    x̂ = r x_φ + (1 − r) x̂_θ,

which is the step of an ordinary sampler (DDPM, DDIM, Euler, DPM++) with the prediction x̂. The same holds for v and flow
models, since their predictions convert to x̂_θ.

Shapes: B samples, C channels, h and w positions. x̂_θ is ``x_theta``, x_φ is ``x_phi``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LEVEL = 8.0  # maximum of |ln(noise / signal)|; flow models start at infinity, zero-terminal-SNR models at 8.4

Network = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x_theta, level [B], x_t / √(s² + n²) -> x_phi, r
Metric = Callable[[Tensor, Tensor], Tensor]  # x_phi, x0 -> [B]


def amplitudes(sigma: Tensor, flow: bool, noise_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Amplitudes of signal s and noise n [B] in x_t = s x0 + n ε at ``sigma`` [B].

    ``flow``: x_t = (1 − σ) x0 + σ ``noise_scale`` ε. Otherwise (eps, v, EDM, as in ComfyUI): x_t = x0 + σ ε.
    """
    if flow:
        return 1.0 - sigma, sigma * noise_scale
    return torch.ones_like(sigma), sigma


def noise_level(signal: Tensor, noise: Tensor) -> Tensor:
    """ln(n / s) [B], the time input of a head. It depends only on the signal-to-noise ratio."""
    tiny = torch.finfo(signal.dtype).tiny
    return (noise.clamp(min=tiny).log() - signal.clamp(min=tiny).log()).clamp(-MAX_LEVEL, MAX_LEVEL)


def mix(x_theta: Tensor, x_phi: Tensor, r: Tensor) -> Tensor:
    """x̂ = r x_φ + (1 − r) x̂_θ; exactly x̂_θ where x_φ = x̂_θ or r = 0. ``r`` broadcasts to [B, C, h, w]."""
    return x_theta + r * (x_phi - x_theta)


def predict(
    network: Network, x_theta: Tensor, x: Tensor, sigma: Tensor, *, flow: bool, noise_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x_φ, r) of a head, in sampling and in training.

    ``x_theta``: x̂_θ, predicted from ``x`` (x_t), both [B, C, h, w], at ``sigma`` [B]. The head receives x_t scaled to
    unit variance.
    """
    signal, noise = amplitudes(sigma, flow, noise_scale)
    scale = (signal**2 + noise**2).rsqrt().to(x.dtype)
    return network(x_theta, noise_level(signal, noise), x * scale[:, None, None, None])


def refine(
    network: Network,
    x_theta: Tensor,
    x: Tensor,
    sigma: Tensor,
    *,
    strength: float = 1.0,
    flow: bool = False,
    noise_scale: float = 1.0,
) -> Tensor:
    """x̂_θ + strength (x̂ − x̂_θ) [B, C, h, w] in the dtype of ``x_theta``; strength 0 returns ``x_theta`` itself.

    Computed in float32: float16 would round away the details that φ adds. This costs little, since φ is small.
    """
    if strength == 0.0:
        return x_theta
    wide = x_theta.float()
    x_phi, r = predict(network, wide, x.float(), sigma.float(), flow=flow, noise_scale=noise_scale)
    return torch.lerp(wide, mix(wide, x_phi, r), strength).to(x_theta.dtype)


def alpha_bar(signal: Tensor, noise: Tensor) -> Tensor:
    """ᾱ = s² / (s² + n²): the ᾱ with the same signal-to-noise ratio in the paper's variance-preserving process."""
    return signal**2 / (signal**2 + noise**2)


def posterior(before: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """(A_t, B_t) such that E[x_{t−1} | x_t, x0] = A_t x0 + B_t x_t, from ``before`` = ᾱ_{t−1} and ``now`` = ᾱ_t.

        A_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t),    B_t = √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t),    α_t = ᾱ_t / ᾱ_{t−1} = 1 − β_t

    Here x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε, as in the paper. The last step (ᾱ_{t−1} = 1) has A = 1, B = 0.
    """
    alpha = now / before
    return before.sqrt() * (1 - alpha) / (1 - now), alpha.sqrt() * (1 - before) / (1 - now)


def posterior_weight(before: Tensor, now: Tensor) -> Tensor:
    """A_t² [B], the weight of the squared distance of x0 in the papers' gate loss.

    The papers' gate loss is the squared distance of the posterior means, which is A_t² times the squared distance of
    x0. The weight falls by orders of magnitude towards high noise, so that the gate is hardly trained there.
    """
    return posterior(before, now)[0] ** 2


def losses(
    x0: Tensor,
    x_theta: Tensor,
    x_phi: Tensor,
    r: Tensor,
    *,
    metric: Metric | None = None,
    gate_weight: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The parts of the loss L_φ by name, each [B] with one value per sample.

    Inputs are [B, C, h, w]. ‖·‖² is the mean, not the sum, of the squares of a sample.

        l2       ‖x_0 − x_φ‖²
        metric   metric(x_φ, x_0); absent without a metric
        gate     w ‖x_0 − (r sg[x_φ] + (1 − r) sg[x̂_θ])‖²

    with w = ``gate_weight``, a number or [B]. With ``posterior_weight`` the gate loss is the papers' ‖μ̃_t − μ‖²; with
    1 it has the same weight at every noise level. sg stops the gradient. The gate loss therefore trains only r, the
    other losses train only x_φ, and no gradient reaches θ. ``total`` is the weighted sum of the parts. In
    the papers the weights of l2 and gate are 1, and that of the metric is unpublished.
    """
    theta, phi = x_theta.detach(), x_phi.detach()
    parts = {"l2": _mean_square(x0 - x_phi)}
    if metric is not None:
        parts["metric"] = metric(x_phi, x0)
    return {**parts, "gate": gate_weight * _mean_square(x0 - mix(theta, phi, r))}


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def total(parts: dict[str, Tensor], *, metric_weight: float = 1.0, gate_weight: float = 1.0) -> Tensor:
    """L_φ = l2 + λ metric + gate, averaged over the samples; a scalar."""
    weights = {"l2": 1.0, "metric": metric_weight, "gate": gate_weight}
    return torch.stack([weights[name] * part.mean() for name, part in parts.items()]).sum()
