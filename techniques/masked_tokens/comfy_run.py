"""Masked token networks at work: pictures to tokens and back, logits, previews. Memory and interrupts are the host's.

Shapes: B samples, h and w tokens, H and W pixels of height and width, K codes.
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
from .decode import MaskedTokenSettings, decode, draw, guided
from .networks import uvit
from .networks.vq import VQGAN

Text = tuple[Tensor, Tensor]  # states [B, L, C] and pooled [B, C] of one prompt for each sample
ENCODE_BYTES, DECODE_BYTES = 56, 34  # per pixel and channel at full size, as the host reckons for its VAEs in float32

_colors: weakref.WeakKeyDictionary[VQGAN, Tensor] = weakref.WeakKeyDictionary()  # the colours of its codes, [K, 3]


def read_prompts(model: MaskedTokenModel, conditioning: Conditioning, socket: str) -> list[Text]:
    """Every prompt of a CONDITIONING, its states [1, L, C] and its pooled text [1, C], if the model can read it."""
    texts = read_text(conditioning, model.text, socket)
    config = model.transformer.model.config
    wanted = config.encoder_hidden_size, config.cond_embed_dim
    for text in texts:
        if (found := tuple(x.shape[-1] for x in text)) != wanted:
            raise ValueError(
                f"{socket}: text of width {found[0]} (pooled {found[1]}) does not fit {model.name}, which reads"
                f" {wanted[0]} (pooled {wanted[1]}); encode the prompt with the clip of this model's loader"
            )
    return texts


def encode_pictures(model: MaskedTokenModel, pictures: Tensor) -> Tensor:
    """Ids [B, h, w], on the CPU, of ``pictures`` [B, H, W, 3] with values 0..1; few at a time where memory is short."""
    if not bool(pictures.isfinite().all()):  # the nearest code to them would be any
        raise ValueError(
            f"the image {size_of(pictures)} holds numbers that are NaN or infinite, which have no token;"
            " make it anew, with its VAE in a wider dtype"
        )
    config = model.vq.model.config
    memory = ENCODE_BYTES * pictures.shape[1] * pictures.shape[2] * config.block_out_channels[0]
    return _in_chunks(model, pictures.movedim(-1, 1), memory, lambda vq, x: vq.encode(x).cpu())


def decode_tokens(model: MaskedTokenModel, ids: Tensor) -> Tensor:
    """Pictures [B, H, W, 3] with values 0..1 of known ``ids`` [B, h, w], where the host keeps its images."""
    memory = _decode_memory(model, *ids.shape[1:])
    device = comfy.model_management.intermediate_device()
    pictures = _in_chunks(model, ids, memory, lambda vq, x: vq.decode(x).clamp(0.0, 1.0).movedim(1, -1).to(device))
    if not bool(pictures.isfinite().all()):
        raise ValueError(
            f"the pictures of the tokens that the VQ-GAN of {model.name} makes are not finite (NaN); run it in a wider dtype"
            " (ComfyUI's --force-fp32), or load the model's files anew"
        )
    return pictures


@torch.inference_mode()
def _in_chunks(
    model: MaskedTokenModel, batch: Tensor, memory: int, function: Callable[[VQGAN, Tensor], Tensor]
) -> Tensor:
    """``function(vq, chunk)`` of as many samples at a time as have their ``memory`` bytes each."""
    patcher = model.vq
    comfy.model_management.load_models_gpu([patcher], memory_required=memory)
    size = max(1, int(patcher.get_free_memory(patcher.load_device) / memory))
    chunks = []
    for chunk in batch.split(size):
        comfy.model_management.throw_exception_if_processing_interrupted()
        chunks.append(function(patcher.model, chunk.to(patcher.load_device)))
    return torch.cat(chunks).contiguous()


def _decode_memory(model: MaskedTokenModel, height: int, width: int) -> int:
    """Bytes for one sample of that many tokens."""
    config = model.vq.model.config
    return DECODE_BYTES * height * width * config.downscale**2 * max(config.block_out_channels[:2])


def code_colors(model: MaskedTokenModel) -> Tensor:
    """The colours [K, 3] of the codes, on the CPU; computed once for each VQ-GAN."""
    vq = model.vq.model
    if vq not in _colors:
        sheets = preview.sample_sheets(model.codebook)
        pictures = decode_tokens(model, sheets).cpu()
        with torch.inference_mode():
            codes = vq.quantize.lookup(torch.arange(model.codebook, device=model.vq.load_device)[None, None])
        _colors[vq] = preview.code_colors(codes[0, :, 0].T.cpu(), sheets, pictures)
    return _colors[vq]


class MaskedTokenRun:
    """One run: the logits of the transformer for the prompts of B samples, and the progress of the sampling.

    Nothing is loaded or computed before the first forward pass.
    """

    def __init__(self, model: MaskedTokenModel, texts: Sequence[Text], micro: Tensor) -> None:
        """``texts``: the prompts and the negative ones, of one length; without those, ask for ``cond`` only.
        ``micro`` [B, 5] as UViT.condition takes it."""
        self.model, self.texts, self.micro = model, texts, micro
        self.device = model.transformer.load_device
        self.bar: comfy.utils.ProgressBar | None = None

    def cond(self, ids: Tensor) -> Tensor:
        """Logits [B, K, h, w] of ``ids`` [B, h, w] under the prompts."""
        self._load(ids)
        return self._logits(ids, self._positive)

    def both(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits under the prompts and under the negative ones, from one doubled batch."""
        self._load(ids)
        uncond, cond = self._logits(torch.cat([ids, ids]), self._doubled).chunk(2)
        return cond, uncond

    @torch.inference_mode()
    def _logits(self, ids: Tensor, conditioning: uvit.Conditioning) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.model.transformer.model(ids, conditioning)

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
        """At the first forward pass of ``ids`` [B, h, w]: memory for it, with all that previews need in the same call,
        for what is loaded later could displace the transformer."""
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
        """Bytes: the logits with what sampling makes of them, and the widest features of the network."""
        config, size = self.model.transformer.model.config, self.model.dtype.itemsize
        rows = len(self.texts)
        logits = config.codebook_size * (rows * 2 * size + 6 * 4)
        features = 20 * config.block_out_channels + 8 * config.hidden_size + 4 * config.intermediate_size
        return ids.numel() * (logits + rows * size * features)

    def progress(self, done: int, total: int, ids: Tensor, predicted: Tensor) -> None:
        """What masked_tokens.decode calls after a step: the bar, with a preview of the first sample."""
        assert self.bar is not None  # the step's forward pass made it
        self.bar.update_absolute(done, total, self._picture(ids[:1], predicted[:1]))

    def _picture(self, ids: Tensor, predicted: Tensor) -> tuple[str, Image.Image, int] | None:
        """A preview as the host's hooks take it; obeys its setting: none, quick colours (auto, latent2rgb) or the
        VQ-GAN itself, which is the small decoder here (taesd)."""
        if self.method == LatentPreviewMethod.NoPreviews:
            return None
        if self.method == LatentPreviewMethod.TAESD:
            with torch.inference_mode():
                picture = self.model.vq.model.decode(predicted.to(self.model.vq.load_device))
            picture = picture[0].movedim(0, -1)
        else:
            picture = preview.draw_tokens(ids[0].cpu(), self.model.mask_id, self.colors)
        return as_preview(picture)


def read_texts(
    model: MaskedTokenModel, positive: Conditioning, negative: Conditioning | None, scales: Sequence[float]
) -> list[list[Text]]:
    """The prompts, and the negative ones where any of the ``scales`` reads them; each as its states and pooled text."""
    texts = [read_prompts(model, positive, "positive")]
    if all(scale == 1.0 for scale in scales):
        return texts
    if negative is None:
        raise ValueError(
            f"guidance of {max(scales):g} leads away from a negative prompt, and none is wired: wire an empty CLIP Text"
            " Encode into 'negative', or set cfg to 1"
        )
    return [*texts, read_prompts(model, negative, "negative")]


def micro(area: tuple[int, int], aesthetic_score: float) -> Tensor:
    """The micro-conditioning [1, 5]: width, height, top and left of a crop, all in pixels; aesthetic score."""
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

    ``scales``: the guidance scale of each step; without a negative prompt all are 1. ``feather``: width in pixels of the
    seam at a mask. B is the largest of ``batch_size`` and of the counts of prompts and of what is in ``request``.
    """
    texts = read_texts(model, positive, negative, scales[settings.first_step :])
    counts = dict(zip(("prompts", "negative_prompts"), map(len, texts)))
    batch = Batch.of(batch_size, **counts, **request.counts())
    run = MaskedTokenRun(
        model,
        [(batch.spread(states), batch.spread(pooled)) for states, pooled in stack_texts(*texts)],
        micro(request.area, aesthetic_score).expand(len(batch), -1),
    )
    initial = request.initial_tokens(batch, lambda pictures: encode_pictures(model, pictures))
    ids = decode(
        initial.ids.to(run.device),
        guided(run.cond, run.both, scales),
        settings,
        draw(seed, *initial.ids.shape, settings.steps),
        mask=initial.free,
        pinned=initial.pinned,
        progress=run.progress,
    ).cpu()
    del run  # and what it keeps for its steps, before the VQ-GAN needs the memory
    return initial.finish(ids, lambda ids: decode_tokens(model, ids), feather), ids
