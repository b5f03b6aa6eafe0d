"""The score of pictures against the references, by the host's VAE and image encoder or by those of an open session."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...host.images import check_vae, embeddings, encode
from .losses import ReferenceLoss, check_references, embedding_centroid, latent_centroid


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringSettings:
    """What pictures are compared with: ``references`` [K, H, W, 3] in 0..1, a VAE, a CLIP_VISION, and the weights."""

    references: Tensor
    vae: VAE
    clip_vision: ClipVisionModel | None = None  # needed unless semantic_weight is 0
    semantic_weight: float = 10.0
    appearance_weight: float = 1.0


class ScoringModels(TypedDict, total=False):
    """The models that make pictures and embeddings of latents, where they are wired."""

    vae: VAE
    clip_vision: ClipVisionModel


class ReferenceScorer:
    """The references as the model sees them. ``latents``: [K, C, h, w] in its scale, of the size of ``samples``.

    ``model``: the MODEL. ``samples``: [1, C, h, w]. Errors (ValueError): references that show no concept or are not
    RGB, a VAE of another model or of video, weights without what they need.
    """

    def __init__(self, settings: ScoringSettings, model: ModelPatcher, samples: Tensor) -> None:
        references, vae = settings.references, settings.vae
        check_references(references)
        if references.shape[-1] < 3:
            raise ValueError(
                f"the references have {references.shape[-1]} channels; wire RGB pictures (Load Image gives them)"
            )
        check_vae(vae)
        clip_vision = settings.clip_vision if settings.semantic_weight > 0.0 else None
        self.models: ScoringModels = {"vae": vae}
        if clip_vision is not None:
            self.models["clip_vision"] = clip_vision
        self._settings = settings
        self._embedding = None if clip_vision is None else embedding_centroid(embeddings(clip_vision, references))
        self.latents = model.model.process_latent_in(encode(vae, references, samples))
        embed = None if clip_vision is None else partial(embeddings, clip_vision)
        self.host_loss = self.loss(embed, vae.decode, model.model.process_latent_out)

    def loss(
        self,
        embed: Callable[[Tensor], Tensor] | None,
        decode: Callable[[Tensor], Tensor],
        to_latent: Callable[[Tensor], Tensor],
    ) -> ReferenceLoss:
        """The loss of latents in the model's scale, whose pictures and embeddings are made by these functions.

        ``embed``: not needed where semantic_weight is 0.
        """
        return ReferenceLoss(
            latent_centroid(self.latents),
            self._embedding,
            None if self._embedding is None or embed is None else lambda x: embed(decode(to_latent(x))),
            semantic_weight=self._settings.semantic_weight,
            appearance_weight=self._settings.appearance_weight,
        )
