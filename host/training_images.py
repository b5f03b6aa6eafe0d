"""Differentiable decoding and image features for trainings.

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
from .autograd_copies import AutogradCopies
from .gradients import Recorder, gradients, require_memory
from .parametrization import latent_format_of

GRADIENT_MEMORY_FACTOR = 3  # memory of a gradient through a VAE, as a multiple of ComfyUI's estimate for decoding


@contextmanager
def training_gradients() -> Iterator[None]:
    """``gradients()`` for a training; unloads the model copies made inside it at the end."""
    with gradients():
        try:
            yield
        finally:
            comfy.model_management.cleanup_models_gc()


class TrainingImages:
    """Decodes latents in the model's scale and computes image features, both differentiably.

    Create and use it in ``training_gradients``. ``model``: the MODEL whose latents ``vae`` decodes. The method
    ``features`` needs neither ``model`` nor ``vae``. ``checkpoint``: gradient checkpointing, which needs less memory
    and more time.
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
            images.check_vae(vae, "metrics need an image VAE: disconnect vae and set metric to l1 or none")
        if clip_vision is not None:
            images.check_clip_vision(clip_vision)
        weights = AutogradCopies()
        connected = {"VAE": vae, "image encoder": clip_vision}
        self._patchers = {name: weights(one.patcher) for name, one in connected.items() if one is not None}
        self.recorder = Recorder(checkpoint, self._require_room)

    def _require_room(self, what: str, size: int) -> None:
        remedy = "use a smaller crop or batch_size, switch gradient_checkpointing on, or set metric to none"
        require_memory(what, size, self._patchers[what].load_device, list(self._patchers.values()), remedy)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context for ``decode``, ``features`` and the backward pass."""
        self._load()  # before autograd records, so that loading is not part of the graph
        with self.recorder.recording():
            yield

    def _load(self) -> None:
        """Load the models completely: a gradient cannot pass through weights that are streamed to the device."""
        if self._patchers:
            comfy.model_management.load_models_gpu(list(self._patchers.values()), force_full_load=True)

    def _module(self, name: str) -> Any:
        """Loaded network of the VAE or the image encoder."""
        self._load()
        self.recorder.add_weights(self._patchers[name].model)
        return self._patchers[name].model

    def decode(self, latent: Tensor) -> Tensor:
        """Images [B, H, W, 3] in 0..1, decoded from latents [B, C, h, w]."""
        model, vae, module = self.model, self.vae, self._module("VAE")
        assert model is not None and vae is not None  # needed for decoding
        latent = model.model.process_latent_out(latent)

        def decoded(z: Tensor) -> Tensor:
            return images.decode(vae, module, z)

        return torch.cat([self.recorder("VAE", decoded, rows) for rows in latent.split(_decode_batch(vae, latent))])

    def features(self, batch: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Apply ``join`` to the encoder's outputs: [B, tokens, channels] of each layer, then the embedding [B, D]."""
        encoder, module = self.clip_vision, self._module("image encoder")
        assert encoder is not None  # _module raises without it

        def joined(rows: Tensor) -> Tensor:
            layers: list[Tensor] = []

            def record_layers(pixel_values: Tensor, intermediate_output: str | int) -> tuple:
                outputs = module(pixel_values=pixel_values, intermediate_output="all")
                layers.extend(outputs[1].unbind(1))
                return outputs

            embedding = images.embed(encoder, record_layers, rows)
            return join([*(layer.to(embedding) for layer in layers), embedding])

        return self.recorder("image encoder", joined, batch)


def _decode_batch(vae: VAE, latent: Tensor) -> int:
    """Number of rows of ``latent`` [B, C, h, w] to decode at once, chosen by the free memory."""
    one = GRADIENT_MEMORY_FACTOR * vae.memory_used_decode((1, *latent.shape[1:]), vae.vae_dtype)
    free = comfy.model_management.get_free_memory(vae.device)
    return max(1, min(len(latent), int(free / 2 / max(1, one))))


def preview_images(model: ModelPatcher, latents: Tensor) -> Tensor | None:
    """Preview images [B, h, w, 3] in 0..1 of latents [B, C, h, w] by ComfyUI's latent RGB factors; None without factors."""
    latent_format = latent_format_of(model)
    if latent_format.latent_rgb_factors is None or latent_format.latent_rgb_factors_reshape is not None:
        return None
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    rgb = latents.float().cpu().movedim(1, -1) @ torch.tensor(factors)
    return ((rgb + (0.0 if bias is None else torch.tensor(bias)) + 1.0) / 2.0).clamp(0.0, 1.0)
