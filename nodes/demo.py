"""The checkpoints that come with the pack, as nodes without files to choose."""

from comfy_api.latest import io

from ..demo import modules
from ..demo.comfy_files import offer_shipped_files
from .checked_inputs import checks_inputs

offer_shipped_files()


@checks_inputs
class ChorusDemoCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ChorusDemoCheckpoint",
            display_name="Chorus Demo Checkpoint",
            category="chorus/demo",
            description="A small diffusion checkpoint that comes with the pack: emoji on 64x64 canvases.",
            search_aliases=["chorus", "demo", "tiny model", "emoji"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[*modules.CHECKPOINTS, *modules.STUDENTS],
                    default=modules.CHECKPOINTS[0],
                    tooltip="general: every sign, in Noto style. expert-animals: animals only, in Twemoji style."
                    " general-4-steps, general-1-step: distilled from general; euler, simple, so many steps, cfg 1. All share"
                    " text encoder and latent space. Prompts like 'a cat left of a tree on blue', 64x64 pixels.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="v-prediction; 12 latent channels, 4 pixels per latent."),
                io.Clip.Output(tooltip="Knows the words of the demo captions; others are named in the log."),
                io.Vae.Output(tooltip="A fixed PCA of 4x4 pixel patches."),
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
            description="The small image-text encoder that comes with the pack; it was trained on the demo checkpoints' signs.",
            search_aliases=["chorus", "demo", "clip vision", "image encoder"],
            inputs=[],
            outputs=[io.ClipVision.Output(tooltip="64x64 pixels; 64 projected dimensions.")],
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
            description="Pictures of concepts that no demo checkpoint saw in training: references for Seed Select, or to train on.",
            search_aliases=["chorus", "demo", "reference pictures", "emoji"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=modules.reference_names(),
                    tooltip="Those that the general checkpoint saw least come first; it paints them worst. all concepts: a small data set.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="64x64 pixels, 4 pictures of a concept; of all concepts 392."),
                io.String.Output("prompt", display_name="prompt", is_output_list=True, tooltip="One for each picture."),
            ],
        )

    @classmethod
    def execute(cls, concept: str) -> io.NodeOutput:
        return io.NodeOutput(*modules.load_references(concept))


NODES: list[type[io.ComfyNode]] = [ChorusDemoCheckpoint, ChorusDemoVision, ChorusDemoReferences]
