"""The run that trainings share: its steps, what ends them early, the moving average of the weights, the best of them.

The draws of a step depend on the seed and its number alone, so that a resumed run goes on with those that it would have
had, and several small batches accumulated are the same samples as one large one.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .finite import LastGood, NotFiniteError, all_finite

AfterStep = Callable[[int, float], None]  # steps done, loss


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train, whatever it is."""

    usual_rate: ClassVar[str]  # a learning_rate to try

    steps: int
    batch_size: int
    accumulation: int = 1  # batches per step
    learning_rate: float
    average: float = 0.999  # how much of the average weights stays at a step
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is less than 1; use at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate:g} is not a positive number; try {self.usual_rate}")
        if not 0.0 <= self.average < 1.0:
            raise ValueError(f"average {self.average:g} is not in 0 to below 1; 0 takes the weights as they are")

    @property
    def samples(self) -> int:
        """Of a step."""
        return self.batch_size * self.accumulation

    def rate(self, step: int) -> float:
        """Of step 0 to steps - 1: the learning rate."""
        raise NotImplementedError


class Trainer:
    """One run. ``losses`` and what a subclass makes of the weights are what there is so far, also after ``train`` was ended
    by an exception.

    A subclass has ``_gradient``.
    """

    clip: float | None = None  # of the gradient's norm, at most

    def __init__(
        self,
        settings,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        first_step: int = 0,
        followers: Sequence[Tensor] = (),
        buffers: Sequence[Tensor] = (),
    ):
        """``settings``: with steps, learning_rate and rate(step). ``parameters``: of what is handed out, among those of
        ``optimizer``.

        ``first_step``: steps behind them where the run begins. ``followers``, ``buffers``: what follows them and what else a
        step changes; with the parameters it goes back where a number is none.
        """
        self.settings, self.optimizer, self.first_step = settings, optimizer, first_step
        self.parameters, self.buffers = list(parameters), list(buffers)
        self.all_parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.done = 0  # steps of this run that the weights have seen
        self.losses: dict[str, list[float]] = {"loss": []}  # and of each part
        self.good = LastGood([*self.parameters, *followers, *self.buffers])

    @property
    def steps(self) -> int:
        """Steps behind the weights, with those of the run that was resumed."""
        return self.first_step + self.done

    def train(self, after_step: AfterStep) -> None:
        """Run the steps. ``after_step(done, loss)`` follows each; what it raises ends the run."""
        for step in range(self.settings.steps):
            parts = self._gradient(step)
            # not every step gives every weight a gradient
            gradients = [p.grad for p in self.all_parameters if p.grad is not None]
            self._check(step, "the loss or its gradient", [*parts.values(), *gradients, *self.buffers])
            self.good.keep(self.done)
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.all_parameters, self.clip)
            self.optimizer.param_groups[0]["lr"] = self.settings.rate(step)
            self.optimizer.step()
            self.done = step + 1
            self._check(step, "a weight", self.all_parameters)
            self._follow()
            for name, value in parts.items():
                self.losses.setdefault(name, []).append(float(value))
            after_step(self.done, self.losses["loss"][-1])

    def _gradient(self, step: int) -> dict[str, Tensor]:
        """The parts of the loss of a step, whose gradients the parameters hold then; "loss" is the whole."""
        raise NotImplementedError

    def _follow(self) -> None:
        """After each step."""

    def _check(self, step: int, what: str, values: Sequence[Tensor]) -> None:
        """Raise where a value is not finite, back at the last weights whose loss was."""
        if not all_finite(values):
            self.done = self.good.restore()
            raise NotFiniteError.at(what, step, self.settings.steps, self.settings.learning_rate)


@dataclass(frozen=True, eq=False)
class Best:
    """What is handed out as it was when it was examined, and how it did."""

    done: int  # steps of the run behind it
    kept: list[Tensor]  # on the CPU
    examined: Any  # with a loss


class AveragingTrainer(Trainer):
    """A run that hands out the moving average of the weights, with ``buffers`` as they are: the last, or where held-out
    pictures were looked at on the way, those that did best on them.

    A subclass has ``_batches``, ``_backward`` and ``_examine``.
    """

    settings: Training

    def __init__(
        self,
        settings: Training,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        first_step: int,
        buffers: Sequence[Tensor] = (),
        *,
        device: torch.device | str,
        precision: torch.dtype,
        recording: Callable[[], contextlib.AbstractContextManager],
    ):
        """``precision``: layers compute in it, by autocast; weights are float32. ``recording``: what the gradients of a
        batch are computed in.
        """
        self.device, self.precision, self.recording = torch.device(device), precision, recording
        self.average = [p.detach().clone() for p in parameters]
        super().__init__(settings, parameters, optimizer, first_step, self.average, buffers)
        self.resumed = first_step > 0
        self.best: Best | None = None  # of the weights of this run that were examined
        self._examined: tuple[int, Any] | None = None  # after so many steps; the last time

    def _gradient(self, step: int) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        parts = {}
        for number, batch in enumerate(self._batches(step)):
            with self.recording():
                own = self._backward(step, number, batch)
            for name, value in own.items():
                parts[name] = parts.get(name, 0.0) + value.detach() / self.settings.accumulation
        return parts

    def _batches(self, step: int) -> Iterable:
        """What ``_backward`` takes, as many as accumulate in a step, each made when it is asked for."""
        raise NotImplementedError

    def _backward(self, step: int, number: int, batch: Any) -> dict[str, Tensor]:
        """Add the gradients of batch ``number`` of a step, over ``accumulation``; the parts of its loss, undivided."""
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average; early in training it must not remember the beginning."""
        keep = min(self.settings.average, (1 + self.steps) / (10 + self.steps)) if self.settings.average else 0.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with its average weights, without gradients."""
        own = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
            try:
                yield
            finally:
                torch._foreach_copy_(self.parameters, own)

    def examine(self) -> Any:
        """How the average weights do on the held-out pictures, the same in every run; remembers the best."""
        if self._examined is None or self._examined[0] != self.done:
            self._examined = self.done, self._examine()
        done, examined = self._examined
        # a run never goes back to where it began: that is there already
        if done and examined.loss <= (math.inf if self.best is None else self.best.examined.loss):
            kept = [t.detach().to("cpu", copy=True) for t in (*self.average, *self.buffers)]
            self.best = Best(done, kept, examined)
        return examined

    @torch.no_grad()
    def settle(self) -> Any:
        """Examine the last weights; where earlier ones did better, go back to those. How the ones that it settled for do.

        After the run: from then on all else here is about these.
        """
        last = self.examine()
        if self.best is None or self.best.done == self.done:
            return last
        for ours, kept in zip((*self.average, *self.buffers), self.best.kept):
            ours.copy_(kept)
        self.done, self._examined = self.best.done, (self.best.done, self.best.examined)
        return self.best.examined

    def _examine(self) -> Any:
        """With a ``loss``: the lower, the better."""
        raise NotImplementedError


def weighted_means(rows: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Of each name, over rows of so many samples."""
    count = sum(n for n, _ in rows)
    return {name: math.fsum(n * row[name] for n, row in rows) / count for name in rows[0][1]}
