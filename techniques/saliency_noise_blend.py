"""Saliency-aware noise blending: several diffusion models paint one image, each where its own guidance is strongest.

MagicFusion: Boosting Text-to-Image Generation Performance by Fusing Diffusion Models (arXiv 2303.13126).

At every step each model predicts with and without its prompt. The difference, smoothed over space, is its saliency Λ;
the model with the largest ln softmax(k Λ) + bias paints the position. The paper blends noise predictions of two
models; blending the x0 predictions of N models by the same mask at one x is the same thing.

Shapes: B samples, C channels, S spatial axes: (H, W), or (T, H, W) for video, whose frames are masked one by one.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.saliency_blend import saliency_blend
from .blend_region import log_region
from .blend_trace import BlendRecord, BlendStep, BlendTrace

OFF, REUSE, RUN = "off", "reuse", "run"


@dataclass(frozen=True, eq=False)
class ExpertSettings:
    """What belongs to one expert of the chain."""

    label: str
    strength: float = 1.0  # k_e; 0 switches the expert off
    bias: float = 0.0  # added to the expert's log score
    start_percent: float = 0.0
    end_percent: float = 1.0
    ramp: str = "constant"  # of the bias over the window: constant, rising, falling
    expert_cfg: float = 0.0  # 0: the sampler's
    region: Tensor | None = None  # [R, H', W'] in 0..1, any size
    region_mode: str = "compete"  # compete: ln(region) joins the score; force: exactly the positions >= 0.5
    refresh: int = 1  # the expert runs in every n-th interval of the sampling sigmas


@dataclass(frozen=True)
class JointSettings:
    """What the models of a chain share; its last node decides."""

    general_strength: float = 1.0  # k_g
    mask_mode: str = "hard"
    softness: float = 1.0
    saliency: str = "own"  # own: the paper; shared: the authors' code
    blur: int = 4


@dataclass(frozen=True)
class Schedule:
    """The run, as the sampler sees it."""

    sigmas: tuple[float, ...]
    percent_to_sigma: Callable[[float], float]
    cfg: float | None  # the sampler's guidance scale; None where there is no single one
    seed: int | None = None


class SaliencyBlendRun:
    """One sampling run of the blend. Model 0 is the base, model i the i-th expert of the chain."""

    def __init__(
        self, experts: Sequence[ExpertSettings], joint: JointSettings, schedule: Schedule, traces: Sequence[BlendTrace]
    ):
        self.experts, self.joint, self.schedule, self.traces = tuple(experts), joint, schedule, tuple(traces)
        self._check_guidance()
        self._boundaries = sorted(set(schedule.sigmas), reverse=True)
        self._windows = [
            (schedule.percent_to_sigma(e.start_percent), schedule.percent_to_sigma(e.end_percent)) for e in experts
        ]
        self._regions: list[Tensor | None] | None = None  # as kernels.saliency_blend takes them
        self._empty: list[bool] = []
        self.predictions: dict[int, tuple[Tensor, Tensor]] = {}  # of the last blend, by model
        self._offsets: dict[int, tuple[Tensor, Tensor]] = {}
        self._refreshed: dict[int, int] = {}
        self._last_step: BlendStep | None = None
        self._pending: list[tuple[float, tuple[int, ...], Tensor]] = []
        self.record = BlendRecord(
            labels=("base", *(e.label for e in experts)),
            shape=(),
            seed=schedule.seed,
            notes=self._notes(),
            spent=[0] * (len(experts) + 1),
            saved=[0] * (len(experts) + 1),
        )
        for trace in self.traces:
            trace.clear()

    def _check_guidance(self) -> None:
        for e in self.experts:
            if e.expert_cfg > 0.0 and self.schedule.cfg is None:
                raise ValueError(
                    f"expert_cfg {e.expert_cfg:g} of '{e.label}' needs a guider with a single cfg scale;"
                    " use KSampler or CFGGuider, or set expert_cfg to 0"
                )
            if e.expert_cfg > 0.0 and self.schedule.cfg == 0.0:
                raise ValueError(
                    f"expert_cfg {e.expert_cfg:g} of '{e.label}' cannot act under the sampler's cfg 0;"
                    " raise the sampler's cfg or set expert_cfg to 0"
                )
        if self.joint.saliency == "shared" and self.schedule.cfg is None:
            raise ValueError(
                "saliency 'shared' multiplies by the sampler's cfg and this guider has no single one;"
                " use KSampler or CFGGuider, or saliency 'own'"
            )

    def _notes(self) -> tuple[str, ...]:
        if len(self.experts) < 2:
            return ()
        j = self.joint
        return (
            f"joint settings of the chain, from its last node: general_strength {j.general_strength:g},"
            f" mask_mode {j.mask_mode}, softness {j.softness:g}, saliency {j.saliency}, blur {j.blur}",
        )

    def plan(self, sigma: float, x: Tensor, can_run: Sequence[bool]) -> dict[int, str]:
        """What each model that takes part in this prediction at ``sigma`` does: RUN a forward pass or REUSE offsets.

        ``x`` [B, C, *S] gives shape and device; ``can_run`` says which experts the caller can evaluate at this sigma.
        """
        if self._regions is None:
            self.record.shape = (x.shape[0], *x.shape[2:])
            self._regions = [log_region(e.region, e.region_mode, e.label, x) for e in self.experts]
            self._empty = [r is not None and bool(torch.isneginf(r).all()) for r in self._regions]
        interval = self._interval(sigma)
        actions = {}
        for i, e in enumerate(self.experts, start=1):
            start, end = self._windows[i - 1]
            barred = e.strength == 0.0 or not end < sigma <= start or self._empty[i - 1]
            if barred or not can_run[i - 1]:
                self.record.saved[i] += 1
                continue
            group = interval // e.refresh
            stale = e.refresh == 1 or i not in self._offsets or self._refreshed.get(i) != group
            actions[i] = RUN if stale else REUSE
            if stale:
                self._refreshed[i] = group
                self.record.spent[i] += 1
            else:
                self.record.saved[i] += 1
        self.record.spent[0] += 1
        if not actions:
            self._remember(BlendStep(sigma, (0,), None))
        return actions

    def _interval(self, sigma: float) -> int:
        """Index of the interval of the sampling sigmas that a call at ``sigma`` falls into; its upper end belongs to it."""
        position = bisect.bisect_right([-s for s in self._boundaries], -sigma)
        return max(0, position - 1)

    def blend(
        self,
        sigma: Tensor,
        base: tuple[Tensor, Tensor],
        fresh: Mapping[int, tuple[Tensor, Tensor]],
        reused: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Blend the predictions of x0 [B, C, *S], as (conditional, unconditional) pairs, at ``sigma`` [B].

        ``fresh`` holds the experts that ran, ``reused`` those whose last offsets from the base stand in.
        """
        pairs = {0: base}
        for i, pair in fresh.items():
            if self.experts[i - 1].refresh > 1:
                self._offsets[i] = tuple(p - b for p, b in zip(pair, base, strict=True))
            pairs[i] = pair
        for i in reused:
            pairs[i] = tuple(b + o for b, o in zip(base, self._offsets[i], strict=True))
        models = tuple(sorted(pairs))
        self.predictions = pairs

        level = float(sigma[0])
        blend = saliency_blend(
            [pairs[i][0] for i in models],
            [pairs[i][1] for i in models],
            sigma,
            [self._strength(i) for i in models],
            [self._bias(i, level) for i in models],
            [None if i == 0 else self._regions[i - 1] for i in models],
            [self._gain(i) for i in models],
            blur=self.joint.blur,
            shared=self.joint.saliency == "shared",
            softness=self.joint.softness if self.joint.mask_mode == "soft" else None,
        )
        self._check_finite(level, models, blend.partition)
        self._remember(BlendStep(level, models, blend.weights))
        return blend.cond, blend.uncond

    def mix(self, base: Tensor, experts: Mapping[int, Tensor]) -> Tensor:
        """Blend predictions [B, C, *S] of a further conditioning by the last mask; absent experts leave the base's."""
        step = self._last_step
        if step is None or step.weights is None:
            return base
        if step.weights.dtype == torch.uint8:
            out = base
            for slot, i in enumerate(step.models):
                if i in experts:
                    out = torch.where((step.weights == slot).unsqueeze(1), experts[i], out)
            return out
        out = torch.zeros_like(base, dtype=torch.float32)
        for weight, i in zip(step.weights, step.models, strict=True):
            out.addcmul_(experts.get(i, base).float(), weight.unsqueeze(1))
        return out.to(base.dtype)

    @property
    def painting(self) -> tuple[int, ...]:
        """The experts that took part in the last prediction."""
        return () if self._last_step is None else tuple(i for i in self._last_step.models if i > 0)

    def _strength(self, i: int) -> float:
        strength = self.joint.general_strength if i == 0 else self.experts[i - 1].strength
        # the authors' code measures the guided difference
        return strength * self.schedule.cfg if self.joint.saliency == "shared" else strength

    def _gain(self, i: int) -> float:
        if i == 0 or self.experts[i - 1].expert_cfg == 0.0:
            return 1.0
        return self.experts[i - 1].expert_cfg / self.schedule.cfg

    def _bias(self, i: int, sigma: float) -> float:
        if i == 0:
            return 0.0
        e = self.experts[i - 1]
        if e.bias == 0.0 or e.ramp == "constant":
            return e.bias
        done = self._progress(i, sigma)
        return e.bias * (done if e.ramp == "rising" else 1.0 - done)

    def _progress(self, i: int, sigma: float) -> float:
        """How far ``sigma`` lies into the window of expert ``i``, 0 to 1 in sampling percent."""
        e = self.experts[i - 1]
        low, high = e.start_percent, e.end_percent
        for _ in range(24):  # percent_to_sigma falls with percent and has no inverse in the host
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.schedule.percent_to_sigma(middle) > sigma else (low, middle)
        return (low - e.start_percent) / max(e.end_percent - e.start_percent, 1e-9)

    def _remember(self, step: BlendStep) -> None:
        self._last_step = step
        self.record.steps.append(step)

    def _check_finite(self, sigma: float, models: tuple[int, ...], partition: Tensor) -> None:
        """Refuse predictions that are not finite: at once on the CPU, at the end of the run where asking would wait."""
        self._pending.append((sigma, models, partition))
        if partition.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        for sigma, models, partition in self._pending:
            bad = ~torch.isfinite(partition).all(1).cpu()
            if bad.any():
                label = self.record.labels[models[int(bad.nonzero()[0])]]
                raise ValueError(
                    f"the prediction of '{label}' is not finite (NaN or infinite) at sigma {sigma:.4g};"
                    " check that its conditioning fits its checkpoint, or run it in a wider dtype"
                )
        self._pending.clear()

    def finish(self, output: Tensor) -> None:
        """Publish the trace of a run that reached its end; ``output`` is the finished latent."""
        self._raise_if_not_finite()
        self.record.output = output
        self.record.steps = [
            replace(s, weights=None if s.weights is None else s.weights.cpu()) for s in self.record.steps
        ]
        for trace in self.traces:
            trace.finish(self.record)
