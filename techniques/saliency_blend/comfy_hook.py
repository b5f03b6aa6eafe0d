"""Connects a blend of several models to ComfyUI's sampling by four wrappers and an attachment on the base MODEL.

- PREPARE_SAMPLING loads the base and the experts in one call, so that none of them evicts another.
- SAMPLER_SAMPLE prepares the experts and starts the run of the blend.
- CALC_COND_BATCH plans, predicts and blends. It returns the blended predictions in place of the base's.
- OUTER_SAMPLE writes the record of the run, with the finished latent, to the traces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ...common.shapes import size_of
from ...host.attachments import Attachment, Conditioning, attached
from ...host.guiders import guider_name
from ...host.log import warn_once
from ...host.parametrization import latent_format_of
from .blend import JointSettings, SaliencyBlendRun, Schedule
from .comfy_expert_run import ExpertRun, absent_expert
from .comfy_experts import (
    Expert,
    check_latent_space,
    copy_controls,
    effective_conditionings,
    own_networks,
    resolve_patchers,
)
from .comfy_guidance import ExpertGuider
from .comfy_kernel_backend import kernel_backend
from .comfy_layout import LatentLayout
from .comfy_live import live_masks
from .comfy_memory import memory_notes
from .comfy_prediction import BlendPrediction, Conds, guidance_scale
from .comfy_workers import Workers
from .experts import ExpertParticipant
from .live import LiveMasks

KEY = "chorus_blend"  # key of the attachment, of the wrappers, and of a run's state in model_options
SCOPE = f"{KEY}_scope"


@dataclass(frozen=True, eq=False)
class BlendChain(Attachment):
    """The blend of a MODEL: its experts in the order of the chain, and the joint settings of the chain."""

    experts: tuple[Expert, ...] = ()
    joint: JointSettings = field(default_factory=JointSettings)
    record: bool = True  # whether the steps of a run are recorded and written to the experts' traces
    quiet: bool = False  # whether a run shows no live masks and logs no warnings

    needs_negative = True  # saliency is the difference from the prediction with the negative conditioning

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
        reasons = (self.joint.depends_on_history, *(expert.settings.depends_on_history for expert in self.experts))
        return next(filter(None, reasons), "")

    def for_gradients(self, copy: Callable[[ModelPatcher], ModelPatcher]) -> "BlendChain":
        return replace(self, experts=tuple(expert.for_gradients(copy) for expert in self.experts), record=False)

    @property
    def refusal_as_expert(self) -> str:
        return (
            "the MODEL connected to 'expert' is itself a blend; connect a single checkpoint to it, and chain blends by"
            " connecting the blended MODEL to 'model'"
        )

    def begin(
        self, experts: list[ExpertParticipant], schedule: Schedule, live: LiveMasks | None = None
    ) -> SaliencyBlendRun:
        """The state of one sampling run. ``live`` shows its masks while it samples."""
        traces = [expert.trace for expert in self.experts if expert.trace is not None] if self.record else []
        return SaliencyBlendRun(experts, self.joint, schedule, traces, self.record, live)


def blend_chain(model: ModelPatcher) -> BlendChain:
    """The blend attached to ``model``, or an empty one."""
    return model.get_attachment(KEY) or BlendChain()


def add_expert(model: ModelPatcher, expert: Expert, joint: JointSettings) -> ModelPatcher:
    """A clone of ``model`` with ``expert`` added to its blend.

    Errors (ValueError): an expert with another latent space, or with a blend or a Cas-DM head on its MODEL.
    """
    for attachment in attached(expert.patcher):
        if refusal := attachment.refusal_as_expert:
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
        out.remove_wrappers_with_key(kind, KEY)  # ComfyUI would add the wrapper a second time under an existing key
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
    for patcher, expert in zip(patchers, experts, strict=True):
        if expert.settings.is_off:
            continue
        if not any(patcher.model is m for m in modules):
            modules.append(patcher.model)
            extra.append({"additional_models": [patcher]})
        extra.append({"additional_models": patcher.get_nested_additional_models() + patcher.model_patches_models()})
    networks = own_networks(model, experts, patchers, conds)
    for expert, own in zip(experts, networks, strict=True):  # ControlNets and GLIGEN models of the conditionings
        if expert.settings.is_off:
            continue
        for options in effective_conditionings(expert, conds):
            found = {k: options[k] for k in ("control", "gligen", "additional_models") if k in options}
            if own and "control" in found:
                found["control"] = copy_controls(found["control"], own)
            extra.append(found)
    used = [(e.label, patcher) for e, patcher in zip(experts, patchers, strict=True) if not e.settings.is_off]
    notes = memory_notes(model, used, noise_shape, {**conds, KEY: extra}, kwargs)  # before the models are loaded
    real_model, _, loaded = executor(model, noise_shape, {**conds, KEY: extra}, *args, **kwargs)
    if (options := kwargs.get("model_options")) is not None:
        options[KEY] = patchers, networks
        if SCOPE in options:
            options[SCOPE].notes = notes
    return real_model, conds, loaded


class _Scope:
    """State that the wrappers of one sampling run share: the experts' guiders, and the run of the blend.

    ComfyUI and its nodes (EasyCache) copy the dictionaries of model_options inside a run. All copies refer to this one
    object, so that all wrappers see what one of them stores.
    """

    def __init__(self, guiders: dict[Expert, ExpertGuider]) -> None:
        self.guiders = guiders  # of the experts that are not off
        self.technique: SaliencyBlendRun | None = None
        self.latent_shapes: Sequence[Sequence[int]] = ()  # of the parts of the latent; empty: not known
        self.notes: tuple[str, ...] = ()  # of the preparation of the run, for its record

    @classmethod
    def of(cls, chain: BlendChain) -> "_Scope":
        return cls({e: ExpertGuider(e.patcher, e.label) for e in chain.experts if not e.settings.is_off})

    def within(self, kind: str, inner: Callable[[], Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """``inner()``, called inside the wrappers of ``kind`` of all experts."""
        for guider in reversed(self.guiders.values()):
            inner = partial(guider.within, kind, inner, args, kwargs)
        return inner()


def _outer_sample(executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Tensor:
    """Write the record of the run to the traces, with the latent as the sampler node returns it."""
    guider = cast(CFGGuider, executor.class_obj)
    chain = blend_chain(guider.model_patcher)
    scope = _Scope.of(chain)
    scope.latent_shapes = kwargs.get("latent_shapes") or ()
    options: dict[str, Any] = guider.model_options
    options[SCOPE] = scope
    try:
        output = scope.within(WrappersMP.OUTER_SAMPLE, lambda: executor(*args, **kwargs), args, kwargs)
    finally:
        options.pop(SCOPE, None)
    if scope.technique is not None:
        latent = LatentLayout(scope.latent_shapes or [output.shape])
        scope.technique.finish(latent.part(output.detach()).to("cpu", copy=True))
        if chain.record and not chain.quiet:
            for warning in scope.technique.record.warnings:
                warn_once(warning)
    return output


def _check_run(guider: CFGGuider, latent: LatentLayout) -> None:
    """Refuse a guider or a latent that a blend cannot use (ValueError)."""
    shape = latent.shapes[0]
    if "positive" not in guider.conds or "negative" not in guider.conds:
        raise ValueError(
            f"{guider_name(guider)} has no negative conditioning, which saliency needs;"
            " use CFGGuider (at cfg 1 the negative is evaluated only for the saliency)"
        )
    if "context_handler" in guider.model_options:
        raise ValueError(
            "a blend does not support context windows, which split the latent; remove the context windows node"
        )
    if len(shape) not in (3, 4, 5):
        raise ValueError(
            "expected a latent of images [B, C, H, W], video [B, C, T, H, W] or audio [B, C, L], got"
            f" {size_of(shape)}; use the empty latent node of the models of the blend"
        )
    if latent.several:
        return  # the models' latent format describes only one of the parts
    space = latent_format_of(guider.model_patcher)
    if 0 in shape or shape[1] != space.latent_channels or len(shape) < space.latent_dimensions + 2:
        raise ValueError(
            f"expected a latent with {space.latent_channels} channels and at least {space.latent_dimensions + 2} axes"
            f" for the models of the blend, got {size_of(shape)}; use the VAE or the empty latent node of these models"
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
    args = (guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
    if len(sigmas) < 2:  # no step to take
        return executor(*args)
    base, chain = guider.model_patcher, blend_chain(guider.model_patcher)
    seed = extra_args.get("seed")
    schedule = Schedule(tuple(sigmas.tolist()), guidance_scale(guider), seed, kernel_backend())
    run_options: dict[str, Any] = guider.model_options
    scope: _Scope = run_options.get(SCOPE) or _Scope.of(chain)  # no scope if the guider runs no OUTER_SAMPLE wrapper
    shapes = scope.latent_shapes or [tuple(noise.shape)]
    latent = LatentLayout(shapes)
    _check_run(guider, latent)
    for expert_guider in scope.guiders.values():
        expert_guider.check_noise()
    prepared = run_options.pop(KEY, None)
    if prepared is None:
        patchers = resolve_patchers(base, chain.experts, guider.conds)
        prepared = patchers, own_networks(base, chain.experts, patchers, guider.conds)
    options = extra_args["model_options"]
    participants: list[ExpertParticipant] = []
    experts: list[ExpertRun] = []
    workers = Workers()

    def sample() -> Tensor:
        for index, (patcher, own, expert) in enumerate(zip(*prepared, chain.experts, strict=True), start=1):
            if expert not in scope.guiders:
                participants.append(absent_expert(index, expert, base))
                continue
            run = ExpertRun(
                index,
                patcher,
                expert,
                guider,
                sigmas,
                noise,
                latent_image,
                denoise_mask,
                seed,
                scope.guiders[expert],
                shapes,
                own,
            )
            participants.append(run)
            experts.append(run)
            run.batched_with_base = run.shares_forward_with(guider, options, KEY)
        guider.inner_model.current_patcher = base  # an expert on the same module has set its own patcher
        live = live_masks() if chain.record and not chain.quiet else None
        technique = chain.begin(participants, schedule, live)
        technique.record.notes += (*scope.notes, *filter(None, [latent.note]))
        options[KEY] = BlendPrediction(guider, technique, workers, latent)
        output = executor(*args)
        if live is not None:
            live.finish()
        scope.technique = technique
        return output

    try:
        return scope.within(WrappersMP.SAMPLER_SAMPLE, sample, args, {})
    finally:
        options.pop(KEY, None)
        workers.close()
        for expert in experts:
            expert.close()
        guider.inner_model.current_patcher = base  # ComfyUI's cleanup needs the base's patcher here


def _calc_cond_batch(
    executor: WrapperExecutor, model: BaseModel, conds: Conds, x: Tensor, sigma: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    run = model_options.get(KEY)
    if not isinstance(run, BlendPrediction):
        raise ValueError(
            "this sampler does not use ComfyUI's guiders, so the experts of the blend are not prepared;"
            " sample with KSampler, SamplerCustom or SamplerCustomAdvanced, or remove SaliencyNoiseBlend"
        )
    if model is not run.inner:
        return executor(model, conds, x, sigma, model_options)
    return run.predict(lambda conds: executor(model, conds, x, sigma, model_options), conds, x, sigma)
