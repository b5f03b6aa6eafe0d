"""Draws the noise of an integer seed, and samples from noises with ComfyUI's samplers.

``generate(noise_of(seed))`` equals KSampler's result for that seed at batch 1, bit for bit. Shapes: N noises, C channels,
latents of height h and width w.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...common.shapes import size_of
from ...host.attachments import Conditioning
from ...host.parametrization import family, sampling_of, unsupported
from .comfy_batching import CALLS_PER_STEP, DETERMINISTIC, rows_are_independent
from .comfy_counting import RowCounter
from .comfy_progress import SeedProgress
from .comfy_scoring import ReferenceScorer, ScoringModels, ScoringSettings
from .comfy_session import KSamplerInputs, OpenSession, Session, SessionSettings, draw_noise
from .inversion import invert
from .prompt_variation import VARIATION_END, vary_prompt
from .records import Candidate
from .sampler import GradientCost

INVERSION_STEPS = 50  # as in NAO's code, which inverts without guidance
SHORT_RUNS = "beta"  # scheduler of runs with fewer steps than the full run
SAMPLERS, SCHEDULERS = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES

Callback = Callable[[int, Tensor, Tensor, int], None]  # step, x0, x, steps; called by ComfyUI's samplers


class ComfySeedSampler:
    """A ``sampler.SeedSampler`` for the inputs of KSampler.

    ``scoring``: required for scoring, decoding, inversions and gradients. ``prompt_variation``: strength of the noise on
    the embeddings of the positive prompt, drawn from the seed of each noise; see prompt_variation.py. The constructor raises a ValueError for several
    latents, video, audio or nested latents, several noise masks, denoise outside 0 to 1, a model whose noise process is not
    supported, a prompt that cannot be varied, and inputs that ReferenceScorer rejects.
    """

    def __init__(
        self, inputs: KSamplerInputs, scoring: ScoringSettings | None = None, prompt_variation: float = 0.0
    ) -> None:
        self.model = inputs.model
        self.samples = self._checked(inputs.latent_image)  # [1, C, h, w]
        self.inputs = replace(inputs, latent_image={**inputs.latent_image, "samples": self.samples})
        self._seeds: dict[bytes, int] = {}  # seeds of the noises that noise_of returned, by digest
        if inputs.steps < 1 or not 0.0 < inputs.denoise <= 1.0:
            raise ValueError(
                f"{inputs.steps} steps at denoise {inputs.denoise:g} generate nothing; use at least 1 step and a denoise"
                " above 0 and at most 1"
            )
        sampling = sampling_of(self.model)
        try:
            self.kind = family(sampling)  # VE or FLOW of host/parametrization.py
        except ValueError as error:
            raise ValueError(unsupported(sampling)) from error
        self.prompt_variation = prompt_variation
        self.positive_of(inputs.seed)  # raises an error for a prompt that cannot be varied
        self.counter = RowCounter()
        self.callback: Callback | None = None  # replaces ComfyUI's progress and preview in ``generate``
        self._scorer = None if scoring is None else ReferenceScorer(scoring, self.model, self.samples)
        self.gradients: Session | None = None  # session for optimisation

    @property
    def scorer(self) -> ReferenceScorer:
        assert self._scorer is not None  # the constructor has created it from the argument ``scoring``
        return self._scorer

    def _checked(self, latent_image: Mapping) -> Tensor:
        samples = latent_image["samples"]
        if samples.is_nested:
            raise ValueError(
                "expected an image latent, got a nested latent (video with audio); connect an image latent"
            )
        samples = comfy.sample.fix_empty_latent_channels(
            self.model,
            samples,
            latent_image.get("downscale_ratio_spacial"),
            latent_image.get("downscale_ratio_temporal"),
        )
        if samples.ndim != 4:
            raise ValueError(
                f"expected an image latent [1, C, h, w] for {type(self.model.model).__name__}, got the size"
                f" {size_of(samples)}; use a model whose latents have these four axes"
            )
        if len(samples) != 1:
            raise ValueError(
                f"expected one latent in latent_image, got {len(samples)} latents; set batch_size to 1 or select one with"
                " LatentFromBatch"
            )
        if (mask := latent_image.get("noise_mask")) is not None and mask.ndim > 2 and len(mask) != 1:
            raise ValueError(f"expected one noise mask in latent_image, got {len(mask)} noise masks; use one of them")
        return samples

    def sigmas(self, steps: int | None = None, sampler: str | None = None) -> Tensor:
        """Sigmas of a run with ``steps`` steps (default: all steps), decreasing to 0.

        A run with fewer steps approximates the full run. It uses the beta schedule (arXiv 2407.12173) even if the full
        run uses another one. With the beta schedule, the ranking of candidates agrees best with that of full runs
        (dev/benchmarks/seed_ranking.py). With denoise below 1, the shorter run uses a subset of the full run's sigmas
        instead, so both runs start at the same noise level.
        """
        if steps is None or steps >= self.inputs.steps:
            return self._ksampler(steps, sampler).sigmas.clone()
        if self.inputs.denoise == 1.0:
            return comfy.samplers.calculate_sigmas(sampling_of(self.model), SHORT_RUNS, steps)
        full = self._ksampler(None, sampler).sigmas
        return full[torch.linspace(0, len(full) - 1, steps + 1).round().long()]

    def _ksampler(self, steps: int | None, sampler: str | None = None) -> comfy.samplers.KSampler:
        return comfy.samplers.KSampler(
            self.model,
            steps=self.inputs.steps if steps is None else steps,
            device=self.model.load_device,
            sampler=sampler or self.inputs.sampler_name,
            scheduler=self.inputs.scheduler,
            denoise=self.inputs.denoise,
            model_options=self.model.model_options,
        )

    def noise_of(self, seed: int) -> Tensor:
        """Noise [1, C, h, w] that KSampler draws for ``seed`` at batch 1, float32."""
        # KSampler draws noise in the dtype of the latent and then samples in float32
        noise = draw_noise(self.inputs.latent_image, seed).float()
        self._seeds[_digest(noise)] = seed
        return noise

    def positive_of(self, seed: int) -> Conditioning:
        """The positive prompt of a run with the seed ``seed``: with its variation, or unchanged if there is none."""
        return vary_prompt(self.inputs.positive, seed, self.prompt_variation, VARIATION_END)

    def to_model(self, latent: Tensor) -> Tensor:
        """Convert a latent [N, C, h, w] of ``generate`` from the VAE's scale to the model's scale."""
        return self.model.model.process_latent_in(latent.float())

    def generate(self, noise: Tensor, steps: int | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """Final latents [N, C, h, w] of a run of ``steps`` steps (default: all) from ``noise`` [N, C, h, w].

        The latents are in the VAE's scale, as KSampler returns them. ``seeds``: one seed for each noise, from which
        stochastic samplers draw the noise that they add during the run, and the variation of the prompt is drawn. The default is the seed from which ``noise_of``
        drew the initial noise, or the seed of the inputs for other noises. Several noises are sampled in one batch only
        if this changes the latents by no more than rounding.
        """
        seeds = self._checked_seeds(noise, seeds)
        size = self.batch_size(len(noise))
        latents = []
        with self.counter.counting(self.model, self.inputs.positive, self.inputs.negative):
            for first in range(0, len(noise), size):
                comfy.model_management.throw_exception_if_processing_interrupted()
                chunk = slice(first, first + size)
                latents.append(self._sample(noise[chunk], steps, seeds[first]))
        with torch.inference_mode(False):  # clone to normal tensors, which autograd can use
            return torch.cat([x.clone() for x in latents])

    def _checked_seeds(self, noise: Tensor, seeds: Sequence[int] | None) -> Sequence[int]:
        if noise.ndim != 4 or noise.shape[1:] != self.samples.shape[1:] or not len(noise):
            raise ValueError(
                f"the noise {size_of(noise)} does not fit the latent {size_of(self.samples)}; use noise of the latent's size"
            )
        if seeds is None:
            return [self._seeds.get(_digest(row), self.inputs.seed) for row in noise.split(1)]
        if len(seeds) != len(noise):
            raise ValueError(f"expected {len(noise)} seeds, one for each noise, got {len(seeds)}; pass one for each")
        return seeds

    def _sample(self, noise: Tensor, steps: int | None, seed: int) -> Tensor:
        inputs, steps = self.inputs, self.inputs.steps if steps is None else steps
        latent = self.samples if len(noise) == 1 else self.samples.repeat(len(noise), 1, 1, 1)
        return comfy.sample.sample(
            self.model,
            noise,
            steps,
            inputs.cfg,
            inputs.sampler_name,
            inputs.scheduler,
            self.positive_of(seed),
            inputs.negative,
            latent,
            denoise=inputs.denoise,
            noise_mask=inputs.latent_image.get("noise_mask"),
            callback=self.callback or latent_preview.prepare_callback(self.model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            sigmas=self.sigmas(steps) if steps < inputs.steps else None,
            seed=seed,
        )

    @property
    def deterministic(self) -> bool:
        """Whether the final latent depends only on the initial noise, and not on the seed."""
        if self.inputs.sampler_name == "ddim" and self.inputs.latent_image.get("noise_mask") is not None:
            return False  # ddim fills the unmasked area with noise from the seed
        return self.inputs.sampler_name in DETERMINISTIC

    @property
    def calls_per_step(self) -> int:
        """Largest number of model calls of the sampler per step."""
        return CALLS_PER_STEP.get(self.inputs.sampler_name, 1)

    def batch_size(self, count: int) -> int:
        """Number of noises, of ``count`` in total, to sample in one batch.

        It is 1 if noises in one batch would influence each other or have different prompts, otherwise as many as fit in
        memory.
        """
        if self.prompt_variation:
            return 1
        positive, negative = self.inputs.positive, self.inputs.negative
        if count < 2 or not self.deterministic or not rows_are_independent(self.model, positive, negative):
            return 1
        free = comfy.model_management.get_free_memory(self.model.load_device)
        shape = self.samples.shape[1:]
        # guidance doubles the rows
        return next((n for n in range(count, 1, -1) if self.model.memory_required([2 * n, *shape]) < free), 1)

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
            inputs = replace(self.gradients.inputs, positive=self.positive_of(start.sampler_seed))
            yield replace(self.gradients, inputs=inputs), [start]

    @property
    def gradient_cost(self) -> GradientCost | None:
        return None if self.gradients is None else self.gradients.cost

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """Scores [N] of ``latents``, a list with one element: the latents [N, C, h, w] that ``generate`` returned."""
        return self.scorer.host_loss([self.to_model(x) for x in latents])

    def decode(self, latent: Tensor) -> Tensor:
        """Images [N, H, W, 3] in 0..1 of latents [N, C, h, w] that ``generate`` returned."""
        return self.scorer.models["vae"].decode(latent)

    def inversions(self) -> dict[int, Tensor]:
        """Inverted noises [1, C, h, w] of the references, by their numbers from 1. References left out are missing.

        The inversions use the prompt without a variation.
        """
        references = self.scorer.latents
        progress = SeedProgress(self.model, INVERSION_STEPS * len(references))
        progress.show(text=f"inverting {len(references)} references")

        def work(session: OpenSession) -> list[Tensor]:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                progress.show(steps=1)
                return session.denoise(x, sigma)

            sigmas, flow = session.sigmas, session.flow
            return [session.noise_of(invert(denoise, x, sigmas, flow=flow)).cpu() for x in references.split(1)]

        noises = self.session(SessionSettings(gradients=False, cfg=1.0, steps=INVERSION_STEPS)).run(work)
        SeedProgress(self.model, 1).show()  # reset the progress bar for the sampling
        selection = self.scorer.selection
        return dict(zip(selection.used if selection else range(1, len(noises) + 1), noises, strict=True))

    def session(
        self, settings: SessionSettings, models: ScoringModels | None = None, scorer: ReferenceScorer | None = None
    ) -> Session:
        """Session with the inputs of this sampler; ``models`` and ``scorer``: see Session."""
        inputs = replace(self.inputs, cfg=self.inputs.cfg if settings.cfg is None else settings.cfg)
        sigmas = self.sigmas(settings.steps, settings.sampler)
        return Session(
            inputs=inputs,
            sigmas=sigmas,
            kind=self.kind,
            settings=settings,
            counter=self.counter,
            models=models or {},
            scorer=scorer,
        )


def _digest(noise: Tensor) -> bytes:
    return hashlib.sha256(noise.detach().float().cpu().contiguous().numpy().tobytes()).digest()
