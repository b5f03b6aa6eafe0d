"""VaryPrompt: adds seeded noise to the embeddings of a prompt in the first part of the sampling."""

from comfy_api.latest import io

from ..host.attachments import Conditioning
from ..techniques.seed_select.prompt_variation import VARIATION_END, vary_prompt
from .checked_inputs import checks_inputs


@checks_inputs
class VaryPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VaryPrompt",
            display_name="Vary Prompt",
            category="chorus",
            description=(
                "Adds noise to the embeddings of a prompt in the first part of the sampling, so that distilled models generate"
                " more varied images. With the seed and the strength in the report of Seed Select, KSampler generates the same"
                " image as Seed Select, bit for bit."
            ),
            search_aliases=["VaryPrompt", "seed variance", "prompt noise", "diversity", "conditioning noise", "chorus"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, usually the positive one."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the noise.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Standard deviation of the noise, in standard deviations of each token's embedding. Useful: 0.5 to 1."
                    " 0: the prompt is not changed.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=VARIATION_END,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="Part of the sampling in which the noise is used; from then on the prompt is unchanged. 1: in the whole"
                    " sampling. 0: the prompt is not changed. Seed Select uses 0.3.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning", display_name="conditioning", tooltip="The varied prompt, for KSampler."
                )
            ],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, seed: int, strength: float, end_percent: float) -> io.NodeOutput:
        return io.NodeOutput(vary_prompt(conditioning, seed, strength, end_percent))


NODES: list[type[io.ComfyNode]] = [VaryPrompt]
