"""Training loop with gradient accumulation, exponential moving average (EMA) of the weights, and best checkpoint.

After a non-finite loss it restores the last finite weights. The random numbers of a step depend only on the seed and
the step number. A resumed run therefore uses the same random numbers as an uninterrupted one, and several accumulated
small batches hold the same samples as one large batch.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .finite import LastFiniteState, NotFiniteError, read_if_finite

AfterStep = Callable[[int, float], None]  # steps done, loss


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings common to all trainings; a subclass sets the default learning_rate."""

    steps: int
    batch_size: int
    gradient_accumulation: int = 1  # batches per step
    learning_rate: float
    ema_decay: float = 0.999  # 0: no averaging
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1; use at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            usual = type(self).learning_rate
            raise ValueError(
                f"learning_rate {self.learning_rate:g} is not a finite number above 0; use for example {usual:g}"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(
                f"ema_decay {self.ema_decay:g} must be at least 0 and below 1; use 0.999, or 0 for no averaging"
            )

    def check_weights(self, *names: str) -> None:
        """Raise a ValueError unless the loss weights ``names`` are 0 or more."""
        for name in names:
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} {getattr(self, name):g} is not a finite number of at least 0; use 0 to switch it off"
                )

    @property
    def samples(self) -> int:
        """Samples per step."""
        return self.batch_size * self.gradient_accumulation

    def rate(self, step: int) -> float:
        """Learning rate of ``step``, 0 to steps - 1."""
        return self.learning_rate


@dataclass(frozen=True)
class Evaluation:
    """Result of evaluating weights on samples that are the same in every run."""

    loss: float  # lower is better


E = TypeVar("E", bound=Evaluation)


@dataclass(frozen=True, eq=False)
class BestCheckpoint(Generic[E]):
    """Weights with the lowest evaluation loss so far."""

    done: int  # steps of this run that the weights were trained for
    tensors: list[Tensor]  # EMA weights and buffers, on the CPU
    evaluation: E


@dataclass(kw_only=True, eq=False)
class TrainingLoop(Generic[E]):
    """Callbacks and state of a training; ``train`` runs it.

    ``done``, ``losses`` and ``average`` are valid at any time, also after an exception ended ``train``.
    """

    settings: Training
    optimizer: torch.optim.Optimizer
    # parameters of the network that the training produces; the optimizer may have more, such as those of a discriminator
    parameters: list[Tensor]
    # buffers of that network that training steps change; they are not averaged
    buffers: list[Tensor] = field(default_factory=list)
    batches: Callable[[int], Iterable]  # yields the gradient_accumulation batches of a step of this run
    # (step, number of the batch in the step, batch) -> the batch's loss under the key "loss", and its parts by name.
    # Adds the gradients of the loss, divided by gradient_accumulation, to the gradients of the parameters
    backward: Callable[[int, int, Any], dict[str, Tensor]]
    measure: Callable[[], E]  # evaluates the EMA weights
    recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # context of ``backward``
    clip: float | None = None  # maximum gradient norm
    keep_best: bool = True  # whether evaluations update ``best``
    first_step: int = 0  # steps that the weights were trained for before this run
    resumed: bool = False  # whether this run continues another

    done: int = field(default=0, init=False)  # steps of this run that the weights were trained for
    losses: dict[str, list[float]] = field(default_factory=lambda: {"loss": []}, init=False)  # of each step, by name
    best: BestCheckpoint[E] | None = field(default=None, init=False)
    average: list[Tensor] = field(init=False)  # EMA of the parameters; the parameters themselves if EMA is off
    last_finite: LastFiniteState = field(init=False)
    _evaluated: tuple[int, E] | None = field(default=None, init=False)  # steps done and result of the last evaluation

    def __post_init__(self) -> None:
        averaged = self.settings.ema_decay > 0.0
        self.average = [p.detach().clone() for p in self.parameters] if averaged else self.parameters
        self.last_finite = LastFiniteState([*self.parameters, *(self.average if averaged else ()), *self.buffers])
        self.resumed = self.resumed or self.first_step > 0

    @property
    def steps(self) -> int:
        """Total steps that the weights were trained for, including those before a resumed run."""
        return self.first_step + self.done

    @property
    def trained(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradient(self, step: int) -> dict[str, Tensor]:
        """Compute the gradients of a step; returns the parts of its loss, averaged over the accumulated batches."""
        self.optimizer.zero_grad()
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches(step)):
            with self.recording():
                batch_parts = self.backward(step, number, batch)
            for name, value in batch_parts.items():
                parts[name] = parts.get(name, 0.0) + value.detach() / self.settings.gradient_accumulation
        return parts

    def check(self, step: int, what: str, values: Sequence[Tensor], numbers: Sequence[Tensor] = ()) -> list[float]:
        """Restore the last finite state and raise a NotFiniteError if one of ``values`` is not finite.

        Returns ``numbers``, tensors of one element, as floats. The device is read once for the check and the numbers.
        """
        read = read_if_finite(values, numbers)
        if read is None:
            self.done = self.last_finite.restore()
            raise NotFiniteError.at(what, step, self.settings.steps, self.settings.learning_rate)
        return read

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the EMA, with a smaller decay in early steps so that the initial weights do not dominate."""
        if self.average is not self.parameters:
            decay = min(self.settings.ema_decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the network has its EMA weights, without gradients."""
        current = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, current)

    def evaluate(self) -> E:
        """Evaluate the current EMA weights, at most once per step, and update the best checkpoint."""
        if self._evaluated is None or self._evaluated[0] != self.done:
            self._evaluated = self.done, self.measure()
        done, evaluation = self._evaluated
        lowest = math.inf if self.best is None else self.best.evaluation.loss
        # the initial weights are not a checkpoint of this run
        if self.keep_best and done and evaluation.loss <= lowest:
            tensors = [t.detach().to("cpu", copy=True) for t in (*self.average, *self.buffers)]
            self.best = BestCheckpoint(done, tensors, evaluation)
        return evaluation

    @torch.no_grad()
    def restore_best(self) -> E:
        """Evaluate the last weights and restore the best checkpoint if it is better; returns the evaluation.

        Call it after the run; ``done`` and ``average`` then belong to the restored weights.
        """
        last = self.evaluate()
        if self.best is None or self.best.done == self.done:
            return last
        for current, best in zip((*self.average, *self.buffers), self.best.tensors):
            current.copy_(best)
        self.done, self._evaluated = self.best.done, (self.best.done, self.best.evaluation)
        return self.best.evaluation


def train(loop: TrainingLoop, after_step: AfterStep) -> None:
    """Run the steps of ``loop`` and call ``after_step(done, loss)`` after each step.

    An exception in ``after_step`` ends the run.
    """
    settings, optimizer, trained = loop.settings, loop.optimizer, loop.trained
    for step in range(settings.steps):
        parts = loop.gradient(step)
        # a parameter may have no gradient in some steps
        gradients = [p.grad for p in trained if p.grad is not None]
        values = [*parts.values(), *gradients, *loop.buffers]
        losses = loop.check(step, "the loss or its gradient", values, list(parts.values()))
        loop.last_finite.keep(loop.done)
        if loop.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, loop.clip)
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.step()
        loop.done = step + 1
        loop.check(step, "a weight", trained)
        loop.update_average()
        for name, value in zip(parts, losses, strict=True):
            loop.losses.setdefault(name, []).append(value)
        after_step(loop.done, loop.losses["loss"][-1])


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Autocast of layers to ``precision``; weights stay float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def weighted_means(rows: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Mean of each named value over rows (number of samples, values), weighted by the number of samples."""
    count = sum(n for n, _ in rows)
    return {name: math.fsum(n * row[name] for n, row in rows) / count for name in rows[0][1]}
