"""Draws the noise of an integer seed, and samples from noises with ComfyUI's samplers.

``generate(noise_of(seed))`` equals KSampler's result for that seed at batch 1, bit for bit, or with connected sigmas,
sampler or guider that of SamplerCustomAdvanced. Shapes: N noises; noises and latents are packed (see host/sampled_latents.py),
[N, C, *S]. S is (h, w) for images and (T, h, w) for videos.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...common.shapes import size_of
from ...host.images import filmstrips
from ...host.parametrization import family, is_image_to_image, sampling_of, unsupported
from ...host.sampled_latents import LatentLayout, decoded_shape, draw_noise, sampled_latent
from ...host.sampling_progress import SamplingProgress
from .comfy_batching import CALLS_PER_STEP, adds_no_noise, rows_are_independent, rows_that_fit
from .comfy_counting import RowCounter
from .comfy_inputs import KSamplerInputs
from .comfy_scoring import ReferenceScorer, ScoringModels, ScoringSettings
from .comfy_session import OpenSession, Session, SessionSettings
from .inversion import invert
from .prompt_variation import VARIATION_END, vary_prompt
from .records import Candidate
from .sampler import GradientCost

INVERSION_STEPS = 50  # as in NAO's code, which inverts without guidance
SAMPLERS, SCHEDULERS = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES

Callback = Callable[[int, Tensor, Tensor, int], None]  # step, x0, x, steps; called by ComfyUI's samplers


class ComfySeedSampler:
    """A ``sampler.SeedSampler`` for the inputs of KSampler or SamplerCustomAdvanced.

    ``scoring``: required for scoring, decoding, inversions and gradients. ``prompt_variation``: strength of the noise on
    the embeddings of the positive prompt, drawn from the seed of each noise; see prompt_variation.py. The constructor
    raises a ValueError for several latents or noise masks, latents that are not of images or videos, an image-to-image
    model, a prompt that cannot be varied, and inputs that KSamplerInputs.checked or ReferenceScorer rejects.
    """

    def __init__(
        self, inputs: KSamplerInputs, scoring: ScoringSettings | None = None, prompt_variation: float = 0.0
    ) -> None:
        inputs = inputs.checked()
        self.model = inputs.model
        if is_image_to_image(sampling_of(self.model)):
            raise ValueError(
                f"{type(self.model.model).__name__} is an image-to-image model, whose result does not depend on a seed; use a"
                " text-to-image model"
            )
        samples = sampled_latent(self.model, inputs.latent_image)
        self.layout = LatentLayout.of(samples)
        self.samples = self.layout.pack(samples)  # [1, C, *S]
        self.inputs = replace(inputs, latent_image={**inputs.latent_image, "samples": samples})
        self._seeds: dict[bytes, int] = {}  # seeds of the noises that noise_of returned, by digest
        self.prompt_variation = prompt_variation
        self.varied(inputs.seed)  # raises an error for a prompt that cannot be varied
        self.counter = RowCounter()
        self.callback: Callback | None = None  # replaces ComfyUI's progress and preview in ``generate``
        shape = decoded_shape(self.model, self.layout)
        self._scorer = None if scoring is None else ReferenceScorer(scoring, self.model, shape)
        self.gradients: Session | None = None  # session for optimisation

    @property
    def scorer(self) -> ReferenceScorer:
        assert self._scorer is not None  # the constructor has created it from the argument ``scoring``
        return self._scorer

    def sigmas(self, steps: int | None = None, sampler: str | None = None) -> Tensor:
        """Sigmas of a run with ``steps`` steps (default: all steps), decreasing to 0; see KSamplerInputs.sigmas_of."""
        return self.inputs.sigmas_of(steps, sampler).clone()

    def noise_of(self, seed: int) -> Tensor:
        """Noise [1, C, *S] that KSampler draws for ``seed`` at batch 1, float32."""
        # KSampler draws noise in the dtype of the latent and then samples in float32
        noise = self.layout.pack(draw_noise(self.inputs.latent_image, seed)).float()
        self._seeds[_digest(noise)] = seed
        return noise

    def varied(self, seed: int) -> KSamplerInputs:
        """The inputs of a run with the seed ``seed``: with its variation of the positive prompt, if there is one."""
        if not self.prompt_variation:
            return self.inputs
        return self.inputs.with_positive(lambda x: vary_prompt(x, seed, self.prompt_variation, VARIATION_END))

    def to_model(self, latent: Tensor) -> Tensor:
        """Convert latents that the VAE decodes from its scale to the model's scale."""
        return self.model.model.process_latent_in(latent.float())

    def generate(self, noise: Tensor, steps: int | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """Final latents [N, C, *S] of a run of ``steps`` steps (default: all) from ``noise`` [N, C, *S].

        The latents are in the VAE's scale, as KSampler returns them. ``seeds``: one seed for each noise, from which
        stochastic samplers draw the noise that they add during the run, and from which the variation of the prompt is
        drawn. The default is the seed from which ``noise_of`` drew the initial noise, or the seed of the inputs for other
        noises. Several noises are sampled in one batch only if this changes the latents by no more than rounding.
        """
        seeds = self._checked_seeds(noise, seeds)
        size = self.batch_size(len(noise))
        latents = []
        with self.counter.counting(self.inputs.models, self.inputs.conds):
            for first in range(0, len(noise), size):
                comfy.model_management.throw_exception_if_processing_interrupted()
                chunk = slice(first, first + size)
                latents.append(self._sample(noise[chunk], steps, seeds[first]))
        with torch.inference_mode(False):  # clone to normal tensors, which autograd can use
            return torch.cat([x.clone() for x in latents])

    def _checked_seeds(self, noise: Tensor, seeds: Sequence[int] | None) -> Sequence[int]:
        if noise.shape[1:] != self.samples.shape[1:] or not len(noise):
            raise ValueError(
                f"the noise {size_of(noise)} does not fit the latent {size_of(self.samples)}; use noise of the latent's size"
            )
        if seeds is None:
            return [self._seeds.get(_digest(row), self.inputs.seed) for row in noise.split(1)]
        if len(seeds) != len(noise):
            raise ValueError(f"expected {len(noise)} seeds, one for each noise, got {len(seeds)}; pass one for each")
        return seeds

    def _sample(self, noise: Tensor, steps: int | None, seed: int) -> Tensor:
        inputs, steps = self.varied(seed), self.inputs.steps if steps is None else steps
        latent = self.samples
        if len(noise) > 1:
            latent = latent.repeat(len(noise), *[1] * (latent.ndim - 1))
        parts: dict[str, Any] = dict(noise=self.layout.unpack(noise), latent_image=self.layout.unpack(latent))
        mask = inputs.latent_image.get("noise_mask")
        callback = self.callback or latent_preview.prepare_callback(self.model, steps)
        further: dict[str, Any] = dict(callback=callback, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
        if inputs.custom:  # as SamplerCustomAdvanced samples
            chosen: dict[str, Any] = dict(sampler=inputs.sampler_object(), sigmas=self.sigmas(steps))
            samples = inputs.own_guider().sample(**parts, **chosen, denoise_mask=mask, **further)
            return self.layout.pack(samples.to(comfy.model_management.intermediate_device()))
        samples = comfy.sample.sample(
            self.model,
            steps=steps,
            cfg=inputs.cfg,
            sampler_name=inputs.sampler_name,
            scheduler=inputs.scheduler,
            positive=inputs.positive,
            negative=inputs.negative,
            denoise=inputs.denoise,
            noise_mask=mask,
            sigmas=self.sigmas(steps) if steps < inputs.steps else None,
            **parts,
            **further,
        )
        return self.layout.pack(samples)

    @property
    def deterministic(self) -> bool:
        """Whether the final latent depends only on the initial noise, and not on the seed."""
        return adds_no_noise(self.inputs.plain_sampler, self.inputs.latent_image.get("noise_mask"))

    @property
    def calls_per_step(self) -> int:
        """Largest number of model calls of the sampler per step."""
        return CALLS_PER_STEP.get(self.inputs.base_sampler or "", 1)

    def batch_size(self, count: int) -> int:
        """Number of noises, of ``count`` in total, to sample in one batch.

        It is 1 if noises in one batch would influence each other or have different prompts, otherwise as many as fit in
        memory.
        """
        if self.prompt_variation or count < 2:
            return 1
        if not self.deterministic or not self.inputs.guides_rows_independently:
            return 1
        if not rows_are_independent(self.model, self.inputs.conds):
            return 1
        return rows_that_fit(self.model, self.samples.shape[1:], count)

    def allow_gradients(self, settings: SessionSettings) -> None:
        """Enable optimisation in a session with ``settings``; ValueError if no correct gradient is available with them."""
        self.gradients = self.session(settings, models=self.scorer.models, scorer=self.scorer)

    def gradient_sessions(self, starts: Sequence[Candidate]) -> Iterator[tuple[Session, Sequence[Candidate]]]:
        """Sessions for an optimisation of ``starts``, each with the candidates that it optimises.

        It is one session for all of them, or one for each if their prompts are varied: a session has one prompt.
        """
        assert self.gradients is not None  # the caller has called allow_gradients
        if not self.prompt_variation:
            yield self.gradients, starts
            return
        for start in starts:
            yield replace(self.gradients, inputs=self.varied(start.sampler_seed)), [start]

    @property
    def gradient_cost(self) -> GradientCost | None:
        return None if self.gradients is None else self.gradients.cost

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """Scores [N] of ``latents``, a list with one element: the latents [N, C, *S] that ``generate`` returned."""
        return self.scorer.host_loss([self.to_model(self.layout.pictures(x)) for x in latents])

    def decode(self, latent: Tensor) -> Tensor:
        """Images [N, H, W, 3] in 0..1 of latents [N, C, *S] that ``generate`` returned; videos as strips of the scored
        frames, side by side."""
        return filmstrips(self.scorer.models["vae"].decode(self.layout.pictures(latent)))

    @property
    def references(self) -> int:
        """Number of references that are used."""
        return len(self.scorer.latents)

    def inversions(self) -> dict[int, Tensor]:
        """Inverted noises [1, C, *S] of the references, by their numbers from 1. References left out are missing.

        The inversions use the prompt without a variation.
        """
        references = self.scorer.latents
        if self.layout.nested:
            raise ValueError(
                "the references have no audio, so they cannot be inverted to the noise of a video with audio; use start noise"
            )
        progress = SamplingProgress(self.model, INVERSION_STEPS * len(references))
        progress.show(text=f"inverting {len(references)} references")

        def work(session: OpenSession) -> list[Tensor]:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                progress.show(steps=1)
                return session.denoise(x, sigma)

            sigmas, flow = session.sigmas, session.flow
            return [session.noise_of(invert(denoise, x, sigmas, flow=flow)).cpu() for x in references.split(1)]

        noises = self.session(SessionSettings(gradients=False, cfg=1.0, steps=INVERSION_STEPS)).run(work)
        SamplingProgress(self.model, 1).show()  # reset the progress bar for the sampling
        selection = self.scorer.selection
        return dict(zip(selection.used if selection else range(1, len(noises) + 1), noises, strict=True))

    def session(
        self, settings: SessionSettings, models: ScoringModels | None = None, scorer: ReferenceScorer | None = None
    ) -> Session:
        """Session with the inputs of this sampler; ``models`` and ``scorer``: see Session."""
        sampling = sampling_of(self.model)
        try:
            kind = family(sampling)
        except ValueError as error:
            raise ValueError(f"{unsupported(sampling)}, or mode search with start noise") from error
        return Session(
            inputs=self.inputs,
            sigmas=self.sigmas(settings.steps, settings.sampler),
            kind=kind,
            settings=settings,
            counter=self.counter,
            models=models or {},
            scorer=scorer,
        )


def _digest(noise: Tensor) -> bytes:
    return hashlib.sha256(noise.detach().float().cpu().contiguous().numpy().tobytes()).digest()
