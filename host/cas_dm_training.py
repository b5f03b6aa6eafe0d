"""What training a Cas-DM head asks of the host: guided predictions of a MODEL without gradients, decoded crops and their
features with them.

Shapes: B samples, C channels, h and w positions; H and W pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from . import seed_pictures
from .blend_hook import blend_chain
from .parametrization import FLOW, family
from .seed_gradients import NormalWeights, Recorder, gradients, make_room

# what an entry of a CONDITIONING may hold that acts by the noise level, by the place, or by memory
BY_LEVEL = frozenset("control hooks gligen start_percent end_percent area mask timestep_start timestep_end".split())
KEPT_PER_DECODED = 3  # what a gradient through a VAE keeps, in what the host reckons for decoding


@contextmanager
def training_gradients() -> Iterator[None]:
    """Autograd inside a node, with the host's differentiable kernels; copies that were made in it are gone after it."""
    with gradients():
        try:
            yield
        finally:
            comfy.model_management.cleanup_models_gc()


def training_place(model) -> tuple[torch.device, torch.dtype | None]:
    """Where to train, and what to autocast to: bfloat16 where the device has it, else None for float32."""
    device = model.load_device
    plain = comfy.model_management.is_device_cpu(device) or not comfy.model_management.should_use_bf16(device)
    return device, None if plain else torch.bfloat16


def process_of(model) -> tuple[Callable[[float], float], bool, float]:
    """How ``model`` was noised in training: sigma of the share of the sampling, whether it is a flow, its noise scale."""
    sampling = model.get_model_object("model_sampling")
    flow = family(sampling) == FLOW
    return (
        lambda percent: float(sampling.percent_to_sigma(percent)),
        flow,
        float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0,
    )


@torch.inference_mode(False)
def read_latents(model, samples: Sequence[Mapping]) -> list[Tensor]:
    """The pictures of some LATENTs, each of one or several of one size, in the model's scale: [C, h, w] or [C, T, h, w].

    Errors (ValueError): none at all, nested ones, other channels than the model's, numbers that are none.
    """
    latent_format = model.get_model_object("latent_format")
    channels, axes = latent_format.latent_channels, latent_format.latent_dimensions + 2
    pictures: list[Tensor] = []
    for latent in samples:
        tensor = latent["samples"]
        if tensor.is_nested:
            raise ValueError("samples holds nested latents (video with sound); train on pictures or on video alone")
        if tensor.ndim != axes or tensor.shape[1] != channels:
            raise ValueError(
                f"samples are {tuple(tensor.shape)}, and {type(model.model).__name__} works on latents of {channels}"
                f" channels and {axes} axes; encode the pictures with the VAE of this model"
            )
        tensor = model.model.process_latent_in(tensor.to("cpu", torch.float32, copy=True))
        if not bool(tensor.isfinite().all()):
            raise ValueError("samples hold numbers that are NaN or infinite; encode the pictures anew")
        pictures += tensor.unbind(0)
    if not pictures:
        raise ValueError("samples hold no latents; load pictures and encode them with the VAE of this model")
    return pictures


class Guided:
    """x̂_θ of a MODEL: what the host's guidance predicts, with all that hangs on the MODEL, and without gradients.

    Every call is a run of the host's guider with one prediction, so that patches, LoRAs, a blend of several models and
    other heads act as they do in sampling.
    """

    def __init__(self, model, positive: Sequence, negative: Sequence | None, cfg: float, count: int):
        """``positive``: entries of a CONDITIONING, one for all pictures or one for each of ``count``."""
        if len(positive) not in (1, count):
            raise ValueError(
                f"{len(positive)} prompts in positive for {count} latents; wire one prompt for all, or one for each"
            )
        if negative is None and (cfg != 1.0 or blend_chain(model).experts):
            why = f"cfg {cfg:g} guides away from it" if cfg != 1.0 else "the blend on the model compares with it"
            raise ValueError(f"negative is not wired, and {why}; wire it (an empty prompt), or set cfg to 1")
        self.model, self.positive, self.cfg = model, list(positive), cfg
        self.negative = self.positive[:1] if negative is None else list(negative)
        # a head that was trained at one level for a whole batch would not see windows and steps as sampling has them
        self.one_by_one = _by_level(model) or any(BY_LEVEL & set(o) for _, o in [*self.positive, *self.negative])

    def __call__(self, x: Tensor, sigma: Tensor, indices: Sequence[int]) -> Tensor:
        """For x_t [B, C, h, w] at ``sigma`` [B] of the pictures ``indices``, in the model's scale."""
        found: list[Tensor | None] = [None] * len(x)
        for rows, entry in self._groups(indices):
            comfy.model_management.throw_exception_if_processing_interrupted()
            predicted = self._predict(x[rows], sigma[rows], entry)
            for row, x0 in zip(rows, predicted):
                found[row] = x0
        return torch.stack(found)

    def _groups(self, indices: Sequence[int]) -> list[tuple[list[int], list]]:
        """Rows that can be asked for at once, with their prompts joined."""
        entries = [self.positive[i % len(self.positive)] for i in indices]
        if self.one_by_one:
            return [([row], entry) for row, entry in enumerate(entries)]
        groups: dict[tuple, list[int]] = {}
        for row, entry in enumerate(entries):
            groups.setdefault(_kind(entry), []).append(row)
        return [(rows, _joined([entries[row] for row in rows])) for rows in groups.values()]

    @torch.inference_mode()
    def _run(self, x: Tensor, sigma: Tensor, entry: list) -> Tensor:
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds([entry], self.negative)
        guider.set_cfg(self.cfg)
        asked, zeros = _Asked(x, sigma), torch.zeros_like(x, device="cpu")
        levels = torch.stack([sigma.max(), torch.zeros_like(sigma[0])]).cpu()
        guider.sample(zeros, zeros, asked, levels, disable_pbar=True, seed=0)
        return asked.answer

    def _predict(self, x: Tensor, sigma: Tensor, entry: list) -> Tensor:
        before = comfy.model_management.in_training
        comfy.model_management.in_training = False  # this one is asked as it is in sampling
        try:
            return self._run(x, sigma, entry).clone()
        finally:
            comfy.model_management.in_training = before

    def unload(self) -> None:
        """The predictions are all there; give the memory back."""
        comfy.model_management.unload_model_and_clones(self.model)


class _Asked(comfy.samplers.Sampler):
    """A sampler that asks once."""

    def __init__(self, x: Tensor, sigma: Tensor):
        self.x, self.sigma, self.answer = x, sigma, None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *rest, **kwargs
    ):
        self.answer = guider(self.x.to(noise.device), self.sigma.to(noise.device), **extra_args)
        return torch.zeros_like(noise)


def _by_level(model) -> bool:
    """Whether something on ``model`` may look at the noise level of a whole batch, which the host takes from its first."""
    options = model.model_options
    inside = {k: v for k, v in options.get("transformer_options", {}).items() if v}
    hooked = any(v for k, v in options.items() if k != "transformer_options")
    return bool(inside or hooked or any(model.wrappers.values()))


def _kind(entry: Sequence) -> tuple:
    """What entries must agree in to be asked for at once."""
    tensor, options = entry
    rest = tuple((key, _like(options[key])) for key in sorted(options))
    return (_like(tensor), rest) if _joinable(tensor) else (id(tensor), rest)


def _like(value) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape) if _joinable(value) else id(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _joinable(value) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1


def _joined(entries: list[Sequence]) -> list:
    """One entry with a row for each of ``entries``, which are of one kind."""
    tensor, options = entries[0]
    if all(entry is entries[0] for entry in entries):
        return entries[0]
    tensors = [e[0] for e in entries]
    merged = {k: torch.cat([o[k] for _, o in entries]) if _joinable(v) else v for k, v in options.items()}
    return [torch.cat(tensors) if _joinable(tensor) else tensor, merged]


class LatentPictures:
    """Latents in the model's scale as pictures and as features, open to gradients. Make and use it in ``training_gradients``.

    ``checkpoint``: compute again in the backward pass what it would else keep: less memory for more time.
    """

    def __init__(self, model, vae=None, clip_vision=None, checkpoint: bool = True):
        self.model, self.vae, self.clip_vision = model, vae, clip_vision
        if vae is not None:
            vae.throw_exception_if_invalid()
            if vae.latent_dim != 2:
                raise ValueError(
                    f"the VAE ({type(vae.first_stage_model).__name__}) decodes video or sound, whose pictures no metric"
                    " compares; set metric to l1 or none and leave vae unwired"
                )
        if clip_vision is not None:
            seed_pictures.check_clip_vision(clip_vision)
        weights = NormalWeights()
        wired = {"VAE": vae, "image encoder": clip_vision}
        self._patchers = {name: weights(one.patcher) for name, one in wired.items() if one is not None}
        self.recorder = Recorder(checkpoint, self._make_room)

    def _make_room(self, what: str, size: int) -> None:
        remedy = "use a smaller crop or batch_size, switch gradient_checkpointing on, or set metric to none"
        make_room(what, size, self._patchers[what].load_device, list(self._patchers.values()), remedy)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Where pictures and features are made of latents, and the backward pass runs."""
        self._load()  # before: what the host moves for it is none of autograd's business
        with self.recorder.recording():
            yield

    def _load(self) -> None:
        """As a whole: a gradient cannot pass through weights that are brought for a moment."""
        if self._patchers:
            comfy.model_management.load_models_gpu(list(self._patchers.values()), force_full_load=True)

    def _module(self, name: str) -> torch.nn.Module:
        self._load()
        self.recorder.add_weights(self._patchers[name].model)
        return self._patchers[name].model

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1 of latents [B, C, h, w]."""
        module, vae = self._module("VAE"), self.vae
        latent = self.model.model.process_latent_out(latent)

        def decoded(z: Tensor) -> Tensor:
            return seed_pictures.decode(vae, module, z)

        return torch.cat([self.recorder("VAE", decoded, rows) for rows in latent.split(self._at_once(latent))])

    def _at_once(self, latent: Tensor) -> int:
        one = KEPT_PER_DECODED * self.vae.memory_used_decode((1, *latent.shape[1:]), self.vae.vae_dtype)
        free = comfy.model_management.get_free_memory(self.vae.device)
        return max(1, min(len(latent), int(free / 2 / max(1, one))))

    def features(self, pictures: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """``join(layers)`` of the encoder's layers [B, T, W] each and, last, its embedding [B, D]."""
        module, encoder = self._module("image encoder"), self.clip_vision

        def joined(rows: Tensor) -> Tensor:
            layers: list[Tensor] = []

            def remember(pixel_values, intermediate_output):
                found = module(pixel_values=pixel_values, intermediate_output="all")
                layers.extend(found[1].unbind(1))
                return found

            embedding = seed_pictures.embed(encoder, remember, rows)
            return join([*(layer.to(embedding) for layer in layers), embedding])

        return self.recorder("image encoder", joined, pictures)


def rough_pictures(model, latents: Tensor) -> Tensor | None:
    """[B, h, w, 3] in 0..1 of latents [B, C, h, w] without a VAE, as the host's previews are; None where it has none."""
    latent_format = model.get_model_object("latent_format")
    if latent_format.latent_rgb_factors is None or latent_format.latent_rgb_factors_reshape is not None:
        return None
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    pictures = latents.float().cpu().movedim(1, -1) @ torch.tensor(factors)
    return ((pictures + (0.0 if bias is None else torch.tensor(bias)) + 1.0) / 2.0).clamp(0.0, 1.0)
