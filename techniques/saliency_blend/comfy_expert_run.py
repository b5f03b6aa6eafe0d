"""An expert during one sampling run: its predictions, and whether they can share a batch with the base's."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import comfy.hooks
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor, nn

from ...host.batches import relates_rows
from ...host.guiders import guider_name
from ...host.parametrization import Conversion, latent_format_of, percent_to_sigma, sampling_of
from ...host.patch_names import GUIDANCE, name_of
from ...host.patcher_differences import same_forward, same_module, same_value
from .comfy_experts import Control, Expert, Network, copy_controls
from .comfy_guidance import ExpertGuider, guidance_functions, guided, leaves_out_negative
from .experts import ExpertParticipant
from .extrapolation import Pair
from .regions import LatentBox

MEMORY_OF_CONTEXT_WINDOWS = "ContextWindows_prepare_sampling"  # ComfyUI's wrapper that only estimates memory


Evaluation = tuple[list[Tensor], Pair | None]  # see ExpertRun.evaluate()


def _fresh(conds: list[dict], controls: dict[int, Control], networks: Mapping[nn.Module, Network]) -> list[dict]:
    """Copies of converted conditionings with new ids.

    ControlNets are copied, too, because they store state of one model. For ``networks`` see ``copy_controls``.

    ``controls`` maps the id of a ControlNet to its copy. Conditionings that share a ControlNet therefore also share the
    copy, so that ComfyUI can still batch them.
    """
    out = []
    for cond in conds:
        fresh: dict[str, Any] = {**cond, "model_conds": dict(cond.get("model_conds", {})), "uuid": uuid.uuid4()}
        if "control" in cond:
            control = cond["control"]
            if id(control) not in controls:
                controls[id(control)] = copy_controls(control, networks)
            fresh["control"] = controls[id(control)]
        out.append(fresh)
    return out


def absent_expert(index: int, expert: Expert, base: ModelPatcher) -> ExpertParticipant:
    """The participant for an expert that is off, whose model is not loaded."""
    participant = ExpertParticipant(index, expert.settings, percent_to_sigma(sampling_of(base)))
    participant.frame_ratio = getattr(latent_format_of(base), "temporal_downscale_ratio", 1)
    return participant


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
        own_guider: ExpertGuider,
        latent_shapes: Sequence[Sequence[int]],
        networks: Mapping[nn.Module, Network],
    ) -> None:
        base = guider.model_patcher
        sampling = sampling_of(base)
        super().__init__(index, expert.settings, percent_to_sigma(sampling))
        self.frame_ratio = getattr(latent_format_of(base), "temporal_downscale_ratio", 1)
        self.patcher, self.inner, self.device = patcher, patcher.model, patcher.load_device
        self.convert = Conversion(sampling, sampling_of(patcher))
        # an expert on another device runs in its own thread while the base runs; this needs two modules
        self.has_own_device = self.device != base.load_device and self.inner is not guider.inner_model
        self.batched_with_base = False  # set by the caller from shares_forward_with()

        given = {"positive": expert.positive, "negative": expert.negative}
        conds: dict[str, list[dict]] = {}
        controls: dict[int, Control] = {}
        for name, original in guider.original_conds.items():
            wired = given.get(name)
            converted = original if wired is None else comfy.sampler_helpers.convert_cond(wired)
            conds[name] = _fresh(converted, controls, networks)
        comfy.samplers.preprocess_conds_hooks(conds)

        self._hook_mode = patcher.hook_mode
        if comfy.samplers.get_total_hook_groups_in_conds(conds) <= 1:
            patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        # empty until process_conds() below: close() cleans up the ControlNets in it, and ComfyUI cannot clean up a
        # control LoRA before its pre_run()
        self.conds: dict[str, list[dict]] = {}
        self.guider = own_guider
        self.options = comfy.model_patcher.create_model_options_clone(self.guider.model_options)
        self._seed = seed
        # a box of the first part would need a box of the packed latent; and audio that is cut out begins at time 0
        self._whole_latent = len(latent_shapes) > 1 or len(latent_shapes[0]) == 3
        try:
            comfy.sampler_helpers.prepare_model_patcher(patcher, conds, self.options)
            self.guidance = guidance_functions(self.options)
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
                latent_shapes=latent_shapes,
            )
            self.guider.model_patcher, self.guider.inner_model = patcher, self.inner
            self.guider.conds, self.guider.model_options = self.conds, self.options
            self._check_guidance(guider, denoise_mask)
        except BaseException:
            self.close()
            raise

    @property
    def has_guidance(self) -> bool:  # type: ignore[override]
        return bool(self.guidance)

    def can_run(self, sigma: float) -> bool:
        return self.convert.covers(sigma)

    def shares_forward_with(self, guider: CFGGuider, base_options: dict, own_key: str) -> bool:
        """Whether the expert's conditionings can join the base's batch.

        They can if the expert and the base use the same module with the same weights, and if neither has patches, hooks
        or ControlNets.

        ``own_key``: the key of the blend's own wrappers, which are ignored here.
        """
        base = guider.model_patcher
        if relates_rows(base):
            return False
        plain = not any("hooks" in c or "control" in c for conds in self.conds.values() for c in conds)
        return (
            plain
            and self.inner is base.model
            and self.convert.identity
            and same_module(self.patcher, base)
            and same_forward(self.patcher, base, but=("model_options", "wrappers", "callbacks"))
            and not _has_patches(self.options, None)
            and not _has_patches(base_options, own_key)
            and same_value(_forward_options(self.options), _forward_options(base_options))
        )

    @cached_property
    def sort_key(self) -> tuple[float, ...]:
        """Key that orders the experts in the base's batch by their prompts, independent of their order in the chain.

        The position of a row in a batch can change the last bits of its result.
        """
        texts = [c["cross_attn"] for conds in self.conds.values() for c in conds if c.get("cross_attn") is not None]
        return tuple(float(text.double().sum()) for text in texts)

    @cached_property
    def can_crop(self) -> bool:
        """Whether the expert can be evaluated on a part of the latent.

        It cannot if its conditionings or guidance functions need the whole latent.
        """
        whole = ("area", "control", "default", "gligen")
        if self._whole_latent:
            return False
        return not self.guidance and not any(k in c for conds in self.conds.values() for c in conds for k in whole)

    def _check_guidance(self, guider: CFGGuider, denoise_mask: Tensor | None) -> None:
        """Refuse nodes on the expert's MODEL that a blend cannot apply to an expert (ValueError)."""
        names = " and ".join(dict.fromkeys(name_of(f) for f in self.guidance))
        if self.guidance and set(guider.conds) != {"positive", "negative"}:
            raise ValueError(
                f"{names} on the expert '{self.label}' needs a guider with a single cfg scale, got"
                f" {guider_name(guider)}; use KSampler or CFGGuider, or remove {names} from the expert"
            )
        ours, theirs = (o.get("denoise_mask_function") for o in (self.options, guider.model_options))
        if denoise_mask is not None and ours is not None and not same_value(ours, theirs):
            raise ValueError(
                f"{name_of(ours)} on the expert '{self.label}' changes how the sampler masks the latent, and the sampler"
                f" belongs to the base; put {name_of(ours)} on the base model"
            )
        kinds = self.options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.PREPARE_SAMPLING, {})
        others = [w for key, found in kinds.items() if key != MEMORY_OF_CONTEXT_WINDOWS for w in found]
        if others:
            raise ValueError(
                f"{name_of(others[0])} on the expert '{self.label}' changes the preparation of the sampler, which belongs"
                " to the base; put it on the base model"
            )

    def evaluate(self, names: list[str], x: Tensor, sigma: Tensor, cfg: float | None) -> Evaluation:
        """The expert's x0 [B, C, *S] for each of ``names`` at the base's ``x`` and ``sigma``, and the guided pair.

        The results are on the expert's device; they are 0 outside ``box``. ``cfg``: the sampler's scale. The guided
        pair is the result of ``own_guidance``, or None if the expert has no guidance functions.
        """
        found = self._predict(names, x, sigma, self.box, cfg)
        if not self.guidance:
            return found, None
        pair = found[names.index("positive")], found[names.index("negative")]
        return found, self.own_guidance(pair, x, sigma, cfg)

    def _predict(
        self, names: list[str], x: Tensor, sigma: Tensor, box: LatentBox | None = None, cfg: float | None = None
    ) -> list[Tensor]:
        """The expert's x0 [B, C, *S] for each of ``names`` at the base's ``x`` and ``sigma``, on the expert's device.

        ``box``: the part of the latent to evaluate; the results are 0 elsewhere. At cfg 1, ComfyUI evaluates only the
        positive, but the blend also needs the negative. For a model whose rows can depend on each other, the negative is
        therefore evaluated in a separate call, so that the positive is the same as without a blend.
        """
        x_own, sigma_own = self._own_input(x, sigma)
        conds = [self.conds[n] for n in names]
        if box is not None:
            top, left, height, width = box
            area = (*x.shape[2:-2], height, width, *[0] * (x.ndim - 4), top, left)
            conds = [[{**c, "area": area} for c in cond] for cond in conds]
        split = "negative" in names and self._splits(cfg)
        calls = [[n for n in names if n != "negative"], ["negative"]] if split else [names]
        out: dict[str, Tensor] = {}
        with self._current():
            for call in calls:
                # None marks a conditioning that is not evaluated, as in ComfyUI
                wanted: Any = [cond if n in call else None for n, cond in zip(names, conds, strict=True)]
                found = comfy.samplers.calc_cond_batch(self.inner, wanted, x_own, sigma_own, self.options)
                out |= {n: found[k] for k, n in enumerate(names) if n in call}
        return [out[n] for n in names]

    def _own_input(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The base's x and sigma, converted to the expert's noise process, on the expert's device."""
        x_own, sigma_own = self.convert(x, sigma)
        return x_own.to(self.device), sigma_own.to(self.device)

    def _splits(self, cfg: float | None) -> bool:
        """Whether the negative is evaluated in a separate call if the sampler's scale is ``cfg``, see ``_predict``."""
        return self.relates_rows and leaves_out_negative(self.own_cfg(cfg), self.options)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Let the expert's module use the weights and hooks of the expert's patcher."""
        previous, self.inner.current_patcher = getattr(self.inner, "current_patcher", None), self.patcher
        try:
            yield
        finally:
            self.inner.current_patcher = previous

    def own_cfg(self, cfg: float | None) -> float | None:
        """The expert's guidance scale if the sampler's scale is ``cfg``."""
        return self.settings.expert_cfg or cfg

    @cached_property
    def relates_rows(self) -> bool:
        """Whether a row that the expert predicts may depend on the other rows of the batch: its model, or one of its
        patches and wrappers, may relate them."""
        return relates_rows(self.patcher) or _has_patches(self.options, None)

    def own_guidance(self, pair: Pair, x: Tensor, sigma: Tensor, cfg: float | None) -> Pair:
        """The guided pair for ``pair``, the expert's raw predictions at the base's x and sigma.

        See ``comfy_guidance`` for the conversion.

        Errors (ValueError): the sampler's ``cfg`` is 0, which discards every guidance.
        """
        own = self.own_cfg(cfg)
        if not cfg or own is None:
            raise ValueError(
                f"{name_of(self.guidance[0])} on the expert '{self.label}' has no effect with the sampler's cfg 0; raise"
                " the sampler's cfg, or remove it from the expert"
            )
        self.guider.cfg = own
        split = self._splits(cfg)
        with self._current():
            return guided(
                self.guider,
                *self._own_input(x, sigma),
                pair,
                cfg,
                joint=not split,
                separate=split or not self.relates_rows,
                seed=self._seed,
            )

    def predict(self, names: list[str | None], x: Tensor, sigma: Tensor) -> list[Tensor | None]:
        """The expert's x0 [B, C, *S], on the device of ``x``, for each of ``names``; None for a name that is None."""
        wanted = [n for n in names if n is not None]
        found = dict(zip(wanted, (o.to(x) for o in self._predict(wanted, x, sigma)), strict=True))
        return [found.get(n) for n in names]

    def close(self) -> None:
        """Undo all changes of the run to the expert's patcher and its controls."""
        comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        self.patcher.hook_mode = self._hook_mode
        self.patcher.restore_hook_patches()
        self.patcher.cleanup()
        comfy.sampler_helpers.cleanup_models(self.conds, [])


def _forward_options(options: dict[str, Any]) -> dict[str, Any]:
    """The entries of model_options that can still change a forward pass if there are no patches, wrappers or callbacks.

    Examples are attention overrides.
    """
    transformer = {
        k: v
        for k, v in options.get("transformer_options", {}).items()
        if k not in ("sample_sigmas", "wrappers", "callbacks") and v not in ({}, [])
    }
    outside = (
        *GUIDANCE,
        "disable_cfg1_optimization",
        "denoise_mask_function",
        "transformer_options",
        "to_load_options",
    )
    # keys that begin with "chorus_" are set by this pack; the others are set by ComfyUI and other nodes
    inside = {k: v for k, v in options.items() if k not in outside and not k.startswith("chorus_")}
    return {**inside, "transformer_options": transformer}


def _has_patches(options: dict, own_key: str | None) -> bool:
    """Whether model_options contain patches, callbacks, or wrappers under a key other than ``own_key``.

    The result of such code may depend on which rows are in the batch.
    """
    transformer = options.get("transformer_options", {})
    wrappers = transformer.get("wrappers", {})
    foreign = any(key != own_key and found for kind in wrappers.values() for key, found in kind.items())
    hooked = any(transformer.get(k) for k in ("patches", "patches_replace")) or any(
        found for kind in transformer.get("callbacks", {}).values() for found in kind.values()
    )
    return foreign or hooked or "model_function_wrapper" in options or "multigpu_clones" in options
