"""Sampling of masked token models: predict all unknown tokens, keep the most confident predictions, mask the rest, repeat.

aMUSEd: An Open MUSE Reproduction (arXiv 2401.01808) uses the loop of MaskGIT: Masked Generative Image Transformer
(arXiv 2202.04200, section 3.2). Text to image, image to image, inpainting and outpainting are the same loop with different
initial unknown tokens. The id ``mask_id`` marks an unknown token.

With the same random numbers, the ids of every step equal those of diffusers 0.33.1 (AmusedScheduler and the three aMUSEd
pipelines), with these deliberate differences:
- denoise 1 masks every token (diffusers then masks none);
- the share of masked tokens is computed per sample (in diffusers, once for the whole batch);
- denoise below 1 keeps some tokens under an inpainting mask, as in image to image (diffusers masks all of them);
- known tokens never change (diffusers masks some again at high temperatures, or if no token is masked);
- the scheduled number of tokens is masked even if some scores are equal (diffusers then masks fewer).

Shapes: B samples, h and w the height and width in tokens, L = h w, K codes in the codebook, N steps.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...common.finite import DeferredChecks
from ...common.settings import check_choice
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
    denoise: float = 1.0  # share of the steps that run; at 1 all tokens are initially unknown
    # temperature of the Gumbel noise at the first step; it falls to 0 at the last step. Used only if ``order`` is
    # confidence
    temperature: float = 2.0
    # order in which tokens are revealed. confidence: the most confident first, as in the papers; halton: evenly
    # spread over the image; random
    order: str = "confidence"
    schedule: str = "cosine"  # how the share of masked tokens falls over the steps; diffusers inpaints with linear

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps} is less than 1; use at least 1, aMUSEd uses 12")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature {self.temperature:g} is not a finite number of at least 0; use 0 for no noise, aMUSEd uses 2"
            )
        if not 0.0 <= self.denoise <= 1.0:
            raise ValueError(f"denoise {self.denoise:g} is not between 0 and 1; use 1 to generate every token")
        if self.denoise > 0.0 and self.first_step == self.steps:
            enough = math.ceil(1.0 / self.denoise), math.ceil(1000 / self.steps) / 1000
            raise ValueError(
                f"denoise {self.denoise:g} of {self.steps} steps is less than one step;"
                f" use at least {enough[0]} steps or a denoise of at least {enough[1]:g}"
            )
        for name, known in (("order", ORDERS), ("schedule", SCHEDULES)):
            check_choice(name, getattr(self, name), known)
        if not 0 < self.codebook <= self.mask_id:
            raise ValueError(f"mask_id {self.mask_id} is one of the {self.codebook} codes; use {self.codebook} or more")

    @property
    def first_step(self) -> int:
        return self.steps - int(self.steps * self.denoise)


@dataclass(frozen=True, eq=False)
class Uniforms:
    """The uniform random numbers in [0, 1) of one run, on the CPU."""

    start: Tensor  # [B, h, w]: select the initially masked tokens at denoise below 1
    ids: Tensor  # [N, B, h, w]: select the ids by inverse transform sampling
    order: Tensor  # [N, B, h, w]: noise for the order in which tokens are revealed


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a sample of the batch: ``seed + sample``, within 64 bits."""
    return (seed + sample) % 2**64


def draw_uniforms(seed: int, batch: int, height: int, width: int, steps: int) -> Uniforms:
    """The uniforms of a run, on the CPU.

    Sample i uses a separate generator with the seed ``seed + i``, so its uniforms do not depend on the other samples.
    The uniforms of a step do not depend on the number of steps.
    """
    shape = (1 + 2 * steps, height, width)
    seeds = [sample_seed(seed, i) for i in range(batch)]
    samples = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float32) for s in seeds]
    values = torch.stack(samples, dim=1)  # [1 + 2 N, B, h, w]
    return Uniforms(start=values[0], ids=values[1::2], order=values[2::2])


@torch.no_grad()
def decode(
    tokens: Tensor,
    tokens_to_logits: TokensToLogits,
    settings: MaskedTokenSettings,
    uniforms: Uniforms,
    *,
    mask: Tensor | None = None,
    pinned: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Generate every unknown token (MaskGIT, section 3.2); returns ids [B, h, w] on the device of ``tokens``.

    ``tokens`` [B, h, w]: ids, with ``mask_id`` at unknown tokens. For text to image, all tokens are unknown; for
    outpainting, those of the new border.
    ``mask`` [1 or B, h, w]: tokens with a value of at least 0.5 may change; None: all may change.
    ``pinned`` [1 or B, h, w]: ids that are kept for any mask, denoise and seed; ``mask_id`` elsewhere.
    ``tokens_to_logits(ids, step)`` receives ids with ``mask_id`` at unknown tokens. The first step is
    ``settings.first_step``.
    ``progress(done, total, ids, predicted)`` is called after every forward pass. ``ids`` has ``mask_id`` at tokens that
    are still unknown; ``predicted`` has newly sampled ids at these tokens. An exception in ``progress`` ends the run.

    Steps that reveal no token are skipped. If no token is unknown, the tokens are returned without a forward pass.
    """
    known, free = _known_and_free(tokens, mask, pinned, settings)
    if uniforms.start.shape != known.shape or len(uniforms.ids) != settings.steps:
        raise ValueError(
            f"uniforms for {size_of(uniforms.start)} and {len(uniforms.ids)} steps do not fit tokens {size_of(known)} and"
            f" {settings.steps} steps; use the same sizes in draw_uniforms"
        )
    unknown = known == settings.mask_id
    if settings.denoise == 0.0 and unknown.any():
        raise ValueError(f"denoise 0 cannot generate the {int(unknown.sum())} unknown tokens; use denoise 1")
    unknown = unknown | (free & (uniforms.start < mask_ratio(settings.first_step, settings)))
    ids = known.masked_fill(unknown, settings.mask_id).to(tokens.device)
    plan = reveal_plan(free.sum((1, 2)), unknown.sum((1, 2)), known[0].numel(), settings)
    run = _DecodingRun(plan, settings, uniforms, tokens.device)
    for done, (step, _) in enumerate(plan, start=1):
        ids, predicted = run.reveal(ids, tokens_to_logits(ids, step), done - 1)
        if progress is not None:
            progress(done, len(plan), ids, predicted)
    run.checks.flush()
    return ids


def _known_and_free(
    tokens: Tensor, mask: Tensor | None, pinned: Tensor | None, settings: MaskedTokenSettings
) -> tuple[Tensor, Tensor]:
    """The ids and a bool mask of the tokens that may change, both [B, h, w].

    Both are on the CPU, because counting tokens there needs no device synchronization.
    """
    if tokens.ndim != 3:
        raise ValueError(
            f"token ids of size {size_of(tokens)} are not [batch, height, width]; encode an image to get them"
        )
    known = _check_ids("tokens", tokens, settings)
    free = torch.ones_like(known, dtype=torch.bool)
    if mask is not None:
        _check_size("mask", mask, tokens)
        # unknown tokens are always generated
        free = (mask.cpu() >= 0.5) | (known == settings.mask_id)
    if pinned is not None:
        _check_size("pinned tokens", pinned, tokens)
        pins = _check_ids("pinned tokens", pinned, settings)
        is_pinned = pins != settings.mask_id
        known, free = torch.where(is_pinned, pins, known), free & ~is_pinned
    return known, free


def _check_ids(name: str, ids: Tensor, settings: MaskedTokenSettings) -> Tensor:
    ids = ids.cpu().long()
    wrong = ids[((ids < 0) | (ids >= settings.codebook)) & (ids != settings.mask_id)]
    if len(wrong):
        raise ValueError(
            f"{name} have the id {int(wrong[0])}; expected 0 to {settings.codebook - 1}, or {settings.mask_id} where"
            " unknown; encode with the model that samples"
        )
    return ids


def _check_size(name: str, x: Tensor, tokens: Tensor) -> None:
    if x.ndim != 3 or x.shape[1:] != tokens.shape[1:] or x.shape[0] not in (1, tokens.shape[0]):
        raise ValueError(
            f"{name}: expected the size {size_of(tokens)} (batch x height x width) or batch size 1, got {size_of(x)};"
            " resize to the height and width of the tokens"
        )


def mask_ratio(done: int, settings: MaskedTokenSettings) -> Tensor:
    """Share of masked tokens after ``done`` steps: γ of MaskGIT, section 3.3, which falls from 1 to 0.

    A float32 on the CPU, as in diffusers. In float32, γ(2/3) rounds below 1/2, so that 127 of 256 tokens stay masked
    instead of 128.
    """
    ratio = torch.tensor(done / settings.steps, dtype=torch.float32)
    if settings.schedule == "linear":
        return 1 - ratio
    # computed in float64: in float32 the last bit of the cosine, and so the counts, would depend on the processor
    return torch.tensor(math.cos(float(ratio * math.pi / 2)), dtype=torch.float32)


def reveal_plan(free: Tensor, masked: Tensor, length: int, settings: MaskedTokenSettings) -> list[tuple[int, Tensor]]:
    """Steps to run, each with the number of tokens [B] that stay masked after it.

    ``free`` [B]: number of tokens that may change; ``masked`` [B]: number of unknown tokens among them; ``length``:
    number of all tokens of a sample. While a sample has several masked tokens, each step reveals at least one. At least one stays masked until
    the last step. Steps that reveal no token in any sample are skipped.
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


class _DecodingRun:
    """The steps of one run.

    Counts and uniforms are moved to ``device`` once, because each copy to a GPU waits for the queued work.
    """

    def __init__(
        self,
        plan: list[tuple[int, Tensor]],
        settings: MaskedTokenSettings,
        uniforms: Uniforms,
        device: torch.device,
    ) -> None:
        self.settings, self.checks = settings, DeferredChecks()
        self._steps = [step for step, _ in plan]
        self._keep = [keep.to(device) for _, keep in plan]
        self._ids, self._order = uniforms.ids.to(device), uniforms.order.to(device)
        size = uniforms.order.shape[-2:]
        self._halton = halton_rank(*size).to(device) if settings.order == "halton" else None

    def reveal(self, ids: Tensor, logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Run step ``number`` of the plan. Returns two tensors [B, h, w].

        The first has ``mask_id`` at the tokens that stay masked, the second has predicted ids at all masked tokens.
        """
        settings, step = self.settings, self._steps[number]
        batch, height, width = ids.shape
        if logits.shape != (batch, settings.codebook, height, width):
            raise ValueError(
                f"logits of size {size_of(logits)} do not fit ids of {size_of(ids)} and {settings.codebook} codes;"
                " set the codebook size to that of the model"
            )
        tokens = ids.flatten(1)  # [B, L]
        masked = tokens == settings.mask_id
        probs = rearrange(logits.float(), "b k h w -> b (h w) k").softmax(dim=-1)
        self.checks.flush()  # the previous step's check, read only after this step's forward pass is queued
        self.checks.add(probs.sum().view(1), functools.partial(_check_logits, step))
        sampled = sample_ids(probs, self._ids[step].flatten(1))
        predicted = torch.where(masked, sampled, tokens)
        # known tokens rank above all masked ones; a stable sort keeps the count exact if scores are equal
        score = torch.where(masked, self._score(probs, predicted, step), torch.inf)
        rank = score.argsort(dim=1, stable=True).argsort(dim=1)
        revealed = predicted.masked_fill(rank < self._keep[number][:, None], settings.mask_id)
        return revealed.view_as(ids), predicted.view_as(ids)

    def _score(self, probs: Tensor, predicted: Tensor, step: int) -> Tensor:
        """Scores [B, L]; the tokens with the lowest scores are masked again.

        The noise changes only the order in which tokens are revealed, not their predicted ids.
        """
        noise = self._order[step].flatten(1)
        if self._halton is not None:
            return -self._halton.float().expand(predicted.shape)
        if self.settings.order == "random":
            return noise
        p = probs.gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
        temperature = float(torch.linspace(self.settings.temperature, 0.0, self.settings.steps)[step])
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20)))
        return torch.log(p.clamp(1e-20)) + temperature * gumbel


def _check_logits(step: int, finite: list[bool]) -> None:
    if not all(finite):
        raise ValueError(f"the logits at step {step} are not finite (NaN or infinite); run the model in a wider dtype")


def sample_ids(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One id [...] for each distribution in ``probs`` [..., K].

    It is the first id whose cumulative probability exceeds the entry of ``uniforms`` [...] for this distribution.
    """
    cdf = probs.cumsum(dim=-1)
    # the uniform is scaled by the rounded sum of the probabilities, so that it always selects a code
    ids = torch.searchsorted(cdf, uniforms.unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)
    # NaN selects an index after the last code. On a GPU, such an index ends the process before the check of the logits
    # is read.
    return ids.clamp(max=cdf.shape[-1] - 1)


@functools.lru_cache(maxsize=16)
def halton_rank(height: int, width: int) -> Tensor:
    """The position of each token [h w] in the order of a Halton sequence: a permutation of 0 to h w - 1.

    Halton Scheduler for Masked Generative Image Transformer (arXiv 2503.17076). Tokens revealed together are spread
    evenly, which lowers their mutual information. Point n of the sequence is (y, x) = (radical inverse of n in base 3,
    in base 2) in the unit square. A token has the rank of the first point that falls into it.
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
    """Index of the part that contains the radical inverse of ``n``, if [0, 1) is cut into ``cells`` equal parts."""
    mirrored, scale = torch.zeros_like(n), 1
    while bool(n.any()):
        mirrored, scale = mirrored * base + n % base, scale * base
        n = n // base
    return mirrored * cells // scale


def guidance_scales(scale: float, steps: int, ramp: str = "constant") -> list[float]:
    """The guidance scale of every step.

    ``rising`` goes from near 1 to ``scale``, for more diverse early tokens (Muse, arXiv 2301.00704, section 2.7).
    ``falling`` is the reverse.
    """
    check_choice("ramp", ramp, RAMPS)
    if ramp == "constant":
        return [scale] * steps
    rising = [1.0 + (scale - 1.0) * (step + 1) / steps for step in range(steps)]
    return rising if ramp == "rising" else rising[::-1]


def guided(
    cond: Callable[[Tensor], Tensor], both: Callable[[Tensor], tuple[Tensor, Tensor]], scales: Sequence[float]
) -> TokensToLogits:
    """Classifier-free guidance on logits: u + scale (c − u), in float32.

    c are the logits with the prompt, u those with the negative prompt. ``cond(ids)`` returns c and is the only call at
    steps with scale 1. ``both(ids)`` returns (c, u), from one doubled batch or two forward passes.
    """

    def tokens_to_logits(ids: Tensor, step: int) -> Tensor:
        if scales[step] == 1.0:
            return cond(ids)
        c, u = (logits.float() for logits in both(ids))
        return u + scales[step] * (c - u)

    return tokens_to_logits
