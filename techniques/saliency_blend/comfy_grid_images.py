"""Samples images of a blend with other settings, for BlendGrid.

The images are those that KSampler generates, all from the same noise. The steps before any expert starts are the same
for all of them: they are sampled once, and further images continue from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...host.attachments import Conditioning
from ...host.images import check_decodes, filmstrips
from ...host.parametrization import sampling_of
from ...host.sampled_latents import LatentLayout, decoded_shape, draw_noise, sampled_latent
from .comfy_hook import KEY, BlendChain, blend_chain
from .trace import BlendTrace
from .varied_settings import Point, VariedSetting, settings_at

# samplers without a memory of earlier steps and without noise, which continue at any step as if they had begun before;
# the number is how many sigmas after that of the step they evaluate
CONTINUES = {"euler": 0, "ddim": 0, "heun": 1, "dpm_2": 1}
MOST_SHARED = 4  # latents kept, from which images continue
OWN_VAE = "connect the VAE of this model"  # remedy for a VAE that does not decode the latents

Callback = Callable[[int, Tensor, Tensor, int], None]


def chain_of(model: ModelPatcher) -> BlendChain:
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
class GridImages:
    """Samples the blend of ``model`` with other values of the settings in ``varied``.

    Errors (ValueError): a model without a blend; several latents, or latents from which no VAE decodes images; a VAE of
    another kind of model.
    """

    model: ModelPatcher
    varied: Sequence[VariedSetting]
    inputs: SamplingInputs
    vae: VAE
    callback: Callback | None = None
    evaluated_steps: int = 0
    warnings: tuple[str, ...] = ()  # of the last image: why models have no effect
    _shared: dict[int, Tensor] = field(default_factory=dict)
    _trace: BlendTrace = field(default_factory=BlendTrace)

    def __post_init__(self) -> None:
        self.chain = chain_of(self.model)
        latent = self.inputs.latent_image
        samples = sampled_latent(self.model, latent)
        self.layout = LatentLayout.of(samples)
        self.samples = self.layout.pack(samples)
        self.inputs = replace(self.inputs, latent_image={**latent, "samples": samples})
        check_decodes(self.vae, decoded_shape(self.model, self.layout), OWN_VAE)

    def blended(self, point: Point) -> ModelPatcher:
        """A clone of the model whose blend has the settings of ``point``. Its runs are recorded in ``_trace`` only."""
        settings, joint = settings_at(
            self.varied, point, [expert.settings for expert in self.chain.experts], self.chain.joint
        )
        # one expert's trace suffices, since all traces of a chain get the same record
        traces = [self._trace, *[None] * (len(settings) - 1)]
        experts = [e.with_settings(s, t) for e, s, t in zip(self.chain.experts, settings, traces, strict=True)]
        out = self.model.clone()
        out.set_attachments(KEY, replace(self.chain, experts=tuple(experts), joint=joint, quiet=True))
        return out

    def latent(self, point: Point) -> Tensor:
        """The latent [1, C, *S], packed and in the VAE's scale, of the image with the settings of ``point``."""
        latent = self._latent(point)
        # the record of the last part of the run: no expert takes part in the steps before it
        self.warnings = self._trace.record.warnings if self._trace.record else ()
        self._trace.clear()
        return latent

    def _latent(self, point: Point) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        model = self.blended(point)
        sigmas = comfy.samplers.KSampler(
            model,
            steps=self.inputs.steps,
            device=model.load_device,
            sampler=self.inputs.sampler_name,
            scheduler=self.inputs.scheduler,
            denoise=1.0,
            model_options=model.model_options,
        ).sigmas
        first = self._steps_without_experts(model, sigmas)
        if not first:
            return self._run(model, self._noise(), self.samples, sigmas)
        known = self._shared
        before = max((k for k in known if k <= first), default=0)
        if before < first:
            noise = torch.zeros_like(self.samples) if before else self._noise()
            known[first] = self._run(model, noise, known.get(before, self.samples), sigmas[before : first + 1]).cpu()
            if len(known) > MOST_SHARED:
                del known[next(iter(known))]  # the oldest
        return self._run(model, torch.zeros_like(known[first]), known[first], sigmas[first:])

    def picture(self, latent: Tensor) -> Tensor:
        """The image [H, W, 3] in 0..1 of ``latent``; of a video, a strip of a few frames."""
        return filmstrips(self.vae.decode(self.layout.pictures(latent)))[0].cpu()

    def _noise(self) -> Tensor:
        return self.layout.pack(draw_noise(self.inputs.latent_image, self.inputs.seed)).float()

    def _run(self, model: ModelPatcher, noise: Tensor, latent: Tensor, sigmas: Tensor) -> Tensor:
        inputs = self.inputs
        steps = len(sigmas) - 1
        self.evaluated_steps += steps
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
            seed=inputs.seed,
        )
        return self.layout.pack(out)

    def _steps_without_experts(self, model: ModelPatcher, sigmas: Tensor) -> int:
        """How many of the first steps are the same for all images, because no expert takes part in them.

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
