"""What SeedSelect samples with: the inputs of KSampler, or those of SamplerCustomAdvanced."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from torch import Tensor

from ...common.shapes import size_of
from ...host.attachments import Conditioning
from ...host.autograd_copies import clone_tensors
from ...host.guiders import guider_name
from ...host.latent_spaces import LatentSpace
from ...host.parametrization import latent_format_of, sampling_of

Conds = dict[str, list[dict[str, Any]]]  # conditionings by name, as ComfyUI's guiders hold them
SHORT_RUNS = "beta"  # scheduler of runs with fewer steps than the full run
SAMPLING = ("sample", "outer_sample", "inner_sample", "outer_predict_noise", "predict_noise", "__call__")


@dataclass(frozen=True, kw_only=True, eq=False)
class KSamplerInputs:
    """Inputs of KSampler, and optionally those of SamplerCustomAdvanced, which take precedence.

    ``latent_image``: LATENT of one image or video, with or without a noise mask. ``seed``: seed of the noise that
    stochastic samplers add during a run. Exception: if ``ComfySeedSampler.noise_of`` drew the initial noise from a seed, the
    run uses that seed.

    ``sigmas`` replaces ``steps``, ``scheduler`` and ``denoise``; ``sampler`` (SAMPLER) replaces ``sampler_name``; ``guider``
    (GUIDER) replaces ``model``, ``positive``, ``negative`` and ``cfg``. See ``checked`` for their limits.
    """

    model: ModelPatcher
    positive: Conditioning
    negative: Conditioning
    latent_image: Mapping[str, Any]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    seed: int = 0
    sigmas: Tensor | None = None
    sampler: comfy.samplers.Sampler | None = None
    guider: CFGGuider | None = None

    def checked(self) -> "KSamplerInputs":
        """The inputs with ``model`` and ``steps`` as they are used.

        ValueError for sigmas that do not fall to 0, a sampler that samples nothing, and a guider that has no model or
        whose model has another latent space than ``model``.
        """
        if self.sampler is not None and not callable(getattr(self.sampler, "sample", None)):
            raise ValueError(
                f"expected a SAMPLER for sampler, got {type(self.sampler).__name__}; connect KSamplerSelect or another"
                " sampler node"
            )
        found = self
        if self.guider is not None:
            found = replace(found, model=_checked_model(self.guider, self.model))
        if self.sigmas is not None:
            return replace(found, sigmas=_checked_sigmas(self.sigmas), steps=len(self.sigmas) - 1)
        if self.steps < 1 or not 0.0 < self.denoise <= 1.0:
            raise ValueError(
                f"{self.steps} steps at denoise {self.denoise:g} generate nothing; use at least 1 step and a denoise"
                " above 0 and at most 1"
            )
        return found

    @property
    def custom(self) -> bool:
        """Whether SamplerCustomAdvanced samples with these inputs, not KSampler."""
        return any(given is not None for given in (self.sigmas, self.sampler, self.guider))

    @property
    def unused(self) -> dict[str, str]:
        """The inputs that are not used, by the connected input that replaces them."""
        replaced = dict(
            sigmas="steps, scheduler and denoise", sampler="sampler_name", guider="model, positive, negative and cfg"
        )
        return {name: text for name, text in replaced.items() if getattr(self, name) is not None}

    @property
    def connected(self) -> dict[str, Any]:
        """The connected sigmas, sampler and guider as plain values, for the details of a saved noise."""
        found: dict[str, Any] = {}
        if self.sigmas is not None:
            found["sigmas"] = self.sigmas.tolist()
        if self.sampler is not None:
            found["sampler"] = self.base_sampler or type(self.sampler).__name__
        if self.guider is not None:
            found["guider"] = type(self.guider).__name__
        return found

    @property
    def conds(self) -> Conds:
        """The conditionings by name, as ComfyUI's guider holds them."""
        if self.guider is not None:
            return self.guider.original_conds
        conds = {"positive": self.positive, "negative": self.negative}
        return {name: comfy.sampler_helpers.convert_cond(cond) for name, cond in conds.items()}

    def with_positive(self, change: Callable[[Conditioning], Conditioning]) -> "KSamplerInputs":
        """The inputs with the positive prompt changed by ``change``, which may return the same object.

        Of a guider, a copy gets the changed prompt. ValueError for a guider without a positive prompt.
        """
        if self.guider is None:
            positive = change(self.positive)
            return self if positive is self.positive else replace(self, positive=positive)
        conds = self.guider.original_conds
        if "positive" not in conds:
            raise ValueError(
                f"the guider {guider_name(self.guider)} has no positive prompt, which prompt_variation could vary; set it to 0"
            )
        prompt = [[c.get("cross_attn"), {k: v for k, v in c.items() if k != "cross_attn"}] for c in conds["positive"]]
        changed = change(prompt)
        if changed is prompt:
            return self
        guider = copy.copy(self.guider)
        guider.original_conds = {**conds, "positive": comfy.sampler_helpers.convert_cond(changed)}
        return replace(self, guider=guider)

    @property
    def models(self) -> list[ModelPatcher]:
        """``model``, then those that the guider uses besides, such as that for the negative prompt of DualModelGuider."""
        return [self.model, *([] if self.guider is None else further_models(self.guider).values())]

    @property
    def base_sampler(self) -> str | None:
        """Name of the sampler function, which may have options; None for a sampler that ComfyUI's list does not name."""
        return self.sampler_name if self.sampler is None else _name_of(self.sampler)

    @property
    def plain_sampler(self) -> str | None:
        """``base_sampler``, or None if the sampler has options."""
        plain = self.sampler is None or not getattr(self.sampler, "extra_options", None)
        return self.base_sampler if plain else None

    @property
    def guides_rows_independently(self) -> bool:
        """Whether the guider treats the rows of a batch independently, known only of ComfyUI's CFGGuider and BasicGuider.

        PerpNegGuider, for example, takes means over a batch.
        """
        return self.guider is None or all(
            getattr(type(self.guider), name) is getattr(CFGGuider, name) for name in SAMPLING
        )

    def sampler_object(self) -> comfy.samplers.Sampler:
        return comfy.samplers.sampler_object(self.sampler_name) if self.sampler is None else self.sampler

    def own_guider(self) -> CFGGuider:
        """The connected guider, or the one that KSampler would make."""
        if self.guider is not None:
            return self.guider
        guider = CFGGuider(self.model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(self.cfg)
        return guider

    def copied_guider(
        self, model: ModelPatcher, copied: Callable[[ModelPatcher], ModelPatcher], cfg: float | None = None
    ) -> CFGGuider:
        """Copy of ``own_guider`` with a copy of its model, ``model``, and clones of its tensors, which autograd can save.

        ``copied`` copies the guider's further models. With ``cfg``, the copy is a CFGGuider with this guidance scale, whatever
        the connected guider is. ValueError for a guider whose model has options that only this guider knows.
        """
        guider = self.own_guider()
        if cfg is not None:
            conds, guider = guider.original_conds, CFGGuider(guider.model_patcher)
            guider.original_conds = {k: conds[k] for k in ("positive", "negative") if k in conds}
            guider.set_cfg(cfg)
        # a dynamic model of conditionings with hooks has been replaced, but not its options
        if guider.model_options is not guider.model_patcher.model_options and not _has_hooks(guider.original_conds):
            raise ValueError(
                f"the guider {guider_name(guider)} has model options of its own, which would be lost here; use mode search"
                " with start noise"
            )
        out = copy.copy(guider)
        out.model_patcher, out.model_options = model, model.model_options
        if model.is_dynamic() and _has_hooks(guider.original_conds):  # as in CFGGuider.inner_set_conds
            out.model_patcher = model.get_non_dynamic_delegate()  # ty: ignore[missing-attribute]  # of dynamic patchers
        out.original_conds = clone_tensors(guider.original_conds)
        for name, further in further_models(guider).items():
            setattr(out, name, copied(further))
        return out

    def sigmas_of(self, steps: int | None = None, sampler: str | None = None) -> Tensor:
        """Sigmas of a run with ``steps`` steps (default: all steps), with ``sampler`` in place of ``sampler_name``.

        A run with fewer steps approximates the full run. It uses the beta schedule (arXiv 2407.12173) even if the full run
        uses another one. With the beta schedule, the ranking of candidates agrees best with that of full runs
        (dev/benchmarks/seed_ranking.py). With connected sigmas or denoise below 1, the shorter run uses a subset of the full
        run's sigmas instead, so both runs start at the same noise level. A run with more steps than connected sigmas have
        uses sigmas between them.
        """
        steps = self.steps if steps is None else steps
        if self.sigmas is not None:
            return self.sigmas if steps == self.steps else _resampled(self.sigmas, steps)
        if steps >= self.steps:
            return self._ksampler_sigmas(steps, sampler)
        if self.denoise == 1.0:
            return comfy.samplers.calculate_sigmas(sampling_of(self.model), SHORT_RUNS, steps)
        return _resampled(self._ksampler_sigmas(self.steps, sampler), steps)

    def _ksampler_sigmas(self, steps: int, sampler: str | None) -> Tensor:
        return comfy.samplers.KSampler(
            self.model,
            steps=steps,
            device=self.model.load_device,
            # BasicScheduler, unlike KSampler, computes the same sigmas for every sampler
            sampler="euler" if self.custom else sampler or self.sampler_name,
            scheduler=self.scheduler,
            denoise=self.denoise,
            model_options=self.model.model_options,
        ).sigmas


def _resampled(sigmas: Tensor, steps: int) -> Tensor:
    """``steps`` + 1 of the ``sigmas``, evenly taken; linearly interpolated if there are not as many."""
    places = torch.linspace(0, len(sigmas) - 1, steps + 1)
    if steps < len(sigmas):
        return sigmas[places.round().long()]
    lower = places.long().clamp(max=len(sigmas) - 2)
    return torch.lerp(sigmas[lower], sigmas[lower + 1], (places - lower).to(sigmas))


def _checked_sigmas(sigmas: Tensor) -> Tensor:
    def refuse(problem: str, remedy: str) -> ValueError:
        shown = [round(s, 4) for s in sigmas.flatten().tolist()[:8]]
        return ValueError(f"the sigmas {shown}{' ...' if sigmas.numel() > 8 else ''} {problem}; {remedy}")

    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"expected at least two sigmas in one row, got the size {size_of(sigmas) or 'of one number'}; connect a scheduler"
            " node with at least 1 step"
        )
    if not bool(torch.isfinite(sigmas).all()):
        raise refuse("are not all finite numbers", "connect a scheduler node for this model")
    if bool((sigmas[1:] > sigmas[:-1]).any()) or not float(sigmas[0]) > float(sigmas[-1]):
        raise refuse("do not fall from step to step", "connect the sigmas of a scheduler node, not flipped")
    if float(sigmas[-1]) != 0.0:
        raise refuse(
            "do not end at 0, so no finished image could be compared with the references",
            "connect all sigmas of the schedule, or the low sigmas of SplitSigmas with an image as latent_image",
        )
    return sigmas.detach()


def _checked_model(guider: CFGGuider, model: ModelPatcher) -> ModelPatcher:
    """The model of ``guider``; ValueError if it has none, or one of another latent space than ``model``."""
    own = getattr(guider, "model_patcher", None)
    if own is None or not hasattr(own, "get_model_object") or not callable(getattr(guider, "sample", None)):
        raise ValueError(
            f"expected a GUIDER with a model for guider, got {guider_name(guider)} without one; connect CFGGuider,"
            " BasicGuider or another guider node with a model"
        )
    ours, theirs = (LatentSpace.of(latent_format_of(m)) for m in (own, model))
    if ours != theirs:
        raise ValueError(
            f"the latent format of the guider's model is {ours}, that of the model connected to model is {theirs}; connect the"
            " guider's model to model"
        )
    return own


def further_models(guider: CFGGuider) -> dict[str, ModelPatcher]:
    """Models of ``guider`` besides its ``model_patcher``, by the names of its attributes."""
    found = {k: v for k, v in vars(guider).items() if isinstance(v, ModelPatcher)}
    return {k: v for k, v in found.items() if k != "model_patcher"}


def _has_hooks(conds: Conds) -> bool:
    return any("hooks" in entry for entries in conds.values() for entry in entries)


def _name_of(sampler: comfy.samplers.Sampler) -> str | None:
    """The name that KSampler has for a SAMPLER, without regard to its options; None if it has none."""
    if type(sampler) is not comfy.samplers.KSAMPLER:
        return None
    for name in comfy.samplers.SAMPLER_NAMES:
        named = comfy.samplers.sampler_object(name)
        # ComfyUI makes ddim of the function of euler and an option for inpainting
        same = (named.sampler_function, named.inpaint_options) == (sampler.sampler_function, sampler.inpaint_options)
        if same:
            return name
    return None
