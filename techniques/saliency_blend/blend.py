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

from ...kernels.saliency_blend import saliency_blend
from .experts import RUN, ExpertSettings, ExpertState
from .extrapolation import Pair
from .regions import Box
from .trace import BlendRecord, BlendStep, BlendTrace
from .non_finite import FiniteWatch


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
    backend: str = "auto"  # of the kernels


class SaliencyBlendRun:
    """One sampling run of the blend. Model 0 is the base, model i the i-th expert of the chain."""

    def __init__(
        self, experts: Sequence[ExpertSettings], joint: JointSettings, schedule: Schedule, traces: Sequence[BlendTrace]
    ):
        self.experts, self.joint, self.schedule, self.traces = tuple(experts), joint, schedule, tuple(traces)
        self._check_guidance()
        self._boundaries = sorted(set(schedule.sigmas), reverse=True)
        self._states = [ExpertState(e, schedule.percent_to_sigma) for e in experts]
        self._begun = False
        self._sigma, self._interval = 0.0, 0  # of the prediction that plan() was asked about
        self.predictions: dict[int, Pair] = {}  # of the last blend, by model
        self._last_step: BlendStep | None = None
        self._watch = FiniteWatch(("base", *(e.label for e in experts)))
        self.record = BlendRecord(
            labels=("base", *(e.label for e in experts)),
            shape=(),
            seed=schedule.seed,
            notes=self._notes(),
            spent=[0] * (len(experts) + 1),
            saved=[0] * (len(experts) + 1),
            cost=[0.0] * (len(experts) + 1),
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

    def plan(
        self, sigma: float, x: Tensor, can_run: Sequence[bool], can_crop: Sequence[bool] | None = None
    ) -> dict[int, str]:
        """What each model that takes part in this prediction at ``sigma`` does: RUN a forward pass or REUSE offsets.

        ``x`` [B, C, *S] gives shape and device; ``can_run`` says which experts the caller can evaluate at this sigma,
        ``can_crop`` which of them on a part of the latent; ``box`` then tells on which.
        """
        if not self._begun:
            self._begun = True
            self.record.shape = (x.shape[0], *x.shape[2:])
            for state in self._states:
                state.begin(x)
        self._watch.asked(sigma, x)
        self._sigma, self._interval = sigma, self._interval_of(sigma)
        actions = {}
        for i, state in enumerate(self._states, start=1):
            action = state.turn(sigma, self._interval, can_run[i - 1], can_crop is None or can_crop[i - 1])
            if action is not None:
                actions[i] = action
            if action == RUN:
                self.record.spent[i] += 1
                self.record.cost[i] += 1.0 if state.box is None else state.box.share_of(x)
            else:
                self.record.saved[i] += 1
        self.record.spent[0] += 1
        self.record.cost[0] += 1.0
        if not actions:
            self._remember(BlendStep(sigma, (0,), None))
        return actions

    def box(self, i: int) -> Box | None:
        """The part of the latent on which expert ``i`` is to be evaluated now; None: all of it."""
        return self._states[i - 1].box

    def _interval_of(self, sigma: float) -> int:
        """Index of the interval of the sampling sigmas that a call at ``sigma`` falls into; its upper end belongs to it."""
        position = bisect.bisect_right([-s for s in self._boundaries], -sigma)
        return max(0, position - 1)

    def blend(self, sigma: Tensor, base: Pair, fresh: Mapping[int, Pair], reused: Sequence[int]) -> Pair:
        """Blend the predictions of x0 [B, C, *S], as (conditional, unconditional) pairs, at the planned ``sigma`` [B].

        ``fresh`` holds the experts that ran, ``reused`` those whose last offsets from the base stand in.
        """
        level = self._sigma
        pairs = {0: base}
        pairs |= {i: self._states[i - 1].answered(level, pair, base) for i, pair in fresh.items()}
        pairs |= {i: self._states[i - 1].stand_in(level, base) for i in reused}
        models = tuple(sorted(pairs))
        self.predictions = pairs

        states = [None if i == 0 else self._states[i - 1] for i in models]
        blend = saliency_blend(
            [pairs[i][0] for i in models],
            [pairs[i][1] for i in models],
            sigma,
            [self._strength(i) for i in models],
            [0.0 if s is None else s.bias(level) for s in states],
            [None if s is None else s.reach(base[0]) for s in states],
            [self._gain(i) for i in models],
            blur=self.joint.blur,
            shared=self.joint.saliency == "shared",
            softness=self.joint.softness if self.joint.mask_mode == "soft" else None,
            backend=self.schedule.backend,
        )
        self._watch.answered(models, blend.partition)
        self._remember(BlendStep(level, models, blend.weights))
        hard = blend.weights.dtype == torch.uint8
        for slot, state in enumerate(states):
            if state is not None and state.watches:
                state.saw(blend.weights == slot if hard else blend.weights[slot], self._interval)
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

    def _remember(self, step: BlendStep) -> None:
        self._last_step = step
        self.record.steps.append(step)

    def finish(self, output: Tensor) -> None:
        """Publish the trace of a run that reached its end; ``output`` is the finished latent, on the CPU.

        A ValueError where a prediction or the latent is not finite.
        """
        self._watch.finished(output)
        for state in self._states:
            self.record.notes += state.notes()
        self.record.output = output
        self.record.steps = [
            replace(s, weights=None if s.weights is None else s.weights.cpu()) for s in self.record.steps
        ]
        for trace in self.traces:
            trace.finish(self.record)
