"""A cascade of two modules: a frozen model θ predicts the noise, a head φ repaints its x0, a gate r mixes the two.

Cas-DM (arXiv 2401.02414), after Dual-Output Diffusion (arXiv 2203.04304). The paper has no public code and leaves several
choices open; this is a reconstruction. θ learns from the noise alone, as ever; the metric (LPIPS or another distance of
pictures) acts on x_φ only, and no gradient passes from φ to θ. So θ may be any frozen model, and training φ alone is the
same objective for φ.

Why a hook after guidance is the paper's sampler. Its reverse step from x_t mixes the means of two posteriors,

    μ = r μ_x(x_φ) + (1 − r) μ_ε(ε_θ),    μ_x(x_φ) = A_t x_φ + B_t x_t,

and with x̂_θ = (x_t − √(1−ᾱ_t) ε_θ) / √ᾱ_t the other mean is exactly A_t x̂_θ + B_t x_t. Hence

    μ = A_t x̂ + B_t x_t    with    x̂ = r x_φ + (1 − r) x̂_θ,

which is the step of an ordinary sampler that is told x̂: DDPM, DDIM, Euler, DPM++, and for v and flow models too, whose
predictions are x̂_θ in another form.

Shapes: B samples, C channels, h and w positions. x̂_θ is ``x_theta``, x_φ is ``x_phi``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LEVEL = 8.0  # |ln(n / s)|; flow models begin at infinity, zero-terminal-SNR models at 8.4

Network = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x_theta, level [B], x_t / √(s² + n²) -> x_phi, r
Metric = Callable[[Tensor, Tensor], Tensor]  # x_phi, x0 -> [B]


def amplitudes(sigma: Tensor, flow: bool, noise_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Signal s and noise n [B] in x_t = s x0 + n ε at ``sigma`` [B].

    ``flow``: x_t = (1 − σ) x0 + σ ``noise_scale`` ε; else (eps, v, EDM, as ComfyUI has them) x_t = x0 + σ ε.
    """
    if flow:
        return 1.0 - sigma, sigma * noise_scale
    return torch.ones_like(sigma), sigma


def noise_level(signal: Tensor, noise: Tensor) -> Tensor:
    """ln(n / s) [B], what a head is told of the time: the same for every kind of model where the picture is as noisy."""
    tiny = torch.finfo(signal.dtype).tiny
    return (noise.clamp(min=tiny).log() - signal.clamp(min=tiny).log()).clamp(-MAX_LEVEL, MAX_LEVEL)


def mix(x_theta: Tensor, x_phi: Tensor, r: Tensor) -> Tensor:
    """x̂ = r x_φ + (1 − r) x̂_θ; exactly x̂_θ where x_φ is it, and where r is 0. ``r`` broadcasts to [B, C, h, w]."""
    return x_theta + r * (x_phi - x_theta)


def predict(
    network: Network, x_theta: Tensor, x: Tensor, sigma: Tensor, *, flow: bool, noise_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x_φ, r) of a head for ``x_theta`` predicted from ``x`` = x_t, both [B, C, h, w], at ``sigma`` [B].

    The same in sampling and in training, so that a head is asked what it has learned. The head sees x_t of unit variance.
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
    """x̂_θ + strength (x̂ − x̂_θ) [B, C, h, w] in the dtype of ``x_theta``, which strength 0 returns as it is.

    Computed in float32: of θ's float16 the last bits of x̂_θ are the details that φ is there for, and φ is small.
    """
    if strength == 0.0:
        return x_theta
    wide = x_theta.float()
    x_phi, r = predict(network, wide, x.float(), sigma.float(), flow=flow, noise_scale=noise_scale)
    return torch.lerp(wide, mix(wide, x_phi, r), strength).to(x_theta.dtype)


def objective(
    network: Network,
    x0: Tensor,
    x_theta: Tensor,
    x: Tensor,
    sigma: Tensor,
    *,
    flow: bool,
    noise_scale: float = 1.0,
    metric: Metric | None = None,
    gate_weight: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """The parts of L_φ as ``losses`` has them, for the true ``x0`` and what θ made of it: ``x_theta`` [B, C, h, w] from
    ``x`` = x_t at ``sigma`` [B]. No gradient passes to either."""
    x_theta = x_theta.detach()
    x_phi, r = predict(network, x_theta, x.detach(), sigma, flow=flow, noise_scale=noise_scale)
    return losses(x0, x_theta, x_phi, r, metric=metric, gate_weight=gate_weight)


def alpha_bar(signal: Tensor, noise: Tensor) -> Tensor:
    """ᾱ = s² / (s² + n²): where the picture is as noisy in a variance preserving process, the one of the paper."""
    return signal**2 / (signal**2 + noise**2)


def posterior(before: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """(A_t, B_t) such that E[x_{t−1} | x_t, x0] = A_t x0 + B_t x_t, from ``before`` = ᾱ_{t−1} and ``now`` = ᾱ_t.

        A_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t),    B_t = √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t),    α_t = ᾱ_t / ᾱ_{t−1} = 1 − β_t

    x_t is the paper's, √ᾱ_t x0 + √(1−ᾱ_t) ε. The last step (ᾱ_{t−1} = 1) has A = 1, B = 0.
    """
    alpha = now / before
    return before.sqrt() * (1 - alpha) / (1 - now), alpha.sqrt() * (1 - before) / (1 - now)


def posterior_weight(before: Tensor, now: Tensor) -> Tensor:
    """A_t² [B]: what the papers' gate loss, a distance of means, weighs the same distance of x0 with.

    It falls by orders of magnitude towards the noise, where a gate then learns next to nothing.
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
    """The parts of L_φ for every sample, [B] each, by name; all pictures [B, C, h, w], squares as means over a sample.

        l2       ‖x_0 − x_φ‖²
        metric   metric(x_φ, x_0); not there without one
        gate     w ‖x_0 − (r sg[x_φ] + (1 − r) sg[x̂_θ])‖²

    with w = ``gate_weight``, a number or [B]: ``posterior_weight`` for A_t², which makes it ‖μ̃_t − μ‖² of the papers, or 1
    for the same weight at every noise level. sg stops the gradient: the gate loss trains r and not the pictures that it
    mixes, the others train x_φ and not r, none reaches θ. All weights are 1 in the papers, but for the metric's, which is
    not known; see ``total``.
    """
    theta, phi = x_theta.detach(), x_phi.detach()
    parts = {"l2": _mean_square(x0 - x_phi)}
    if metric is not None:
        parts["metric"] = metric(x_phi, x0)
    return {**parts, "gate": gate_weight * _mean_square(x0 - mix(theta, phi, r))}


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def total(parts: dict[str, Tensor], *, metric_weight: float = 1.0, gate_weight: float = 1.0) -> Tensor:
    """L_φ = l2 + λ metric + gate, the mean over the samples, as one number."""
    weights = {"l2": 1.0, "metric": metric_weight, "gate": gate_weight}
    return torch.stack([weights[name] * part.mean() for name, part in parts.items()]).sum()
