"""LoadMaskedTokenModel: loads aMUSEd (arXiv 2401.01808), which generates images as tokens of a codebook."""

from pathlib import PurePosixPath

from comfy_api.latest import io

from ..demo import modules
from ..techniques.masked_tokens.comfy_files import (
    FROM_FOLDER,
    MODELS,
    model_folders,
    pick,
    read_model,
    replacements,
    text_files,
    weight_files,
)
from .checked_inputs import checks_inputs
from .sockets import MaskedTokenModelSocket

DEMO = "chorus-demo"


@checks_inputs
class LoadMaskedTokenModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadMaskedTokenModel",
            display_name="Load Masked Token Model",
            category="chorus",
            description=(
                "Loads a masked token model (aMUSEd), which generates images as tokens of a codebook, and its text"
                " encoder. The small chorus-demo is included in the pack."
            ),
            search_aliases=["aMUSEd", "Muse", "masked image model", "VQ-GAN", "U-ViT"],
            inputs=[
                io.Combo.Input(
                    "model_folder",
                    options=[DEMO, *model_folders()],
                    default=DEMO,
                    tooltip="chorus-demo, or a folder in models/masked_token with transformer, vqvae and text_encoder"
                    " subfolders as published, such as amused-256.",
                ),
                *(
                    io.Combo.Input(
                        id,
                        options=[FROM_FOLDER, *files],
                        default=FROM_FOLDER,
                        tooltip=f"Weights to load instead of the folder's {part}; the folder's config.json is"
                        f" still used.{more}",
                        advanced=True,
                    )
                    for id, part, files, more in (
                        ("transformer_file", "transformer", weight_files(), ""),
                        ("vq_file", "vqvae", weight_files(), ""),
                        (
                            "text_encoder_file",
                            "text_encoder",
                            text_files(),
                            " Without a config.json, OpenAI's CLIP-L is assumed.",
                        ),
                    )
                ),
            ],
            outputs=[
                MaskedTokenModelSocket.Output("model", display_name="model", tooltip="For Masked Token Sampler."),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="For CLIP Text Encode. Prompts encoded with this clip work only with this model.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model_folder: str, transformer_file: str, vq_file: str, text_encoder_file: str) -> io.NodeOutput:
        files = replacements(transformer_file, vq_file, text_encoder_file)
        if model_folder != DEMO:
            # models/masked_token itself, ".", can have any name on this machine, which must not get into saved files
            name = PurePosixPath(model_folder).name or MODELS
            return io.NodeOutput(*read_model(pick(model_folder, model_folders()), files, name))
        if files:
            raise ValueError(
                f"{DEMO} cannot load other weights, got {', '.join(map(str, files.values()))}; set the file inputs to"
                f" {FROM_FOLDER!r}, or choose another model_folder"
            )
        return io.NodeOutput(*modules.load_masked_tokens())


NODES: list[type[io.ComfyNode]] = [LoadMaskedTokenModel]
