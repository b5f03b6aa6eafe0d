"""The pack's own sockets, and what each of them carries."""

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
# not the host's class: it has a box for default, which clients that make prompts of saved workflows send for an empty socket
BoxesSocket = io.Custom(io.BoundingBox.io_type)


def blank(model: MaskedTokenModel) -> Tokens:
    """One unknown token, with the sizes of the model's."""
    return Tokens(torch.full((1, 1, 1), model.mask_id), model.codebook, model.mask_id, model.downscale)
