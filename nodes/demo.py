"""Nodes that load the models and images included in the pack."""

from comfy_api.latest import io

from ..demo import modules
from ..demo.comfy_files import register_shipped_files
from .checked_inputs import checks_inputs

register_shipped_files()


@checks_inputs
class ChorusDemoCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChorusDemoCheckpoint",
            display_name="Chorus Demo Checkpoint",
            category="chorus/demo",
            description="A small diffusion checkpoint included in the pack; generates emoji in images of 128x128 pixels.",
            search_aliases=["chorus", "demo", "tiny model", "emoji"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[*modules.CHECKPOINTS, *modules.STUDENTS],
                    default=modules.CHECKPOINTS[0],
                    tooltip="general: 80 concepts, as glossy 3D emoji. expert-animals: animals only, as flat emoji."
                    " expert-food: food only, as flat emoji; a Flux transformer with flow matching, the others are"
                    " U-Nets. general-4-steps and general-1-step are distilled from general: use 4 steps or 1 step,"
                    " sampler euler, scheduler simple and cfg 1. All checkpoints share one text encoder and one latent"
                    " space. Use prompts like 'a cat left of a tree on blue' and images of 128x128 pixels.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="A model with 8 latent channels. A latent position covers 8x8 pixels. It predicts v, and"
                    " expert-food the velocity of a flow."
                ),
                io.Clip.Output(tooltip="Knows the words of the demo captions. Unknown words are listed in the log."),
                io.Vae.Output(tooltip="An autoencoder with 8 channels, trained on the images of all checkpoints."),
            ],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*modules.load_checkpoint(name))


@checks_inputs
class ChorusDemoVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChorusDemoVision",
            display_name="Chorus Demo Vision",
            category="chorus/demo",
            description="The small image-text encoder included in the pack, trained on the concepts of the demo checkpoints.",
            search_aliases=["chorus", "demo", "clip vision", "image encoder"],
            inputs=[],
            outputs=[
                io.ClipVision.Output(tooltip="For images of 128x128 pixels. The image embedding has 64 dimensions.")
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(modules.load_vision())


@checks_inputs
class ChorusDemoReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChorusDemoReferences",
            display_name="Chorus Demo References",
            category="chorus/demo",
            description="Images that no demo checkpoint was trained on. Use them as references for Seed Select or as"
            " training data.",
            search_aliases=["chorus", "demo", "reference pictures", "emoji"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=modules.reference_names(),
                    tooltip="The list begins with the concepts that are rarest in the training data of 'general'. That"
                    " checkpoint generates rare concepts worst. all concepts: the images of all concepts, a small data"
                    " set.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="Images of 128x128 pixels: 4 of one concept, or 320 of all concepts."),
                io.String.Output(
                    "prompt", display_name="prompt", is_output_list=True, tooltip="One prompt for each image."
                ),
            ],
        )

    @classmethod
    def execute(cls, concept: str) -> io.NodeOutput:
        return io.NodeOutput(*modules.load_references(concept))


NODES: list[type[io.ComfyNode]] = [ChorusDemoCheckpoint, ChorusDemoVision, ChorusDemoReferences]
