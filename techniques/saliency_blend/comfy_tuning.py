"""Samples images of a blend with other settings, for TuneBlend and BlendGrid.

The images are those that KSampler generates. All candidates get the same noise. The steps before any expert starts are
the same for all candidates: they are sampled once, and further candidates continue from there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...host.attachments import Conditioning
from ...host.images import check_decodes, filmstrips
from ...host.parametrization import sampling_of
from ...host.row_batches import adds_no_noise, rows_are_independent, rows_that_fit
from ...host.sampled_latents import LatentLayout, decoded_shape, draw_noise, sampled_latent
from .comfy_hook import KEY, BlendChain, blend_chain
from .experts import ExpertSettings
from .tuning_space import Point, Space, current_point, settings_at

# samplers without a memory of earlier steps and without noise, which continue at any step as if they had begun before;
# the number is how many sigmas after that of the step they evaluate
CONTINUES = {"euler": 0, "ddim": 0, "heun": 1, "dpm_2": 1}
MOST_SHARED = 4  # latents kept for each seed and number of steps, from which candidates continue
OWN_VAE = "connect the VAE of this model"  # remedy for a VAE that does not decode the latents

Callback = Callable[[int, Tensor, Tensor, int], None]


def tuned_chain(model: ModelPatcher) -> BlendChain:
    """The blend of ``model``; a ValueError if it has none."""
    chain = blend_chain(model)
    if not chain.experts:
        raise ValueError(
            "the model is no blend, so it has no settings to vary; connect the output of SaliencyNoiseBlend"
        )
    return chain


@dataclass(frozen=True, kw_only=True)
class SamplingInputs:
    """The inputs of KSampler at denoise 1."""

    positive: Conditioning
    negative: Conditioning
    latent_image: Mapping[str, Any]  # of one image or video
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str


@dataclass
class BlendCandidates:
    """Samples the blend of ``model`` with other values of the settings in ``space``.

    Images of several seeds are sampled in one batch if this changes them by no more than rounding.

    Errors (ValueError): a model without a blend; several latents, or latents from which no VAE decodes images; a VAE of
    another kind of model.
    """

    model: ModelPatcher
    space: Space
    inputs: SamplingInputs
    vae: VAE
    callback: Callback | None = None
    evaluated_steps: int = 0  # steps of one image that were sampled
    _shared: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chain = tuned_chain(self.model)
        latent = self.inputs.latent_image
        samples = sampled_latent(self.model, latent)
        self.layout = LatentLayout.of(samples)
        self.samples = self.layout.pack(samples)
        self.inputs = replace(self.inputs, latent_image={**latent, "samples": samples})
        check_decodes(self.vae, decoded_shape(self.model, self.layout), OWN_VAE)

    @property
    def settings(self) -> list[ExpertSettings]:
        return [expert.settings for expert in self.chain.experts]

    @property
    def start(self) -> Point:
        """The point of the settings as they are connected."""
        return current_point(self.space, self.settings, self.chain.joint)

    def blended(self, point: Point, record: bool = True) -> ModelPatcher:
        """A clone of the model whose blend has the settings of ``point``. ``record``: whether its runs are recorded."""
        settings, joint = settings_at(self.space, point, self.settings, self.chain.joint)
        experts = [expert.with_settings(s) for expert, s in zip(self.chain.experts, settings, strict=True)]
        out = self.model.clone()
        out.set_attachments(KEY, replace(self.chain, experts=tuple(experts), joint=joint, record=record))
        return out

    def latents(self, point: Point, steps: int, seeds: range) -> Tensor:
        """Latents [N, C, *S], packed and in the VAE's scale, of ``seeds`` (numbers of the seeds from 0)."""
        model = self.blended(point, record=False)
        size = self._rows(model, len(seeds))
        out = []
        for first in range(0, len(seeds), size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            out.append(self._sample(model, steps, seeds[first : first + size]))
        return torch.cat(out)

    def pictures(self, latents: Tensor) -> Tensor:
        """Images [N, H, W, 3] or videos [N, F, H, W, 3] in 0..1 of ``latents``."""
        return self.vae.decode(self.layout.pictures(latents))

    def strips(self, latents: Tensor) -> Tensor:
        """Images [N, H, W, 3]; of videos, strips of a few frames."""
        return filmstrips(self.pictures(latents))

    def _rows(self, model: ModelPatcher, count: int) -> int:
        """How many of ``count`` images to sample in one batch."""
        inputs = self.inputs
        conds = {
            name: comfy.sampler_helpers.convert_cond(cond)
            for name, cond in (("positive", inputs.positive), ("negative", inputs.negative))
        }
        same_noise = adds_no_noise(inputs.sampler_name, inputs.latent_image.get("noise_mask"))
        if not same_noise or not rows_are_independent(model, conds):
            return 1
        return rows_that_fit(model, self.samples.shape[1:], count)

    def _sample(self, model: ModelPatcher, steps: int, seeds: range) -> Tensor:
        sigmas = comfy.samplers.KSampler(
            model,
            steps=steps,
            device=model.load_device,
            sampler=self.inputs.sampler_name,
            scheduler=self.inputs.scheduler,
            denoise=1.0,
            model_options=model.model_options,
        ).sigmas
        first = self._steps_without_experts(model, sigmas)
        if not first:
            return self._run(model, self._noise(seeds), self.samples, sigmas, seeds)
        rows = []
        for seed in seeds:
            known = self._shared.setdefault((steps, seed), {})
            before = max((k for k in known if k <= first), default=0)
            if before < first:
                one = range(seed, seed + 1)
                noise = torch.zeros_like(self.samples) if before else self._noise(one)
                begun = known[before] if before else self.samples
                known[first] = self._run(model, noise, begun, sigmas[before : first + 1], one).cpu()
                if len(known) > MOST_SHARED:
                    del known[next(iter(known))]  # the oldest
            rows.append(known[first])
        begun = torch.cat(rows)
        return self._run(model, torch.zeros_like(begun), begun, sigmas[first:], seeds)

    def _noise(self, seeds: range) -> Tensor:
        latent, first = self.inputs.latent_image, self.inputs.seed
        return torch.cat([self.layout.pack(draw_noise(latent, (first + k) % 2**64)).float() for k in seeds])

    def _run(self, model: ModelPatcher, noise: Tensor, latent: Tensor, sigmas: Tensor, seeds: range) -> Tensor:
        inputs = self.inputs
        if len(latent) < len(noise):
            latent = latent.repeat(len(noise), *[1] * (latent.ndim - 1))
        steps = len(sigmas) - 1
        self.evaluated_steps += len(noise) * steps
        out = comfy.sample.sample(
            model,
            self.layout.unpack(noise),
            steps,
            inputs.cfg,
            inputs.sampler_name,
            inputs.scheduler,
            inputs.positive,
            inputs.negative,
            self.layout.unpack(latent),
            noise_mask=inputs.latent_image.get("noise_mask"),
            sigmas=sigmas,
            callback=self.callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=(inputs.seed + seeds[0]) % 2**64,
        )
        return self.layout.pack(out)

    def _steps_without_experts(self, model: ModelPatcher, sigmas: Tensor) -> int:
        """How many of the first steps are the same for all candidates, because no expert takes part in them.

        0 if a run that is interrupted and continued would not be the same: with samplers that remember earlier steps,
        with an inpainting mask, which needs the noise in every step, and with EasyCache.
        """
        further = CONTINUES.get(self.inputs.sampler_name)
        cached = "easycache" in model.model_options.get("transformer_options", {})
        if further is None or cached or self.inputs.latent_image.get("noise_mask") is not None:
            return 0
        to_sigma = sampling_of(model).percent_to_sigma
        starts = [e.settings.start_percent for e in blend_chain(model).experts if not e.settings.is_off]
        if not starts:
            return 0
        highest = max(float(to_sigma(start)) for start in starts)
        before = int((sigmas > highest).sum()) - further  # a step evaluates its sigma and maybe the next one
        return max(0, min(before, len(sigmas) - 2))
