"""What a saliency blend did in its last run: who painted where at each step, and what it cost."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlendStep:
    """One blended prediction. ``models`` are the indices (0 = base) that took part, in the order of ``weights``."""

    sigma: float
    models: tuple[int, ...]
    weights: Tensor | None  # as kernels.saliency_blend.Blend.weights; None where the base painted alone

    def shares(self, num_models: int) -> Tensor:
        """Weight of every model at every position: float32 [num_models, B, *spatial] on the CPU."""
        owner = self.weights
        assert owner is not None  # else the base owns everything, see BlendRecord.shares
        if owner.dtype == torch.uint8:
            owner = torch.stack([owner == i for i in range(len(self.models))]).float()
        full = torch.zeros(num_models, *owner.shape[1:])
        full[list(self.models)] = owner
        return full


@dataclass
class BlendRecord:
    """One sampling run. Steps are the sampler's own calls in order; a second-order sampler makes two per step."""

    labels: tuple[str, ...]  # the base first
    shape: tuple[int, ...]  # [B, *spatial] of the latent
    seed: int | None
    notes: tuple[str, ...] = ()
    steps: list[BlendStep] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)  # evaluations (conditional and unconditional) per model
    saved: list[int] = field(default_factory=list)  # calls answered without one
    cost: list[float] = field(default_factory=list)  # the evaluations in whole latents: a cropped one is less than 1
    output: Tensor | None = None  # the finished latent, to tell whose picture this is

    def shares(self, index: int) -> Tensor:
        """Shares [num_models, B, *spatial] of step ``index``; the base owns everything where it painted alone."""
        step = self.steps[index]
        if step.weights is None:
            full = torch.zeros(len(self.labels), *self.shape)
            full[0] = 1.0
            return full
        return step.shares(len(self.labels))

    def belongs_to(self, samples: Tensor) -> bool:
        """Whether ``samples`` are the latent this run finished with."""
        mine = self.output
        return mine is not None and mine.shape == samples.shape and torch.equal(mine.to(samples.dtype), samples.cpu())

    def mean_shares(self, blended_only: bool = False) -> Tensor:
        """Mean share of every model at every position over the run: [num_models, B, *spatial]."""
        chosen = [i for i, s in enumerate(self.steps) if s.weights is not None or not blended_only]
        if not chosen:
            chosen = range(len(self.steps))
        return torch.stack([self.shares(i) for i in chosen]).mean(0)

    def report(self) -> str:
        """Shares in percent by label, forward passes spent and saved, and what else a user should know."""
        blended = sum(s.weights is not None for s in self.steps)
        lines = [f"{len(self.steps)} predictions, {blended} of them blended, seed {self.seed}"]
        over_run, over_window = (self.mean_shares(b).flatten(1).mean(1) for b in (False, True))
        for i, label in enumerate(self.labels):
            cropped = f" (cropped: the cost of {self.cost[i]:.1f})" if self.cost[i] < self.spent[i] else ""
            lines.append(
                f"{label}: {100 * over_run[i]:.1f} % of the picture over the whole run"
                f" ({100 * over_window[i]:.1f} % while blending),"
                f" {self.spent[i]} evaluations{cropped}, {self.saved[i]} saved"
            )
        return "\n".join([*lines, *self.notes])


class BlendTrace:
    """Filled by the runs of one blended model; holds the last one that finished."""

    def __init__(self) -> None:
        self.record: BlendRecord | None = None

    def clear(self) -> None:
        self.record = None

    def finish(self, record: BlendRecord) -> None:
        self.record = record
