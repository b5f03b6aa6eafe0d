"""Losses of SeedSelect: distance of a generated image to a few reference images of the concept.

From "Generating images of rare concepts using pre-trained diffusion models" (arXiv 2304.14530). A semantic loss
compares image embeddings with the mean of the references' embeddings. An appearance loss compares VAE latents with the
mean of the references' latents. The means are called centroids. Formulas, weights and defaults are those of the
authors' code (dvirsamuel/SeedSelect, 8a1f3d4). The code's sum of the two losses differs from the paper's
λ L_sem + (1 − λ) L_app only by a factor: the weights 10 and 1 correspond to λ = 10/11.

Shapes: K references, B samples, C channels, S spatial axes (H, W; of a video
T, H, W), D numbers of an embedding. All latents, including
the references' latents, are in the diffusion model's scale.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...common.shapes import size_of

STEP_WEIGHTS = (0.05, 0.25, 0.70)  # weights of the latents after the last three steps, the final latent last


def vp_scale(x: Tensor, sigma: Tensor | float) -> Tensor:
    """x / √(1 + σ²): converts a variance-exploding latent x0 + σ n to the variance-preserving scale of the authors' DDIM."""
    return x / (1 + sigma**2) ** 0.5


def check_references(images: Tensor) -> None:
    """Raise a ValueError for references [K, H, W, 3] in 0..1 that are empty, not finite or of a single colour."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"references of size {size_of(images)} hold no image; connect at least one image of the concept, ideally 3 to 5"
        )
    for number, image in enumerate(images, start=1):
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"reference {number} of {len(images)} is not finite (NaN or infinite); load it again")
        spread = float((image.amax((0, 1)) - image.amin((0, 1))).max())
        if spread < 1 / 255:
            raise ValueError(
                f"reference {number} of {len(images)} is of one colour: its values differ by {spread:.2g}, less than"
                " 1/255, so it shows no concept; leave it out or use another image"
            )


def embedding_centroid(embeddings: Tensor) -> Tensor:
    """μ_v [D] = normalise(mean_k f(I_k)) for the encoder's embeddings f [K, D], which are not normalised."""
    if embeddings.ndim != 2 or len(embeddings) == 0:
        raise ValueError(
            f"embeddings of size {size_of(embeddings)} are not [references, numbers]; encode at least one reference"
        )
    mean = _at_least_float32(embeddings).mean(0)
    norm = mean.norm()
    if not bool(torch.isfinite(norm)) or float(norm) == 0.0:
        raise ValueError(
            f"the mean embedding of the {len(embeddings)} references has the norm {float(norm):g} and therefore no"
            " direction; connect other references or another clip_vision"
        )
    return mean / norm


def latent_centroid(latents: Tensor) -> Tensor:
    """μ_z [1, C, *S] = mean_k z_k for the references' latents z [K, C, *S]."""
    if latents.ndim < 3 or len(latents) == 0:
        raise ValueError(
            f"latents of size {size_of(latents)} are not [references, channels, ...]; encode at least one reference"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("the references' latents are not finite (NaN or infinite); run the VAE in a wider dtype")
    return _at_least_float32(latents).mean(0, keepdim=True)


def step_weights(count: int) -> tuple[float, ...]:
    """Loss weights of the last ``count`` steps (1 to 3), rescaled to the sum 1.

    The authors always use three steps. A search scores only the final latents, and a short run may have one or two steps.
    """
    weights = STEP_WEIGHTS[-count:]
    return tuple(w / math.fsum(weights) for w in weights)


def semantic_loss(embeddings: Sequence[Tensor], centroid: Tensor) -> Tensor:
    """L_sem [B] = Σ_j w_j (1 − cos(f_j, μ_v)).

    f_j [B, D] are the embeddings after each of the last one to three steps, and w_j are their ``step_weights``. Of videos,
    f_j [B, F, D] are those of F frames, and the loss is the mean over the frames (not in the paper, which has images).
    """
    distances = [1 - (f / f.norm(dim=-1, keepdim=True)) @ centroid.to(f) for f in embeddings]
    distances = [d if d.ndim == 1 else d.mean(1) for d in distances]
    return sum(w * l for w, l in zip(step_weights(len(distances)), distances, strict=True))


def appearance_loss(x0: Tensor, centroid: Tensor) -> Tensor:
    """L_app [B]: the mean over all elements of (x0 − μ_z)², for the final latents x0 [B, C, *S]."""
    if x0.shape[1:] != centroid.shape[1:]:
        raise ValueError(
            f"latents of size {size_of(x0)} do not fit the references' centroid of {size_of(centroid)}; resize the"
            " references to the width and height of the image before encoding them"
        )
    return ((x0 - centroid.to(x0)) ** 2).flatten(1).mean(1)


class ReferenceLoss:
    """Score of latents against the references: L [B] = semantic_weight L_sem + appearance_weight L_app.

    A call takes the latents [B, C, *S] after each of the last one to three steps, the final latent last. The earlier
    latents are noisy ones in ``vp_scale``, or for flow models the estimates of x0. A search passes only the final latent.

    ``latents`` and ``embedding`` are the centroids of the references' latents and embeddings. ``embed(latents)`` decodes
    latents and embeds the images, -> [B, D], or the frames of videos, -> [B, F, D]. ``embed`` and ``embedding`` may be None
    if semantic_weight is 0, and ``latents`` may be None if appearance_weight is 0.
    """

    def __init__(
        self,
        latents: Tensor | None,
        embedding: Tensor | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        *,
        semantic_weight: float = 10.0,
        appearance_weight: float = 1.0,
    ) -> None:
        for name, weight in (("semantic_weight", semantic_weight), ("appearance_weight", appearance_weight)):
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"{name} {weight:g} is not a finite number of at least 0; use 0 to switch the loss off (the authors use 10 and 1)"
                )
        if semantic_weight == appearance_weight == 0.0:
            raise ValueError(
                "semantic_weight and appearance_weight are both 0, so nothing is scored; raise one of them"
            )
        if semantic_weight > 0.0 and (embed is None or embedding is None):
            raise ValueError(
                f"semantic_weight {semantic_weight:g} needs an image encoder; connect clip_vision, or set semantic_weight to 0"
            )
        if appearance_weight > 0.0 and latents is None:
            raise ValueError(
                f"appearance_weight {appearance_weight:g} needs the references' latents; connect a vae, or set"
                " appearance_weight to 0"
            )
        self.semantic_weight, self.appearance_weight, self.embed = semantic_weight, appearance_weight, embed
        # cloned outside inference mode, since autograd cannot save inference tensors for backward
        with torch.inference_mode(False):
            self.latents = None if latents is None else latents.clone()
            self.embedding = None if embedding is None else embedding.clone()

    def __call__(self, latents: Sequence[Tensor]) -> Tensor:
        loss = latents[-1].new_zeros(len(latents[-1]))
        if self.semantic_weight > 0.0 and self.embed is not None and self.embedding is not None:
            embeddings = [self.embed(x) for x in latents[-len(STEP_WEIGHTS) :]]
            loss = loss + self.semantic_weight * semantic_loss(embeddings, self.embedding)
        if self.appearance_weight > 0.0 and self.latents is not None:
            loss = loss + self.appearance_weight * appearance_loss(latents[-1], self.latents)
        return loss


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
