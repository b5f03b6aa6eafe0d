"""The sockets that the masked token nodes share, and the tokens that fit a model."""

import torch
from comfy_api.latest import io

from ..techniques.masked_tokens.comfy_model import MaskedTokenModel as Model
from ..techniques.masked_tokens.tokens import Tokens as TokenIds

MaskedTokenModel = io.Custom("MASKED_TOKEN_MODEL")  # host.masked_token_model.MaskedTokenModel
Tokens = io.Custom("TOKENS")  # techniques.tokens.Tokens
MaskedTokenLora = io.Custom("MASKED_TOKEN_LORA")


def blank(model: Model) -> TokenIds:
    """One unknown token, with the sizes of the model's."""
    return TokenIds(torch.full((1, 1, 1), model.mask_id), model.codebook, model.mask_id, model.downscale)
