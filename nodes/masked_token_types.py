"""The sockets that the masked token nodes share."""

from comfy_api.latest import io

MaskedTokenModel = io.Custom("MASKED_TOKEN_MODEL")  # host.masked_token_model.MaskedTokenModel
Tokens = io.Custom("TOKENS")
MaskedTokenLora = io.Custom("MASKED_TOKEN_LORA")
