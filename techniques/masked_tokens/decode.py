"""Sampling of masked token models: predict all unknown tokens at once, keep the most confident ones, ask again.

aMUSEd: An Open MUSE Reproduction (arXiv 2401.01808), whose loop is that of MaskGIT: Masked Generative Image Transformer
(arXiv 2202.04200, section 3.2). Text to image, image to image, in- and outpainting are one loop that differs in which
tokens are unknown at first. An id equal to ``mask_id`` stands for an unknown token.

Given the same random choices, the ids of every step are those of diffusers 0.33.1 (AmusedScheduler, the three aMUSEd
pipelines), except where the choice here is deliberate:
- denoise 1 masks every token (there: none);
- every sample of a batch has a mask share of its own (there: one of the whole batch);
- denoise below 1 within a mask keeps a part of the tokens under it, as image to image does (there: all are masked);
- known tokens never change, however high the temperature and also where none is masked (there: some are masked);
- of tokens whose scores tie, as many are masked as the schedule says (there: fewer).

Shapes: B samples, h and w tokens of height and width, L = h w tokens, K codes of the codebook, N steps.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...common.shapes import size_of

ORDERS = ("confidence", "halton", "random")
SCHEDULES = ("cosine", "linear")
RAMPS = ("constant", "rising", "falling")

TokensToLogits = Callable[[Tensor, int], Tensor]  # ids [B, h, w], step -> logits [B, K, h, w]
Progress = Callable[[int, int, Tensor, Tensor], None]  # see decode


@dataclass(frozen=True)
class MaskedTokenSettings:
    """How to sample; the defaults are those of aMUSEd."""

    codebook: int = 8192
    mask_id: int = 8255
    steps: int = 12
    denoise: float = 1.0  # share of the steps that run; 1: all tokens are unknown at first
    temperature: float = 2.0  # of the noise on the confidence at the first step, falling to 0; other orders have none
    order: str = "confidence"  # which tokens stay: confidence (the papers), halton (evenly spread), random
    schedule: str = "cosine"  # of the share of masked tokens over the steps; diffusers inpaints with linear

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is less than 1; use at least 1, aMUSEd uses 12")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature:g} is not in 0 to infinity; use 0 for no noise, aMUSEd 2")
        if not 0.0 <= self.denoise <= 1.0:
            raise ValueError(f"denoise {self.denoise:g} is not in 0 to 1; use 1 to generate every token")
        if self.denoise > 0.0 and self.first_step == self.steps:
            enough = math.ceil(1.0 / self.denoise), math.ceil(1000 / self.steps) / 1000
            raise ValueError(
                f"denoise {self.denoise:g} of {self.steps} steps is less than one step;"
                f" use at least {enough[0]} steps or a denoise of at least {enough[1]:g}"
            )
        for name, known in (("order", ORDERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} '{getattr(self, name)}' is unknown; use one of {', '.join(known)}")
        if not 0 < self.codebook <= self.mask_id:
            raise ValueError(f"mask_id {self.mask_id} lies among the {self.codebook} codes; use one that is no code")

    @property
    def first_step(self) -> int:
        return self.steps - int(self.steps * self.denoise)


@dataclass(frozen=True, eq=False)
class Draws:
    """The uniforms in [0, 1) of one run, on the CPU."""

    start: Tensor  # [B, h, w] which tokens are unknown at first, for denoise below 1
    ids: Tensor  # [N, B, h, w] the id of a token, by the inverse of its distribution function
    order: Tensor  # [N, B, h, w] the noise of the order


def draw(seed: int, batch: int, height: int, width: int, steps: int) -> Draws:
    """The uniforms of a run. Sample i has the stream of ``seed + i``: alone, as the first of that seed, it is the same.

    More steps leave the draws of the earlier ones as they are.
    """
    shape = (1 + 2 * steps, height, width)
    seeds = [(seed + i) % 2**64 for i in range(batch)]
    streams = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float32) for s in seeds]
    uniforms = torch.stack(streams, dim=1)  # [1 + 2 N, B, h, w]
    return Draws(start=uniforms[0], ids=uniforms[1::2], order=uniforms[2::2])


@torch.no_grad()
def decode(
    tokens: Tensor,
    tokens_to_logits: TokensToLogits,
    settings: MaskedTokenSettings,
    draws: Draws,
    *,
    mask: Tensor | None = None,
    pinned: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Ids [B, h, w] with every unknown token generated: MaskGIT, section 3.2; on the device of ``tokens``.

    ``tokens`` [B, h, w] with ``mask_id`` where unknown: everywhere for text to image, the new border for outpainting.
    ``mask`` [1 or B, h, w]: tokens under at least 0.5 may change; None lets all change.
    ``pinned`` [1 or B, h, w]: its ids hold whatever mask, denoise and seed say; ``mask_id`` where a token is free.
    ``tokens_to_logits(ids, step)`` sees ``mask_id`` at unknown tokens; its step counts from ``settings.first_step``.
    ``progress(done, total, ids, predicted)`` after every forward pass: ``ids`` with ``mask_id`` at what is still
    unknown, ``predicted`` with the ids just sampled in its place. What it raises ends the run.

    Steps that would reveal nothing are left out; with nothing unknown, the tokens come back without a forward pass.
    """
    known, free = _canvas(tokens, mask, pinned, settings)
    if draws.start.shape != known.shape or len(draws.ids) != settings.steps:
        raise ValueError(
            f"draws for {size_of(draws.start)} and {len(draws.ids)} steps do not fit tokens {size_of(known)} and"
            f" {settings.steps} steps; draw with the same sizes"
        )
    unknown = known == settings.mask_id
    if settings.denoise == 0.0 and unknown.any():
        raise ValueError(
            f"denoise 0 leaves {int(unknown.sum())} unknown tokens without an id; use denoise 1 to generate them"
        )
    unknown = unknown | (free & (draws.start < mask_ratio(settings.first_step, settings)))
    ids = known.masked_fill(unknown, settings.mask_id).to(tokens.device)
    plan = reveal_plan(free.sum((1, 2)), unknown.sum((1, 2)), known[0].numel(), settings)
    for done, (step, keep) in enumerate(plan, start=1):
        ids, predicted = _reveal(ids, tokens_to_logits(ids, step), step, keep, settings, draws)
        if progress is not None:
            progress(done, len(plan), ids, predicted)
    return ids


def _canvas(
    tokens: Tensor, mask: Tensor | None, pinned: Tensor | None, settings: MaskedTokenSettings
) -> tuple[Tensor, Tensor]:
    """The known ids and where they may change, both [B, h, w] and on the CPU, where counting them makes nobody wait."""
    if tokens.ndim != 3:
        raise ValueError(
            f"tokens of size {size_of(tokens)} are not [batch, height, width]; encode an image to get them"
        )
    known = _check_ids("tokens", tokens, settings)
    free = torch.ones_like(known, dtype=torch.bool)
    if mask is not None:
        _check_size("mask", mask, tokens)
        # an unknown token has nothing to keep
        free = (mask.cpu() >= 0.5) | (known == settings.mask_id)
    if pinned is not None:
        _check_size("pinned tokens", pinned, tokens)
        pins = _check_ids("pinned tokens", pinned, settings)
        held = pins != settings.mask_id
        known, free = torch.where(held, pins, known), free & ~held
    return known, free


def _check_ids(name: str, ids: Tensor, settings: MaskedTokenSettings) -> Tensor:
    ids = ids.cpu().long()
    wrong = ids[((ids < 0) | (ids >= settings.codebook)) & (ids != settings.mask_id)]
    if len(wrong):
        raise ValueError(
            f"{name} hold the id {int(wrong[0])}; ids are 0 to {settings.codebook - 1}, or {settings.mask_id} where"
            " unknown: encode with the model that samples"
        )
    return ids


def _check_size(name: str, x: Tensor, tokens: Tensor) -> None:
    if x.ndim != 3 or x.shape[1:] != tokens.shape[1:] or x.shape[0] not in (1, tokens.shape[0]):
        raise ValueError(
            f"{name} of size {size_of(x)} do not fit tokens of {size_of(tokens)} (batch x height x width); resize to the"
            " tokens' height and width, with one for all samples or one for each"
        )


def mask_ratio(done: int, settings: MaskedTokenSettings) -> Tensor:
    """Share of masked tokens after ``done`` steps, γ of MaskGIT section 3.3, from 1 to 0; float32 on the CPU.

    In float32 as in diffusers: γ(2/3) rounds below 1/2, so that of 256 tokens 127 stay and not 128.
    """
    ratio = torch.tensor(done / settings.steps, dtype=torch.float32)
    if settings.schedule == "linear":
        return 1 - ratio
    # the cosine in double: float32 ones differ by a bit from processor to processor, and with it the counts
    return torch.tensor(math.cos(float(ratio * math.pi / 2)), dtype=torch.float32)


def reveal_plan(free: Tensor, masked: Tensor, length: int, settings: MaskedTokenSettings) -> list[tuple[int, Tensor]]:
    """Steps to run, each with the counts [B] of tokens that stay masked after it.

    ``free`` [B] tokens may change, ``masked`` [B] of them are unknown, of ``length``. Of several masked tokens a step
    reveals at least one, and at least one is left to the last step. Steps that reveal none in any sample are left out.
    """
    share = free.float() / length
    plan = []
    for step in range(settings.first_step, settings.steps):
        if step == settings.steps - 1:
            keep = torch.zeros_like(masked)
        else:
            keep = (length * (share * mask_ratio(step + 1, settings))).floor().long()
            keep = torch.minimum(keep, masked - 1).clamp(min=1).minimum(masked)
        if bool((keep < masked).any()):
            plan.append((step, keep))
        masked = keep
    return plan


def _reveal(
    ids: Tensor, logits: Tensor, step: int, keep: Tensor, settings: MaskedTokenSettings, draws: Draws
) -> tuple[Tensor, Tensor]:
    """One step: the ids [B, h, w] with all but ``keep`` [B] tokens revealed, and with all of them."""
    batch, height, width = ids.shape
    if logits.shape != (batch, settings.codebook, height, width):
        raise ValueError(
            f"logits of size {size_of(logits)} do not fit ids of {size_of(ids)} and {settings.codebook} codes;"
            " set the codebook to that of the model"
        )
    tokens = ids.flatten(1)  # [B, L]
    masked = tokens == settings.mask_id
    probs = rearrange(logits.float(), "b k h w -> b (h w) k").softmax(dim=-1)
    if not bool(torch.isfinite(probs.sum())):
        raise ValueError(f"the logits at step {step} are not finite (NaN or infinite); run the model in a wider dtype")
    sampled = sample_ids(probs, draws.ids[step].flatten(1).to(ids.device))
    predicted = torch.where(masked, sampled, tokens)
    score = _score(probs, predicted, step, settings, draws)
    # known tokens are above every score; a stable sort keeps the count where scores tie
    rank = torch.where(masked, score, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    stays_masked = rank < keep.to(ids.device)[:, None]
    revealed = predicted.masked_fill(stays_masked, settings.mask_id)
    return revealed.view_as(ids), predicted.view_as(ids)


def sample_ids(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One id [...] from each of ``probs`` [..., K]: the first at which the cumulative sum exceeds the uniform."""
    cdf = probs.cumsum(dim=-1)
    # scaled by the sum as it was rounded, a uniform below 1 always falls on a code
    return torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)


def _score(probs: Tensor, predicted: Tensor, step: int, settings: MaskedTokenSettings, draws: Draws) -> Tensor:
    """What decides which tokens stay, [B, L]: the lowest are masked again. Noise moves the order, never an id."""
    uniforms = draws.order[step].flatten(1).to(probs.device)
    if settings.order == "random":
        return uniforms
    if settings.order == "halton":
        rank = halton_rank(*draws.order.shape[-2:]).to(probs.device)
        return -rank.float().expand(predicted.shape)
    p = probs.gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
    temperature = float(torch.linspace(settings.temperature, 0.0, settings.steps)[step])
    gumbel = -torch.log(-torch.log(uniforms.clamp(1e-20)))
    return torch.log(p.clamp(1e-20)) + temperature * gumbel


@functools.lru_cache(maxsize=16)
def halton_rank(height: int, width: int) -> Tensor:
    """When each token [h w] is revealed if the order is that of a Halton sequence: a permutation of 0 to h w - 1.

    Halton Scheduler for Masked Generative Image Transformer (arXiv 2503.17076): points that spread evenly are revealed
    together, so that they tell little about each other. Point n is (y, x) = (radical inverse of n to base 3, to base 2)
    in the unit square; a token has the rank of the first point that falls into it.
    """
    count, ranked = height * width, {}
    n = 1
    while len(ranked) < count:
        points = torch.arange(n, n + 4 * count)
        cells = _radical_inverse_cell(points, 3, height) * width + _radical_inverse_cell(points, 2, width)
        for cell in cells.tolist():
            ranked.setdefault(cell, len(ranked))
        n += 4 * count
    return torch.tensor([ranked[cell] for cell in range(count)])


def _radical_inverse_cell(n: Tensor, base: int, cells: int) -> Tensor:
    """Which of ``cells`` equal parts of [0, 1) the digits of ``n``, mirrored at the point, fall into; in integers."""
    mirrored, scale = torch.zeros_like(n), 1
    while bool(n.any()):
        mirrored, scale = mirrored * base + n % base, scale * base
        n = n // base
    return mirrored * cells // scale


def guidance_scales(scale: float, steps: int, ramp: str = "constant") -> list[float]:
    """The guidance scale of every step. Rising goes from near 1 to ``scale``, which frees the early tokens (Muse, arXiv
    2301.00704, section 2.7); falling is its mirror image."""
    if ramp not in RAMPS:
        raise ValueError(f"ramp '{ramp}' is unknown; use one of {', '.join(RAMPS)}")
    if ramp == "constant":
        return [scale] * steps
    rising = [1.0 + (scale - 1.0) * (step + 1) / steps for step in range(steps)]
    return rising if ramp == "rising" else rising[::-1]


def guided(
    cond: Callable[[Tensor], Tensor], both: Callable[[Tensor], tuple[Tensor, Tensor]], scales: Sequence[float]
) -> TokensToLogits:
    """Classifier-free guidance on logits: u + scale (c − u), in float32.

    ``cond(ids)`` gives c and is all that runs where the scale of the step is 1; ``both(ids)`` gives (c, u), from one
    doubled batch or two runs.
    """

    def tokens_to_logits(ids: Tensor, step: int) -> Tensor:
        if scales[step] == 1.0:
            return cond(ids)
        c, u = (logits.float() for logits in both(ids))
        return u + scales[step] * (c - u)

    return tokens_to_logits
