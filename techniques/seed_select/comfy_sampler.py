"""From an integer seed to its noise, and from noise to a finished latent by the host's own sampling.

What ``SeedRun.generate`` makes of ``SeedRun.noise_of(seed)`` is what KSampler makes of that seed at batch 1, bit for
bit. Shapes: N noises, C channels, h and w latent positions.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...host.attachments import attached
from ...host.gradients import Recorder, gradients
from ...host.images import size_of
from ...host.parametrization import FLOW, family
from .comfy_batching import CALLS_PER_STEP, DETERMINISTIC, rows_are_independent
from .comfy_opening import check_session, open_session
from .comfy_session import SeedSession, SessionSettings

SHORT_RUNS = "beta"  # scheduler
SAMPLERS, SCHEDULERS = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES

Callback = Callable[[int, Tensor, Tensor, int], None]  # step, x0, x, steps; as the host's samplers call it


class SeedRun:
    """KSampler's inputs as functions of the noise.

    ``latent_image``: a LATENT of one picture, with its noise mask if it has one. ``seed``: what a sampler that draws
    more than the first noise draws it from, for noises that ``noise_of`` has not given; those keep their own. Errors (ValueError): several latents,
    video, sound or nested latents, several noise masks, denoise outside 0 to 1, an image-to-image model.
    """

    def __init__(
        self,
        model,
        positive,
        negative,
        latent_image: Mapping,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float = 1.0,
        seed: int = 0,
    ):
        self.model, self.positive, self.negative = model, positive, negative
        self.steps, self.cfg, self.denoise = steps, cfg, denoise
        self.sampler_name, self.scheduler = sampler_name, scheduler
        self.latent_image, self.seed = latent_image, seed
        self._seeds: dict[bytes, int] = {}  # of the noises that were given out
        self.samples = self._checked(latent_image)  # [1, C, h, w]
        if steps < 1 or not 0.0 < denoise <= 1.0:
            raise ValueError(
                f"{steps} steps at denoise {denoise:g} paint nothing; use at least 1 step and a denoise above 0, up to 1"
            )
        sampling = model.get_model_object("model_sampling")
        try:
            self.kind = family(sampling)  # of parametrization: VE or FLOW
        except ValueError as error:
            raise ValueError(
                f"{type(model.model).__name__} ({type(sampling).__name__}) has no known way from noise to picture; use a"
                " model of the SD or flow family"
            ) from error
        self.evaluations = 0  # rows of forward passes so far, through the model and the experts of its blend
        self.backward_evaluations = 0  # of which were computed again for a gradient

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

    @property
    def flow(self) -> bool:
        return self.kind == FLOW

    def sigmas(self, steps: int | None = None, sampler: str | None = None) -> Tensor:
        """[N + 1] of the run with ``steps`` (default: all), falling to 0.

        Fewer steps than all stand for the whole run: they have the levels of the beta schedule (arXiv 2407.12173), after
        which candidates rank most as they do in full, whatever the run's own scheduler (dev/benchmarks/seed_ranking.py). With
        a denoise below 1 they are some of the full run's levels, so that they begin where it does.
        """
        if steps is None or steps >= self.steps:
            return self._ksampler(steps, sampler).sigmas.clone()
        if self.denoise == 1.0:
            return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), SHORT_RUNS, steps)
        full = self._ksampler(None, sampler).sigmas
        return full[torch.linspace(0, len(full) - 1, steps + 1).round().long()]

    def _ksampler(self, steps: int | None, sampler: str | None = None) -> comfy.samplers.KSampler:
        return comfy.samplers.KSampler(
            self.model,
            steps=self.steps if steps is None else steps,
            device=self.model.load_device,
            sampler=sampler or self.sampler_name,
            scheduler=self.scheduler,
            denoise=self.denoise,
            model_options=self.model.model_options,
        )

    @torch.inference_mode(False)
    def noise_of(self, seed: int) -> Tensor:
        """The noise [1, C, h, w] that KSampler draws for ``seed`` at batch 1."""
        noise = comfy.sample.prepare_noise(self.samples, seed, self.latent_image.get("batch_index"))
        self._seeds[_digest(noise)] = seed
        return noise

    def to_model(self, latent: Tensor) -> Tensor:
        """A latent [N, C, h, w] of the VAE, as ``generate`` gives it, in the scale in which the model sees it."""
        return self.model.model.process_latent_in(latent)

    def to_latent(self, x: Tensor) -> Tensor:
        """The inverse of ``to_model``."""
        return self.model.model.process_latent_out(x)

    def generate(
        self,
        noise: Tensor,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Finished latents [N, C, h, w] of ``noise`` [N, C, h, w] in ``steps`` (default: all), as KSampler gives them.

        ``seeds``: what else a sampler draws from for each noise; by default the seed that ``noise_of`` gave it for, else
        the run's. Noises share batches only where that changes nothing but rounding. ``callback`` replaces the host's
        progress and preview.
        """
        seeds = self._checked_seeds(noise, seeds)
        size = self.batch_size(len(noise))
        found = []
        with self.counting(self.model):
            for first in range(0, len(noise), size):
                comfy.model_management.throw_exception_if_processing_interrupted()
                chunk = slice(first, first + size)
                found.append(self._sample(noise[chunk], steps, seeds[first], callback))
        with torch.inference_mode(False):  # so that a gradient may start here
            return torch.cat([f.clone() for f in found])

    def _checked_seeds(self, noise: Tensor, seeds: Sequence[int] | None) -> Sequence[int]:
        if noise.ndim != 4 or noise.shape[1:] != self.samples.shape[1:] or not len(noise):
            raise ValueError(
                f"the noise {size_of(noise)} does not fit the latent {size_of(self.samples)}; make it for this size"
            )
        if seeds is None:
            return [self._seeds.get(_digest(row), self.seed) for row in noise.split(1)]
        if len(seeds) != len(noise):
            raise ValueError(f"{len(seeds)} seeds for {len(noise)} noises; give one for each")
        return seeds

    def _sample(self, noise: Tensor, steps: int | None, seed: int, callback: Callback | None) -> Tensor:
        steps = self.steps if steps is None else steps
        latent = self.samples if len(noise) == 1 else self.samples.repeat(len(noise), 1, 1, 1)
        return comfy.sample.sample(
            self.model,
            noise,
            steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            self.positive,
            self.negative,
            latent,
            denoise=self.denoise,
            noise_mask=self.latent_image.get("noise_mask"),
            callback=callback or latent_preview.prepare_callback(self.model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            sigmas=self.sigmas(steps) if steps < self.steps else None,
            seed=seed,
        )

    @property
    def deterministic(self) -> bool:
        """Whether the noise alone decides the latent."""
        if self.sampler_name == "ddim" and self.latent_image.get("noise_mask") is not None:
            return False  # what the mask keeps is filled with noise of the seed
        return self.sampler_name in DETERMINISTIC

    @property
    def calls_per_step(self) -> int:
        """How often the sampler asks the model in a step, most often."""
        return CALLS_PER_STEP.get(self.sampler_name, 1)

    def batch_size(self, count: int) -> int:
        """How many of ``count`` noises may share a batch: one where they would look at each other, else what fits."""
        if count < 2 or not self.deterministic or not rows_are_independent(self.model, self.positive, self.negative):
            return 1
        free = comfy.model_management.get_free_memory(self.model.load_device)
        shape = self.samples.shape[1:]
        # guidance doubles the rows
        return next((n for n in range(count, 1, -1) if self.model.memory_required([2 * n, *shape]) < free), 1)

    @contextmanager
    def counting(self, model, recorder: Recorder | None = None):
        """Counts the rows of every forward pass through the networks of ``model``, also of passes that fail."""
        conds = {
            "positive": comfy.sampler_helpers.convert_cond(self.positive),
            "negative": comfy.sampler_helpers.convert_cond(self.negative),
        }
        patchers = [model, *(p for attachment in attached(model) for p in attachment.patchers(model, conds))]
        if model.is_dynamic() and any("hooks" in c for cond in conds.values() for c in cond):
            patchers.append(model.get_non_dynamic_delegate())  # where the guider goes then
        networks = {id(n): n for n in (p.get_model_object("diffusion_model") for p in patchers)}

        def count(module, inputs):
            self.evaluations += len(inputs[0])
            if recorder is not None and recorder.recomputing:
                self.backward_evaluations += len(inputs[0])

        with ExitStack() as stack:
            for network in networks.values():
                stack.callback(network.register_forward_pre_hook(count).remove)
            yield

    def session(self, work: Callable[[SeedSession], object], *, vae=None, clip_vision=None, **settings):
        """What ``work(session)`` returns, called inside one open run of the host's guider.

        ``settings`` as SessionSettings has them. ``vae`` and ``clip_vision`` are what session.decode and session.embed
        use; all is loaded at once and stays loaded. With gradients everything runs out of inference mode, on copies of
        weights that were loaded in it, as nodes load them; the copies are gone when ``work`` has returned.

        Errors: ValueError for what has no gradient, MemoryError where a gradient does not fit, with its size.
        """
        settings = self.check_session(vae=vae, clip_vision=clip_vision, **settings)
        with gradients() if settings.gradients else nullcontext():
            try:
                return open_session(self, work, settings, vae, clip_vision)
            finally:
                comfy.model_management.cleanup_models_gc()  # the copies

    def check_session(self, *, vae=None, clip_vision=None, **settings) -> SessionSettings:
        """The settings of a session that can be had; a ValueError, as ``session`` raises it, before anything is run."""
        settings = SessionSettings(**settings)
        check_session(self, settings, vae, clip_vision)
        return settings


def _digest(noise: Tensor) -> bytes:
    return hashlib.sha256(noise.detach().float().cpu().contiguous().numpy().tobytes()).digest()
