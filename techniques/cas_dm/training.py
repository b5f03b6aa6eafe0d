"""Trains φ, the head of a cascade, on a frozen model θ that is asked once for every noisy picture.

Cas-DM (arXiv 2401.02414), a reconstruction; ``techniques.cas_dm`` has the losses. θ is a callable and gets no gradient:
neither its weights nor its input are touched, so it may be a whole host's guided prediction.

Shapes: B samples, C channels, h and w positions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from ...training.finite import NotFiniteError
from ...training.loop import Evaluation, Training, TrainingLoop, autocast, weighted_means
from .mix import losses, mix, predict, total
from .network import Head
from .training_data import LEVELS, Draw, Latents

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 1e-2, 1.0
WARM_UP = 100  # steps of rising learning rate, at most a tenth of the run
GATE_WEIGHTS = ("even", "paper")

Theta = Callable[[Tensor, Tensor, Sequence[int]], Tensor]  # x_t, sigma [B], the pictures' numbers -> x̂_θ
LatentMetric = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_φ, x0, places [B, 2] -> [B]; frames of video one by one


@dataclass(frozen=True, kw_only=True)
class CasDMTraining(Training):
    """The papers weigh L2 and the gate's loss with 1; the metric's weight is not known."""

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 3e-4
    metric_weight: float = 1.0
    gate_weights: str = "even"  # the same for the gate's loss at every level, or the papers' A_t²
    cached_steps: int = 0  # ask θ for that many steps beforehand and use them in turn; 0: ask at every step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cached_steps < 0:
            raise ValueError(f"cached_steps {self.cached_steps} is negative; use 0 to cache nothing")
        self.check_weights("metric_weight")
        if self.gate_weights not in GATE_WEIGHTS:
            raise ValueError(f"gate_weights '{self.gate_weights}' is not one of {', '.join(GATE_WEIGHTS)}")

    def rate(self, step: int) -> float:
        warm_up = max(1, min(WARM_UP, self.steps // 10))
        return self.learning_rate * min(1.0, (step + 1) / warm_up)


@dataclass(frozen=True)
class HeadEvaluation(Evaluation):
    """Means over fixed noisy pictures, of θ alone, of x_φ alone and of the mix."""

    l2: dict[str, float]  # squared distance to x0, by "theta", "phi", "mix"
    metric: dict[str, float] = field(default_factory=dict)  # the same of the metric, where there is one
    gate: tuple[tuple[float, float], ...] = ()  # (percent of the sampling in 0..1, mean r there)


@dataclass(frozen=True)
class Example:
    """One noisy picture and what was made of it, all [C, h, w]; of video the first frame."""

    percent: float
    r: float
    x_theta: Tensor
    x_phi: Tensor
    mixed: Tensor
    x0: Tensor


class CasDMTrainer:
    """What ``loop`` trains a head by; ``head()`` is what it has learned so far."""

    def __init__(
        self,
        head: Head,
        latents: Latents,
        x0_theta: Theta,
        settings: CasDMTraining,
        metric: LatentMetric | None = None,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
        recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        """``head``: where to begin; its ``facts.steps`` are behind it. ``precision``: φ computes in it, by autocast.

        ``recording``: what a metric's gradient is computed in, if it needs that; θ is asked outside of it.
        """
        shapes = {shape for shape in latents.buckets if shape[0] != head.config.channels}
        if shapes:
            raise ValueError(
                f"the head repaints latents of {head.config.channels} channels, these have {shapes.pop()[0]}; use a head"
                " and latents of one model"
            )
        self.start, self.latents, self.x0_theta, self.settings = head, latents, x0_theta, settings
        self.device, self.precision = torch.device(device), precision
        self.metric = metric if settings.metric_weight else None
        self.network = head.network().to(device).train().requires_grad_(True)
        parameters: list[Tensor] = list(self.network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.loop = TrainingLoop(
            settings=settings,
            optimizer=optimizer,
            parameters=parameters,
            batches=self._batches,
            backward=self._backward,
            measure=self._measure,
            recording=recording,
            clip=CLIP,
            first_step=head.facts.steps,
        )
        self._cache: dict[int, list[Tensor]] = {}
        self._fixed: list[tuple[Draw, Tensor]] | None = None

    def _batches(self, step: int) -> Iterator[tuple[Draw, Tensor]]:
        """With what θ says of each."""
        batches = self.draw(step).split(self.settings.batch_size)
        return zip(batches, self._predictions(step, batches))

    def _backward(self, step: int, number: int, batch: tuple[Draw, Tensor]) -> dict[str, Tensor]:
        parts, *_ = self._parts(*batch)
        loss = self._total(parts)
        (loss / self.settings.gradient_accumulation).backward()
        return {"loss": loss, **{name: value.mean() for name, value in parts.items()}}

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return total(parts, metric_weight=self.settings.metric_weight)

    def _parts(self, draw: Draw, x_theta: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Draw, Tensor]:
        """The parts of the loss, x_φ, r, and what they were made of, frame by frame."""
        draw, x_theta = _frames(draw, x_theta)
        x0, x, sigma, places = (t.to(self.device) for t in (draw.x0, draw.x, draw.sigma, draw.places))
        process, weight = self.latents.process, 1.0
        with autocast(self.device, self.precision):
            x_phi, r = predict(self.network, x_theta, x, sigma, flow=process.flow, noise_scale=process.noise_scale)
        if self.settings.gate_weights == "paper":
            weight = process.posterior_weight(draw.percent).to(self.device)
        distance = self.metric
        metric = None if distance is None else lambda a, b: distance(a, b, places)
        x_phi, r = x_phi.float(), r.float()
        return losses(x0, x_theta, x_phi, r, metric=metric, gate_weight=weight), x_phi, r, draw, x_theta

    def draw(self, step: int) -> Draw:
        """The samples of a step of this run."""
        if self.settings.cached_steps:
            step %= self.settings.cached_steps
        return self.latents.draw(self.settings.seed, self.loop.first_step + step, self.settings.samples)

    def _predictions(self, step: int, batches: list[Draw]) -> Iterator[Tensor]:
        if self.settings.cached_steps == 0:
            return (self._ask(batch) for batch in batches)
        step %= self.settings.cached_steps
        if step not in self._cache:
            self._cache[step] = [self._ask(batch).cpu() for batch in batches]
        return (kept.to(self.device) for kept in self._cache[step])

    @torch.no_grad()
    def _ask(self, draw: Draw) -> Tensor:
        found = self.x0_theta(draw.x.to(self.device), draw.sigma.to(self.device), draw.indices)
        found = found.detach().to(self.device, torch.float32)
        if not bool(found.isfinite().all()):
            raise NotFiniteError(
                f"the model's own prediction is NaN or infinite at sigma {float(draw.sigma.min()):.3g} to"
                f" {float(draw.sigma.max()):.3g}; run the model in a wider dtype"
            )
        return found

    def ask_beforehand(self, progress: Callable[[int, int], None] = lambda done, count: None) -> None:
        """Ask θ all that the run will need of it, where it is to be cached: after this θ need not stay loaded."""
        count = min(self.settings.cached_steps, self.settings.steps)
        if count:
            self._fixed_draws()
        for step in range(count):
            list(self._predictions(step, self.draw(step).split(self.settings.batch_size)))
            progress(step + 1, count)

    def _fixed_draws(self) -> list[tuple[Draw, Tensor]]:
        """The draws that evaluations use, with θ's predictions, which do not change."""
        if self._fixed is None:
            batches = [batch for draw in self.latents.fixed() for batch in draw.split(self.settings.batch_size)]
            self._fixed = [(batch, self._ask(batch).cpu()) for batch in batches]
        return self._fixed

    def _measure(self) -> HeadEvaluation:
        rows, by_level = [], [[] for _ in range(LEVELS)]
        with self.loop.averaged():
            for draw, x_theta in self._fixed_draws():
                parts, x_phi, r, draw, x_theta = self._parts(draw, x_theta.to(self.device))
                rows.append((len(draw.x0), self._scores(draw, x_theta, x_phi, r) | {"loss": float(self._total(parts))}))
                for percent, mean in zip(draw.percent.tolist(), r.flatten(1).mean(1).expand(len(draw.x0)).tolist()):
                    by_level[min(int(percent * LEVELS), LEVELS - 1)].append(mean)
        means = weighted_means(rows)
        kinds = {
            kind: {name.split()[1]: value for name, value in means.items() if name.startswith(kind)}
            for kind in ("l2", "metric")
        }
        gate = tuple(((k + 0.5) / LEVELS, math.fsum(part) / len(part)) for k, part in enumerate(by_level) if part)
        return HeadEvaluation(means["loss"], **kinds, gate=gate)

    def _scores(self, draw: Draw, x_theta: Tensor, x_phi: Tensor, r: Tensor) -> dict[str, float]:
        x0, places, found = draw.x0.to(self.device), draw.places.to(self.device), {}
        for name, x in {"theta": x_theta, "phi": x_phi, "mix": mix(x_theta, x_phi, r)}.items():
            found[f"l2 {name}"] = float((x - x0).square().mean())
            if self.metric is not None:
                found[f"metric {name}"] = float(self.metric(x, x0, places).mean())
        return found

    def examples(self, levels: Sequence[float] = (0.1, 0.35, 0.6, 0.85)) -> list[Example]:
        """A held-out picture at each of some ``levels``, for a preview."""
        found: dict[float, Example] = {}
        with self.loop.averaged():
            for draw, x_theta in self._fixed_draws():
                for k, percent in enumerate(draw.percent.tolist()):
                    level = next((v for v in levels if abs(percent - v) <= 0.5 / LEVELS), None)
                    if level is None or level in found:
                        continue
                    one = Draw([draw.indices[k]], *(t[k : k + 1] for t in draw[1:]))
                    _, x_phi, r, one, theta = self._parts(one, x_theta[k : k + 1].to(self.device))
                    kept = (v[0].cpu() for v in (theta, x_phi, mix(theta, x_phi, r), one.x0))
                    found[level] = Example(percent, float(r[0].mean()), *kept)
        return [found[level] for level in sorted(found)]

    def head(self, evaluation: HeadEvaluation | None = None, **details: str) -> Head:
        """What has been learned so far; ``details`` about the run are kept with it."""
        names = [name for name, _ in self.network.named_parameters()]
        weights = {name: value.detach().to("cpu", copy=True) for name, value in zip(names, self.loop.average)}
        own = {
            key: str(getattr(self.settings, key)) for key in ("batch_size", "learning_rate", "seed", "metric_weight")
        }
        if evaluation is not None:
            own["held_out_loss"] = f"{evaluation.loss:.6g}"
        facts = self.start.facts
        gate = facts.gate if evaluation is None else evaluation.gate
        facts = replace(facts, steps=self.loop.steps, gate=gate, details={**facts.details, **own, **details})
        return Head(self.start.config, weights, facts)


def _frames(draw: Draw, x_theta: Tensor) -> tuple[Draw, Tensor]:
    """The frames of video as samples of their own; pictures as they are."""
    if draw.x0.ndim == 4:
        return draw, x_theta
    count = draw.x0.shape[2]
    x0, x, x_theta = (rearrange(t, "b c t h w -> (b t) c h w") for t in (draw.x0, draw.x, x_theta))
    sigma, percent, places = (repeat(v, "b ... -> (b t) ...", t=count) for v in (draw.sigma, draw.percent, draw.places))
    return Draw([i for i in draw.indices for _ in range(count)], x0, x, sigma, percent, places), x_theta
