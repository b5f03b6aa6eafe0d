"""One sampling run of the host that stays open: predict, walk from noise to latent, with gradients if wanted.

The session is a sampler given to the host's guider, so all that hangs on the MODEL acts in it: patches, LoRAs,
guidance, a blend of several models. Latents are in the model's scale (``to_latent`` gives the VAE's); B samples are
computed one by one: what one needs bounds the memory, and no sample depends on its neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ...host import images
from ...host.attachments import Conditioning
from ...host.autograd_copies import NormalWeights, own_tensors
from ...host.gradients import Recorder, gradients, require_room
from ...host.parametrization import FLOW
from .comfy_counting import RowCounter
from .comfy_differentiable import check_differentiable
from .comfy_scoring import ReferenceScorer, ScoringModels
from .sampler import GradientCost

KEY = "chorus_seed"
LATE_STEPS = 3  # whose latents the authors' loss sees
Denoise = Callable[[int, Tensor], Tensor]  # of a step's number and x [1, C, h, w]
T = TypeVar("T")


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


@torch.inference_mode(False)
def draw_noise(latent: Mapping[str, Any], seed: int) -> Tensor:
    """The noise [1, C, h, w] that KSampler draws for ``seed`` and a LATENT of one picture."""
    return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))


@dataclass(frozen=True, kw_only=True, eq=False)
class KSamplerInputs:
    """What KSampler is given. ``latent_image``: a LATENT of one picture, with its noise mask if it has one. ``seed``: of
    what a sampler draws besides the first noise, for noises that ``noise_of`` has not given; those keep their own."""

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


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How a session runs; None stands for the sampler's own."""

    gradients: bool = True
    steps: int | None = None
    sampler: str = "euler"  # one of STEPPERS
    cfg: float | None = None
    seed: int = 0  # of what is drawn besides the noise
    last_steps: int | None = None  # the gradient passes through the denoisers of that many steps only; None: of all
    checkpoint: bool = True  # False keeps the activations of all steps, for tests


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """A session that can be had; ``run`` opens it. A ValueError, before anything is run, for one that cannot be had."""

    inputs: KSamplerInputs
    sigmas: Tensor  # [N + 1], falling to 0
    kind: str  # of parametrization: VE or FLOW
    settings: SessionSettings
    counter: RowCounter
    models: ScoringModels = field(default_factory=ScoringModels)  # vae for OpenSession.decode, clip_vision for embed
    scorer: ReferenceScorer | None = None  # for OpenSession.score

    def __post_init__(self) -> None:
        settings, steps = self.settings, len(self.sigmas) - 1
        if settings.sampler not in STEPPERS:
            raise ValueError(f"no gradient is known through the sampler {settings.sampler}; use {', '.join(STEPPERS)}")
        if settings.last_steps is not None and not 1 <= settings.last_steps <= steps:
            raise ValueError(f"last_steps {settings.last_steps} is not in 1 to {steps}, the steps of this session")
        if "vae" in self.models:
            images.check_vae(self.models["vae"])
        if "clip_vision" in self.models:
            images.check_clip_vision(self.models["clip_vision"])
        if settings.sampler == "ddim" and self.inputs.latent_image.get("noise_mask") is not None:
            raise ValueError(
                "with a noise mask ddim fills what is kept with noise of its own, which no optimisation knows; use"
                " euler, its like otherwise"
            )
        if settings.gradients:
            check_differentiable(self.inputs.model, self.inputs.positive, self.inputs.negative)

    @property
    def cost(self) -> GradientCost:
        steps = len(self.sigmas) - 1
        again = min(self.settings.last_steps or steps, steps) if self.settings.checkpoint else 0
        return GradientCost(forward=steps, with_gradient=steps + again)

    def run(self, work: Callable[["OpenSession"], T]) -> T:
        """What ``work(open_session)`` returns, called inside one open run of the host's guider.

        All is loaded at once and stays loaded. With gradients everything runs out of inference mode, on copies of
        weights that were loaded in it, as nodes load them; the copies are gone when ``work`` has returned.

        Errors: MemoryError where a gradient does not fit, with its size.
        """
        with gradients() if self.settings.gradients else nullcontext():
            try:
                return self._run(work)
            finally:
                comfy.model_management.cleanup_models_gc()  # the copies

    def _run(self, work: Callable[["OpenSession"], T]) -> T:
        inputs, settings = self.inputs, self.settings
        weights = NormalWeights() if settings.gradients else None
        model = inputs.model.clone() if weights is None else weights.with_attachments(inputs.model)
        wired = {"vae": self.models.get("vae"), "clip_vision": self.models.get("clip_vision")}
        patchers = {name: found.patcher for name, found in wired.items() if found is not None}
        copies = {name: weights(p) if weights else p.clone() for name, p in patchers.items()}
        loaded: list[ModelPatcher] = []
        recorder = Recorder(settings.checkpoint or not settings.gradients, self._room(model, loaded, copies))

        def keep(patchers: Sequence[ModelPatcher]) -> None:
            loaded.extend(patchers)
            for patcher in patchers:
                recorder.add_weights(patcher.model)

        loading = _loaded_with([*copies.values()], settings.gradients, keep)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, loading)
        modules = {name: patcher.model for name, patcher in copies.items()}
        session = OpenSession(self, work, recorder, modules)

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(own_tensors(inputs.positive), own_tensors(inputs.negative))
        guider.set_cfg(inputs.cfg)
        noise, sigmas = draw_noise(inputs.latent_image, settings.seed), self.sigmas.clone()
        latent, mask = (own_tensors(inputs.latent_image.get(name)) for name in ("samples", "noise_mask"))
        with self.counter.counting(model, inputs.positive, inputs.negative, recorder), recorder.recording():
            guider.sample(noise, latent, session, sigmas, mask, disable_pbar=True, seed=settings.seed)
        return session.result

    def _room(
        self, model: ModelPatcher, loaded: Sequence[ModelPatcher], copies: Mapping[str, ModelPatcher]
    ) -> Callable[[str, int], None]:
        """What a Recorder asks before a gradient is computed: MemoryError where it does not fit beside ``loaded``."""
        settings, shape = self.settings, self.inputs.latent_image["samples"].shape

        def check(what: str, size: int) -> None:
            device, remedy = model.load_device, "use a smaller latent_image, or mode search, which needs none"
            if what == "denoiser":
                remedy = remedy if self.inputs.cfg == 1.0 else f"set cfg to 1 (about half of it), {remedy}"
                if not settings.checkpoint:
                    size *= settings.last_steps or len(self.sigmas) - 1
                    remedy = f"switch checkpointing on, lower last_steps, {remedy}"
                size += model.memory_required([2, *shape[1:]])
            elif what == "VAE":
                vae, device = self.models["vae"], copies["vae"].load_device
                size += vae.memory_used_decode(shape, vae.vae_dtype)
            else:
                device = copies["clip_vision"].load_device
            require_room(what, int(size), device, loaded, remedy)

        return check


class _Inpaint(Protocol):
    """KSamplerX0Inpaint with what a sampler sets on it."""

    latent_image: Tensor
    noise: Tensor | None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        denoise_mask: Tensor | None,
        model_options: dict[str, Any] = ...,
        seed: int | None = ...,
    ) -> Tensor: ...


class OpenSession(comfy.samplers.Sampler):
    """What ``work`` gets in Session.run, a ``sampler.SeedGradients``; of no use after it."""

    def __init__(
        self, session: Session, work: Callable[["OpenSession"], Any], recorder: Recorder, modules: Mapping[str, Any]
    ) -> None:
        """``modules``: those that compute for the session's ``models``, by the same names."""
        self.flow, self.work = session.kind == FLOW, work
        self.result: Any = None
        self._settings, self._scorer, self._models = session.settings, session.scorer, session.models
        self._recorder, self._modules = recorder, modules

    def sample(
        self,
        guider: CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Called by the host's guider in place of a sampler's steps; what ``work`` returns is in ``result``."""
        self.sigmas = sigmas.clone()  # [N + 1], falling to 0
        self.device, self._guider, self._args = guider.model_patcher.load_device, guider, extra_args
        self._latent_image, self._mask = latent_image, denoise_mask  # [1, C, h, w]
        self.result = self.work(self)
        return torch.zeros_like(noise)

    @property
    def activations(self) -> dict[str, int]:
        """Bytes that the gradient of one call keeps, by what was called so far."""
        return dict(self._recorder.sizes)

    def start(self, noise: Tensor) -> Tensor:
        """x [B, C, h, w] at sigmas[0] of ``noise`` [B, C, h, w], as the host's samplers begin."""
        return self._scaled(noise.to(self.device, torch.float32), self._latent_image)

    def noise_of(self, x: Tensor) -> Tensor:
        """The noise [B, C, h, w] from which ``start`` makes ``x`` [B, C, h, w]; it is linear in the noise."""
        zeros = torch.zeros_like(self._latent_image)
        return (x.to(self.device) - self._scaled(zeros, self._latent_image)) / self._scaled(zeros + 1, zeros)

    def _scaled(self, noise: Tensor, latent_image: Tensor) -> Tensor:
        full = self.max_denoise(self._guider, self.sigmas)
        return self._guider.inner_model.model_sampling.noise_scaling(self.sigmas[0], noise, latent_image, full)

    def to_model(self, latent: Tensor) -> Tensor:
        """A latent [B, C, h, w] of the VAE in the scale in which the model sees it."""
        return self._guider.inner_model.process_latent_in(latent)

    def to_latent(self, x: Tensor) -> Tensor:
        """The inverse of ``to_model``; what it gives for a finished x is what KSampler gives."""
        return self._guider.inner_model.process_latent_out(x)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x0 [B, C, h, w] that the host's guidance predicts for ``x`` at ``sigma``, a number or [B].

        The noise mask, which needs the run's noise, is not applied here: for inversions.
        """
        levels = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x))
        found = []
        for row, level in zip(x.to(self.device).split(1), levels.clone().split(1), strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            predict = partial(self._guider, timestep=level, **self._args)
            found.append(self._recorder("denoiser", predict, row))
        return torch.cat(found).to(x.device)

    def unroll(self, noise: Tensor) -> list[Tensor]:
        """The latents [B, C, h, w] of ``generate`` that ``score`` sees."""
        return self.generate(noise, min(LATE_STEPS, len(self.sigmas) - 1))

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """The score [B] of such latents against the references, differentiable."""
        assert self._scorer is not None  # whose work asks for scores gives the session a scorer
        return self._scorer.loss(self.embed, self.decode, self.to_latent)(latents)

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
        return [*found, self._guider.inner_model.model_sampling.inverse_noise_scaling(self.sigmas[-1], x)]

    def _denoiser(self, noise: Tensor) -> Denoise:
        """The model of a run from ``noise``, inpainting as the host's samplers do."""
        inpaint = cast(_Inpaint, comfy.samplers.KSamplerX0Inpaint(self._guider, self.sigmas))
        inpaint.latent_image = self._latent_image
        steps = len(self.sigmas) - 1
        first = 0 if self._settings.last_steps is None else steps - self._settings.last_steps

        def denoise(i: int, x: Tensor) -> Tensor:
            def predict(x: Tensor, noise: Tensor | None = None) -> Tensor:
                inpaint.noise = noise
                return inpaint(x, self.sigmas[i] * x.new_ones([1]), self._mask, **self._args)

            comfy.model_management.throw_exception_if_processing_interrupted()
            inputs: tuple[Tensor, ...] = (x,) if self._mask is None else (x, noise)
            if i < first:  # what these steps say counts as constant: the gradient passes them by
                inputs = tuple(v.detach() for v in inputs)
            return self._recorder("denoiser", predict, *inputs)

        return denoise

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1 of latents [B, C, h, w] in the VAE's scale."""
        self._check_wired("vae")
        vae, module = self._models["vae"], self._modules["vae"]
        rows = [self._recorder("VAE", lambda z: images.decode(vae, module, z), z) for z in latent.split(1)]
        return torch.cat(rows)

    def embed(self, image: Tensor, crop: bool = True) -> Tensor:
        """Embeddings [B, D] of pictures [B, H, W, 3], not normalised: the image_embeds of CLIP_VISION."""
        self._check_wired("clip_vision")
        encoder, module = self._models["clip_vision"], self._modules["clip_vision"]
        rows = []
        for row in image.split(1):
            rows.append(self._recorder("image encoder", lambda r: images.embed(encoder, module, r, crop), row))
        return torch.cat(rows)

    def _check_wired(self, name: str) -> None:
        if name not in self._modules:
            raise ValueError(f"the pictures are asked for without a {name}; wire one")


def _loaded_with(
    patchers: Sequence[ModelPatcher], whole: bool, keep: Callable[[Sequence[ModelPatcher]], None]
) -> Callable[..., tuple[BaseModel, dict[str, list[dict]], list[ModelPatcher]]]:
    """A PREPARE_SAMPLING wrapper that loads ``patchers`` in the model's own call and tells ``keep`` what is loaded.

    ``whole``: no weight may stay behind.
    """

    def prepare(
        executor: WrapperExecutor,
        model: ModelPatcher,
        noise_shape: Sequence[int],
        conds: dict[str, list[dict]],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[BaseModel, dict[str, list[dict]], list[ModelPatcher]]:
        if whole:
            kwargs["force_full_load"] = True
        extra = [{"additional_models": [patcher]} for patcher in patchers]
        inner, _, loaded = executor(model, noise_shape, {**conds, KEY: extra}, *args, **kwargs)
        keep([model, *loaded])
        for patcher in (model, *loaded):
            # weights that are brought for a moment are not those that backward would find
            if whole and getattr(patcher.model, "model_lowvram", False):
                raise MemoryError(
                    f"{type(patcher.model).__name__} does not fit on {patcher.load_device} as a whole, as a gradient"
                    " needs it; use mode search, a smaller model, or start ComfyUI without --lowvram and --novram"
                )
        return inner, conds, loaded

    return prepare
