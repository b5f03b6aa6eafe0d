"""PromptCombinations: one prompt and seed per queued run."""

from comfy_api.latest import io

from ..common.settings import check_share
from ..techniques.face_refiner.prompt_combinations import ORDERS, PromptCombinations
from . import machine_widgets
from .checked_inputs import checks_inputs

MAX_SEED = 0xFFFFFFFFFFFFFFFF


@checks_inputs
class PromptCombinationsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PromptCombinations",
            display_name="Prompt Combinations",
            category="chorus/train",
            description=(
                "Outputs one prompt per run: every combination of the alternatives in a template, each with its own seed."
                " Set index to increment and queue as many runs as you like; later runs continue where the last run stopped."
            ),
            search_aliases=["wildcards", "prompt list", "prompt matrix", "dynamic prompts", "prompt template"],
            inputs=[
                io.String.Input(
                    "template",
                    multiline=True,
                    dynamic_prompts=False,
                    default="a photo of a {young|old} {who}",
                    tooltip="One prompt template per line. {a|b} is a or b; {who} is one of the choices of the variable who.",
                ),
                io.String.Input(
                    "variables",
                    multiline=True,
                    dynamic_prompts=False,
                    default="who = man | woman",
                    tooltip="One variable per line: name = one | two | three. A variable has the same value everywhere in a prompt.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=io.ControlAfterGenerate.increment,
                    tooltip="Number of the prompt, from 0. After the last prompt, all prompts repeat with other seeds.",
                ),
                io.Int.Input(
                    "first_seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="The seed of index 0. Another first seed produces another data set from the same prompts.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=ORDERS[0],
                    tooltip="spread: even if you stop early, all choices occur about equally often. listed: the last"
                    " choice changes fastest.",
                ),
                machine_widgets.share(
                    "If several machines build one data set: number of this machine, from 0. Prompt and seed are those of index *"
                    " shares + share, so that no two machines use the same seed."
                ),
                machine_widgets.shares("Number of machines that build one data set. share must be lower."),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt"),
                io.Int.Output("seed", display_name="seed", tooltip="first_seed + index, for both samplers of a pair."),
                io.Int.Output("total", display_name="total", tooltip="Number of prompts before they repeat."),
            ],
        )

    @classmethod
    def execute(
        cls,
        template: str,
        variables: str,
        index: int,
        first_seed: int,
        order: str,
        share: int = 0,
        shares: int = 1,
    ) -> io.NodeOutput:
        check_share(share, shares)
        prompts = PromptCombinations(template, variables, order)
        index = index * shares + share
        return io.NodeOutput(prompts.prompt(index), (first_seed + index) & MAX_SEED, prompts.total)


NODES: list[type[io.ComfyNode]] = [PromptCombinationsNode]
