"""Hooks a blend of several models into ComfyUI's sampling: four wrappers on the base MODEL, one attachment.

PREPARE_SAMPLING loads base and experts in one call, so none evicts another. SAMPLER_SAMPLE readies the experts and
hands their state to the run. CALC_COND_BATCH lets them predict beside the base and puts the blend in its place.
OUTER_SAMPLE publishes the trace with the finished latent.
"""

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..cas_dm.comfy_hook import heads_on
from .comfy_workers import Workers
from .comfy_experts import Expert, ExpertRun, check_latent_space, resolve_patchers
from .comfy_kernel_backend import kernel_backend
from ...host.shape_errors import explained

KEY = "chorus_blend"  # attachment, wrapper key, and where a run's state lies in model_options
log = logging.getLogger("comfyui-chorus")


@dataclass(frozen=True, eq=False)
class BlendChain:
    """What hangs on a blended MODEL.

    ``begin(settings, sigmas=, percent_to_sigma=, cfg=, seed=, backend=)`` makes the technique's state of one run; cfg
    is None where the guider has no single scale.
    """

    experts: tuple[Expert, ...] = ()
    settings: tuple[Any, ...] = ()
    begin: Callable[..., Any] | None = None


def blend_chain(model) -> BlendChain:
    """The blend that ``model`` carries; an empty one if it carries none."""
    return model.get_attachment(KEY) or BlendChain()


def add_expert(model, expert_model, positive, negative, label: str, settings, begin):
    """A clone of ``model`` whose sampling lets ``expert_model`` take part, beside the experts it already has."""
    if blend_chain(expert_model).experts:
        raise ValueError(
            f"the model wired in as '{label}' is itself a blend; chain instead: wire the blended MODEL into 'model'"
            " and each single checkpoint into 'expert'"
        )
    if heads_on(expert_model):
        raise ValueError(
            f"the model wired in as '{label}' carries a Cas-DM head, which a blend does not ask; put CasDMHead after"
            " SaliencyNoiseBlend, where it refines what both have painted"
        )
    check_latent_space(model, expert_model, label)
    chain = blend_chain(model)
    out = model.clone()
    expert = Expert(expert_model, positive, negative, label)
    out.set_attachments(KEY, BlendChain((*chain.experts, expert), (*chain.settings, settings), begin))
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.SAMPLER_SAMPLE, _sampler_sample),
        (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
    ):
        out.remove_wrappers_with_key(kind, KEY)  # the host appends under an existing key
        out.add_wrapper_with_key(kind, KEY, wrapper)
    return out


def _prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
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


def _outer_sample(executor, *args, **kwargs):
    """Publishes the trace with the finished latent, in the form in which the sampler node gives it out."""
    output = executor(*args, **kwargs)
    if (run := executor.class_obj.model_options.pop(f"{KEY}_run", None)) is not None:
        run.finish(output.detach().to("cpu", copy=True))
    return output


def _guidance_scale(guider) -> float | None:
    """The guider's cfg where it has a single one: just positive and negative, and cfg as CFGGuider applies it."""
    if set(guider.conds) != {"positive", "negative"}:
        return None
    return float(guider.cfg)


def _check_run(guider, noise: Tensor) -> None:
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
    space = guider.model_patcher.get_model_object("latent_format")
    if not noise.numel() or noise.shape[1] != space.latent_channels or noise.ndim < space.latent_dimensions + 2:
        raise ValueError(
            f"the latent is {'x'.join(map(str, noise.shape))}, and the models of the blend work on {space.latent_channels}"
            f" channels and {space.latent_dimensions + 2} axes; use the VAE or the empty latent of these models"
        )


def _sampler_sample(executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *rest):
    if len(sigmas) < 2:  # no step to take
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
    _check_run(guider, noise)
    base, chain = guider.model_patcher, blend_chain(guider.model_patcher)
    sampling = base.get_model_object("model_sampling")
    technique = chain.begin(
        chain.settings,
        sigmas=tuple(sigmas.tolist()),
        percent_to_sigma=lambda percent: float(sampling.percent_to_sigma(percent)),
        cfg=_guidance_scale(guider),
        seed=extra_args.get("seed"),
        backend=kernel_backend(),
    )
    patchers = guider.model_options.pop(KEY, None) or resolve_patchers(base, chain.experts, guider.conds)
    options = extra_args["model_options"]
    runs: list[ExpertRun] = []
    workers = Workers()
    try:
        for patcher, expert in zip(patchers, chain.experts, strict=True):
            runs.append(
                ExpertRun(patcher, expert, guider, sigmas, noise, latent_image, denoise_mask, extra_args.get("seed"))
            )
        guider.inner_model.current_patcher = base  # an expert on the same module has put itself there
        options[KEY] = _BlendRun(guider, runs, technique, options, workers)
        output = executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *rest)
        guider.model_options[f"{KEY}_run"] = technique
        return output
    finally:
        options.pop(KEY, None)
        workers.close()
        for run in runs:
            run.close()
        guider.inner_model.current_patcher = base  # the host's own cleanup still needs it


def _calc_cond_batch(executor, model, conds, x, sigma, model_options):
    run = model_options.get(KEY)
    if not isinstance(run, _BlendRun):
        raise ValueError(
            "this sampler does not go through ComfyUI's guiders, so the blend has no experts to ask;"
            " sample with KSampler, SamplerCustom or SamplerCustomAdvanced, or remove SaliencyNoiseBlend"
        )
    if model is not run.inner:
        return executor(model, conds, x, sigma, model_options)
    return run.calc(lambda asked: executor(model, asked, x, sigma, model_options), conds, x, sigma)


class _BlendRun:
    """Base, experts and technique during one run, seen from the sampler's calls."""

    def __init__(self, guider, experts: list[ExpertRun], technique, base_options: dict, workers: Workers):
        self.inner, self.conds, self.experts, self.technique = guider.inner_model, guider.conds, experts, technique
        self.workers = workers
        self.labels = [expert.label for expert in blend_chain(guider.model_patcher).experts]
        here = guider.model_patcher.load_device
        self.elsewhere = [run.device != here and run.inner is not self.inner for run in experts]
        self.can_crop = [run.can_crop for run in experts]
        self.names = {c[0]["uuid"]: name for name, c in guider.conds.items() if c}
        self.together = [run.shares_forward_with(guider, base_options, KEY) for run in experts]
        prints = {i: run.fingerprint() for i, run in enumerate(experts, start=1) if self.together[i - 1]}
        self.places = {i: place for place, i in enumerate(sorted(prints, key=prints.get))}  # riders in the base's batch
        self._x, self._sigma = None, None  # of the last blended prediction
        self._warned = False

    def calc(self, base: Callable, conds: list, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """The host's answer for ``conds`` with the blend in its place; ``base(conds)`` asks the base model."""
        names = [self.names.get(c[0]["uuid"]) if c else None for c in conds]
        if not any(names):
            if any(c for c in conds) and not self._warned:
                self._warned = True
                log.warning("a conditioning the sampler did not name is predicted by the base model alone")
            return base(conds)
        level = float(sigma[0])
        here = x is self._x and level == self._sigma
        if "positive" in names and not here:
            self._x, self._sigma = x, level
            return self._blend(base, conds, names, x, sigma, level)
        return self._mix(base, conds, names, x, sigma, here)

    def _blend(self, base, conds, names, x, sigma, level) -> list[Tensor]:
        """The prediction of a step: saliency, mask, blend."""
        covered = [run.convert.covers(level) for run in self.experts]
        plan = self.technique.plan(level, x, covered, self.can_crop)
        if not plan:
            return base(conds)
        running = [i for i, action in plan.items() if action == "run"]
        boxes = {i: self.technique.box(i) for i in running}
        others = [n for n in names if n not in (None, "positive", "negative")]  # DualCFG's middle, PerpNeg's empty
        # in the sampler's order: a row's place in a batch can change its last bits
        wanted = list(dict.fromkeys([*filter(None, names), "positive", "negative"]))
        # riders keep their places in any order of the chain, for the same reason
        riding = sorted((i for i in running if self.together[i - 1] and boxes[i] is None), key=self.places.get)

        with self._asked(running, riding, wanted, x, sigma, boxes) as answers_of:
            with explained("the base model of the blend, or an expert of the same weights,"):
                own, predicted, out = self._ask_base(base, conds, names, wanted, riding)
            for i in running:
                if i not in predicted:
                    with explained(f"'{self.labels[i - 1]}'"):
                        predicted[i] = dict(zip(wanted, (o.to(x) for o in answers_of[i]()), strict=True))

        cond, uncond = self.technique.blend(
            sigma,
            (own["positive"], own["negative"]),
            {i: (p["positive"], p["negative"]) for i, p in predicted.items()},
            [i for i, action in plan.items() if action == "reuse"],
        )
        blended = {"positive": cond, "negative": uncond}
        for n in others:
            blended[n] = self.technique.mix(own[n], {i: p[n] for i, p in predicted.items()})
        return [blended.get(n, o) for n, o in zip(names, out, strict=True)]

    @contextlib.contextmanager
    def _asked(self, running, riding, wanted, x, sigma, boxes):
        """By expert, how to get the answers of those that do not ride; those on other devices have been started.

        Whatever ends the block, none of them is still at work after it.
        """
        answers = {i: self.experts[i - 1].ask(wanted, x, sigma, boxes[i]) for i in running if i not in riding}
        started = {}
        for i, answer in answers.items():
            # gradients are recorded by the thread that computes, so a run that wants them has one
            if self.elsewhere[i - 1] and not torch.is_grad_enabled():
                started[i] = self.workers.submit(self.experts[i - 1].device, answer)
        try:
            yield answers | {i: future.result for i, future in started.items()}
        finally:
            concurrent.futures.wait(started.values())

    def _ask_base(self, base, conds, names, wanted, riding) -> tuple[dict, dict[int, dict], list]:
        """The base's predictions by name, the riders' by expert and name, and the base's in the order of ``conds``.

        What rides with the base shares its batch; the negative that cfg 1 left out is asked for apart, so that the
        base's own rows are computed exactly as without the blend.
        """
        missing = [n for n in ("positive", "negative") if n not in names]
        guests = [self.experts[i - 1].conds[n] for i in riding for n in wanted]
        if missing:
            out = list(base(conds))
            answers = base([self.conds[n] for n in missing] + guests)
            extra, answers = dict(zip(missing, answers, strict=False)), answers[len(missing) :]
        else:
            answers = base([*conds, *guests])
            out, answers, extra = list(answers[: len(conds)]), answers[len(conds) :], {}
        own = {n: out[k] for k, n in enumerate(names) if n is not None} | extra
        size = len(wanted)
        predicted = {
            i: dict(zip(wanted, answers[slot * size : (slot + 1) * size], strict=True)) for slot, i in enumerate(riding)
        }
        return own, predicted, out

    def _mix(self, base, conds, names, x, sigma, here: bool) -> list[Tensor]:
        """A further prediction (PAG, SAG, skipped layers): the base's by its own patches, mixed by the last mask.

        ``here``: at the very x and sigma of the last blended prediction.
        """
        out = list(base(conds))
        painting = self.technique.painting
        if not painting:
            return out
        if here:  # the experts have already predicted
            side = {"positive": 0, "negative": 1}
            predicted = {
                i: [pair[side[n]] if n in side else None for n in names]
                for i, pair in self.technique.predictions.items()
                if i in painting
            }
        else:
            predicted = {i: self.experts[i - 1].predict(names, x, sigma) for i in painting}
        for k, n in enumerate(names):
            if n is not None:
                experts = {i: p[k] for i, p in predicted.items() if p[k] is not None}
                out[k] = self.technique.mix(out[k], experts)
        return out
