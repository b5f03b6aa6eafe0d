"""Computes each prediction that the sampler requests: plan, predict with the base and the experts, and blend."""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from comfy.samplers import CFGGuider
from torch import Tensor

from ...host.shape_errors import explain_shape_errors
from .blend import Plan, SaliencyBlendRun
from .comfy_expert_run import Evaluation, ExpertRun
from .comfy_layout import LatentLayout
from .comfy_workers import Workers
from .extrapolation import Pair

log = logging.getLogger("comfyui-chorus")

Conds = Sequence[list[dict] | None]  # the entries of each conditioning; None or empty if there is no such conditioning
Base = Callable[[Conds], list[Tensor]]  # the base model's predictions for conditionings


def guidance_scale(guider: CFGGuider) -> float | None:
    """The guider's cfg if its conditionings are only positive and negative, as for CFGGuider; else None."""
    if set(guider.conds) != {"positive", "negative"}:
        return None
    return float(guider.cfg)


class BlendPrediction:
    """Predicts with the base and the experts during one run; called for every prediction of the sampler."""

    def __init__(
        self, guider: CFGGuider, technique: SaliencyBlendRun[ExpertRun], workers: Workers, latent: LatentLayout
    ) -> None:
        self.latent = latent
        self.guider, self.inner, self.conds = guider, guider.inner_model, guider.conds
        self.technique, self.workers = technique, workers
        self.names = {c[0]["uuid"]: name for name, c in guider.conds.items() if c}
        self._x: Tensor | None = None  # x and sigma of the last blended prediction
        self._sigma: float | None = None
        self._warned = False

    def predict(self, base: Base, conds: Conds, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """The blended predictions for ``conds``; ``base(conds)`` returns the base model's predictions."""
        names = [self.names.get(c[0]["uuid"]) if c else None for c in conds]
        if not any(names):
            if any(c for c in conds) and not self._warned:
                self._warned = True
                log.warning(
                    "a conditioning that the guider has no name for is not blended; only the base model predicts it"
                )
            return base(conds)
        level = float(sigma[0])
        same_input = x is self._x and level == self._sigma
        if "positive" in names and not same_input:
            self._x, self._sigma = x, level
            return self._blend(base, conds, names, x, sigma, level)
        return self._mix(base, conds, names, x, sigma, same_input)

    def _blend(
        self, base: Base, conds: Conds, names: list[str | None], x: Tensor, sigma: Tensor, level: float
    ) -> list[Tensor]:
        """The prediction of a step: plan, predict, blend."""
        self.technique.cfg = guidance_scale(self.guider)  # nodes such as CFG Override change it between steps
        # the base predicts the other parts of a packed latent, and conditionings without a name
        needs_base = self.latent.several or any(c and n is None for c, n in zip(conds, names, strict=True))
        plan = self.technique.plan(level, self.latent.part(x), "negative" in names, needs_base)
        if not plan:
            return base(conds)
        if plan.held:
            return self._hold(base, conds, names, x, sigma, plan)
        # such as the middle conditioning of DualCFG and the empty one of PerpNeg
        others = [n for n in names if n not in (None, "positive", "negative")]
        # in the sampler's order, because the position of a row in a batch can change the last bits of its result
        wanted = list(dict.fromkeys([*filter(None, names), "positive", "negative"]))
        batched = sorted((e for e in plan.run if e.batched_with_base and e.box is None), key=lambda e: e.sort_key)
        alone = [e for e in plan.run if e not in batched]

        guided: dict[ExpertRun, Pair] = {}
        with self._started(dict.fromkeys(alone, wanted), x, sigma) as results:
            with explain_shape_errors("the base model of the blend, or an expert of the same weights,"):
                own, predicted, out = self._predict_with_base(base, conds, names, wanted, batched)
                guided |= self._guidance(predicted, x, sigma)
            for expert in alone:
                self._collect(expert, wanted, results[expert], x, predicted, guided)

        part = self.latent.part
        cond, uncond = self.technique.blend(
            sigma,
            (part(own["positive"]), part(own["negative"])),
            {expert: (part(p["positive"]), part(p["negative"])) for expert, p in predicted.items()},
            {expert: (part(cond), part(uncond)) for expert, (cond, uncond) in guided.items()},
        )
        blended = {"positive": cond, "negative": uncond}
        for n in others:
            blended[n] = self.technique.mix(part(own[n]), {expert: part(p[n]) for expert, p in predicted.items()})
        return self._outputs(names, out, blended)

    def _outputs(self, names: list[str | None], out: list[Tensor], blended: Mapping[str, Tensor]) -> list[Tensor]:
        """The base's predictions ``out`` with the ``blended`` ones in place of their first parts."""
        return [
            self.latent.replaced(o, blended[n]) if n is not None and n in blended else o
            for n, o in zip(names, out, strict=True)
        ]

    def _guidance(
        self, predicted: Mapping[ExpertRun, Mapping[str, Tensor]], x: Tensor, sigma: Tensor
    ) -> dict[ExpertRun, Pair]:
        """The guided pairs of the experts that have guidance functions."""
        return {
            expert: expert.own_guidance((p["positive"], p["negative"]), x, sigma, self.technique.cfg)
            for expert, p in predicted.items()
            if expert.guidance
        }

    @staticmethod
    def _collect(
        expert: ExpertRun,
        names: list[str],
        result: Callable[[], Evaluation],
        x: Tensor,
        predicted: dict[ExpertRun, dict[str, Tensor]],
        guided: dict[ExpertRun, Pair],
    ) -> None:
        """Add the result of an expert that is evaluated alone, for ``names``, to ``predicted`` and ``guided``."""
        with explain_shape_errors(f"'{expert.label}'"):
            found, pair = result()
            predicted[expert] = dict(zip(names, (o.to(x) for o in found), strict=True))
            if pair is not None:
                guided[expert] = pair[0].to(x), pair[1].to(x)

    def _hold(
        self, base: Base, conds: Conds, names: list[str | None], x: Tensor, sigma: Tensor, plan: Plan[ExpertRun]
    ) -> list[Tensor]:
        """The prediction of a step with the last computed mask: only the models and conditionings that it needs."""
        cfg = self.technique.cfg
        asked = list(dict.fromkeys(n for n in names if n is not None))
        wanted = {
            e: [*asked, "negative"] if "negative" not in asked and e.needs_negative(cfg) else asked for e in plan.run
        }
        batched = sorted((e for e in plan.run if e.batched_with_base and e.box is None), key=lambda e: e.sort_key)
        alone = {e: wanted[e] for e in plan.run if e not in batched}
        extra = ["negative"] if plan.base and plan.base_negative and "negative" not in asked else []
        rows = [*(conds if plan.base else ()), *(self.conds[n] for n in extra)]
        rows += [e.conds[n] for e in batched for n in wanted[e]]

        predicted: dict[ExpertRun, dict[str, Tensor]] = {}
        guided: dict[ExpertRun, Pair] = {}
        with self._started(alone, x, sigma) as results:
            with explain_shape_errors("the base model of the blend, or an expert of the same weights,"):
                rest = iter(base(rows) if rows else ())
                out = [next(rest) if plan.base else torch.zeros_like(x) for _ in conds]
                own = dict(zip(names, out, strict=True)) | {n: next(rest) for n in extra}
                predicted |= {expert: {n: next(rest) for n in wanted[expert]} for expert in batched}
                guided |= self._guidance(predicted, x, sigma)
            for expert, its_names in alone.items():
                self._collect(expert, its_names, results[expert], x, predicted, guided)

        parts = {n: self.latent.part(o) for n, o in own.items() if n is not None}
        of_experts = {expert: {n: self.latent.part(o) for n, o in p.items()} for expert, p in predicted.items()}
        cond, uncond = self.technique.hold(
            (parts["positive"], parts.get("negative")) if plan.base else None,
            {expert: (p["positive"], p.get("negative")) for expert, p in of_experts.items()},
            {expert: (self.latent.part(cond), self.latent.part(uncond)) for expert, (cond, uncond) in guided.items()},
        )
        blended: dict[str, Tensor] = {"positive": cond} | ({} if uncond is None else {"negative": uncond})
        for n in asked:
            if n not in ("positive", "negative"):
                found = {expert: p[n] for expert, p in of_experts.items()}
                blended[n] = self.technique.mix(parts[n] if plan.base else next(iter(found.values())), found)
        return self._outputs(names, out, blended)

    @contextlib.contextmanager
    def _started(
        self, experts: Mapping[ExpertRun, list[str]], x: Tensor, sigma: Tensor
    ) -> Iterator[dict[ExpertRun, Callable[[], Evaluation]]]:
        """Start the experts on other devices; yields for each expert a function that returns the result of ``evaluate``.

        ``experts``: the names of the conditionings that each expert predicts.

        When the ``with`` block ends, also by an error, the exit waits until no expert is running.
        """
        results: dict[ExpertRun, Callable[[], Evaluation]] = {
            expert: partial(expert.evaluate, names, x, sigma, self.technique.cfg) for expert, names in experts.items()
        }
        futures = []
        # autograd records in the thread that computes, so a run with gradients uses only one thread
        for expert in (e for e in experts if e.has_own_device and not torch.is_grad_enabled()):
            futures.append(self.workers.submit(expert.device, results[expert]))
            results[expert] = futures[-1].result
        try:
            yield results
        finally:
            concurrent.futures.wait(futures)

    def _predict_with_base(
        self, base: Base, conds: Conds, names: list[str | None], wanted: list[str], batched: list[ExpertRun]
    ) -> tuple[dict[str, Tensor], dict[ExpertRun, dict[str, Tensor]], list[Tensor]]:
        """Predict with the base and the experts ``batched``, which share the base's batch.

        Returns the base's predictions by name, the experts' predictions by expert and name, and the base's predictions
        in the order of ``conds``. If the sampler omits the negative (cfg 1), it is predicted in a separate call, so
        that the base's positive is computed exactly as without the blend.
        """
        missing = [n for n in ("positive", "negative") if n not in names]
        further = [expert.conds[n] for expert in batched for n in wanted]
        if missing:
            out = list(base(conds))
            rows = base([self.conds[n] for n in missing] + further)
            extra, rows = dict(zip(missing, rows, strict=False)), rows[len(missing) :]
        else:
            rows = base([*conds, *further])
            out, rows, extra = list(rows[: len(conds)]), rows[len(conds) :], {}
        own = {n: out[k] for k, n in enumerate(names) if n is not None} | extra
        size = len(wanted)
        predicted = {
            expert: dict(zip(wanted, rows[slot * size : (slot + 1) * size], strict=True))
            for slot, expert in enumerate(batched)
        }
        return own, predicted, out

    def _mix(
        self, base: Base, conds: Conds, names: list[str | None], x: Tensor, sigma: Tensor, same_input: bool
    ) -> list[Tensor]:
        """An additional prediction of the step (PAG, SAG, skipped layers), blended by the last mask.

        The base predicts with the patches of this prediction. ``same_input``: whether x and sigma are those of the last
        blended prediction; the experts' predictions are then already known.
        """
        out = list(base(conds))
        experts = self.technique.active_experts
        if not experts:
            return out
        side = {"positive": 0, "negative": 1}
        predicted: dict[ExpertRun, list[Tensor | None]] = {}
        for expert in experts:
            # with a held mask, the negative may not be known
            if same_input and not ("negative" in names and expert.blended()[1] is None):
                predicted[expert] = [expert.blended()[side[n]] if n in side else None for n in names]
            else:
                found = expert.predict(names, x, sigma)
                predicted[expert] = [None if one is None else self.latent.part(one) for one in found]
        for k, n in enumerate(names):
            if n is not None:
                found = {expert: one for expert, p in predicted.items() if (one := p[k]) is not None}
                out[k] = self.latent.replaced(out[k], self.technique.mix(self.latent.part(out[k]), found))
        return out
