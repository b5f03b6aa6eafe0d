"""Nodes that save and load tokens."""

from comfy_api.latest import io

from ..host.files import workflow_metadata
from ..techniques.masked_tokens.comfy_token_files import FILES as TOKEN_FILES
from ..techniques.masked_tokens.comfy_token_files import load_tokens, save_ids
from ..techniques.masked_tokens.tokens import Tokens
from .checked_inputs import checks_inputs
from .file_widgets import filename_prefix
from .sockets import TokensSocket


@checks_inputs
class SaveMaskedTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveMaskedTokens",
            display_name="Save Masked Tokens",
            category="chorus",
            description="Saves token ids to a new numbered file in the output folder.",
            search_aliases=["aMUSEd", "export tokens", "VQ codes"],
            is_output_node=True,
            inputs=[
                TokensSocket.Input(
                    "tokens", tooltip="From Masked Token Sampler, Masked Token Encode or Masked Token Edit."
                ),
                filename_prefix("tokens/ComfyUI"),
            ],
            outputs=[TokensSocket.Output("tokens", display_name="tokens", tooltip="The saved tokens.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, tokens: Tokens, filename_prefix: str) -> io.NodeOutput:
        sizes = {"codebook": tokens.codebook, "mask_id": tokens.mask_id, "downscale": tokens.downscale}
        saved = save_ids(tokens.ids, sizes, filename_prefix, workflow_metadata(cls.hidden))
        return io.NodeOutput(tokens, ui={"tokens": [saved]})


@checks_inputs
class LoadMaskedTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadMaskedTokens",
            display_name="Load Masked Tokens",
            category="chorus",
            description="Loads token ids saved by Save Masked Tokens.",
            search_aliases=["aMUSEd", "saved tokens", "VQ codes"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=TOKEN_FILES.options(),
                    tooltip="A .tokens.safetensors file in the input or output folder.",
                )
            ],
            outputs=[TokensSocket.Output("tokens", display_name="tokens")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return TOKEN_FILES.validate(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        return TOKEN_FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_tokens(file))


NODES: list[type[io.ComfyNode]] = [SaveMaskedTokens, LoadMaskedTokens]
