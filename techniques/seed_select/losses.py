"""The losses of SeedSelect: how far a generated picture is from a few references of the concept.

Generating images of rare concepts using pre-trained diffusion models (arXiv 2304.14530): a semantic loss on the
embeddings of an image encoder and an appearance loss on VAE latents, both against the references' centroid. Formulas,
weights and defaults are those of the authors' code (dvirsamuel/SeedSelect, 8a1f3d4), which differs from the paper's
λ L_sem + (1 − λ) L_app by a factor only: 10 to 1 is λ = 10/11.

Shapes: K references, B samples, C channels, S spatial axes (H, W), D numbers of an embedding. All latents are in the
scale in which the diffusion model sees them, those of the references too.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...common.shapes import size_of

STEP_WEIGHTS = (0.05, 0.25, 0.70)  # of the latents after the last three steps, the finished one last


def vp_scale(x: Tensor, sigma: Tensor | float) -> Tensor:
    """x / √(1 + σ²): a variance-exploding latent x0 + σ n as the variance-preserving one that the authors' DDIM has."""
    return x / (1 + sigma**2) ** 0.5


def check_references(images: Tensor) -> None:
    """Refuse references [K, H, W, 3] with values in 0 to 1 that show no concept: none, not finite, of one colour."""
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"references of size {size_of(images)} hold no picture; wire at least one picture of the concept, best 3 to 5"
        )
    for number, image in enumerate(images, start=1):
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"reference {number} of {len(images)} is not finite (NaN or infinite); load it again")
        spread = float((image.amax((0, 1)) - image.amin((0, 1))).max())
        if spread < 1 / 255:
            raise ValueError(
                f"reference {number} of {len(images)} is of one colour (its values differ by {spread:.2g}, less than"
                " 1/255) and shows no concept; leave it out or use another picture"
            )


def embedding_centroid(embeddings: Tensor) -> Tensor:
    """μ_v [D] = normalise(mean_k f(I_k)) of embeddings f [K, D] as the encoder gives them, not normalised."""
    if embeddings.ndim != 2 or len(embeddings) == 0:
        raise ValueError(f"embeddings of size {size_of(embeddings)} are not [references, numbers]; encode at least one")
    mean = _at_least_float32(embeddings).mean(0)
    norm = mean.norm()
    if not bool(torch.isfinite(norm)) or float(norm) == 0.0:
        raise ValueError(
            f"the mean embedding of the {len(embeddings)} references has the norm {float(norm):g} and no direction;"
            " use other references or another clip_vision"
        )
    return mean / norm


def latent_centroid(latents: Tensor) -> Tensor:
    """μ_z [1, C, *S] = mean_k z_k of the references' latents [K, C, *S]."""
    if latents.ndim < 3 or len(latents) == 0:
        raise ValueError(f"latents of size {size_of(latents)} are not [references, channels, ...]; encode at least one")
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("the references' latents are not finite (NaN or infinite); run the VAE in a wider dtype")
    return _at_least_float32(latents).mean(0, keepdim=True)


def step_weights(count: int) -> tuple[float, ...]:
    """Weights of the last ``count`` steps, 1 to 3; with fewer than three, the last ones scaled to the sum 1.

    The authors always have three; a search scores finished latents only, and a proxy may have one or two steps.
    """
    weights = STEP_WEIGHTS[-count:]
    return tuple(w / math.fsum(weights) for w in weights)


def semantic_loss(embeddings: Sequence[Tensor], centroid: Tensor) -> Tensor:
    """L_sem [B] = Σ_j w_j (1 − cos(f_j, μ_v)) of the embeddings [B, D] after the last one to three steps."""
    distances = [1 - (f / f.norm(dim=-1, keepdim=True)) @ centroid.to(f) for f in embeddings]
    return sum(w * l for w, l in zip(step_weights(len(distances)), distances, strict=True))


def appearance_loss(x0: Tensor, centroid: Tensor) -> Tensor:
    """L_app [B]: the mean over all elements of (x0 − μ_z)², for the finished latents [B, C, *S]."""
    if x0.shape[1:] != centroid.shape[1:]:
        raise ValueError(
            f"latents of size {size_of(x0)} do not fit the references' centroid of {size_of(centroid)}; resize the"
            " references to the picture's width and height before they are encoded"
        )
    return ((x0 - centroid.to(x0)) ** 2).flatten(1).mean(1)


class ReferenceLoss:
    """L [B] = semantic_weight L_sem + appearance_weight L_app of latents against the references; the ``score``.

    Called with the latents [B, C, *S] after the last one to three steps, the finished one last: still noisy ones in
    ``vp_scale``, of flow models the estimates of x0. A search gives the finished one only. ``embed(latents) -> [B, D]`` decodes and encodes; with semantic_weight 0 it
    is not called and may be None, as may the centroid of a weight that is 0.
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
                raise ValueError(f"{name} {weight:g} is not in 0 to infinity; the authors use 10 and 1, 0 is off")
        if semantic_weight == appearance_weight == 0.0:
            raise ValueError("semantic_weight and appearance_weight are both 0 and nothing is scored; raise one")
        if semantic_weight > 0.0 and (embed is None or embedding is None):
            raise ValueError(
                f"semantic_weight {semantic_weight:g} needs an image encoder; wire clip_vision or set semantic_weight 0"
            )
        if appearance_weight > 0.0 and latents is None:
            raise ValueError(
                f"appearance_weight {appearance_weight:g} needs the references' latents; wire a vae or set it to 0"
            )
        self.semantic_weight, self.appearance_weight, self.embed = semantic_weight, appearance_weight, embed
        # copies, since autograd cannot save what was made in inference mode
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
