"""Experts of a blend: further models that predict beside the base, with patches, hooks and conditioning of their own."""

import copy
import logging
import uuid
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from torch import Tensor

from ...host.attachments import Conditioning
from ...host.autograd_copies import own_tensors, same_weights
from ...host.parametrization import Conversion, latent_format_of, sampling_of
from .experts import ExpertParticipant, ExpertSettings
from .regions import LatentBox
from .trace import BlendTrace

log = logging.getLogger("comfyui-chorus")


class Expert:
    """A MODEL with its conditioning and settings, as wired; its node's trace; its copy if it needs one.

    Shared by all clones of the blended MODEL.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        positive: Conditioning | None,
        negative: Conditioning | None,
        settings: ExpertSettings,
        trace: BlendTrace | None = None,
    ) -> None:
        self.patcher, self.positive, self.negative = patcher, positive, negative
        self.settings, self.trace = settings, trace
        self._own_copy: ModelPatcher | None = None

    @property
    def label(self) -> str:
        return self.settings.label

    def conditionings(self) -> list:
        return [entry for cond in (self.positive, self.negative) if cond is not None for entry in cond]

    def with_own_weights(self) -> ModelPatcher:
        """The expert on a module of its own, made on first need and kept as long as the expert."""
        if self._own_copy is None:
            log.info("'%s' shares a checkpoint with other patches; its weights are copied", self.label)
            self._own_copy = _copy_with_module(self.patcher)
        return self._own_copy

    def for_gradients(self, copy: Callable[[ModelPatcher], ModelPatcher]) -> "Expert":
        """The expert on a copy whose weights autograd may save, without the trace of its node."""
        return Expert(copy(self.patcher), own_tensors(self.positive), own_tensors(self.negative), self.settings)


def _copy_with_module(patcher: ModelPatcher) -> ModelPatcher:
    """A clone of ``patcher`` with its own nn.Module: one module holds one set of patches at a time."""
    with torch.inference_mode(False):
        if patcher.cached_patcher_init is not None:
            return patcher.deepclone_multigpu()  # the host reloads the file and keeps the patches
        comfy.model_management.unload_model_and_clones(patcher)  # the module goes back to its unpatched weights
        # the config answers None to every unknown attribute, __deepcopy__ included
        config = patcher.model.model_config
        module = copy.deepcopy(patcher.model, {id(config): config})
        clone = patcher.clone(model_override=(module, ({}, {}, {}, set())))
        clone.hook_backup = {}
        return clone


def resolve_patchers(base: ModelPatcher, experts: Sequence[Expert], conds: dict[str, list[dict]]) -> list[ModelPatcher]:
    """One patcher per expert, such that no two models of the run want different weights on one module.

    ``conds``: the sampler's. Decided when sampling starts, because a LoRA may be put on the base after the expert was
    wired. A clone does not see which hooks another clone has left on the module: hooks too need weights of their own.
    """
    base_hooked = any("hooks" in c for cond in conds.values() for c in cond)
    placed, patchers = [(base, base_hooked)], []
    for expert in experts:
        patcher = expert.patcher
        hooked = comfy.sampler_helpers.cond_has_hooks(expert.conditionings()) or (
            base_hooked and (expert.positive is None or expert.negative is None or len(conds) > 2)
        )
        if any(
            patcher.is_clone(other) and (hooked or other_hooked or not same_weights(patcher, other))
            for other, other_hooked in placed
        ):
            patcher = expert.with_own_weights()
        if patcher.is_dynamic() and hooked:
            # as CFGGuider does for the base
            patcher = patcher.get_non_dynamic_delegate()  # ty: ignore[missing-attribute]  # a dynamic one has it
        placed.append((patcher, hooked))
        patchers.append(patcher)
    return patchers


def check_latent_space(base: ModelPatcher, expert: ModelPatcher, label: str) -> None:
    """Refuse an expert that cannot read the base's latents."""
    ours, theirs = (latent_format_of(m) for m in (base, expert))

    def describe(f: LatentFormat) -> str:
        return f"{type(f).__name__} ({f.latent_channels} channels, scale {getattr(f, 'scale_factor', 1.0):g})"

    same = (
        type(ours) is type(theirs)
        and ours.latent_channels == theirs.latent_channels
        and getattr(ours, "scale_factor", 1.0) == getattr(theirs, "scale_factor", 1.0)
    )
    if not same:
        raise ValueError(
            f"'{label}' works on latents of the format {describe(theirs)}, the base on {describe(ours)};"
            " only checkpoints of one latent space can be blended"
        )
    Conversion(sampling_of(base), sampling_of(expert))


class Control(Protocol):
    """A ControlNet of any kind, with the one before it in the chain."""

    previous_controlnet: "Control | None"

    def copy(self) -> "Control": ...

    def set_previous_controlnet(self, controlnet: "Control") -> Any: ...


def _fresh(conds: list[dict], controls: dict[int, Control]) -> list[dict]:
    """Copies of converted conditionings under new ids; ControlNets are copied too, since they remember one model.

    ``controls`` keeps the copies by the id of their original: one object stays one over all conditionings of a model,
    since the host batches those that share it.
    """
    out = []
    for cond in conds:
        fresh: dict[str, Any] = {**cond, "model_conds": dict(cond.get("model_conds", {})), "uuid": uuid.uuid4()}
        if "control" in cond:
            control = cond["control"]
            if id(control) not in controls:
                controls[id(control)] = _copy_controls(control)
            fresh["control"] = controls[id(control)]
        out.append(fresh)
    return out


def _copy_controls(control: Control) -> Control:
    duplicate = control.copy()
    if control.previous_controlnet is not None:
        duplicate.set_previous_controlnet(_copy_controls(control.previous_controlnet))
    return duplicate


class ExpertRun(ExpertParticipant):
    """One expert during one sampling run: its patches, hooks, controls and conditioning, ready to predict x0."""

    def __init__(
        self,
        index: int,
        patcher: ModelPatcher,
        expert: Expert,
        guider: CFGGuider,
        sigmas: Tensor,
        noise: Tensor,
        latent_image: Tensor | None,
        denoise_mask: Tensor | None,
        seed: int | None,
    ) -> None:
        base = guider.model_patcher
        sampling = sampling_of(base)
        super().__init__(index, expert.settings, lambda percent: float(sampling.percent_to_sigma(percent)))
        self.patcher, self.inner, self.device = patcher, patcher.model, patcher.load_device
        self.convert = Conversion(sampling, sampling_of(patcher))
        # a thread of its own lets it compute while the base does; one module cannot do both
        self.has_own_device = self.device != base.load_device and self.inner is not guider.inner_model
        self.batched_with_base = False  # see shares_forward_with()

        given = {"positive": expert.positive, "negative": expert.negative}
        conds: dict[str, list[dict]] = {}
        controls: dict[int, Control] = {}
        for name, original in guider.original_conds.items():
            wired = given.get(name)
            conds[name] = _fresh(original if wired is None else comfy.sampler_helpers.convert_cond(wired), controls)
        comfy.samplers.preprocess_conds_hooks(conds)

        self._hook_mode = patcher.hook_mode
        if comfy.samplers.get_total_hook_groups_in_conds(conds) <= 1:
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        self.conds = conds
        self.options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        try:
            comfy.sampler_helpers.prepare_model_patcher(patcher, conds, self.options)
            comfy.samplers.filter_registered_hooks_on_conds(conds, self.options)
            comfy.samplers.cast_to_load_options(self.options, device=self.device, dtype=patcher.model_dtype())
            self.options["transformer_options"]["sample_sigmas"] = self.convert.sigmas(sigmas).to(self.device)
            patcher.pre_run()
            self.conds = comfy.samplers.process_conds(
                self.inner,
                noise.to(self.device),
                conds,
                self.device,
                None if latent_image is None else latent_image.to(self.device),
                None if denoise_mask is None else denoise_mask.to(self.device),
                seed,
                latent_shapes=[tuple(noise.shape)],
            )
        except BaseException:
            self.close()
            raise

    def can_run(self, sigma: float) -> bool:
        return self.convert.covers(sigma)

    def shares_forward_with(self, guider: CFGGuider, base_options: dict, own_key: str) -> bool:
        """Whether the expert's conditionings may join the base's batch: one module, nothing else of its own."""
        base = guider.model_patcher
        plain = not any("hooks" in c or "control" in c for conds in self.conds.values() for c in conds)
        return (
            plain
            and self.inner is base.model
            and self.convert.identity
            and same_weights(self.patcher, base)
            and not _has_patches(self.options, None)
            and not _has_patches(base_options, own_key)
        )

    @cached_property
    def sort_key(self) -> tuple[float, ...]:
        """Orders the experts that join the base's batch by their prompts, whatever their order in the chain.

        The place of a row in a batch can change its last bits.
        """
        texts = [c["cross_attn"] for conds in self.conds.values() for c in conds if c.get("cross_attn") is not None]
        return tuple(float(text.double().sum()) for text in texts)

    @cached_property
    def can_crop(self) -> bool:
        """Whether its conditionings can be evaluated on a part of the latent; these need the whole image."""
        whole = ("area", "control", "default", "gligen")
        return not any(k in c for conds in self.conds.values() for c in conds for k in whole)

    def prediction_of(
        self, names: list[str], x: Tensor, sigma: Tensor, box: LatentBox | None = None
    ) -> Callable[[], list[Tensor]]:
        """A function that predicts x0 [B, C, *S] for each named conditioning at the base's (x, sigma).

        Its inputs are on the expert's device already, where it leaves its results. ``box``: the part of the latent to
        evaluate; results are 0 elsewhere.
        """
        x_own, sigma_own = self.convert(x, sigma)
        x_own, sigma_own = x_own.to(self.device), sigma_own.to(self.device)
        conds = [self.conds[n] for n in names]
        if box is not None:
            top, left, height, width = box
            area = (*x.shape[2:-2], height, width, *[0] * (x.ndim - 4), top, left)
            conds = [[{**c, "area": area} for c in cond] for cond in conds]

        def predict() -> list[Tensor]:
            previous, self.inner.current_patcher = getattr(self.inner, "current_patcher", None), self.patcher
            try:
                return comfy.samplers.calc_cond_batch(self.inner, conds, x_own, sigma_own, self.options)
            finally:
                self.inner.current_patcher = previous

        return predict

    def predict(self, names: list[str | None], x: Tensor, sigma: Tensor) -> list[Tensor | None]:
        """x0 [B, C, *S] for each named conditioning at the base's (x, sigma); None where no name is given."""
        wanted = [n for n in names if n is not None]
        found = dict(zip(wanted, (o.to(x) for o in self.prediction_of(wanted, x, sigma)()), strict=True))
        return [found.get(n) for n in names]

    def close(self) -> None:
        """Undo everything the run changed on the expert's patcher and its controls."""
        comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        self.patcher.hook_mode = self._hook_mode
        self.patcher.restore_hook_patches()
        self.patcher.cleanup()
        comfy.sampler_helpers.cleanup_models(self.conds, [])


def _has_patches(options: dict, own_key: str | None) -> bool:
    """Whether model_options carry anything that looks at which rows of a batch are conditional."""
    transformer = options.get("transformer_options", {})
    wrappers = transformer.get("wrappers", {})
    foreign = any(key != own_key and found for kind in wrappers.values() for key, found in kind.items())
    hooked = any(transformer.get(k) for k in ("patches", "patches_replace")) or any(
        found for kind in transformer.get("callbacks", {}).values() for found in kind.values()
    )
    return foreign or hooked or "model_function_wrapper" in options or "multigpu_clones" in options
