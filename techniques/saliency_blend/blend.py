"""Saliency-aware noise blending: several diffusion models generate one image, each where its own guidance is strongest.

MagicFusion: Boosting Text-to-Image Generation Performance by Fusing Diffusion Models (arXiv 2303.13126).

At every step each model predicts with and without its prompt. The difference, smoothed over space, is its saliency Λ;
the model with the largest ln softmax(k Λ) + bias generates the position. The paper blends noise predictions of two
models; blending the x0 predictions of N models by the same mask at one x is the same thing.

A step is three calls: ``plan`` says which models to evaluate, the caller predicts, ``blend`` blends.

Shapes: B samples, C channels, S spatial axes: (H, W), or (T, H, W) for video, whose frames are masked one by one.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...kernels.saliency_blend import saliency_blend
from .experts import RUN, ExpertParticipant, Participant
from .extrapolation import Pair
from .non_finite import BlendFiniteCheck
from .trace import BlendRecord, BlendStep, BlendTrace

E = TypeVar("E", bound=ExpertParticipant)


@dataclass(frozen=True)
class JointSettings:
    """The settings that the models of a chain share; its last node decides."""

    general_strength: float = 1.0  # k_g
    mask_mode: str = "hard"
    softness: float = 1.0
    saliency: str = "own"  # own: the paper; shared: the authors' code
    blur: int = 4


@dataclass(frozen=True)
class Schedule:
    """The run, as the sampler sees it."""

    sigmas: tuple[float, ...]
    cfg: float | None  # the sampler's guidance scale; None where there is no single one
    seed: int | None = None
    backend: str = "auto"  # of the kernels


@dataclass(frozen=True)
class Plan(Generic[E]):
    """The experts of one prediction: those to evaluate, and those whose last offsets are used again."""

    run: list[E] = field(default_factory=list)
    reuse: list[E] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.run or self.reuse)


class SaliencyBlendRun(Generic[E]):
    """One sampling run of the blend.

    ``experts``: in the order of the chain, with indices from 1; index 0 is the base. ``traces`` get the record of the
    run when it ends; without ``record`` no steps are kept (those of a soft mask would keep every gradient graph alive).
    """

    def __init__(
        self,
        experts: Sequence[E],
        joint: JointSettings,
        schedule: Schedule,
        traces: Sequence[BlendTrace] = (),
        record: bool = True,
    ) -> None:
        self.experts, self.joint, self.schedule, self.traces = tuple(experts), joint, schedule, tuple(traces)
        self.participants = (Participant(0, "base", joint.general_strength), *self.experts)
        self._check_guidance()
        self._boundaries = sorted(set(schedule.sigmas), reverse=True)
        self._begun = False
        self._sigma, self._interval = 0.0, 0  # of the prediction that was planned
        self._plan: Plan[E] = Plan()
        self._last_step: BlendStep | None = None
        labels = tuple(p.label for p in self.participants)
        self._finite = BlendFiniteCheck(labels)
        self._keeps_steps = record
        counts = len(self.participants)
        self.record = BlendRecord(
            labels=labels,
            shape=(),
            seed=schedule.seed,
            notes=self._notes(),
            spent=[0] * counts,
            saved=[0] * counts,
            cost=[0.0] * counts,
        )
        for trace in self.traces:
            trace.clear()

    def _check_guidance(self) -> None:
        cfg = self.schedule.cfg
        for e in (expert.settings for expert in self.experts):
            if e.expert_cfg > 0.0 and cfg is None:
                raise ValueError(
                    f"expert_cfg {e.expert_cfg:g} of '{e.label}' needs a guider with a single cfg scale;"
                    " use KSampler or CFGGuider, or set expert_cfg to 0"
                )
            if e.expert_cfg > 0.0 and cfg == 0.0:
                raise ValueError(
                    f"expert_cfg {e.expert_cfg:g} of '{e.label}' cannot act under the sampler's cfg 0;"
                    " raise the sampler's cfg or set expert_cfg to 0"
                )
        if self.joint.saliency == "shared" and cfg is None:
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

    def plan(self, sigma: float, x: Tensor) -> Plan[E]:
        """The experts that take part in the prediction of ``x`` [B, C, *S] at ``sigma``.

        Each of ``run`` is to be evaluated on its ``box`` of the latent, or on all of it where that is None.
        """
        if not self._begun:
            self._begun = True
            self.record.shape = (x.shape[0], *x.shape[2:])
            for expert in self.experts:
                expert.begin(x)
        self._finite.before(sigma, x)
        self._sigma, self._interval = sigma, self._interval_of(sigma)
        self._plan = Plan()
        self._count(0, 1.0)
        for expert in self.experts:
            action = expert.next_action(sigma, self._interval)
            if action == RUN:
                self._plan.run.append(expert)
                self._count(expert.index, 1.0 if expert.box is None else expert.box.share_of(x))
                continue
            self.record.saved[expert.index] += 1
            if action is not None:
                self._plan.reuse.append(expert)
        if not self._plan:
            self._remember(BlendStep(sigma, (0,), None))
        return self._plan

    def _count(self, index: int, cost: float) -> None:
        self.record.spent[index] += 1
        self.record.cost[index] += cost

    def _interval_of(self, sigma: float) -> int:
        """Index of the interval of the sampling sigmas that ``sigma`` falls into; its upper end belongs to it."""
        position = bisect.bisect_right([-s for s in self._boundaries], -sigma)
        return max(0, position - 1)

    def blend(self, sigma: Tensor, base: Pair, predicted: Mapping[E, Pair]) -> Pair:
        """Blend the predictions of x0 [B, C, *S], as (conditional, unconditional) pairs, at the planned ``sigma`` [B].

        ``predicted``: of the experts of ``plan().run``.
        """
        level, joint, cfg = self._sigma, self.joint, self.schedule.cfg
        self.participants[0].prediction = base
        for expert, pair in predicted.items():
            expert.prediction = expert.complete(level, pair, base)
        for expert in self._plan.reuse:
            expert.prediction = expert.extrapolate(level, base)
        present = {self.participants[0], *predicted, *self._plan.reuse}
        models = [p for p in self.participants if p in present]
        shared = joint.saliency == "shared"
        # the authors' code measures the guided difference; shared has a cfg, see _check_guidance
        scale = cfg if shared and cfg is not None else 1.0

        blend = saliency_blend(
            [p.prediction[0] for p in models],
            [p.prediction[1] for p in models],
            sigma,
            [p.strength * scale for p in models],
            [p.bias(level) for p in models],
            [p.log_mask(base[0]) for p in models],
            [p.cfg_gain(cfg) for p in models],
            blur=joint.blur,
            shared=shared,
            softness=joint.softness if joint.mask_mode == "soft" else None,
            backend=self.schedule.backend,
        )
        indices = tuple(p.index for p in models)
        self._finite.after(indices, blend.partition)
        self._remember(BlendStep(level, indices, blend.weights))
        hard = blend.weights.dtype == torch.uint8
        for slot, model in enumerate(models):
            if model.needs_mask:
                model.observe_mask(blend.weights == slot if hard else blend.weights[slot], self._interval)
        return blend.cond, blend.uncond

    def mix(self, base: Tensor, predicted: Mapping[E, Tensor]) -> Tensor:
        """Blend predictions [B, C, *S] of a further conditioning by the last mask; absent experts leave the base's."""
        step = self._last_step
        if step is None or step.weights is None:
            return base
        if step.weights.dtype == torch.uint8:
            out = base
            for slot, model in enumerate(self._last_models):
                if (found := predicted.get(model)) is not None:
                    out = torch.where((step.weights == slot).unsqueeze(1), found, out)
            return out
        out = torch.zeros_like(base, dtype=torch.float32)
        for weight, model in zip(step.weights, self._last_models, strict=True):
            out.addcmul_(predicted.get(model, base).float(), weight.unsqueeze(1))
        return out.to(base.dtype)

    @property
    def active_experts(self) -> list[E]:
        """The experts that took part in the last prediction."""
        models = self._last_models
        return [expert for expert in self.experts if expert in models]

    @property
    def _last_models(self) -> list[Participant]:
        """The models of the last step, in the order of its weights."""
        return [] if self._last_step is None else [self.participants[i] for i in self._last_step.models]

    def _remember(self, step: BlendStep) -> None:
        self._last_step = step
        if self._keeps_steps:
            self.record.steps.append(step)

    def finish(self, output: Tensor) -> None:
        """Publish the trace of a run that reached its end; ``output`` is the finished latent, on the CPU.

        A ValueError where a prediction or the latent is not finite.
        """
        self._finite.finish(output)
        for expert in self.experts:
            self.record.notes += expert.notes()
        self.record.output = output
        self.record.steps = [
            replace(s, weights=None if s.weights is None else s.weights.cpu()) for s in self.record.steps
        ]
        for trace in self.traces:
            trace.finish(self.record)
