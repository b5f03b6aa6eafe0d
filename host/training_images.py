"""What a training sees: decoded crops and the features of pictures, both with gradients.

Shapes: B samples, C channels, h and w positions; H and W pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from . import images
from .autograd_copies import NormalWeights
from .gradients import Recorder, gradients, require_room
from .parametrization import latent_format_of

KEPT_PER_DECODED = 3  # what a gradient through a VAE keeps, in what the host reckons for decoding


@contextmanager
def training_gradients() -> Iterator[None]:
    """Autograd inside a node, with the host's differentiable kernels; copies that were made in it are gone after it."""
    with gradients():
        try:
            yield
        finally:
            comfy.model_management.cleanup_models_gc()


class TrainingPictures:
    """Latents in the model's scale as pictures, and pictures as features, open to gradients. Make and use it in
    ``training_gradients``.

    ``model``: whose latents ``vae`` decodes; features alone need neither. ``checkpoint``: compute again in the backward pass
    what it would else keep: less memory for more time.
    """

    def __init__(
        self,
        model: ModelPatcher | None = None,
        vae: VAE | None = None,
        clip_vision: ClipVisionModel | None = None,
        checkpoint: bool = True,
    ) -> None:
        self.model, self.vae, self.clip_vision = model, vae, clip_vision
        if vae is not None:
            vae.throw_exception_if_invalid()
            if vae.latent_dim != 2:
                raise ValueError(
                    f"the VAE ({type(vae.first_stage_model).__name__}) decodes video or sound, whose pictures no metric"
                    " compares; set metric to l1 or none and leave vae unwired"
                )
        if clip_vision is not None:
            images.check_clip_vision(clip_vision)
        weights = NormalWeights()
        wired = {"VAE": vae, "image encoder": clip_vision}
        self._patchers = {name: weights(one.patcher) for name, one in wired.items() if one is not None}
        self.recorder = Recorder(checkpoint, self._require_room)

    def _require_room(self, what: str, size: int) -> None:
        remedy = "use a smaller crop or batch_size, switch gradient_checkpointing on, or set metric to none"
        require_room(what, size, self._patchers[what].load_device, list(self._patchers.values()), remedy)

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

    def _module(self, name: str) -> Any:
        """The network behind the VAE or the image encoder."""
        self._load()
        self.recorder.add_weights(self._patchers[name].model)
        return self._patchers[name].model

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] in 0..1 of latents [B, C, h, w]."""
        model, vae, module = self.model, self.vae, self._module("VAE")
        assert model is not None and vae is not None  # latents are decoded where both are wired
        latent = model.model.process_latent_out(latent)

        def decoded(z: Tensor) -> Tensor:
            return images.decode(vae, module, z)

        return torch.cat([self.recorder("VAE", decoded, rows) for rows in latent.split(_at_once(vae, latent))])

    def features(self, pictures: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """``join(layers)`` of the encoder's layers [B, T, W] each and, last, its embedding [B, D]."""
        encoder, module = self.clip_vision, self._module("image encoder")
        assert encoder is not None  # _module has found it

        def joined(rows: Tensor) -> Tensor:
            layers: list[Tensor] = []

            def remember(pixel_values: Tensor, intermediate_output: str | int) -> tuple:
                found = module(pixel_values=pixel_values, intermediate_output="all")
                layers.extend(found[1].unbind(1))
                return found

            embedding = images.embed(encoder, remember, rows)
            return join([*(layer.to(embedding) for layer in layers), embedding])

        return self.recorder("image encoder", joined, pictures)


def _at_once(vae: VAE, latent: Tensor) -> int:
    one = KEPT_PER_DECODED * vae.memory_used_decode((1, *latent.shape[1:]), vae.vae_dtype)
    free = comfy.model_management.get_free_memory(vae.device)
    return max(1, min(len(latent), int(free / 2 / max(1, one))))


def rough_pictures(model: ModelPatcher, latents: Tensor) -> Tensor | None:
    """[B, h, w, 3] in 0..1 of latents [B, C, h, w] without a VAE, as the host's previews are; None where it has none."""
    latent_format = latent_format_of(model)
    if latent_format.latent_rgb_factors is None or latent_format.latent_rgb_factors_reshape is not None:
        return None
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    pictures = latents.float().cpu().movedim(1, -1) @ torch.tensor(factors)
    return ((pictures + (0.0 if bias is None else torch.tensor(bias)) + 1.0) / 2.0).clamp(0.0, 1.0)
