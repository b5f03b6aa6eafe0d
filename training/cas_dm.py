"""Trains φ, the head of a cascade, on a frozen model θ that is asked once for every noisy picture.

Cas-DM (arXiv 2401.02414), a reconstruction; ``techniques.cas_dm`` has the losses. θ is a callable and gets no gradient:
neither its weights nor its input are touched, so it may be a whole host's guided prediction.

The draws of a step depend on the seed and its number alone, so that a resumed run goes on with those that it would have
had, and several small batches accumulated are the same samples as one large one. What is handed out is the moving average
of the weights.

Shapes: B samples, C channels, h and w positions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..networks.cas_dm_head import Head
from ..techniques.cas_dm import losses, mix, predict, total
from .cas_dm_data import LEVELS, Draw, Latents
from .masked_token_lora import NotFiniteError

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 1e-2, 1.0
WARM_UP = 100  # steps of rising learning rate, at most a tenth of the run
GATE_WEIGHTS = ("even", "paper")

Theta = Callable[[Tensor, Tensor, Sequence[int]], Tensor]  # x_t, sigma [B], the pictures' numbers -> x̂_θ
LatentMetric = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_φ, x0, places [B, 2] -> [B]; frames of video one by one
AfterStep = Callable[[int, float], None]  # steps done, loss


@dataclass(frozen=True, kw_only=True)
class CasDMTraining:
    """How to train. The papers weigh L2 and the gate's loss with 1; the metric's weight is not known."""

    steps: int = 1000
    batch_size: int = 8
    accumulation: int = 1  # batches per step
    learning_rate: float = 3e-4
    metric_weight: float = 0.1
    gate_weights: str = "even"  # the same for the gate's loss at every level, or the papers' A_t²
    average: float = 0.999  # how much of the average weights stays at a step
    seed: int = 0
    cached_steps: int = 0  # ask θ for that many steps beforehand and use them in turn; 0: ask at every step

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1; use at least 1")
        if self.cached_steps < 0:
            raise ValueError(f"cached_steps {self.cached_steps} is negative; use 0 to cache nothing")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate:g} is not a positive number; try 3e-4")
        if not 0.0 <= self.metric_weight < math.inf:
            raise ValueError(f"metric_weight {self.metric_weight:g} is not 0 or more; 0 switches the metric off")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average {self.average:g} is not in 0 to below 1; 0 takes the weights as they are")
        if self.gate_weights not in GATE_WEIGHTS:
            raise ValueError(f"gate_weights '{self.gate_weights}' is not one of {', '.join(GATE_WEIGHTS)}")


@dataclass(frozen=True)
class Examined:
    """How a head does on fixed noisy pictures: means over them, of θ alone, of x_φ alone and of the mix."""

    loss: float  # what is trained on
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
    """One run. ``losses`` and ``head()`` are what there is so far, also after ``train`` was ended by an exception."""

    def __init__(
        self,
        head: Head,
        latents: Latents,
        x0_theta: Theta,
        settings: CasDMTraining,
        metric: LatentMetric | None = None,
        device: torch.device | str = "cpu",
        precision: torch.dtype | None = None,
        recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """``head``: where to begin; its ``facts.steps`` are behind it. ``precision``: autocast φ to it; None: float32.

        ``recording``: what a metric's gradient is computed in, if it needs that; θ is asked outside of it.
        """
        shapes = {shape for shape in latents.buckets if shape[0] != head.config.channels}
        if shapes:
            raise ValueError(
                f"the head repaints latents of {head.config.channels} channels, these have {shapes.pop()[0]}; use a head"
                " and latents of one model"
            )
        self.start, self.latents, self.x0_theta, self.settings = head, latents, x0_theta, settings
        self.metric = metric if settings.metric_weight else None
        self.device, self.precision, self.recording = torch.device(device), precision, recording
        self.network = head.network().to(self.device).train().requires_grad_(True)
        self.parameters = list(self.network.parameters())
        self.average = self._copy()
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.done = 0  # steps of this run that the weights have seen
        self.losses: dict[str, list[float]] = {"loss": []}  # and of each part
        self.good = 0, self._copy(), self._copy()
        self._cache: dict[int, list[Tensor]] = {}
        self._fixed: list[tuple[Draw, Tensor]] | None = None

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @property
    def first_step(self) -> int:
        return self.start.facts.steps

    @property
    def steps(self) -> int:
        """Steps behind the weights, with those of the run that was resumed."""
        return self.first_step + self.done

    def train(self, after_step: AfterStep) -> None:
        """Run the steps. ``after_step(done, loss)`` follows each; what it raises ends the run."""
        settings = self.settings
        for step in range(settings.steps):
            parts = self._gradient(step)
            self._check(step, "the loss or its gradient", [*parts.values(), *(p.grad for p in self.parameters)])
            self.good = self.done, self._copy(), [a.clone() for a in self.average]
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            warm_up = max(1, min(WARM_UP, settings.steps // 10))
            self.optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1.0, (step + 1) / warm_up)
            self.optimizer.step()
            self.done = step + 1
            self._check(step, "a weight", self.parameters)
            self._follow()
            for name, value in parts.items():
                self.losses.setdefault(name, []).append(float(value))
            after_step(self.done, self.losses["loss"][-1])

    def _gradient(self, step: int) -> dict[str, Tensor]:
        """The parts of the loss of a step, whose gradient the parameters hold then."""
        self.optimizer.zero_grad()
        batches, parts = self.draw(step).split(self.settings.batch_size), {}
        for batch, x_theta in zip(batches, self._predictions(step, batches)):
            with self.recording():
                own, *_ = self._parts(batch, x_theta)
                loss = self._total(own)
                (loss / len(batches)).backward()
            for name, value in {"loss": loss, **{k: v.mean() for k, v in own.items()}}.items():
                parts[name] = parts.get(name, 0.0) + value.detach() / len(batches)
        return parts

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return total(parts, metric_weight=self.settings.metric_weight)

    def _parts(self, draw: Draw, x_theta: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Draw, Tensor]:
        """The parts of the loss, x_φ, r, and what they were made of, frame by frame."""
        draw, x_theta = _frames(draw, x_theta)
        x0, x, sigma, places = (t.to(self.device) for t in (draw.x0, draw.x, draw.sigma, draw.places))
        process, weight = self.latents.process, 1.0
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            x_phi, r = predict(self.network, x_theta, x, sigma, flow=process.flow, noise_scale=process.noise_scale)
        if self.settings.gate_weights == "paper":
            weight = process.posterior_weight(draw.percent).to(self.device)
        metric = None if self.metric is None else lambda a, b: self.metric(a, b, places)
        x_phi, r = x_phi.float(), r.float()
        return losses(x0, x_theta, x_phi, r, metric=metric, gate_weight=weight), x_phi, r, draw, x_theta

    def draw(self, step: int) -> Draw:
        """The samples of a step of this run."""
        if self.settings.cached_steps:
            step %= self.settings.cached_steps
        count = self.settings.batch_size * self.settings.accumulation
        return self.latents.draw(self.settings.seed, self.first_step + step, count)

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

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average; early in training it must not remember the beginning."""
        keep = min(self.settings.average, (1 + self.steps) / (10 + self.steps)) if self.settings.average else 0.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def _check(self, step: int, what: str, values: Sequence[Tensor]) -> None:
        """Raise where a value is not finite, back at the last weights whose loss was."""
        values = [value for value in values if value is not None]  # a fixed gate leaves some without a gradient
        if bool(torch.stack([value.abs().amax() for value in values]).isfinite().all()):
            return
        self.done, *good = self.good
        for ours, kept in zip((self.parameters, self.average), good):
            torch._foreach_copy_(ours, kept)
        raise NotFiniteError(
            f"{what} is NaN or infinite at step {step + 1} of {self.settings.steps};"
            f" lower the learning rate, {self.settings.learning_rate:g}"
        )

    def _fixed_draws(self) -> list[tuple[Draw, Tensor]]:
        """The draws that are looked at before and after, with θ's answers, which do not change."""
        if self._fixed is None:
            batches = [batch for draw in self.latents.fixed() for batch in draw.split(self.settings.batch_size)]
            self._fixed = [(batch, self._ask(batch).cpu()) for batch in batches]
        return self._fixed

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with its average weights."""
        own = self._copy()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, own)

    def examine(self) -> Examined:
        """How the head as it is handed out does on the held-out pictures, the same noisy ones in every run."""
        rows, by_level = [], [[] for _ in range(LEVELS)]
        with self._averaged():
            for draw, x_theta in self._fixed_draws():
                parts, x_phi, r, draw, x_theta = self._parts(draw, x_theta.to(self.device))
                rows.append((len(draw.x0), self._scores(draw, x_theta, x_phi, r) | {"loss": float(self._total(parts))}))
                for percent, mean in zip(draw.percent.tolist(), r.flatten(1).mean(1).expand(len(draw.x0)).tolist()):
                    by_level[min(int(percent * LEVELS), LEVELS - 1)].append(mean)
        count = sum(n for n, _ in rows)
        means = {name: math.fsum(n * row[name] for n, row in rows) / count for name in rows[0][1]}
        kinds = {
            kind: {name.split()[1]: value for name, value in means.items() if name.startswith(kind)}
            for kind in ("l2", "metric")
        }
        gate = tuple(((k + 0.5) / LEVELS, math.fsum(part) / len(part)) for k, part in enumerate(by_level) if part)
        return Examined(means["loss"], **kinds, gate=gate)

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
        with self._averaged():
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

    def head(self, examined: Examined | None = None, **details: str) -> Head:
        """What has been learned so far; ``details`` about the run are kept with it."""
        names = [name for name, _ in self.network.named_parameters()]
        weights = {name: value.detach().to("cpu", copy=True) for name, value in zip(names, self.average)}
        own = {
            key: str(getattr(self.settings, key)) for key in ("batch_size", "learning_rate", "seed", "metric_weight")
        }
        if examined is not None:
            own["held_out_loss"] = f"{examined.loss:.6g}"
        facts = self.start.facts
        gate = facts.gate if examined is None else examined.gate
        facts = replace(facts, steps=self.steps, gate=gate, details={**facts.details, **own, **details})
        return Head(self.start.config, weights, facts)


def _frames(draw: Draw, x_theta: Tensor) -> tuple[Draw, Tensor]:
    """The frames of video as samples of their own; pictures as they are."""
    if draw.x0.ndim == 4:
        return draw, x_theta
    count = draw.x0.shape[2]
    x0, x, x_theta = (t.movedim(2, 1).flatten(0, 1) for t in (draw.x0, draw.x, x_theta))
    sigma, percent, places = (t.repeat_interleave(count, 0) for t in (draw.sigma, draw.percent, draw.places))
    return Draw([i for i in draw.indices for _ in range(count)], x0, x, sigma, percent, places), x_theta


def report(trainer: CasDMTrainer, before: Examined, after: Examined, metric: str = "metric") -> str:
    """What a run did, in a few lines for people."""
    settings, latents = trainer.settings, trainer.latents
    weights = sum(p.numel() for p in trainer.parameters)
    resumed = f", resumed at step {trainer.first_step}" if trainer.first_step else ""
    which = (
        f"{len(latents.held)} held-out pictures"
        if latents.unseen
        else "the training pictures: too few to hold some out"
    )
    verdict = "it learned" if after.loss < before.loss else "it did NOT learn: use more steps or another learning rate"
    lines = [
        f"{trainer.done} steps of {settings.batch_size} x {settings.accumulation} at learning rate"
        f" {settings.learning_rate:g}, seed {settings.seed}{resumed}",
        f"{weights} weights, {len(latents.trained)} latents of {len(latents.buckets)} size(s)",
        f"loss on {which}: {before.loss:.5f} before, {after.loss:.5f} after: {verdict}",
        _line("squared distance to the truth", after.l2),
    ]
    if after.metric:
        lines.append(_line(metric, after.metric))
    gates = ", ".join(f"{percent:.0%}: {r:.2f}" for percent, r in after.gate)
    lines.append(f"r, the share of the head, over the sampling: {gates}")
    if after.l2["mix"] >= after.l2["theta"]:
        lines.append("the mix is no nearer to the truth than the model alone: train longer before using it")
    return "\n".join(lines)


def _line(what: str, values: dict[str, float]) -> str:
    theta, phi, mixed = (values[name] for name in ("theta", "phi", "mix"))
    return f"{what}: model {theta:.5f}, head alone {phi:.5f}, mix {mixed:.5f}"
