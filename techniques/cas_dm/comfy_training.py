"""What training a Cas-DM head asks of the host: latents, how a MODEL was noised, its guided predictions without gradients.

Shapes: B samples, C channels, h and w positions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...host.attachments import Conditioning, attached
from ...host.parametrization import FLOW, family, latent_format_of, sampling_of
from ...host.shape_errors import explained

# what an entry of a CONDITIONING may hold that acts by the noise level, by the place, or by memory
BY_LEVEL = frozenset("control hooks gligen start_percent end_percent area mask timestep_start timestep_end".split())


def process_of(model: ModelPatcher) -> tuple[Callable[[float], float], bool, float]:
    """How ``model`` was noised in training: sigma of the share of the sampling, whether it is a flow, its noise scale."""
    sampling = sampling_of(model)
    flow = family(sampling) == FLOW
    return (
        lambda percent: float(sampling.percent_to_sigma(percent)),
        flow,
        float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0,
    )


@torch.inference_mode(False)
def read_latents(model: ModelPatcher, samples: Sequence[Mapping]) -> list[Tensor]:
    """The pictures of some LATENTs, each of one or several of one size, in the model's scale: [C, h, w] or [C, T, h, w].

    Errors (ValueError): none at all, nested ones, other channels than the model's, non-finite numbers.
    """
    latent_format = latent_format_of(model)
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

    def __init__(
        self, model: ModelPatcher, positive: Conditioning, negative: Conditioning | None, cfg: float, count: int
    ) -> None:
        """``positive``: entries of a CONDITIONING, one for all pictures or one for each of ``count``."""
        if len(positive) not in (1, count):
            raise ValueError(
                f"{len(positive)} prompts in positive for {count} latents; wire one prompt for all, or one for each"
            )
        if negative is None and (cfg != 1.0 or any(a.needs_negative for a in attached(model))):
            why = f"cfg {cfg:g} guides away from it" if cfg != 1.0 else "the blend on the model compares with it"
            raise ValueError(f"negative is not wired, and {why}; wire it (an empty prompt), or set cfg to 1")
        self.model, self.positive, self.cfg = model, list(positive), cfg
        self.negative = self.positive[:1] if negative is None else list(negative)
        # a head that was trained at one level for a whole batch would not see windows and steps as sampling has them
        self.one_by_one = _by_level(model) or any(BY_LEVEL & set(o) for _, o in [*self.positive, *self.negative])

    def __call__(self, x: Tensor, sigma: Tensor, indices: Sequence[int]) -> Tensor:
        """For x_t [B, C, h, w] at ``sigma`` [B] of the pictures ``indices``, in the model's scale."""
        found: dict[int, Tensor] = {}
        for rows, entry in self._groups(indices):
            comfy.model_management.throw_exception_if_processing_interrupted()
            predicted = self._predict(x[rows], sigma[rows], entry)
            for row, x0 in zip(rows, predicted):
                found[row] = x0
        return torch.stack([found[row] for row in range(len(x))])

    def _groups(self, indices: Sequence[int]) -> list[tuple[list[int], Sequence]]:
        """Rows that can be asked for at once, with their prompts joined."""
        entries = [self.positive[i % len(self.positive)] for i in indices]
        if self.one_by_one:
            return [([row], entry) for row, entry in enumerate(entries)]
        groups: dict[tuple, list[int]] = {}
        for row, entry in enumerate(entries):
            groups.setdefault(_kind(entry), []).append(row)
        return [(rows, _joined([entries[row] for row in rows])) for rows in groups.values()]

    @torch.inference_mode()
    def _run(self, x: Tensor, sigma: Tensor, entry: Sequence) -> Tensor:
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds([entry], self.negative)
        guider.set_cfg(self.cfg)
        asked, zeros = _Asked(x, sigma), torch.zeros_like(x, device="cpu")
        levels = torch.stack([sigma.max(), torch.zeros_like(sigma[0])]).cpu()
        with explained("the model"):
            guider.sample(zeros, zeros, asked, levels, disable_pbar=True, seed=0)
        return asked.answer

    def _predict(self, x: Tensor, sigma: Tensor, entry: Sequence) -> Tensor:
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

    answer: Tensor  # once it has sampled

    def __init__(self, x: Tensor, sigma: Tensor) -> None:
        self.x, self.sigma = x, sigma

    def sample(
        self,
        guider: Callable[..., Tensor],
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> Tensor:
        self.answer = guider(self.x.to(noise.device), self.sigma.to(noise.device), **extra_args)
        return torch.zeros_like(noise)


def _by_level(model: ModelPatcher) -> bool:
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


def _like(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape) if _joinable(value) else id(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _joinable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1


def _joined(entries: list[Sequence]) -> Sequence:
    """One entry with a row for each of ``entries``, which are of one kind."""
    tensor, options = entries[0]
    if all(entry is entries[0] for entry in entries):
        return entries[0]
    tensors = [e[0] for e in entries]
    merged = {k: torch.cat([o[k] for _, o in entries]) if _joinable(v) else v for k, v in options.items()}
    return [torch.cat(tensors) if _joinable(tensor) else tensor, merged]
