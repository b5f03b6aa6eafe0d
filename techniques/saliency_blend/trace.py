"""The record of a run of the blend: the masks of every step, the leads of the experts, and the cost.

The lead of an expert is its score minus the base's score, see ``kernels.saliency_blend``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.shapes import named_samples
from ...kernels.saliency_blend import Blend, lead

# The share of positions from which the report recommends to keep the first mask. Of the demo checkpoints, whose images
# are much better with it (BENCHMARKS.md), 49 % of the positions change at each step with the default settings.
MANY_FLIPS = 0.4
LEAD_STEPS = 16  # leads are recorded in one byte, in sixteenths of the spread, from -8 to 8 times the spread


def quantised(leads: Tensor) -> Tensor:
    """``leads``, in units of the spread, as int8 numbers n such that the lead is in (n / 16, (n + 1) / 16].

    n is at least 0 if and only if the lead is above 0.
    """
    return (leads * LEAD_STEPS).ceil_().sub_(1.0).clamp_(-128, 127).to(torch.int8)


def middle(leads: Tensor) -> Tensor:
    """The leads, in units of the spread, from the output of ``quantised``: the middle of each interval."""
    return (leads.float() + 0.5) / LEAD_STEPS


def shown(maps: Tensor) -> Tensor:
    """``maps`` [..., H, W] to look at: those of one row, such as of audio, become bands a sixth as high as they are
    long."""
    return maps if maps.shape[-2] > 1 else maps.expand(*maps.shape[:-2], max(1, maps.shape[-1] // 6), -1)


class LeadRecorder:
    """The leads of the steps of a run. Steps with few values are quantised together at the end."""

    deferred = 1 << 16  # largest number of values in a step for which quantisation waits until the end of the run

    def __init__(self) -> None:
        self._raw: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # logits, partition and spread of a Blend, by step
        self._done: dict[int, Tensor] = {}
        self._partitions: dict[int, Tensor] = {}  # [N, B T] of a Blend, by step

    def add(self, index: int, blend: Blend) -> None:
        """Store the leads of step ``index`` from its ``blend``."""
        self._partitions[index] = blend.partition
        if blend.logits.numel() > self.deferred:
            self._done[index] = quantised(blend.lead())
        else:
            self._raw[index] = blend.logits, blend.partition, blend.spread

    def written_to(self, steps: list["BlendStep"]) -> list["BlendStep"]:
        """``steps`` with the recorded leads."""
        # there is one shape for each number of models that took part
        for shape in {raw[0].shape for raw in self._raw.values()}:
            alike = [i for i, raw in self._raw.items() if raw[0].shape == shape]
            logits, partition, spread = (
                torch.cat(parts, dim=1) for parts in zip(*(self._raw[i] for i in alike), strict=True)
            )
            together = quantised(lead(logits, partition, spread))
            self._done |= dict(zip(alike, together.chunk(len(alike), dim=1), strict=True))
        self._raw = {}
        # k Λ is never negative, so that the mean of its exp is 1 only if k Λ is 0 everywhere
        silent = {i: partition == 0.0 for i, partition in self._partitions.items()}
        return [replace(step, leads=self._done.get(i), silent=silent.get(i)) for i, step in enumerate(steps)]


@dataclass(frozen=True)
class BlendStep:
    """One prediction. ``models``: indices of the models that took part, 0 for the base, in the order of ``weights``."""

    sigma: float
    models: tuple[int, ...]
    weights: Tensor | None  # see kernels.saliency_blend.Blend.weights; None if no expert took part
    leads: Tensor | None = None  # of the experts, int8 [len(models) - 1, B, *S], see quantised(); None: not recorded
    biases: tuple[float, ...] = ()  # of each of ``models``, in units of the spread
    quotas: tuple[Tensor | int | None, ...] = ()  # of each of ``models``: see Participant.quota()
    skipped: tuple[frozenset[int], ...] = ()  # of each of ``models``: the samples that it was left out of; empty: none
    silent: Tensor | None = None  # bool [len(models), B T], whether k Λ was 0 everywhere; None: not recorded
    held: bool = False  # whether ``weights`` are those of an earlier prediction, see held_mask

    def samples(self, slot: int) -> list[int]:
        """The samples of the batch in which the model at ``slot`` of ``models`` took part."""
        assert self.weights is not None  # a step of the base alone has no other models
        batch = self.weights.shape[0] if self.weights.dtype == torch.uint8 else self.weights.shape[1]
        without = self.skipped[slot] if self.skipped else ()
        return [sample for sample in range(batch) if sample not in without]

    def on_cpu(self) -> "BlendStep":
        """The step with its tensors on the CPU."""
        return replace(
            self,
            weights=None if self.weights is None else self.weights.cpu(),
            leads=None if self.leads is None else self.leads.cpu(),
            silent=None if self.silent is None else self.silent.cpu(),
            quotas=tuple(q.cpu() if isinstance(q, Tensor) else q for q in self.quotas),
        )

    def shares(self, num_models: int) -> Tensor:
        """Weight of every model at every position: float32 [num_models, B, *S] on the CPU."""
        owner = self.weights
        assert owner is not None  # BlendRecord.shares handles steps without weights
        if owner.dtype == torch.uint8:
            owner = torch.stack([owner == i for i in range(len(self.models))]).float()
        full = torch.zeros(num_models, *owner.shape[1:])
        full[list(self.models)] = owner
        return full


class Contest(NamedTuple):
    """One step of an expert against the base, in the samples that it took part in."""

    samples: list[int]
    leads: Tensor  # [len(samples), *S], the expert's log score minus the base's, in units of the spread
    bias: float  # without other experts, the expert wins where leads + bias + ln(region) is above 0
    share: float | None  # set by expert_share; None if bias decides


@dataclass
class BlendRecord:
    """The record of one run. ``steps`` are the predictions in order; a second-order sampler makes two per step."""

    labels: tuple[str, ...]  # the base first
    shape: tuple[int, ...]  # [B, *S] of the latent
    seed: int | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # why models have no effect: they stand first in the report and on the sheet
    steps: list[BlendStep] = field(default_factory=list)
    spent: list[int] = field(default_factory=list)  # evaluations (conditional and unconditional together) per model
    saved: list[int] = field(default_factory=list)  # predictions per model for which it was not evaluated
    # as ``spent``, but a cropped evaluation counts as the fraction of the latent that its box covers, and with a held
    # mask an evaluation without the negative conditioning counts as half
    cost: list[float] = field(default_factory=list)
    output: Tensor | None = None  # the finished latent, to recognise the samples that belong to this run
    regions: tuple[Tensor | None, ...] = ()  # ln(region) [B, *S] of each expert; None: no effect

    def shares(self, index: int) -> Tensor:
        """Shares [num_models, B, *S] of step ``index``. If no expert took part, the base's share is 1 everywhere."""
        step = self.steps[index]
        if step.weights is None:
            full = torch.zeros(len(self.labels), *self.shape)
            full[0] = 1.0
            return full
        return step.shares(len(self.labels))

    def belongs_to(self, samples: Tensor) -> bool:
        """Whether ``samples`` are the finished latent of this run."""
        mine = self.output
        return mine is not None and mine.shape == samples.shape and torch.equal(mine.to(samples.dtype), samples.cpu())

    def mean_shares(self, blended_only: bool = False) -> Tensor:
        """Mean share of every model at every position over the run [num_models, B, *S].

        ``blended_only``: include only the steps in which an expert took part; if there are none, include all steps.
        """
        chosen = [i for i, s in enumerate(self.steps) if s.weights is not None or not blended_only]
        if not chosen:
            chosen = range(len(self.steps))
        return torch.stack([self.shares(i) for i in chosen]).mean(0)

    def report(self) -> str:
        """Report for users: warnings, shares in percent, evaluations spent and saved, the effect of other biases, and
        notes."""
        blended = sum(s.weights is not None for s in self.steps)
        lines = [f"{len(self.steps)} predictions, {blended} of them blended, seed {self.seed}"]
        if held := sum(s.held for s in self.steps):
            lines.append(f"{held} of them with the mask of an earlier prediction (mask_refresh)")
        mean = self.mean_shares()
        over_run, over_window = (shares.flatten(1).mean(1) for shares in (mean, self.mean_shares(blended_only=True)))
        by_sample = mean.flatten(2).mean(2)  # [num_models, B]
        for i, label in enumerate(self.labels):
            within = f" ({100 * over_window[i]:.1f} % while blending)" if blended else ""
            part = f" (as expensive as {self.cost[i]:.1f} full ones)" if self.cost[i] < self.spent[i] else ""
            lines.append(
                f"{label}: {100 * over_run[i]:.1f} % of the image over the whole run{within},"
                f" {self.spent[i]} evaluations{part}, {self.saved[i]} saved"
            )
            if self.shape[0] > 1:
                shares = ", ".join(f"{100 * share:.1f} %" for share in by_sample[i].tolist())
                lines.append(f"{label}, over the whole run in each sample of the batch: {shares}")
            if len(self.shape) == 4 and self.shape[1] > 1:
                by_frame = mean[i].flatten(2).mean((0, 2))
                shares = ", ".join(f"{100 * share:.0f} %" for share in by_frame.tolist())
                lines.append(f"{label}, over the whole run in each latent frame: {shares}")
        for i in range(1, len(self.labels)):
            lines += self._contest_lines(i)
        if (flips := self.flips()) is not None:
            remedy = "; to keep the first mask, set start_percent 0.05 and mask_refresh 100"
            lines.append(
                f"from one mask to the next, the model changed at {100 * flips:.0f} % of the positions"
                f"{remedy if flips >= MANY_FLIPS else ''}"
            )
        return "\n".join([*self.warnings, *lines, *self.notes])

    def contested(self, index: int, sample: int | None = None) -> list[BlendStep]:
        """The blended steps in which expert ``index`` took part and its lead was recorded.

        ``sample``: only the steps in which it took part in this sample of the batch.
        """
        found = [step for step in self.steps if step.leads is not None and index in step.models]
        return [step for step in found if sample is None or sample in step.samples(step.models.index(index))]

    def contest(self, index: int, sample: int | None = None) -> Iterator[Contest]:
        """The contest of expert ``index`` with the base at each of the steps ``contested(index, sample)``."""
        for step in self.contested(index, sample):
            assert step.leads is not None  # see contested()
            slot = step.models.index(index)
            samples = step.samples(slot) if sample is None else [sample]
            quota, positions = step.quotas[slot], self.shape[-1] * self.shape[-2]
            if isinstance(quota, Tensor):
                quota = float(quota.unflatten(0, (self.shape[0], -1))[samples].float().mean())
            share = None if quota is None else quota / positions
            yield Contest(samples, middle(step.leads[slot - 1, samples]), step.biases[slot], share)

    def share_with(self, index: int, change: float) -> float | None:
        """The share that expert ``index`` would win without other experts, with ``change`` added to its bias.

        It is computed from the leads of this run; None if the expert never competed by its bias.
        """
        region = self.regions[index - 1] if self.regions else None
        won = [
            (leads + bias + change + (0.0 if region is None else region[samples]) > 0.0).float().mean()
            for samples, leads, bias, share in self.contest(index)
            if share is None
        ]
        return float(torch.stack(won).mean()) if won else None

    def flips(self) -> float | None:
        """The mean share of positions whose strongest model changes from one computed mask to the next.

        None for fewer than two masks.
        """
        owners = [self.shares(i).argmax(0) for i, s in enumerate(self.steps) if s.weights is not None and not s.held]
        changed = [(a != b).float().mean() for a, b in pairwise(owners)]
        return float(torch.stack(changed).mean()) if changed else None

    def _contest_lines(self, index: int) -> list[str]:
        label, changes = self.labels[index], (-0.5, -0.1, 0.0, 0.1, 0.5)
        shares = [self.share_with(index, change) for change in changes]
        parts = ", ".join(
            f"{100 * s:.0f} % {f'at {c:+g}' if c else 'unchanged'}"
            for c, s in zip(changes, shares, strict=True)
            if s is not None
        )
        lines = []
        if parts:
            lines.append(
                f"{label}: share of the image without other experts for each change of its bias: {parts};"
                " a region of 0.9 has the same effect as lowering the bias by 0.1"
            )
        starts = [
            torch.quantile(leads.flatten(-2).float(), 1.0 - share, dim=-1).mean()
            for _, leads, _, share in self.contest(index)
            if share is not None and 0.0 < share < 1.0
        ]
        if starts:
            bias = -float(torch.stack(starts).mean())
            lines.append(
                f"{label}: without other experts, bias {bias:+.2f} has about the same effect as its expert_share"
            )
        return lines

    def unmet_shares(self) -> tuple[str, ...]:
        """Notes on experts that got less than their expert_share, because earlier experts took the positions."""
        missing: dict[int, float] = {}
        for step in self.steps:
            if step.weights is None or step.weights.dtype != torch.uint8:
                continue
            for slot, (index, quota) in enumerate(zip(step.models, step.quotas, strict=False)):
                if quota is not None:
                    got = (step.weights == slot).flatten(-2).sum(-1).view(self.shape[0], -1)
                    wanted = torch.as_tensor(quota).expand(got.numel()).view_as(got)
                    short = float((wanted - got)[step.samples(slot)].max()) / (self.shape[-1] * self.shape[-2])
                    missing[index] = max(missing.get(index, 0.0), short)
        return tuple(
            f"'{self.labels[i]}' got less than its expert_share, by up to {100 * short:.0f} % of the image, because"
            " earlier experts in the chain took these positions; lower their shares, or use regions that do not overlap"
            for i, short in missing.items()
            if short > 0.0
        )

    def equal_predictions(self, base_counts: bool = True) -> tuple[str, ...]:
        """Notes on models whose predictions do not differ, so that no mask can follow from them.

        ``base_counts``: whether the base's k is above 0; otherwise its k Λ is 0 for any prompt.
        """
        if self.shape[-2:].count(1) == 2:  # at a single position the scores of all models are equal
            return ()
        steps = "all steps with a new mask" if any(s.held for s in self.steps) else "all steps"
        silent = [self._always((i,), lambda silent, _, at: silent[at[0]]) for i in range(len(self.labels))]
        notes = [
            f"the prompt changes no prediction of {self._name(i)}{self._where(found)} (saliency 0 everywhere); give it a"
            " positive prompt that differs from its negative prompt"
            for i, found in enumerate(silent)
            if found and (i > 0 or base_counts)
        ]
        for j in range(1, len(self.labels)):
            # recorded leads are 0 at every position only if the spread is 0
            equal = self._always((j,), lambda _, leads, at: leads[at[0] - 1] == -1) - silent[j]
            if equal:
                notes.append(
                    f"base and {self._name(j)} predicted the same in {steps}{self._where(equal)}; connect another"
                    " checkpoint to expert, or give the expert a prompt of its own"
                )
            for i in range(1, j):
                twins = self._always((i, j), lambda _, leads, at: leads[at[0] - 1] == leads[at[1] - 1])
                if twins := twins - equal - silent[j]:
                    notes.append(
                        f"{self._name(i)} and {self._name(j)} predicted the same in {steps}{self._where(twins)}; connect"
                        " another checkpoint to expert, or give one of them a prompt of its own"
                    )
        return tuple(notes)

    def _always(self, models: tuple[int, ...], holds: Callable[[Tensor, Tensor, list[int]], Tensor]) -> frozenset[int]:
        """The samples in which a condition is true everywhere, in all new masks that ``models`` took part in together.

        ``holds(silent, leads, at)`` returns the condition, bool [B, *S] or [B T], from ``silent`` and ``leads`` of a
        step and the places of ``models`` in it. A sample without such a mask is not included.
        """
        found: dict[int, bool] = {}
        for step in self.steps:
            if step.leads is None or step.silent is None or not set(models) <= set(step.models):
                continue
            slots = [step.models.index(i) for i in models]
            each = holds(step.silent, step.leads, slots).reshape(self.shape[0], -1).all(1).tolist()
            for sample in set.intersection(*(set(step.samples(slot)) for slot in slots)):
                found[sample] = found.get(sample, True) and each[sample]
        return frozenset(sample for sample, always in found.items() if always)

    def _name(self, index: int) -> str:
        return f"'{self.labels[index]}'" if index else self.labels[0]

    def _where(self, samples: frozenset[int]) -> str:
        return "" if len(samples) == self.shape[0] else f" in {named_samples(samples)}"


class BlendTrace:
    """Holds the record of the last finished run. A node outputs this object before the run, and the run fills it."""

    def __init__(self) -> None:
        self.record: BlendRecord | None = None

    def clear(self) -> None:
        self.record = None

    def finish(self, record: BlendRecord) -> None:
        self.record = record
