"""A session: one call of ComfyUI's guider, inside which several predictions and sampling runs are made.

The session is a sampler passed to the guider, so everything on the MODEL is active: patches, LoRAs, guidance and a
blend of several models. Predictions and runs are differentiable if gradients are enabled. Latents are in the model's
scale; ``to_latent`` converts them to the VAE's scale. B samples are computed one by one, so they do not influence each
other and need only the memory of one sample.

Shapes: latents are packed (see host/sampled_latents.py), [B, C, *S]: S is (h, w) for images and (T, h, w) for videos.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ...host import images
from ...host.autograd_copies import AutogradCopies, clone_tensors
from ...host.gradients import Recorder, gradients, require_memory
from ...host.parametrization import FLOW
from ...host.sampled_latents import LatentLayout, decoded_shape, draw_noise
from .comfy_counting import RowCounter
from .comfy_differentiable import check_differentiable, comparison
from .comfy_inputs import KSamplerInputs, further_models
from .comfy_scoring import OWN_VAE, ReferenceScorer, ScoringModels
from .sampler import GradientCost

KEY = "chorus_seed"
LATE_STEPS = 3  # the authors' loss uses the latents after each of the last three steps
Denoise = Callable[[int, Tensor], Tensor]  # step number, x [1, C, *S] -> x0
T = TypeVar("T")


def _euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (x after the step, x0 predicted in the step) for each step, bit-equal to ComfyUI's sampler."""
    for i in range(len(sigmas) - 1):
        denoised = denoise(i, x)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        yield x, denoised


def _dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M) (arXiv 2211.01095), bit-equal to ComfyUI's sampler; yields the same pairs as ``_euler``."""
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


STEPPERS = {"euler": _euler, "ddim": _euler, "dpmpp_2m": _dpmpp_2m}  # differentiable implementation by sampler name


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """Settings of a session. If ``steps`` or ``cfg`` is None, the value in KSamplerInputs is used."""

    gradients: bool = True
    steps: int | None = None
    sampler: str | None = "euler"  # one of STEPPERS; None: a sampler without a name, which is refused
    cfg: float | None = None
    seed: int = 0  # seed of noise that ComfyUI adds besides the initial noise
    last_steps: int | None = None  # number of last steps in which the gradient flows through the denoiser; None: all
    checkpoint: bool = True  # gradient checkpointing; if False, the activations of all steps are saved


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """A session with checked settings, which ``run`` opens.

    The constructor raises a ValueError if a setting is invalid or no correct gradient is available.
    """

    inputs: KSamplerInputs
    sigmas: Tensor  # of all steps and the final 0
    kind: str  # VE or FLOW of host/parametrization.py
    settings: SessionSettings
    counter: RowCounter
    models: ScoringModels = field(default_factory=ScoringModels)  # vae for OpenSession.decode, clip_vision for .embed
    scorer: ReferenceScorer | None = None  # for OpenSession.score

    def __post_init__(self) -> None:
        settings, steps = self.settings, len(self.sigmas) - 1
        if settings.sampler not in STEPPERS:
            name = settings.sampler or "connected to sampler"
            raise ValueError(f"the sampler {name} has no gradient; use one of {', '.join(STEPPERS)} without options")
        if settings.last_steps is not None and not 1 <= settings.last_steps <= steps:
            raise ValueError(
                f"last_steps {settings.last_steps} is not between 1 and {steps}, the number of steps of an optimisation"
                " run; use 0 to backpropagate through all steps"
            )
        if "vae" in self.models:
            images.check_decodes(self.models["vae"], decoded_shape(self.inputs.model, self.layout), OWN_VAE)
        if "clip_vision" in self.models:
            images.check_clip_vision(self.models["clip_vision"])
        if settings.sampler == "ddim" and self.inputs.latent_image.get("noise_mask") is not None:
            raise ValueError(
                "with a noise mask, ddim fills the unmasked area with random noise, which cannot be optimised; use euler,"
                " which generates the same images as ddim if there is no mask"
            )
        if settings.gradients:
            check_differentiable(self.inputs.models, self.inputs.conds)

    @property
    def layout(self) -> LatentLayout:
        return LatentLayout.of(self.inputs.latent_image["samples"])

    @property
    def cost(self) -> GradientCost:
        steps = len(self.sigmas) - 1
        recomputed = min(self.settings.last_steps or steps, steps) if self.settings.checkpoint else 0
        return GradientCost(forward=steps, with_gradient=steps + recomputed)

    def run(self, work: Callable[["OpenSession"], T]) -> T:
        """Call ``work(open_session)`` inside one run of ComfyUI's guider and return its result.

        All models are loaded at the start and stay loaded. With gradients the run leaves inference mode and copies the
        weights that are inference tensors; the copies are freed afterwards. A MemoryError states the required size if the
        gradient does not fit in memory.
        """
        with gradients() if self.settings.gradients else nullcontext():
            weights = AutogradCopies() if self.settings.gradients else None
            try:
                return self._run(work, weights)
            finally:
                if weights is not None:
                    weights.unload()
                comfy.model_management.cleanup_models_gc()  # frees the copies

    def _run(self, work: Callable[["OpenSession"], T], weights: AutogradCopies | None) -> T:
        inputs, settings = self.inputs, self.settings
        model = inputs.model.clone() if weights is None else weights.with_attachments(inputs.model)
        wired = {"vae": self.models.get("vae"), "clip_vision": self.models.get("clip_vision")}
        patchers = {name: model.patcher for name, model in wired.items() if model is not None}
        copies = {name: weights(p) if weights else p.clone() for name, p in patchers.items()}
        loaded: list[ModelPatcher] = []
        compare = {"denoiser": comparison(inputs.models)} if settings.gradients else {}
        checkpoint = settings.checkpoint or not settings.gradients
        recorder = Recorder(checkpoint, self._memory_check(model, loaded, copies), compare)

        def on_loaded(patchers: Sequence[ModelPatcher]) -> None:
            loaded.extend(patchers)
            for patcher in patchers:
                recorder.add_weights(patcher.model)

        loading = _loaded_with([*copies.values()], settings.gradients, on_loaded)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, loading)
        modules = {name: patcher.model for name, patcher in copies.items()}
        session = OpenSession(self, work, recorder, modules)

        copied = weights or ModelPatcher.clone
        guider = inputs.copied_guider(model, copied, settings.cfg)
        noise, sigmas = draw_noise(inputs.latent_image, settings.seed), self.sigmas.clone()
        latent, mask = (clone_tensors(inputs.latent_image.get(name)) for name in ("samples", "noise_mask"))
        running = [model, *further_models(guider).values()]
        with self.counter.counting(running, guider.original_conds, recorder), recorder.recording():
            guider.sample(noise, latent, session, sigmas, mask, disable_pbar=True, seed=settings.seed)
        return session.result

    def _memory_check(
        self, model: ModelPatcher, loaded: Sequence[ModelPatcher], copies: Mapping[str, ModelPatcher]
    ) -> Callable[[str, int], None]:
        """The ``check`` of a Recorder: raises a MemoryError if a gradient does not fit beside the ``loaded`` models."""
        settings, layout = self.settings, self.layout
        shape = decoded_shape(self.inputs.model, layout)

        def check(what: str, size: int) -> None:
            device, remedy = model.load_device, "use a smaller latent_image, or mode search, which needs no gradient"
            if what == "denoiser":
                remedy = (
                    remedy
                    if self.inputs.guider or self.inputs.cfg == 1.0
                    else f"set cfg to 1 (needs about half the memory), {remedy}"
                )
                if not settings.checkpoint:
                    size *= settings.last_steps or len(self.sigmas) - 1
                    remedy = f"switch checkpointing on, lower last_steps, {remedy}"
                size += model.memory_required([2, *layout.packed_size])
            elif what == "VAE":
                vae, device = self.models["vae"], copies["vae"].load_device
                size += vae.memory_used_decode(shape, vae.vae_dtype)
            else:
                device = copies["clip_vision"].load_device
            require_memory(what, int(size), device, loaded, remedy)

        return check


class _Inpaint(Protocol):
    """KSamplerX0Inpaint with the attributes that samplers set."""

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
    """An open session: the argument of ``work`` in Session.run, valid only during that run.

    Implements ``sampler.SeedGradients``.
    """

    def __init__(
        self, session: Session, work: Callable[["OpenSession"], Any], recorder: Recorder, modules: Mapping[str, Any]
    ) -> None:
        """``modules``: networks of the session's ``models``, by the same names."""
        self.flow, self.work = session.kind == FLOW, work
        self.result: Any = None
        self._settings, self._scorer, self._models = session.settings, session.scorer, session.models
        self._layout = session.layout
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
        """Called by ComfyUI's guider in place of sampling; stores the return value of ``work`` in ``result``."""
        self.sigmas = sigmas.clone()  # of all steps and the final 0
        self.device, self._guider, self._args = guider.model_patcher.load_device, guider, extra_args
        self._latent_image, self._mask = latent_image, denoise_mask  # [1, C, *S]
        self.result = self.work(self)
        return torch.zeros_like(noise)

    @property
    def activations(self) -> dict[str, int]:
        """Size in bytes of the activations of one call, for each network called so far."""
        return dict(self._recorder.sizes)

    def start(self, noise: Tensor) -> Tensor:
        """Initial x [B, C, *S] at sigmas[0] for ``noise`` [B, C, *S], as in ComfyUI's samplers."""
        return self._scaled(noise.to(self.device, torch.float32), self._latent_image)

    def noise_of(self, x: Tensor) -> Tensor:
        """Noise [B, C, *S] for which ``start`` returns ``x`` [B, C, *S]; ``start`` is affine in the noise."""
        zeros = torch.zeros_like(self._latent_image)
        return (x.to(self.device) - self._scaled(zeros, self._latent_image)) / self._scaled(zeros + 1, zeros)

    def _scaled(self, noise: Tensor, latent_image: Tensor) -> Tensor:
        full = self.max_denoise(self._guider, self.sigmas)
        return self._guider.inner_model.model_sampling.noise_scaling(self.sigmas[0], noise, latent_image, full)

    def to_model(self, latent: Tensor) -> Tensor:
        """Convert a latent [B, C, *S] from the VAE's scale to the model's scale."""
        return self._guider.inner_model.process_latent_in(latent)

    def to_latent(self, x: Tensor) -> Tensor:
        """Convert a latent to the VAE's scale (inverse of ``to_model``). The converted final x is KSampler's result."""
        return self._guider.inner_model.process_latent_out(x)

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x0 [B, C, *S], predicted with guidance for ``x`` [B, C, *S] at ``sigma`` (a number or [B]).

        Used for inversions. It does not apply the noise mask, for which the initial noise of a run would be needed.
        """
        levels = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(len(x))
        predictions = []
        for row, level in zip(x.to(self.device).split(1), levels.clone().split(1), strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            predict = partial(self._guider, timestep=level, **self._args)
            predictions.append(self._recorder("denoiser", predict, row))
        return torch.cat(predictions).to(x.device)

    def unroll(self, noise: Tensor) -> list[Tensor]:
        """Latents [B, C, *S] after each of the last steps of a run from ``noise`` [B, C, *S], for ``score``."""
        return self.generate(noise, min(LATE_STEPS, len(self.sigmas) - 1))

    def score(self, latents: Sequence[Tensor]) -> Tensor:
        """Differentiable score [B] of the latents that ``unroll`` returned, against the references."""
        assert self._scorer is not None  # the caller has created the session with a ``scorer``
        loss = self._scorer.loss(self.embed, self.decode, self.to_latent)
        return loss([self._layout.pictures(x) for x in latents])

    def generate(self, noise: Tensor, late: int = 1) -> list[Tensor]:
        """Latents [B, C, *S] after each of the last ``late`` steps, the final latent last, on the device of ``noise``.

        For variance-exploding models the noisy latents before the final one are in VP scale, x / sqrt(1 + sigma^2). For
        flow models the predictions of x0 replace the noisy latents.
        """
        steps = len(self.sigmas) - 1
        if not 1 <= late <= steps:
            raise ValueError(
                f"late {late} is not between 1 and {steps}, the number of steps of this session; use more steps"
            )
        paths = [self._path(row, late) for row in noise.split(1)]
        return [torch.cat(rows).to(noise.device) for rows in zip(*paths, strict=True)]

    def _path(self, noise: Tensor, late: int) -> list[Tensor]:
        noise = noise.to(self.device, torch.float32)
        steps, latents = len(self.sigmas) - 1, []
        sampler = self._settings.sampler
        assert sampler is not None  # the session has refused it
        stepper = STEPPERS[sampler](self._denoiser(noise), self.start(noise), self.sigmas)
        for i, (x, denoised) in enumerate(stepper, start=1):
            if steps - late < i < steps:
                latents.append(denoised if self.flow else x / (1 + self.sigmas[i] ** 2) ** 0.5)
        return [*latents, self._guider.inner_model.model_sampling.inverse_noise_scaling(self.sigmas[-1], x)]

    def _denoiser(self, noise: Tensor) -> Denoise:
        """Denoiser of a run from ``noise``; applies the noise mask as ComfyUI's samplers do."""
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
            if i < first:  # the gradient treats the predictions of these steps as constants
                inputs = tuple(v.detach() for v in inputs)
            return self._recorder("denoiser", predict, *inputs)

        return denoise

    def pictures(self, latent: Tensor) -> Tensor:
        """Images [B, H, W, 3] in 0..1 of latents in the VAE's scale, for display; videos as strips of the scored frames."""
        return images.filmstrips(self.decode(self._layout.pictures(latent)))

    def decode(self, latent: Tensor) -> Tensor:
        """Images [B, H, W, 3] or videos [B, F, H, W, 3] in 0..1 of latents that the VAE decodes, in its scale."""
        self._check_wired("vae")
        vae, module = self._models["vae"], self._modules["vae"]
        rows = [self._recorder("VAE", lambda z: images.decode(vae, module, z), z) for z in latent.split(1)]
        return torch.cat(rows)

    def embed(self, image: Tensor, crop: bool = True) -> Tensor:
        """Embeddings [B, D] of images [B, H, W, 3]: the image_embeds of CLIP_VISION, which are not normalised."""
        self._check_wired("clip_vision")
        encoder, module = self._models["clip_vision"], self._modules["clip_vision"]
        rows = []
        for row in image.split(1):
            rows.append(self._recorder("image encoder", lambda r: images.embed(encoder, module, r, crop), row))
        return torch.cat(rows)

    def _check_wired(self, name: str) -> None:
        if name not in self._modules:
            raise ValueError(f"the session has no {name}; connect a {name}")


def _loaded_with(
    patchers: Sequence[ModelPatcher], whole: bool, on_loaded: Callable[[Sequence[ModelPatcher]], None]
) -> Callable[..., tuple[BaseModel, dict[str, list[dict]], list[ModelPatcher]]]:
    """PREPARE_SAMPLING wrapper that loads ``patchers`` together with the model and passes all of them to ``on_loaded``.

    ``whole``: load all weights to the device at once. MemoryError if the weights do not fit.
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
        on_loaded([model, *loaded])
        for patcher in (model, *loaded):
            # weights that are streamed to the device are no longer there in the backward pass
            if whole and getattr(patcher.model, "model_lowvram", False):
                raise MemoryError(
                    f"a gradient needs all weights of {type(patcher.model).__name__} on {patcher.load_device}, and they do"
                    " not fit; use mode search or a smaller model, or start ComfyUI without --lowvram and --novram"
                )
        return inner, conds, loaded

    return prepare
