"""The socket types of the pack; the comment after each names the Python type of its values."""

import torch
from comfy_api.latest import io

from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.tokens import Tokens

BlendTraceSocket = io.Custom("BLEND_TRACE")  # techniques.saliency_blend.trace.BlendTrace
CasDMHeadSocket = io.Custom("CAS_DM_HEAD")  # techniques.cas_dm.network.Head
FaceRefinerSocket = io.Custom("FACE_REFINER")  # techniques.face_refiner.comfy_model.FaceRefinerModel
MaskedTokenModelSocket = io.Custom("MASKED_TOKEN_MODEL")  # techniques.masked_tokens.comfy_model.MaskedTokenModel
TokensSocket = io.Custom("TOKENS")  # techniques.masked_tokens.tokens.Tokens
MaskedTokenLoraSocket = io.Custom("MASKED_TOKEN_LORA")  # techniques.masked_tokens.lora.Lora
# ComfyUI's boxes, and the SEGS of Impact Pack's detectors. io.BoundingBox has a default box, which clients that convert
# saved workflows send even if the socket is not connected; BoxesSocket has no default.
BoxesSocket = io.Custom(f"{io.BoundingBox.io_type},SEGS")


def blank(model: MaskedTokenModel) -> Tokens:
    """A single masked token with the codebook, mask id and downscale of ``model``."""
    return Tokens(torch.full((1, 1, 1), model.mask_id), model.codebook, model.mask_id, model.downscale)
