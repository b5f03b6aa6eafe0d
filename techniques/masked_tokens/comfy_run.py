"""Masked token networks under ComfyUI's memory management and interrupts: encoding, decoding, logits and previews.

Shapes: B samples, h and w the height and width in tokens, H and W those in pixels, K codes.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from torch import Tensor

from ...common.shapes import size_of
from ...host.attachments import Conditioning
from ...host.previews import as_preview
from . import preview
from .batch import Batch, stack_texts
from .canvas import Request
from .comfy_model import MaskedTokenModel
from .comfy_text import read_text
from .decode import MaskedTokenSettings, decode, draw_uniforms, guided
from .networks import uvit
from .networks.uvit_blocks import KeyValue
from .networks.vq import VQGAN

Text = tuple[Tensor, Tensor]  # states [B, L, C] and pooled [B, C] of one prompt for each sample
# per pixel of the image and channel of the layers that run at the size of the image, from ComfyUI's estimates for
# float32 VAEs
ENCODE_BYTES, DECODE_BYTES = 56, 34

_colors: weakref.WeakKeyDictionary[VQGAN, Tensor] = weakref.WeakKeyDictionary()  # code colours [K, 3]


def read_prompts(model: MaskedTokenModel, conditioning: Conditioning, socket: str) -> list[Text]:
    """Every prompt of a CONDITIONING: states [1, L, C] and pooled text [1, C]. ValueError if a width does not fit."""
    texts = read_text(conditioning, model.text, socket)
    config = model.transformer.model.config
    expected = config.encoder_hidden_size, config.cond_embed_dim
    for text in texts:
        if (widths := tuple(x.shape[-1] for x in text)) != expected:
            raise ValueError(
                f"{socket}: text of width {widths[0]} (pooled {widths[1]}) does not fit {model.name}, which expects"
                f" {expected[0]} (pooled {expected[1]}); encode the prompt with the clip of this model's loader"
            )
    return texts


def encode_images(model: MaskedTokenModel, images: Tensor) -> Tensor:
    """The ids [B, h, w], on the CPU, of ``images`` [B, H, W, 3] with values 0..1.

    The images are encoded in chunks that fit the free memory.
    """
    if not bool(images.isfinite().all()):  # NaN has no nearest code
        raise ValueError(
            f"the image {size_of(images)} is not finite (NaN or infinite), so it cannot be encoded;"
            " generate the image again, with the VAE in a wider dtype"
        )
    config = model.vq.model.config
    memory = ENCODE_BYTES * images.shape[1] * images.shape[2] * config.block_out_channels[0]
    return _in_chunks(model, images.movedim(-1, 1), memory, lambda vq, x: vq.encode(x).cpu())


def decode_tokens(model: MaskedTokenModel, ids: Tensor) -> Tensor:
    """Images [B, H, W, 3] with values 0..1 of known ``ids`` [B, h, w], on ComfyUI's device for images."""
    memory = _decode_memory(model, *ids.shape[1:])
    device = comfy.model_management.intermediate_device()
    images = _in_chunks(model, ids, memory, lambda vq, x: vq.decode(x).clamp(0.0, 1.0).movedim(1, -1).to(device))
    if not bool(images.isfinite().all()):
        raise ValueError(
            f"the output of the VQ-GAN of {model.name} is not finite (NaN or infinite); run the model in a wider dtype"
            " (ComfyUI's --force-fp32), or load the model again"
        )
    return images


@torch.inference_mode()
def _in_chunks(
    model: MaskedTokenModel, batch: Tensor, memory: int, function: Callable[[VQGAN, Tensor], Tensor]
) -> Tensor:
    """``function(vq, chunk)`` over chunks of the batch; one sample needs ``memory`` bytes."""
    patcher = model.vq
    comfy.model_management.load_models_gpu([patcher], memory_required=memory)
    size = max(1, int(patcher.get_free_memory(patcher.load_device) / memory))
    chunks = []
    for chunk in batch.split(size):
        comfy.model_management.throw_exception_if_processing_interrupted()
        chunks.append(function(patcher.model, chunk.to(patcher.load_device)))
    return torch.cat(chunks).contiguous()


def _decode_memory(model: MaskedTokenModel, height: int, width: int) -> int:
    """Bytes to decode one sample of ``height`` x ``width`` tokens."""
    config = model.vq.model.config
    return DECODE_BYTES * height * width * config.downscale**2 * max(config.block_out_channels[:2])


def code_colors(model: MaskedTokenModel) -> Tensor:
    """The colours [K, 3] of the codes, on the CPU; computed once per VQ-GAN."""
    vq = model.vq.model
    if vq not in _colors:
        sheets = preview.sample_sheets(model.codebook)
        images = decode_tokens(model, sheets).cpu()
        with torch.inference_mode():
            codes = vq.quantize.lookup(torch.arange(model.codebook, device=model.vq.load_device)[None, None])
        _colors[vq] = preview.code_colors(codes[0, :, 0].T.cpu(), sheets, images)
    return _colors[vq]


class MaskedTokenRun:
    """One sampling run: logits of the transformer for the prompts of B samples, progress and previews.

    Models are loaded at the first forward pass. ``references``: see UViT.forward; all forward passes read them.
    """

    def __init__(self, model: MaskedTokenModel, texts: Sequence[Text], micro: Tensor) -> None:
        """``texts``: the prompts and, if ``both`` will be called, the negative prompts, all of the same length.

        ``micro`` [B, 5]: see UViT.condition.
        """
        self.model, self.texts, self.micro = model, texts, micro
        self.device = model.transformer.load_device
        self.bar: comfy.utils.ProgressBar | None = None
        self.references: list[KeyValue] | None = None

    def cond(self, ids: Tensor) -> Tensor:
        """Logits [B, K, h, w] of ``ids`` [B, h, w] under the prompts."""
        self._load(ids)
        return self._logits(ids, self._positive)

    def both(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits under the prompts and logits under the negative prompts, from one doubled batch."""
        self._load(ids)
        uncond, cond = self._logits(torch.cat([ids, ids]), self._doubled).chunk(2)
        return cond, uncond

    @torch.inference_mode()
    def _logits(self, ids: Tensor, conditioning: uvit.Conditioning) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.model.transformer.model(ids, conditioning, self.references)

    @torch.inference_mode()
    def keys_values(self, ids: Tensor) -> list[KeyValue]:
        """The keys and values of known ``ids`` [B, h, w], as references for the method ``cond`` without a negative
        prompt, and otherwise for ``both``."""
        self._load(ids)
        comfy.model_management.throw_exception_if_processing_interrupted()
        network = self.model.transformer.model
        if len(self.texts) == 1:
            return network.keys_values(ids, self._positive)
        return network.keys_values(torch.cat([ids, ids]), self._doubled)

    @cached_property
    def _positive(self) -> uvit.Conditioning:
        return self._condition(*self.texts[0], self.micro)

    @cached_property
    def _doubled(self) -> uvit.Conditioning:
        negative_first = (torch.cat(pair) for pair in zip(*reversed(self.texts)))
        return self._condition(*negative_first, self.micro.repeat(2, 1))

    @torch.inference_mode()
    def _condition(self, states: Tensor, pooled: Tensor, micro: Tensor) -> uvit.Conditioning:
        states, pooled = (x.to(self.device, self.model.dtype) for x in (states, pooled))
        return self.model.transformer.model.condition(states, pooled, micro.to(self.device))

    def _load(self, ids: Tensor) -> None:
        """Load the models for sampling and previews before the first forward pass, which is on ``ids`` [B, h, w].

        One call loads all of them, because a second call for the previews could unload the transformer.
        """
        if self.bar is not None:
            return
        models, memory = [self.model.transformer], self._memory(ids)
        self.method = args.preview_method
        if self.method == LatentPreviewMethod.TAESD:
            models.append(self.model.vq)
            memory += _decode_memory(self.model, *ids.shape[1:])
        elif self.method != LatentPreviewMethod.NoPreviews:
            self.colors = code_colors(self.model)
        comfy.model_management.load_models_gpu(models, memory_required=memory)
        self.bar = comfy.utils.ProgressBar(1)

    def _memory(self, ids: Tensor) -> int:
        """Bytes for the logits, the tensors of sampling and the widest features of the network."""
        config, size = self.model.transformer.model.config, self.model.dtype.itemsize
        rows = len(self.texts)
        logits = config.codebook_size * (rows * 2 * size + 6 * 4)
        features = 20 * config.block_out_channels + 8 * config.hidden_size + 4 * config.intermediate_size
        return ids.numel() * (logits + rows * size * features)

    def progress(self, done: int, total: int, ids: Tensor, predicted: Tensor) -> None:
        """The progress callback of ``decode``: updates the bar, with a preview of the first sample."""
        assert self.bar is not None  # created before the first forward pass
        self.bar.update_absolute(done, total, self._preview_image(ids[:1], predicted[:1]))

    def _preview_image(self, ids: Tensor, predicted: Tensor) -> tuple[str, Image.Image, int] | None:
        """A preview for ComfyUI's progress hook, in the form that ComfyUI's preview method requires.

        auto and latent2rgb: the colours of the codes; taesd: the prediction decoded by the VQ-GAN; none: no preview.
        """
        if self.method == LatentPreviewMethod.NoPreviews:
            return None
        if self.method == LatentPreviewMethod.TAESD:
            with torch.inference_mode():
                image = self.model.vq.model.decode(predicted.to(self.model.vq.load_device))
            image = image[0].movedim(0, -1)
        else:
            image = preview.draw_tokens(ids[0].cpu(), self.model.mask_id, self.colors)
        return as_preview(image)


def read_texts(
    model: MaskedTokenModel, positive: Conditioning, negative: Conditioning | None, scales: Sequence[float]
) -> list[list[Text]]:
    """The prompts, and the negative prompts if any of the ``scales`` is not 1."""
    texts = [read_prompts(model, positive, "positive")]
    if all(scale == 1.0 for scale in scales):
        return texts
    if negative is None:
        raise ValueError(
            f"cfg {max(scales):g} needs a negative prompt; connect an empty CLIP Text Encode to 'negative', or set cfg to 1"
        )
    return [*texts, read_prompts(model, negative, "negative")]


def micro(area: tuple[int, int], aesthetic_score: float) -> Tensor:
    """The micro-conditioning [1, 5]: width, height, crop top and crop left in pixels, aesthetic score."""
    height, width = area
    return torch.tensor([[width, height, 0, 0, aesthetic_score]], dtype=torch.float32)


def sample_masked_tokens(
    model: MaskedTokenModel,
    request: Request,
    settings: MaskedTokenSettings,
    positive: Conditioning,
    negative: Conditioning | None,
    *,
    scales: list[float],
    batch_size: int,
    seed: int,
    aesthetic_score: float,
    feather: int,
) -> tuple[Tensor, Tensor]:
    """Images [B, H, W, 3] with values 0..1 and their ids [B, h, w] on the CPU.

    ``scales``: the guidance scale of each step; without a negative prompt, all must be 1. ``feather``: width in pixels
    of the soft edge inside the mask. B is ``batch_size`` times the largest batch size among the prompts and the inputs.
    """
    texts = read_texts(model, positive, negative, scales[settings.first_step :])
    counts = dict(zip(("prompts", "negative_prompts"), map(len, texts)))
    batch = Batch.of(batch_size, **counts, **request.counts())
    run = MaskedTokenRun(
        model,
        [(batch.expand(states), batch.expand(pooled)) for states, pooled in stack_texts(*texts)],
        micro(request.area, aesthetic_score).expand(len(batch), -1),
    )
    initial = request.initial_tokens(batch, lambda images: encode_images(model, images))
    ids = decode(
        initial.ids.to(run.device),
        guided(run.cond, run.both, scales),
        settings,
        draw_uniforms(seed, *initial.ids.shape, settings.steps),
        mask=initial.free,
        pinned=initial.pinned,
        progress=run.progress,
    ).cpu()
    del run  # frees the conditioning before the VQ-GAN needs the memory
    return initial.finish(ids, lambda ids: decode_tokens(model, ids), feather), ids
