"""Pictures to tokens, tokens to pictures, and tokens edited under a mask."""

from comfy_api.latest import io
from torch import Tensor

from ..techniques.masked_tokens.canvas import check_sides, rgb
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from ..techniques.masked_tokens.comfy_run import decode_tokens, encode_pictures
from ..techniques.masked_tokens.tokens import Tokens, edit
from .checked_inputs import checks_inputs
from .sockets import MaskedTokenModelSocket, TokensSocket, blank


@checks_inputs
class MaskedTokenEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenEncode",
            display_name="Masked Token Encode",
            category="chorus",
            description="Reads an image as token ids, with the VQ-GAN of a masked token model.",
            search_aliases=["VQ encode", "tokenize image"],
            inputs=[
                io.Image.Input("image", tooltip="Its sides are multiples of the token's, 16 pixels for aMUSEd."),
                MaskedTokenModelSocket.Input("model", tooltip="From Load Masked Token Model."),
            ],
            outputs=[TokensSocket.Output("tokens", display_name="tokens")],
        )

    @classmethod
    def execute(cls, image: Tensor, model: MaskedTokenModel) -> io.NodeOutput:
        picture = rgb(image)
        check_sides("the image", picture.shape[1:3], model.downscale)
        return io.NodeOutput(blank(model).with_ids(encode_pictures(model, picture)))


@checks_inputs
class MaskedTokenDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskedTokenDecode",
            display_name="Masked Token Decode",
            category="chorus",
            description="Makes an image of token ids, with the VQ-GAN of a masked token model.",
            search_aliases=["VQ decode", "detokenize"],
            inputs=[
                TokensSocket.Input("tokens", tooltip="All of them known: unknown ones have no picture."),
                MaskedTokenModelSocket.Input("model", tooltip="From Load Masked Token Model."),
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
                "Forgets the tokens under a mask, or takes them from other tokens. What is left holds when it is wired"
                " into Masked Token Sampler."
            ),
            search_aliases=["pin tokens", "compose tokens"],
            inputs=[
                TokensSocket.Input(
                    "tokens", tooltip="From Masked Token Encode, Masked Token Sampler or Load Masked Tokens."
                ),
                io.Mask.Input(
                    "mask", tooltip="As large as the tokens' picture. Every token that it touches with at least 0.5."
                ),
                TokensSocket.Input(
                    "source", optional=True, tooltip="Tokens to put under the mask. Not wired: unknown ones."
                ),
            ],
            outputs=[TokensSocket.Output("tokens", display_name="tokens")],
        )

    @classmethod
    def execute(cls, tokens: Tokens, mask: Tensor, source: Tokens | None = None) -> io.NodeOutput:
        return io.NodeOutput(edit(tokens, mask.reshape(-1, *mask.shape[-2:]), source))


NODES: list[type[io.ComfyNode]] = [MaskedTokenEncode, MaskedTokenDecode, MaskedTokenEdit]
