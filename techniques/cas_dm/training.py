"""Trains φ, the head of a cascade. The frozen model θ predicts once for each noisy image.

Cas-DM (arXiv 2401.02414), reimplemented without public code; see mix.py for the losses. θ is any callable. No gradient
passes to its weights or its input, so that θ can be ComfyUI's guided prediction.

Shapes: B samples, C channels, h and w positions.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from ...common.finite import WIDER_DTYPE, DeferredChecks
from ...common.settings import check_choice
from ...training.finite import NotFiniteError
from ...training.loop import Evaluation, Training, TrainingLoop, autocast, weighted_means
from .mix import losses, mix, predict, total
from .network import Head
from .training_data import LEVELS, Latents, NoisyBatch

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 1e-2, 1.0  # of AdamW; CLIP is the maximum gradient norm
WARM_UP = 100  # steps of learning rate warm-up, at most a tenth of the run
GATE_WEIGHTS = ("even", "paper")

Theta = Callable[[Tensor, Tensor, Sequence[int]], Tensor]  # x_t, sigma [B], indices of the images -> x̂_θ
# x_φ, x0, crop positions [B, 2] -> [B]; each video frame is a sample
LatentMetric = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class CasDMTraining(Training):
    """Settings of a training.

    The papers (see mix.py) use weight 1 for L2 and the gate loss; the weight of the metric is unpublished.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 3e-4
    metric_weight: float = 1.0
    gate_weights: str = "even"  # weight of the gate loss. even: 1 at every noise level; paper: A_t² of mix.py
    cached_steps: int = 0  # number of steps with precomputed predictions of θ, which repeat cyclically; 0: no cache

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cached_steps < 0:
            raise ValueError(f"cached_steps {self.cached_steps} is negative; use 0 for no cache")
        self.check_weights("metric_weight")
        check_choice("gate_weights", self.gate_weights, GATE_WEIGHTS)

    def rate(self, step: int) -> float:
        warm_up = max(1, min(WARM_UP, self.steps // 10))
        return self.learning_rate * min(1.0, (step + 1) / warm_up)


@dataclass(frozen=True)
class HeadEvaluation(Evaluation):
    """Means over the validation batches, for θ alone, x_φ alone and their mix."""

    l2: dict[str, float]  # mean squared error to x0, by "theta", "phi", "mix"
    metric: dict[str, float] = field(default_factory=dict)  # distance by the metric, if there is one
    gate: tuple[tuple[float, float], ...] = ()  # (percent of the sampling in 0..1, mean r)


@dataclass(frozen=True)
class Example:
    """The predictions for one noisy image, tensors [C, h, w]; for a video, those for its first frame."""

    percent: float
    r: float
    x_theta: Tensor
    x_phi: Tensor
    mixed: Tensor
    x0: Tensor


class CasDMTrainer:
    """Trains a head through ``loop``; ``head()`` returns a head with the current EMA weights."""

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
        """``head``: initial weights; training resumes after its ``facts.steps``. ``precision``: autocast dtype of φ.

        ``recording``: context of the forward and backward pass through the metric; θ predicts outside of this context.
        """
        shapes = {shape for shape in latents.buckets if shape[0] != head.config.channels}
        if shapes:
            raise ValueError(
                f"expected latents of {head.config.channels} channels for this head, got {shapes.pop()[0]}; use a head"
                " and latents of the same model"
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
        self._checks = DeferredChecks()  # of θ's predictions
        self._cache: dict[int, list[Tensor]] = {}
        self._validation: list[tuple[NoisyBatch, Tensor]] | None = None

    def _batches(self, step: int) -> Iterator[tuple[NoisyBatch, Tensor]]:
        """The batches of a step, each with θ's prediction."""
        batches = self.noisy_batch(step).split(self.settings.batch_size)
        return zip(batches, self._predictions(step, batches))

    def _backward(self, step: int, number: int, batch: tuple[NoisyBatch, Tensor]) -> dict[str, Tensor]:
        parts, *_ = self._parts(*batch)
        loss = self._total(parts)
        (loss / self.settings.gradient_accumulation).backward()
        self._checks.flush()  # waits only for θ's predictions, which the device has computed long before the backward pass
        return {"loss": loss, **{name: value.mean() for name, value in parts.items()}}

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        return total(parts, metric_weight=self.settings.metric_weight)

    def _parts(
        self, batch: NoisyBatch, x_theta: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, NoisyBatch, Tensor]:
        """Loss parts, x_φ and r, and also the batch and θ's prediction, in which each video frame is a sample."""
        batch, x_theta = _split_frames(batch, x_theta)
        x0, x, sigma = (t.to(self.device) for t in (batch.x0, batch.x, batch.sigma))
        positions = batch.positions  # stay on the CPU, since crops are cut at Python numbers
        process, weight = self.latents.process, 1.0
        with autocast(self.device, self.precision):
            x_phi, r = predict(self.network, x_theta, x, sigma, flow=process.flow, noise_scale=process.noise_scale)
        if self.settings.gate_weights == "paper":
            weight = process.posterior_weight(batch.percent).to(self.device)
        distance = self.metric
        metric = None if distance is None else lambda a, b: distance(a, b, positions)
        x_phi, r = x_phi.float(), r.float()
        return losses(x0, x_theta, x_phi, r, metric=metric, gate_weight=weight), x_phi, r, batch, x_theta

    def noisy_batch(self, step: int) -> NoisyBatch:
        """The noisy samples of a step of this run. With a cache they repeat after ``cached_steps`` steps."""
        if self.settings.cached_steps:
            step %= self.settings.cached_steps
        return self.latents.noisy_batch(self.settings.seed, self.loop.first_step + step, self.settings.samples)

    def _predictions(self, step: int, batches: list[NoisyBatch]) -> Iterator[Tensor]:
        if self.settings.cached_steps == 0:
            return (self._predict_theta(batch) for batch in batches)
        step %= self.settings.cached_steps
        if step not in self._cache:
            self._cache[step] = [self._predict_theta(batch).cpu() for batch in batches]
        return (x_theta.to(self.device) for x_theta in self._cache[step])

    @torch.no_grad()
    def _predict_theta(self, batch: NoisyBatch) -> Tensor:
        result = self.x0_theta(batch.x.to(self.device), batch.sigma.to(self.device), batch.indices)
        result = result.detach().to(self.device, torch.float32)
        # 0 times a finite number is 0, and 0 times any other is NaN
        self._checks.add((0.0 * result).sum().view(1), functools.partial(_check_theta, batch.sigma))
        return result

    def cache_predictions(self, progress: Callable[[int, int], None] = lambda done, count: None) -> None:
        """Fill the cache, if there is one, with all predictions that the run needs. θ is not called afterwards."""
        count = min(self.settings.cached_steps, self.settings.steps)
        if count:
            self._validation_predictions()
        for step in range(count):
            list(self._predictions(step, self.noisy_batch(step).split(self.settings.batch_size)))
            self._checks.flush()
            progress(step + 1, count)

    def _validation_predictions(self) -> list[tuple[NoisyBatch, Tensor]]:
        """The validation batches with θ's predictions, computed once."""
        if self._validation is None:
            batches = [
                batch for batch in self.latents.validation_batches() for batch in batch.split(self.settings.batch_size)
            ]
            self._validation = [(batch, self._predict_theta(batch).cpu()) for batch in batches]
            self._checks.flush()
        return self._validation

    def _measure(self) -> HeadEvaluation:
        rows, gate_by_level = [], [[] for _ in range(LEVELS)]
        with self.loop.averaged():
            for batch, x_theta in self._validation_predictions():
                parts, x_phi, r, batch, x_theta = self._parts(batch, x_theta.to(self.device))
                rows.append(
                    (len(batch.x0), self._scores(batch, x_theta, x_phi, r) | {"loss": float(self._total(parts))})
                )
                for percent, mean in zip(batch.percent.tolist(), r.flatten(1).mean(1).expand(len(batch.x0)).tolist()):
                    gate_by_level[min(int(percent * LEVELS), LEVELS - 1)].append(mean)
        means = weighted_means(rows)
        kinds = {
            kind: {name.split()[1]: value for name, value in means.items() if name.startswith(kind)}
            for kind in ("l2", "metric")
        }
        gate = tuple(((k + 0.5) / LEVELS, math.fsum(part) / len(part)) for k, part in enumerate(gate_by_level) if part)
        return HeadEvaluation(means["loss"], **kinds, gate=gate)

    def _scores(self, batch: NoisyBatch, x_theta: Tensor, x_phi: Tensor, r: Tensor) -> dict[str, float]:
        x0, positions, result = batch.x0.to(self.device), batch.positions, {}
        for name, x in {"theta": x_theta, "phi": x_phi, "mix": mix(x_theta, x_phi, r)}.items():
            result[f"l2 {name}"] = float((x - x0).square().mean())
            if self.metric is not None:
                result[f"metric {name}"] = float(self.metric(x, x0, positions).mean())
        return result

    def examples(self, levels: Sequence[float] = (0.1, 0.35, 0.6, 0.85)) -> list[Example]:
        """For a preview: the predictions for one validation image near each of the ``levels``."""
        examples: dict[float, Example] = {}
        with self.loop.averaged():
            for batch, x_theta in self._validation_predictions():
                for k, percent in enumerate(batch.percent.tolist()):
                    level = next((v for v in levels if abs(percent - v) <= 0.5 / LEVELS), None)
                    if level is None or level in examples:
                        continue
                    one = NoisyBatch([batch.indices[k]], *(t[k : k + 1] for t in batch[1:]))
                    _, x_phi, r, one, theta = self._parts(one, x_theta[k : k + 1].to(self.device))
                    tensors = (v[0].cpu() for v in (theta, x_phi, mix(theta, x_phi, r), one.x0))
                    examples[level] = Example(percent, float(r[0].mean()), *tensors)
        return [examples[level] for level in sorted(examples)]

    def head(self, evaluation: HeadEvaluation | None = None, **details: str) -> Head:
        """The head with the current EMA weights; ``details`` of the run are stored in its facts."""
        names = [name for name, _ in self.network.named_parameters()]
        weights = {name: value.detach().to("cpu", copy=True) for name, value in zip(names, self.loop.average)}
        run_details = {
            key: str(getattr(self.settings, key)) for key in ("batch_size", "learning_rate", "seed", "metric_weight")
        }
        if evaluation is not None:
            run_details["held_out_loss"] = f"{evaluation.loss:.6g}"
        facts = self.start.facts
        gate = facts.gate if evaluation is None else evaluation.gate
        facts = replace(facts, steps=self.loop.steps, gate=gate, details={**facts.details, **run_details, **details})
        return Head(self.start.config, weights, facts)


def _check_theta(sigma: Tensor, finite: list[bool]) -> None:
    if not all(finite):
        raise NotFiniteError(
            f"the prediction of the model is not finite (NaN or infinite) at sigma {float(sigma.min()):.3g} to"
            f" {float(sigma.max()):.3g}; {WIDER_DTYPE}"
        )


def _split_frames(batch: NoisyBatch, x_theta: Tensor) -> tuple[NoisyBatch, Tensor]:
    """Turn each frame of a video into a separate sample; images are returned unchanged."""
    if batch.x0.ndim == 4:
        return batch, x_theta
    count = batch.x0.shape[2]
    x0, x, x_theta = (rearrange(t, "b c t h w -> (b t) c h w") for t in (batch.x0, batch.x, x_theta))
    sigma, percent, positions = (
        repeat(v, "b ... -> (b t) ...", t=count) for v in (batch.sigma, batch.percent, batch.positions)
    )
    return NoisyBatch([i for i in batch.indices for _ in range(count)], x0, x, sigma, percent, positions), x_theta
