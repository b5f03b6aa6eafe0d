"""One sampling run of the host that stays open: predict, walk from noise to latent, with gradients if wanted.

The session is a sampler given to the host's guider, so all that hangs on the MODEL acts in it: patches, LoRAs,
guidance, a blend of several models. Latents are in the model's scale (``to_latent`` gives the VAE's); B samples are
computed one by one: what one needs bounds the memory, and no sample depends on its neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...host import images
from ...host.gradients import Recorder
from ...host.parametrization import FLOW

Denoise = Callable[[int, Tensor], Tensor]  # of a step's number and x [1, C, h, w]


def _euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(x after the step, x0 estimated by it) of the host's sampler, to the bit."""
    for i in range(len(sigmas) - 1):
        denoised = denoise(i, x)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        yield x, denoised


def _dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M) (arXiv 2211.01095) as the host has it, to the bit."""
    times, old = sigmas.log().neg(), None
    for i in range(len(sigmas) - 1):
        denoised = denoise(i, x)
        h, estimate = times[i + 1] - times[i], denoised
        if old is not None and sigmas[i + 1] != 0:
            r = (times[i] - times[i - 1]) / h
            estimate = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
        x = (times[i + 1].neg().exp() / times[i].neg().exp()) * x - (-h).expm1() * estimate
        yield x, denoised
        old = denoised


STEPPERS = {"euler": _euler, "ddim": _euler, "dpmpp_2m": _dpmpp_2m}  # samplers with a differentiable twin


@dataclass(frozen=True)
class SessionSettings:
    """How SeedRun.session opens a run; None stands for the run's own."""

    gradients: bool = True
    steps: int | None = None
    sampler: str = "euler"  # one of STEPPERS
    cfg: float | None = None
    seed: int = 0  # of what is drawn besides the noise
    last_steps: int | None = None  # the gradient passes through the denoisers of that many steps only; None: of all
    checkpoint: bool = True  # False keeps the activations of all steps, for tests

    def __post_init__(self):
        if self.sampler not in STEPPERS:
            raise ValueError(f"no gradient is known through the sampler {self.sampler}; use {', '.join(STEPPERS)}")


@dataclass(frozen=True, eq=False)
class _Run:
    """What the host hands to a sampler."""

    guider: comfy.samplers.CFGGuider
    args: dict  # for every prediction
    latent_image: Tensor  # [1, C, h, w]
    mask: Tensor | None  # of the noise, [1, C, h, w]

    @property
    def inner(self):
        return self.guider.inner_model


class SeedSession:
    """What ``work`` gets in SeedRun.session; of no use after it."""

    def __init__(
        self,
        run: _Run,
        sigmas: Tensor,
        settings: SessionSettings,
        kind: str,
        recorder: Recorder,
        vae=None,
        clip_vision=None,
    ):
        """``vae`` and ``clip_vision``: the host's object with the module that computes."""
        self.sigmas = sigmas.clone()  # [N + 1], falling to 0
        self.flow = kind == FLOW
        self.device = run.guider.model_patcher.load_device
        self._run, self._settings, self._recorder = run, settings, recorder
        self._vae, self._clip_vision = vae, clip_vision

    @property
    def activations(self) -> dict[str, int]:
        """Bytes that the gradient of one call keeps, by what was called so far."""
        return dict(self._recorder.sizes)

    def start(self, noise: Tensor) -> Tensor:
        """x [B, C, h, w] at sigmas[0] of ``noise`` [B, C, h, w], as the host's samplers begin."""
        return self._scaled(noise.to(self.device, torch.float32), self._run.latent_image)

    def noise_of(self, x: Tensor) -> Tensor:
        """The noise [B, C, h, w] from which ``start`` makes ``x`` [B, C, h, w]; it is linear in the noise."""
        zeros = torch.zeros_like(self._run.latent_image)
        return (x.to(self.device) - self._scaled(zeros, self._run.latent_image)) / self._scaled(zeros + 1, zeros)

    def _scaled(self, noise: Tensor, latent_image: Tensor) -> Tensor:
        full = comfy.samplers.Sampler().max_denoise(self._run.guider, self.sigmas)
        return self._run.inner.model_sampling.noise_scaling(self.sigmas[0], noise, latent_image, full)

    def to_model(self, latent: Tensor) -> Tensor:
        """A latent [B, C, h, w] of the VAE in the scale in which the model sees it."""
        return self._run.inner.process_latent_in(latent)

    def to_latent(self, x: Tensor) -> Tensor:
        """The inverse of ``to_model``; what it gives for a finished x is what KSampler gives."""
        return self._run.inner.process_latent_out(x)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x0 [B, C, h, w] that the host's guidance predicts for ``x`` at ``sigma``, a number or [B].

        The noise mask, which needs the run's noise, is not applied here: for inversions.
        """
        levels = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x))
        args = {k: v for k, v in self._run.args.items() if k != "denoise_mask"}
        found = []
        for row, level in zip(x.to(self.device).split(1), levels.clone().split(1), strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            predict = partial(self._run.guider, timestep=level, **args)
            found.append(self._recorder("denoiser", predict, row))
        return torch.cat(found).to(x.device)

    def generate(self, noise: Tensor, late: int = 1) -> list[Tensor]:
        """The latents [B, C, h, w] after the last ``late`` steps, the finished one last, where ``noise`` is.

        Latents that are still noisy are in VP scale, x / sqrt(1 + sigma^2), for variance-exploding models; of flow
        models they are the steps' estimates of x0.
        """
        steps = len(self.sigmas) - 1
        if not 1 <= late <= steps:
            raise ValueError(f"late {late} is not in 1 to {steps}, the steps of this session; take more steps")
        paths = [self._path(row, late) for row in noise.split(1)]
        return [torch.cat(rows).to(noise.device) for rows in zip(*paths, strict=True)]

    def _path(self, noise: Tensor, late: int) -> list[Tensor]:
        noise = noise.to(self.device, torch.float32)
        steps, found = len(self.sigmas) - 1, []
        stepper = STEPPERS[self._settings.sampler](self._denoiser(noise), self.start(noise), self.sigmas)
        for i, (x, denoised) in enumerate(stepper, start=1):
            if steps - late < i < steps:
                found.append(denoised if self.flow else x / (1 + self.sigmas[i] ** 2) ** 0.5)
        return [*found, self._run.inner.model_sampling.inverse_noise_scaling(self.sigmas[-1], x)]

    def _denoiser(self, noise: Tensor) -> Denoise:
        """The model of a run from ``noise``, inpainting as the host's samplers do."""
        inpaint = comfy.samplers.KSamplerX0Inpaint(self._run.guider, self.sigmas)
        inpaint.latent_image = self._run.latent_image
        steps = len(self.sigmas) - 1
        first = 0 if self._settings.last_steps is None else steps - self._settings.last_steps

        def denoise(i: int, x: Tensor) -> Tensor:
            def predict(x, noise=None):
                inpaint.noise = noise
                return inpaint(x, self.sigmas[i] * x.new_ones([1]), **self._run.args)

            comfy.model_management.throw_exception_if_processing_interrupted()
            inputs = (x,) if self._run.mask is None else (x, noise)
            if i < first:  # what these steps say counts as constant: the gradient passes them by
                inputs = tuple(v.detach() for v in inputs)
            return self._recorder("denoiser", predict, *inputs)

        return denoise

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1 of latents [B, C, h, w] in the VAE's scale."""
        vae, module = self._wired(self._vae, "vae")
        rows = [self._recorder("VAE", lambda z: images.decode(vae, module, z), z) for z in latent.split(1)]
        return torch.cat(rows)

    def embed(self, image: Tensor, crop: bool = True) -> Tensor:
        """Embeddings [B, D] of pictures [B, H, W, 3], not normalised: the image_embeds of CLIP_VISION."""
        encoder, module = self._wired(self._clip_vision, "clip_vision")
        rows = []
        for row in image.split(1):
            rows.append(self._recorder("image encoder", lambda r: images.embed(encoder, module, r, crop), row))
        return torch.cat(rows)

    @staticmethod
    def _wired(pair, name: str):
        if pair is None:
            raise ValueError(f"the pictures are asked for without a {name}; wire one")
        return pair


class SessionSampler(comfy.samplers.Sampler):
    """The host's place for ``work(session)``; what it returns is in ``result``."""

    def __init__(self, work: Callable[[SeedSession], object], *settings, **pictures):
        self.work, self.settings, self.pictures, self.result = work, settings, pictures, None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        extra_args["denoise_mask"] = denoise_mask
        run = _Run(guider, extra_args, latent_image, denoise_mask)
        self.result = self.work(SeedSession(run, sigmas, *self.settings, **self.pictures))
        return torch.zeros_like(noise)
