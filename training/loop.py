"""The loop that all trainings share: gradient accumulation, the moving average of the weights, the best checkpoint, and the
way back from a non-finite loss.

The random draws of a step depend on the seed and its number alone, so that a resumed run goes on with those that it would
have had, and several small batches accumulated are the same samples as one large one.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .finite import LastFiniteState, NotFiniteError, all_finite

AfterStep = Callable[[int, float], None]  # steps done, loss


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings that all trainings have; a subclass gives the usual learning_rate as its default."""

    steps: int
    batch_size: int
    gradient_accumulation: int = 1  # batches per step
    learning_rate: float
    ema_decay: float = 0.999  # decay of the moving average of the weights; 0: the weights themselves
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1; use at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            usual = type(self).learning_rate
            raise ValueError(f"learning_rate {self.learning_rate:g} is not a positive number; try {usual:g}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay {self.ema_decay:g} is not in 0 to below 1; 0 takes the weights as they are")

    def check_weights(self, *names: str) -> None:
        """Raise a ValueError unless these weights of parts of the loss are 0 or more."""
        for name in names:
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name):g} is not 0 or more; 0 switches it off")

    @property
    def samples(self) -> int:
        """Of a step."""
        return self.batch_size * self.gradient_accumulation

    def rate(self, step: int) -> float:
        """The learning rate of step 0 to steps - 1."""
        return self.learning_rate


@dataclass(frozen=True)
class Evaluation:
    """How weights do on samples that are the same in every run."""

    loss: float  # the lower, the better


E = TypeVar("E", bound=Evaluation)


@dataclass(frozen=True, eq=False)
class BestCheckpoint(Generic[E]):
    """The weights of the lowest evaluation so far."""

    done: int  # steps of the run behind them
    tensors: list[Tensor]  # average weights and buffers, on the CPU
    evaluation: E


@dataclass(kw_only=True, eq=False)
class TrainingLoop(Generic[E]):
    """What a training does in a step and how it is evaluated, and where it stands; ``train`` runs it.

    ``done``, ``losses`` and ``average`` are what there is so far, also after an exception ended ``train``.
    """

    settings: Training
    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]  # those handed out, among the optimizer's
    buffers: list[Tensor] = field(default_factory=list)  # handed out too, as they are; changed by steps
    batches: Callable[[int], Iterable]  # of a step of this run, as many as accumulate, each made when it is asked for
    # adds the gradients of batch number of a step, over accumulation; the parts of its loss, undivided, "loss" the whole
    backward: Callable[[int, int, Any], dict[str, Tensor]]  # step, number, batch
    measure: Callable[[], E]  # of the average weights
    recording: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around ``backward``
    clip: float | None = None  # the largest norm of a gradient
    keep_best: bool = True
    first_step: int = 0  # steps behind the weights when the run begins
    resumed: bool = False

    done: int = field(default=0, init=False)  # steps of this run that the weights have seen
    losses: dict[str, list[float]] = field(default_factory=lambda: {"loss": []}, init=False)  # and of each part
    best: BestCheckpoint[E] | None = field(default=None, init=False)
    average: list[Tensor] = field(init=False)  # of the parameters; they themselves where nothing is averaged
    last_finite: LastFiniteState = field(init=False)
    _evaluated: tuple[int, E] | None = field(default=None, init=False)  # after so many steps; the last time

    def __post_init__(self) -> None:
        averaged = self.settings.ema_decay > 0.0
        self.average = [p.detach().clone() for p in self.parameters] if averaged else self.parameters
        self.last_finite = LastFiniteState([*self.parameters, *(self.average if averaged else ()), *self.buffers])
        self.resumed = self.resumed or self.first_step > 0

    @property
    def steps(self) -> int:
        """Steps behind the weights, with those of the run that was resumed."""
        return self.first_step + self.done

    @property
    def trained(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradient(self, step: int) -> dict[str, Tensor]:
        """Compute the gradients of a step; the parts of its loss."""
        self.optimizer.zero_grad()
        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(self.batches(step)):
            with self.recording():
                own = self.backward(step, number, batch)
            for name, value in own.items():
                parts[name] = parts.get(name, 0.0) + value.detach() / self.settings.gradient_accumulation
        return parts

    def check(self, step: int, what: str, values: Sequence[Tensor]) -> None:
        """Raise a NotFiniteError where a value is not finite, after going back to the last finite state."""
        if not all_finite(values):
            self.done = self.last_finite.restore()
            raise NotFiniteError.at(what, step, self.settings.steps, self.settings.learning_rate)

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average; early in training it must not remember the beginning."""
        if self.average is not self.parameters:
            decay = min(self.settings.ema_decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network with its average weights, without gradients."""
        own = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, own)

    def evaluate(self) -> E:
        """Evaluate the average weights as they are now, once; remembers the best."""
        if self._evaluated is None or self._evaluated[0] != self.done:
            self._evaluated = self.done, self.measure()
        done, evaluation = self._evaluated
        lowest = math.inf if self.best is None else self.best.evaluation.loss
        # a run never goes back to where it began: that is there already
        if self.keep_best and done and evaluation.loss <= lowest:
            kept = [t.detach().to("cpu", copy=True) for t in (*self.average, *self.buffers)]
            self.best = BestCheckpoint(done, kept, evaluation)
        return evaluation

    @torch.no_grad()
    def restore_best(self) -> E:
        """Evaluate the last weights; where earlier ones did better, go back to those. The evaluation of what is kept.

        After the run: from then on all else here is about these weights.
        """
        last = self.evaluate()
        if self.best is None or self.best.done == self.done:
            return last
        for ours, kept in zip((*self.average, *self.buffers), self.best.tensors):
            ours.copy_(kept)
        self.done, self._evaluated = self.best.done, (self.best.done, self.best.evaluation)
        return self.best.evaluation


def train(loop: TrainingLoop, after_step: AfterStep) -> None:
    """Run the steps of ``loop``. ``after_step(done, loss)`` follows each; what it raises ends the run."""
    settings, optimizer, trained = loop.settings, loop.optimizer, loop.trained
    for step in range(settings.steps):
        parts = loop.gradient(step)
        # not every step gives every weight a gradient
        gradients = [p.grad for p in trained if p.grad is not None]
        loop.check(step, "the loss or its gradient", [*parts.values(), *gradients, *loop.buffers])
        loop.last_finite.keep(loop.done)
        if loop.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, loop.clip)
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.step()
        loop.done = step + 1
        loop.check(step, "a weight", trained)
        loop.update_average()
        for name, value in parts.items():
            loop.losses.setdefault(name, []).append(float(value))
        after_step(loop.done, loop.losses["loss"][-1])


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Layers compute in ``precision``; weights stay float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def weighted_means(rows: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each name over rows of so many samples."""
    count = sum(n for n, _ in rows)
    return {name: math.fsum(n * row[name] for n, row in rows) / count for name in rows[0][1]}
