"""From an integer seed to its noise, and from noise to a finished latent by the host's own sampling.

What ``generate`` makes of ``noise_of(seed)`` is what KSampler makes of that seed at batch 1, bit for bit. Shapes: N
noises, C channels, h and w latent positions.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...common.shapes import size_of
from ...host.parametrization import family, sampling_of
from .comfy_batching import CALLS_PER_STEP, DETERMINISTIC, rows_are_independent
from .comfy_counting import RowCounter
from .comfy_progress import SeedProgress
from .comfy_scoring import ReferenceScorer, ScoringModels, ScoringSettings
from .comfy_session import KSamplerInputs, OpenSession, Session, SessionSettings, draw_noise
from .inversion import invert
from .sampler import GradientCost

INVERSION_STEPS = 50  # of NAO's authors, without guidance
SHORT_RUNS = "beta"  # scheduler
SAMPLERS, SCHEDULERS = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES

Callback = Callable[[int, Tensor, Tensor, int], None]  # step, x0, x, steps; as the host's samplers call it


class ComfySeedSampler:
    """KSampler's inputs as functions of the noise, the references and their score: a ``sampler.SeedSampler``.

    ``scoring``: needed by all but ``noise_of``, ``generate`` and ``session``. Errors (ValueError): several latents, video,
    sound or nested latents, several noise masks, denoise outside 0 to 1, an image-to-image model, and ReferenceScorer's.
    """

    def __init__(self, inputs: KSamplerInputs, scoring: ScoringSettings | None = None) -> None:
        self.model = inputs.model
        self.samples = self._checked(inputs.latent_image)  # [1, C, h, w]
        self.inputs = replace(inputs, latent_image={**inputs.latent_image, "samples": self.samples})
        self._seeds: dict[bytes, int] = {}  # of the noises that were given out
        if inputs.steps < 1 or not 0.0 < inputs.denoise <= 1.0:
            raise ValueError(
                f"{inputs.steps} steps at denoise {inputs.denoise:g} paint nothing; use at least 1 step and a denoise above"
                " 0, up to 1"
            )
        sampling = sampling_of(self.model)
        try:
            self.kind = family(sampling)  # of parametrization: VE or FLOW
        except ValueError as error:
            raise ValueError(
                f"{type(self.model.model).__name__} ({type(sampling).__name__}) has no known way from noise to picture; use a"
                " model of the SD or flow family"
            ) from error
        self.counter = RowCounter()
        self.callback: Callback | None = None  # of ``generate``, in place of the host's progress and preview
        self._scorer = None if scoring is None else ReferenceScorer(scoring, self.model, self.samples)
        self.gradients: Session | None = None  # in which noises are optimised

    @property
    def scorer(self) -> ReferenceScorer:
        assert self._scorer is not None  # who needs it has given ``scoring``
        return self._scorer

    def _checked(self, latent_image: Mapping) -> Tensor:
        samples = latent_image["samples"]
        if samples.is_nested:
            raise ValueError("the latent holds several tensors (video with sound); SeedSelect works on pictures")
        samples = comfy.sample.fix_empty_latent_channels(
            self.model,
            samples,
            latent_image.get("downscale_ratio_spacial"),
            latent_image.get("downscale_ratio_temporal"),
        )
        if samples.ndim != 4:
            raise ValueError(
                f"the latents of {type(self.model.model).__name__} have the shape {size_of(samples)}, as of video or sound;"
                " SeedSelect works on pictures [1, C, h, w]: use another model"
            )
        if len(samples) != 1:
            raise ValueError(
                f"latent_image holds {len(samples)} latents; SeedSelect looks for the noise of one: set batch_size to 1"
                " or take one by LatentFromBatch"
            )
        if (mask := latent_image.get("noise_mask")) is not None and mask.ndim > 2 and len(mask) != 1:
            raise ValueError(f"latent_image holds {len(mask)} noise masks for one latent; keep one of them")
        return samples

    def sigmas(self, steps: int | None = None, sampler: str | None = None) -> Tensor:
        """[N + 1] of the run with ``steps`` (default: all), falling to 0.

        Fewer steps than all stand for the whole run: they have the levels of the beta schedule (arXiv 2407.12173), after
        which candidates rank most as they do in full, whatever the run's own scheduler (dev/benchmarks/seed_ranking.py). With
        a denoise below 1 they are some of the full run's levels, so that they begin where it does.
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
        """The noise [1, C, h, w] that KSampler draws for ``seed`` at batch 1."""
        noise = draw_noise(self.inputs.latent_image, seed)
        self._seeds[_digest(noise)] = seed
        return noise

    def to_model(self, latent: Tensor) -> Tensor:
        """A latent [N, C, h, w] of the VAE, as ``generate`` gives it, in the scale in which the model sees it."""
        return self.model.model.process_latent_in(latent)

    def generate(self, noise: Tensor, steps: int | None = None, seeds: Sequence[int] | None = None) -> Tensor:
        """Finished latents [N, C, h, w] of ``noise`` [N, C, h, w] in ``steps`` (default: all), as KSampler gives them.

        ``seeds``: what else a sampler draws from for each noise; by default the seed that ``noise_of`` gave it for, else
        the inputs'. Noises share batches only where that changes nothing but rounding.
        """
        seeds = self._checked_seeds(noise, seeds)
        size = self.batch_size(len(noise))
        found = []
        with self.counter.counting(self.model, self.inputs.positive, self.inputs.negative):
            for first in range(0, len(noise), size):
                comfy.model_management.throw_exception_if_processing_interrupted()
                chunk = slice(first, first + size)
                found.append(self._sample(noise[chunk], steps, seeds[first]))
        with torch.inference_mode(False):  # so that a gradient may start here
            return torch.cat([f.clone() for f in found])

    def _checked_seeds(self, noise: Tensor, seeds: Sequence[int] | None) -> Sequence[int]:
        if noise.ndim != 4 or noise.shape[1:] != self.samples.shape[1:] or not len(noise):
            raise ValueError(
                f"the noise {size_of(noise)} does not fit the latent {size_of(self.samples)}; make it for this size"
            )
        if seeds is None:
            return [self._seeds.get(_digest(row), self.inputs.seed) for row in noise.split(1)]
        if len(seeds) != len(noise):
            raise ValueError(f"{len(seeds)} seeds for {len(noise)} noises; give one for each")
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
            inputs.positive,
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
        """Whether the noise alone decides the latent."""
        if self.inputs.sampler_name == "ddim" and self.inputs.latent_image.get("noise_mask") is not None:
            return False  # what the mask keeps is filled with noise of the seed
        return self.inputs.sampler_name in DETERMINISTIC

    @property
    def calls_per_step(self) -> int:
        """How often the sampler asks the model in a step, most often."""
        return CALLS_PER_STEP.get(self.inputs.sampler_name, 1)

    def batch_size(self, count: int) -> int:
        """How many of ``count`` noises may share a batch: one where they would look at each other, else what fits."""
        positive, negative = self.inputs.positive, self.inputs.negative
        if count < 2 or not self.deterministic or not rows_are_independent(self.model, positive, negative):
            return 1
        free = comfy.model_management.get_free_memory(self.model.load_device)
        shape = self.samples.shape[1:]
        # guidance doubles the rows
        return next((n for n in range(count, 1, -1) if self.model.memory_required([2 * n, *shape]) < free), 1)

    def allow_gradients(self, settings: SessionSettings) -> None:
        """Let noises be optimised in a session of these settings; a ValueError if it cannot be had."""
        self.gradients = self.session(settings, models=self.scorer.models, scorer=self.scorer)

    @property
    def gradient_cost(self) -> GradientCost | None:
        return None if self.gradients is None else self.gradients.cost

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """The scores [N] of a list of one: latents [N, C, h, w] as ``generate`` gives them."""
        return self.scorer.host_loss([self.to_model(x) for x in latents])

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures [N, H, W, 3] in 0..1 of such latents."""
        return self.scorer.models["vae"].decode(latent)

    def inversions(self) -> list[Tensor]:
        """The noises [1, C, h, w] of the references, in their order."""
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
        SeedProgress(self.model, 1).show()  # the bar begins anew
        return noises

    def session(
        self, settings: SessionSettings, models: ScoringModels | None = None, scorer: ReferenceScorer | None = None
    ) -> Session:
        """A session of this sampler; ``models`` and ``scorer`` as Session takes them."""
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
