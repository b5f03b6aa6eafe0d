"""Nodes that encode images to tokens, decode tokens to images, and edit tokens under a mask."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..common.masks import connected
from ..techniques.masked_tokens.canvas import check_sides, rgb
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.comfy_run import decode_tokens, encode_images
from ..techniques.masked_tokens.tokens import Tokens, edit, mask_to_tokens
from . import masked_token_widgets as widgets
from .checked_inputs import checks_inputs
from .sockets import TokensSocket, blank


@checks_inputs
class MaskedTokenEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenEncode",
            display_name="Masked Token Encode",
            category="chorus",
            description="Encodes an image to token ids with the VQ-GAN of a masked token model.",
            search_aliases=["VQ encode", "tokenize image"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="Width and height must be multiples of the token size, 16 pixels for aMUSEd."
                ),
                widgets.model(),
            ],
            outputs=[TokensSocket.Output("tokens", display_name="tokens")],
        )

    @classmethod
    def execute(cls, image: Tensor, model: MaskedTokenModel) -> io.NodeOutput:
        image = rgb(image)
        check_sides("the image", image.shape[1:3], model.downscale)
        return io.NodeOutput(blank(model).with_ids(encode_images(model, image)))


@checks_inputs
class MaskedTokenDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenDecode",
            display_name="Masked Token Decode",
            category="chorus",
            description="Decodes token ids to an image with the VQ-GAN of a masked token model.",
            search_aliases=["VQ decode", "detokenize"],
            inputs=[
                TokensSocket.Input("tokens", tooltip="Known tokens only; unknown tokens cannot be decoded."),
                widgets.model(),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(cls, tokens: Tokens, model: MaskedTokenModel) -> io.NodeOutput:
        tokens.check("the tokens", model.codebook, model.mask_id, model.downscale)
        tokens.check_known()
        return io.NodeOutput(decode_tokens(model, tokens.ids))


@checks_inputs
class MaskedTokenEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenEdit",
            display_name="Masked Token Edit",
            category="chorus",
            description=(
                "Makes the tokens under a mask unknown, or replaces them with other tokens. Masked Token Sampler keeps"
                " the known tokens fixed and generates the unknown ones."
            ),
            search_aliases=["pin tokens", "compose tokens"],
            inputs=[
                TokensSocket.Input(
                    "tokens", tooltip="From Masked Token Encode, Masked Token Sampler or Load Masked Tokens."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Same size as the decoded image. A token is selected if any of its mask pixels is at least"
                    " 0.5.",
                ),
                TokensSocket.Input(
                    "source",
                    optional=True,
                    tooltip="Tokens to insert under the mask. If not connected, the tokens under the mask become"
                    " unknown.",
                ),
            ],
            outputs=[
                TokensSocket.Output("tokens", display_name="tokens"),
                io.String.Output(
                    "report", display_name="report", tooltip="How many tokens are under the mask, for each image."
                ),
            ],
        )

    @classmethod
    def execute(cls, tokens: Tokens, mask: Tensor, source: Tokens | None = None) -> io.NodeOutput:
        found, notes = connected(mask, tokens.size)
        under = torch.zeros(1, *tokens.size) if found is None else found
        edited = edit(tokens, under, source)
        counts = mask_to_tokens(under, tokens.downscale).sum((1, 2)).expand(len(edited.ids)).tolist()
        lines = [
            f"image {i}: {count} of {edited.ids[0].numel()} tokens under the mask"
            for i, count in enumerate(counts, start=1)
        ]
        return io.NodeOutput(edited, "\n".join([*notes, *lines]))


NODES: list[type[io.ComfyNode]] = [MaskedTokenEncode, MaskedTokenDecode, MaskedTokenEdit]
