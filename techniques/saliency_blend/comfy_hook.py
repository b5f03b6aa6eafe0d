"""Hooks a blend of several models into ComfyUI's sampling: four wrappers on the base MODEL, one attachment.

PREPARE_SAMPLING loads base and experts in one call, so none evicts another. SAMPLER_SAMPLE readies the experts and
begins the run of the technique. CALC_COND_BATCH plans, predicts and blends in place of the base's predictions.
OUTER_SAMPLE publishes the trace with the finished latent.
"""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ...common.shapes import size_of
from ...host.attachments import Attachment, Conditioning, attached
from ...host.parametrization import latent_format_of
from ...host.shape_errors import explained
from .blend import JointSettings, SaliencyBlendRun, Schedule
from .comfy_experts import Expert, ExpertRun, check_latent_space, resolve_patchers
from .comfy_kernel_backend import kernel_backend
from .comfy_workers import Workers

KEY = "chorus_blend"  # attachment, wrapper key, and where a run's state lies in model_options
log = logging.getLogger("comfyui-chorus")

Conds = Sequence[list[dict] | None]  # the entries of each conditioning; None or empty: not there
Base = Callable[[Conds], list[Tensor]]  # the base model's predictions for conditionings


@dataclass(frozen=True, eq=False)
class BlendChain(Attachment):
    """The blend that a MODEL carries: its experts in the order of the chain, and the settings of the chain's last node."""

    experts: tuple[Expert, ...] = ()
    joint: JointSettings = field(default_factory=JointSettings)
    record: bool = True  # keep the steps of a run and publish them in the experts' traces

    needs_negative = True  # saliency is the difference to it

    @property
    def models(self) -> Sequence[ModelPatcher]:
        return tuple(expert.patcher for expert in self.experts)

    @property
    def conditionings(self) -> Sequence[tuple[Conditioning | None, Conditioning | None]]:
        return tuple((expert.positive, expert.negative) for expert in self.experts)

    def patchers(self, base: ModelPatcher, conds: dict[str, list[dict]]) -> Sequence[ModelPatcher]:
        return resolve_patchers(base, self.experts, conds)

    @property
    def rows_are_independent(self) -> bool:
        return all(expert.settings.rows_are_independent for expert in self.experts)

    @property
    def depends_on_history(self) -> str:
        return next(filter(None, (expert.settings.depends_on_history for expert in self.experts)), "")

    def for_gradients(self, copy: Callable[[ModelPatcher], ModelPatcher]) -> "BlendChain":
        return replace(self, experts=tuple(expert.for_gradients(copy) for expert in self.experts), record=False)

    def refusal_as_expert(self, label: str) -> str:
        return (
            f"the model wired in as '{label}' is itself a blend; chain instead: wire the blended MODEL into 'model'"
            " and each single checkpoint into 'expert'"
        )

    def begin(self, experts: list[ExpertRun], schedule: Schedule) -> SaliencyBlendRun[ExpertRun]:
        """The technique's state of one run."""
        traces = [expert.trace for expert in self.experts if expert.trace is not None] if self.record else []
        return SaliencyBlendRun(experts, self.joint, schedule, traces, self.record)


def blend_chain(model: ModelPatcher) -> BlendChain:
    """The blend that ``model`` carries; an empty one if it carries none."""
    return model.get_attachment(KEY) or BlendChain()


def add_expert(model: ModelPatcher, expert: Expert, joint: JointSettings) -> ModelPatcher:
    """A clone of ``model`` whose sampling blends ``expert`` in, beside the experts that it already has.

    Errors (ValueError): an expert of another latent space, or one whose MODEL carries a blend or a head.
    """
    for attachment in attached(expert.patcher):
        if refusal := attachment.refusal_as_expert(expert.label):
            raise ValueError(refusal)
    check_latent_space(model, expert.patcher, expert.label)
    out = model.clone()
    out.set_attachments(KEY, BlendChain((*blend_chain(model).experts, expert), joint))
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
        (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
    ):
        out.remove_wrappers_with_key(kind, KEY)  # the host appends under an existing key
        out.add_wrapper_with_key(kind, KEY, wrapper)
    return out


def _prepare_sampling(
    executor: WrapperExecutor,
    model: ModelPatcher,
    noise_shape: Sequence[int],
    conds: dict[str, list[dict]],
    *args: Any,
    **kwargs: Any,
) -> tuple[BaseModel, dict[str, list[dict]], list[ModelPatcher]]:
    experts = blend_chain(model).experts
    patchers = resolve_patchers(model, experts, conds)
    modules, extra = [model.model], []
    for patcher in patchers:
        if not any(patcher.model is m for m in modules):
            modules.append(patcher.model)
            extra.append({"additional_models": [patcher]})
        extra.append({"additional_models": patcher.get_nested_additional_models() + patcher.model_patches_models()})
    for expert in experts:  # ControlNets and GLIGEN that hang on the experts' conditionings
        for _, options in expert.conditionings():
            extra.append({k: options[k] for k in ("control", "gligen", "additional_models") if k in options})
    real_model, _, loaded = executor(model, noise_shape, {**conds, KEY: extra}, *args, **kwargs)
    if (options := kwargs.get("model_options")) is not None:
        options[KEY] = patchers
    return real_model, conds, loaded


def _outer_sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """Publishes the trace with the finished latent, in the form in which the sampler node gives it out."""
    output = executor(*args, **kwargs)
    options: dict[str, Any] = cast(CFGGuider, executor.class_obj).model_options
    if (run := options.pop(f"{KEY}_run", None)) is not None:
        run.finish(output.detach().to("cpu", copy=True))
    return output


def _guidance_scale(guider: CFGGuider) -> float | None:
    """The guider's cfg where it has a single one: just positive and negative, and cfg as CFGGuider applies it."""
    if set(guider.conds) != {"positive", "negative"}:
        return None
    return float(guider.cfg)


def _check_run(guider: CFGGuider, noise: Tensor) -> None:
    if "positive" not in guider.conds or "negative" not in guider.conds:
        raise ValueError(
            f"{type(guider).__name__} gives the sampler no negative conditioning, and saliency is the difference to it;"
            " use CFGGuider (cfg 1 costs nothing more than BasicGuider plus the blend)"
        )
    if "context_handler" in guider.model_options:
        raise ValueError("a blend cannot run inside context windows, which cut the latent; remove the context node")
    if noise.ndim not in (4, 5):
        raise ValueError(
            f"a blend needs a latent of pictures [B, C, H, W] or video [B, C, T, H, W]; this one has {noise.ndim} axes"
        )
    space = latent_format_of(guider.model_patcher)
    if not noise.numel() or noise.shape[1] != space.latent_channels or noise.ndim < space.latent_dimensions + 2:
        raise ValueError(
            f"the latent is {size_of(noise)}, and the models of the blend work on {space.latent_channels}"
            f" channels and {space.latent_dimensions + 2} axes; use the VAE or the empty latent of these models"
        )


def _sampler_sample(
    executor: WrapperExecutor,
    guider: CFGGuider,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable | None,
    noise: Tensor,
    latent_image: Tensor | None = None,
    denoise_mask: Tensor | None = None,
    *rest: Any,
) -> Tensor:
    if len(sigmas) < 2:  # no step to take
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
    _check_run(guider, noise)
    base, chain = guider.model_patcher, blend_chain(guider.model_patcher)
    seed = extra_args.get("seed")
    schedule = Schedule(tuple(sigmas.tolist()), _guidance_scale(guider), seed, kernel_backend())
    run_options: dict[str, Any] = guider.model_options
    patchers = run_options.pop(KEY, None) or resolve_patchers(base, chain.experts, guider.conds)
    options = extra_args["model_options"]
    experts: list[ExpertRun] = []
    workers = Workers()
    try:
        for index, (patcher, expert) in enumerate(zip(patchers, chain.experts, strict=True), start=1):
            experts.append(ExpertRun(index, patcher, expert, guider, sigmas, noise, latent_image, denoise_mask, seed))
            experts[-1].batched_with_base = experts[-1].shares_forward_with(guider, options, KEY)
        guider.inner_model.current_patcher = base  # an expert on the same module has put itself there
        technique = chain.begin(experts, schedule)
        options[KEY] = _BlendSampling(guider, technique, workers)
        output = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
        run_options[f"{KEY}_run"] = technique
        return output
    finally:
        options.pop(KEY, None)
        workers.close()
        for expert in experts:
            expert.close()
        guider.inner_model.current_patcher = base  # the host's own cleanup still needs it


def _calc_cond_batch(
    executor: WrapperExecutor, model: BaseModel, conds: Conds, x: Tensor, sigma: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    run = model_options.get(KEY)
    if not isinstance(run, _BlendSampling):
        raise ValueError(
            "this sampler does not go through ComfyUI's guiders, so the blend has no experts to evaluate;"
            " sample with KSampler, SamplerCustom or SamplerCustomAdvanced, or remove SaliencyNoiseBlend"
        )
    if model is not run.inner:
        return executor(model, conds, x, sigma, model_options)
    return run.predict(lambda conds: executor(model, conds, x, sigma, model_options), conds, x, sigma)


class _BlendSampling:
    """Base, experts and technique during one run, as the sampler calls them."""

    def __init__(self, guider: CFGGuider, technique: SaliencyBlendRun[ExpertRun], workers: Workers) -> None:
        self.inner, self.conds, self.technique, self.workers = guider.inner_model, guider.conds, technique, workers
        self.names = {c[0]["uuid"]: name for name, c in guider.conds.items() if c}
        self._x: Tensor | None = None  # of the last blended prediction
        self._sigma: float | None = None
        self._warned = False

    def predict(self, base: Base, conds: Conds, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """The host's predictions for ``conds``, with the blend in their place; ``base(conds)`` are the base model's."""
        names = [self.names.get(c[0]["uuid"]) if c else None for c in conds]
        if not any(names):
            if any(c for c in conds) and not self._warned:
                self._warned = True
                log.warning("a conditioning the sampler did not name is predicted by the base model alone")
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
        plan = self.technique.plan(level, x)
        if not plan:
            return base(conds)
        others = [n for n in names if n not in (None, "positive", "negative")]  # DualCFG's middle, PerpNeg's empty
        # in the sampler's order: a row's place in a batch can change its last bits
        wanted = list(dict.fromkeys([*filter(None, names), "positive", "negative"]))
        batched = sorted((e for e in plan.run if e.batched_with_base and e.box is None), key=lambda e: e.sort_key)
        alone = [e for e in plan.run if e not in batched]

        with self._started(alone, wanted, x, sigma) as results:
            with explained("the base model of the blend, or an expert of the same weights,"):
                own, predicted, out = self._predict_with_base(base, conds, names, wanted, batched)
            for expert in alone:
                with explained(f"'{expert.label}'"):
                    found = (o.to(x) for o in results[expert]())
                    predicted[expert] = dict(zip(wanted, found, strict=True))

        cond, uncond = self.technique.blend(
            sigma,
            (own["positive"], own["negative"]),
            {expert: (p["positive"], p["negative"]) for expert, p in predicted.items()},
        )
        blended = {"positive": cond, "negative": uncond}
        for n in others:
            blended[n] = self.technique.mix(own[n], {expert: p[n] for expert, p in predicted.items()})
        return [blended.get(n, o) for n, o in zip(names, out, strict=True)]

    @contextlib.contextmanager
    def _started(
        self, experts: list[ExpertRun], wanted: list[str], x: Tensor, sigma: Tensor
    ) -> Iterator[dict[ExpertRun, Callable[[], list[Tensor]]]]:
        """By expert, a function that gives its predictions; those on other devices have been started.

        Whatever ends the block, none of them is still at work after it.
        """
        results = {expert: expert.prediction_of(wanted, x, sigma, expert.box) for expert in experts}
        futures = []
        # gradients are recorded by the thread that computes, so a run that wants them has one
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
        """The base's predictions by name, those of ``batched`` by expert and name, the base's in the order of ``conds``.

        The experts of ``batched`` share the base's batch. The negative that cfg 1 left out is predicted separately, so
        that the base's own rows are computed exactly as without the blend.
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
        """A further prediction (PAG, SAG, skipped layers): the base's by its own patches, mixed by the last mask.

        ``same_input``: at the x and sigma of the last blended prediction, which the experts have already predicted.
        """
        out = list(base(conds))
        experts = self.technique.active_experts
        if not experts:
            return out
        side = {"positive": 0, "negative": 1}
        predicted: dict[ExpertRun, list[Tensor | None]] = {}
        for expert in experts:
            if same_input:
                predicted[expert] = [expert.prediction[side[n]] if n in side else None for n in names]
            else:
                predicted[expert] = expert.predict(names, x, sigma)
        for k, n in enumerate(names):
            if n is not None:
                found = {expert: one for expert, p in predicted.items() if (one := p[k]) is not None}
                out[k] = self.technique.mix(out[k], found)
        return out
