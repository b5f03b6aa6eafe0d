"""Opens a session (seed_session.py) inside the host's guider: what is loaded for it, what it may not do, its memory."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import comfy.samplers
from comfy.patcher_extension import WrappersMP

from ...host import images
from ...host.autograd_copies import NormalWeights, own_tensors
from ...host.gradients import Recorder, make_room
from .comfy_differentiable import check_differentiable
from .comfy_session import SessionSampler, SessionSettings

if TYPE_CHECKING:
    from .comfy_sampler import SeedRun

KEY = "chorus_seed"


def check_session(run: "SeedRun", settings: SessionSettings, vae, clip_vision) -> None:
    """ValueError for a session of ``run`` that cannot be had."""
    steps = len(run.sigmas(settings.steps, settings.sampler)) - 1
    if settings.last_steps is not None and not 1 <= settings.last_steps <= steps:
        raise ValueError(f"last_steps {settings.last_steps} is not in 1 to {steps}, the steps of this session")
    if vae is not None:
        images.check_vae(vae)
    if clip_vision is not None:
        images.check_clip_vision(clip_vision)
    if settings.sampler == "ddim" and run.latent_image.get("noise_mask") is not None:
        raise ValueError(
            "with a noise mask ddim fills what is kept with noise of its own, which no optimisation knows; use euler,"
            " its like otherwise"
        )
    if settings.gradients:
        check_differentiable(run.model, run.positive, run.negative)


def open_session(run: "SeedRun", work: Callable, settings: SessionSettings, vae, clip_vision):
    """What ``work(session)`` returns; MemoryError where a gradient does not fit."""
    weights = NormalWeights() if settings.gradients else None
    model = run.model.clone() if weights is None else weights.with_attachments(run.model)
    wired = {"vae": vae, "clip_vision": clip_vision}
    wired = {k: (v, weights(v.patcher) if weights else v.patcher.clone()) for k, v in wired.items() if v is not None}
    sigmas = run.sigmas(settings.steps, settings.sampler)
    loaded = []
    room = _room(run, model, loaded, wired, settings, len(sigmas) - 1)
    recorder = Recorder(settings.checkpoint or not settings.gradients, room)

    def keep(patchers: list) -> None:
        loaded.extend(patchers)
        for patcher in patchers:
            recorder.add_weights(patcher.model)

    beside = [patcher for _, patcher in wired.values()]
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _loaded_with(beside, settings.gradients, keep))
    modules = {name: (host_object, patcher.model) for name, (host_object, patcher) in wired.items()}
    sampler = SessionSampler(work, settings, run.kind, recorder, **modules)

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(own_tensors(run.positive), own_tensors(run.negative))
    guider.set_cfg(_guidance(run, settings))
    noise, latent = run.noise_of(settings.seed), run.samples.clone()
    mask = run.latent_image.get("noise_mask")
    with run.counting(model, recorder), recorder.recording():
        guider.sample(
            noise,
            latent,
            sampler,
            sigmas,
            None if mask is None else mask.clone(),
            disable_pbar=True,
            seed=settings.seed,
        )
    return sampler.result


def _guidance(run: "SeedRun", settings: SessionSettings) -> float:
    return run.cfg if settings.cfg is None else settings.cfg


def _room(
    run: "SeedRun", model, loaded: list, wired: Mapping, settings: SessionSettings, steps: int
) -> Callable[[str, int], None]:
    """What a Recorder asks before a gradient is computed: MemoryError where it does not fit beside ``loaded``."""

    def check(what: str, size: int) -> None:
        device, remedy = model.load_device, "use a smaller latent_image, or mode search, which needs none"
        if what == "denoiser":
            remedy = remedy if _guidance(run, settings) == 1.0 else f"set cfg to 1 (about half of it), {remedy}"
            if not settings.checkpoint:
                size *= settings.last_steps or steps
                remedy = f"switch checkpointing on, lower last_steps, {remedy}"
            size += model.memory_required([2, *run.samples.shape[1:]])
        elif what == "VAE":
            vae, device = wired["vae"][0], wired["vae"][1].load_device
            size += vae.memory_used_decode(run.samples.shape, vae.vae_dtype)
        else:
            device = wired["clip_vision"][1].load_device
        make_room(what, int(size), device, loaded, remedy)

    return check


def _loaded_with(patchers: list, whole: bool, keep: Callable[[list], None]):
    """A PREPARE_SAMPLING wrapper that loads ``patchers`` in the model's own call and tells ``keep`` what is loaded.

    ``whole``: no weight may stay behind.
    """

    def prepare(executor, model, noise_shape, conds, *args, **kwargs):
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
