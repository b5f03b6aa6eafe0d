"""Scores images against reference images or prompts by the embeddings of an image encoder.

The score of an image is the mean of up to two losses, each between 0 and 2, lower is better:

- 1 - cos(f, μ), with the image's embedding f and the normalised mean μ of the references' embeddings;
- the mean over the prompts of 1 - cos(f, t), with the prompt's embedding t by the text encoder that was trained
  together with the image encoder (CLIP, arXiv 2103.00020).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from ...common.shapes import size_of
from ...host.images import FRAMES, embeddings, evenly_taken_frames

LEAST_NORM = 1e-6
LEAST_STD, MOST_STD = 1e-3, 1.0  # of the weights of a trained projection
COLORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.6, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "purple": (0.5, 0.0, 0.5),
}
CHANCE = 1  # of COLORS, on which unrelated encoders agree on average


class ImageScore:
    """Scores images by ``clip_vision``, against ``references`` [K, H, W, 3] in 0..1, or ``prompts``, or both.

    ``clip``: the CLIP whose text encoder was trained together with ``clip_vision``. It is not needed if ``clip_vision``
    has a text encoder of its own, as that of the demo has.

    Errors (ValueError): neither references nor prompts; references that are not RGB images; a text encoder that does
    not belong to ``clip_vision``.
    """

    def __init__(
        self,
        clip_vision: ClipVisionModel,
        references: Tensor | None = None,
        prompts: list[str] | None = None,
        clip: CLIP | None = None,
    ) -> None:
        if references is None and not prompts:
            raise ValueError(
                "nothing to compare the images with; connect references, or write what the images should show into"
                " prompt_score, one prompt per line"
            )
        self._vision = clip_vision
        self._targets: list[Tensor] = []  # unit vectors [N, D]; the loss is the mean over N, then over the list
        if references is not None:
            if references.ndim != 4 or references.shape[-1] < 3:
                raise ValueError(
                    f"expected RGB images [batch, height, width, 3] for references, got {size_of(references)}; connect"
                    " images"
                )
            mean = embeddings(clip_vision, references).mean(0, keepdim=True)
            self._targets.append(_unit(mean, "the mean of the references"))
        if prompts:
            self._targets.append(_unit(text_embeddings(clip_vision, clip, prompts), "a prompt of prompt_score"))

    def __call__(self, images: Tensor) -> Tensor:
        """Losses [B] of images [B, H, W, 3] or videos [B, F, H, W, 3] in 0..1; of videos, the mean over some frames."""
        frames = images[:, None] if images.ndim == 4 else evenly_taken_frames(images, FRAMES)
        found = _unit(embeddings(self._vision, frames.flatten(0, 1)), "an image")
        losses = torch.stack([(1 - found @ target.T.to(found)).mean(1) for target in self._targets]).mean(0)
        return losses.unflatten(0, frames.shape[:2]).mean(1)


def text_embeddings(clip_vision: ClipVisionModel, clip: CLIP | None, prompts: list[str]) -> Tensor:
    """Embeddings [N, D] of ``prompts`` in the space of the embeddings of ``clip_vision``; see ImageScore."""
    own = getattr(clip_vision, "text_embeds", None)
    if callable(own):
        return own(prompts).float()
    if clip is None:
        raise ValueError(
            "prompt_score needs the text encoder that was trained together with clip_vision; connect it to clip (for CLIP"
            " ViT-L/14: clip_l), or connect references and leave prompt_score empty"
        )
    found = _pooled(clip, prompts)
    size = embeddings(clip_vision, torch.full((1, 32, 32, 3), 0.5)).shape[-1]
    if found is None or found.shape[-1] != size:
        sizes = "none" if found is None else str(found.shape[-1])
        raise ValueError(
            f"the text encoder of clip gives embeddings of {sizes} numbers, clip_vision of {size}, so they do not belong"
            " together; connect the CLIP of this image encoder, or use references"
        )
    _check_projection(clip)
    _check_agreement(clip_vision, clip)
    return found


def _pooled(clip: CLIP, prompts: Sequence[str]) -> Tensor | None:
    """The text encoder's embeddings [N, D]; None if it has none."""
    found = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1] for prompt in prompts]
    return None if any(pooled is None for pooled in found) else torch.cat(found).float()


def _check_projection(clip: CLIP) -> None:
    """Raise a ValueError for a text encoder without its trained projection, which checkpoints of SD 1.5 do not have.

    ComfyUI then leaves the projection as it was in memory.
    """
    for name, weight in clip.cond_stage_model.named_parameters():
        if name.endswith("text_projection.weight"):
            weight = weight.detach().float()
            identity = torch.eye(*weight.shape, device=weight.device)
            if not LEAST_STD < float(weight.std()) < MOST_STD or torch.equal(weight, identity):
                raise ValueError(
                    "the text encoder of clip has no projection to the space of the image embeddings; load it from a file"
                    " of its own, such as clip_l.safetensors, or use references"
                )


def _check_agreement(clip_vision: ClipVisionModel, clip: CLIP) -> None:
    """Raise a ValueError if both encoders agree about plain colours no more often than by chance.

    Embeddings of the same size do not show that two encoders were trained together.
    """
    images = torch.tensor(list(COLORS.values()))[:, None, None].expand(-1, 64, 64, -1)
    texts = _pooled(clip, [f"a plain {color} image" for color in COLORS])
    assert texts is not None  # the prompts have embeddings, too
    similar = F.normalize(embeddings(clip_vision, images), dim=-1) @ F.normalize(texts, dim=-1).T
    right = int((similar.argmax(1) == torch.arange(len(COLORS), device=similar.device)).sum())
    if right <= CHANCE:
        raise ValueError(
            f"the text encoder of clip and clip_vision agree on {right} of {len(COLORS)} plain colours, as encoders that"
            " were not trained together do; connect the CLIP of this image encoder, or use references"
        )


def _unit(x: Tensor, what: str) -> Tensor:
    """``x`` [N, D] with norm 1."""
    norms = x.norm(dim=-1)
    if not bool(torch.isfinite(norms).all()) or bool((norms < LEAST_NORM).any()):
        raise ValueError(
            f"the embedding of {what} has no direction (NaN or 0); use another image, prompt or clip_vision"
        )
    return F.normalize(x.float(), dim=-1)
