"""Scores latents against the references, with ComfyUI's VAE and image encoder or with those of an open session."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor
from torch.nn import functional as F

from ...common.shapes import size_of
from ...host.images import FRAMES, check_decodes, embeddings, encode, evenly_taken_frames
from .losses import ReferenceLoss, check_references, embedding_centroid, latent_centroid
from .references import Selection, nearest_to_centre

OWN_VAE = "connect the VAE of this model"  # remedy for a VAE that does not decode the latents


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringSettings:
    """Settings of the scores: ``references`` [K, H, W, 3] in 0..1, a VAE, a CLIP_VISION and the loss weights."""

    references: Tensor
    vae: VAE
    clip_vision: ClipVisionModel | None = None  # may be None if semantic_weight is 0
    semantic_weight: float = 10.0
    appearance_weight: float = 1.0
    references_used: int = 0  # see references.nearest_to_centre; 0: all


class ScoringModels(TypedDict, total=False):
    """Connected models that decode latents and embed images."""

    vae: VAE
    clip_vision: ClipVisionModel


class ReferenceScorer:
    """Scores latents against the references.

    The references are resized to the image size of latents of ``shape`` [1, C, *S], as the VAE decodes them. They are encoded
    once, to ``latents`` [K, C, *S] in the model's scale. S is (h, w) for images and (T, h, w) for videos, for which each reference is
    encoded as a video that does not change. With ``references_used`` above 0, K is this number, and ``selection`` holds
    which references were used. They are compared by their clip_vision embeddings if it is connected, otherwise by their
    latents.

    The semantic loss of a video is the mean over FRAMES evenly taken frames.

    The constructor raises a ValueError for references that show no concept or are not RGB, more references to use than
    there are, a VAE that does not decode latents of ``shape``, and a loss weight above 0 without the model that it needs.
    """

    def __init__(self, settings: ScoringSettings, model: ModelPatcher, shape: Sequence[int]) -> None:
        references, vae = settings.references, settings.vae
        check_references(references)
        if references.shape[-1] < 3:
            raise ValueError(
                f"expected RGB images [batch, height, width, 3] for references, got {size_of(references)}; repeat the grey"
                " channel three times"
            )
        check_decodes(vae, shape, OWN_VAE)
        clip_vision = settings.clip_vision if settings.semantic_weight > 0.0 else None
        self.models: ScoringModels = {"vae": vae}
        if clip_vision is not None:
            self.models["clip_vision"] = clip_vision
        self._settings = settings
        encoder = settings.clip_vision if settings.references_used else clip_vision
        embedded = None if encoder is None else embeddings(encoder, references)
        self.latents = model.model.process_latent_in(encode(vae, references, shape))
        self.selection: Selection | None = None
        if settings.references_used:
            vectors = self.latents.flatten(1) if embedded is None else F.normalize(embedded, dim=-1)
            self.selection = nearest_to_centre(vectors, settings.references_used)
            rows = [number - 1 for number in self.selection.used]
            embedded, self.latents = None if embedded is None else embedded[rows], self.latents[rows]
        self._embedding = None if clip_vision is None or embedded is None else embedding_centroid(embedded)
        embed = None if clip_vision is None else partial(embeddings, clip_vision)
        self.host_loss = self.loss(embed, vae.decode, model.model.process_latent_out)

    def loss(
        self,
        embed: Callable[[Tensor], Tensor] | None,
        decode: Callable[[Tensor], Tensor],
        to_latent: Callable[[Tensor], Tensor],
    ) -> ReferenceLoss:
        """Loss of latents in the model's scale.

        ``to_latent`` converts latents to the VAE's scale, ``decode`` converts these to images, and ``embed`` converts the
        images to embeddings. ``embed`` may be None if semantic_weight is 0. Of videos, FRAMES frames are embedded.
        """

        def embedded(x: Tensor) -> Tensor:
            assert embed is not None  # checked below
            images = decode(to_latent(x))
            if images.ndim == 4:
                return embed(images)
            frames = evenly_taken_frames(images, FRAMES)  # [B, F', H, W, 3]
            return embed(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

        return ReferenceLoss(
            latent_centroid(self.latents),
            self._embedding,
            None if self._embedding is None or embed is None else embedded,
            semantic_weight=self._settings.semantic_weight,
            appearance_weight=self._settings.appearance_weight,
        )
