"""Scores images against reference images or prompts by the embeddings of an image encoder.

The score of an image is the mean of up to two losses, each between 0 and 2, lower is better:

- 1 - cos(f, μ), with the image's embedding f and the normalised mean μ of the references' embeddings;
- the mean over the prompts of 1 - cos(f, t), with the prompt's embedding t by the text encoder that was trained
  together with the image encoder (CLIP, arXiv 2103.00020).
"""

import torch
import torch.nn.functional as F
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor

from ...common.shapes import size_of
from ...host.images import FRAMES, embeddings, evenly_taken_frames

LEAST_NORM = 1e-6


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
    found = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1] for prompt in prompts]
    size = embeddings(clip_vision, torch.full((1, 32, 32, 3), 0.5)).shape[-1]
    if any(pooled is None or pooled.shape[-1] != size for pooled in found):
        sizes = "none" if found[0] is None else str(found[0].shape[-1])
        raise ValueError(
            f"the text encoder of clip gives embeddings of {sizes} numbers, clip_vision of {size}, so they do not belong"
            " together; connect the CLIP of this image encoder, or use references"
        )
    _check_projection(clip)
    return torch.cat(found).float()


def _check_projection(clip: CLIP) -> None:
    """Raise a ValueError for a text encoder without its trained projection, which checkpoints of SD 1.5 do not have."""
    for name, weight in clip.cond_stage_model.named_parameters():
        if name.endswith("text_projection.weight"):
            weight = weight.detach().float()
            identity = torch.eye(*weight.shape, device=weight.device)
            if not bool(torch.isfinite(weight).all()) or not bool(weight.any()) or torch.equal(weight, identity):
                raise ValueError(
                    "the text encoder of clip has no projection to the space of the image embeddings; load it from a file"
                    " of its own, such as clip_l.safetensors, or use references"
                )


def _unit(x: Tensor, what: str) -> Tensor:
    """``x`` [N, D] with norm 1."""
    norms = x.norm(dim=-1)
    if not bool(torch.isfinite(norms).all()) or bool((norms < LEAST_NORM).any()):
        raise ValueError(
            f"the embedding of {what} has no direction (NaN or 0); use another image, prompt or clip_vision"
        )
    return F.normalize(x.float(), dim=-1)
