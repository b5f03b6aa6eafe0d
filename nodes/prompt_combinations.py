"""Prompts for a queue of runs, one after the other."""

from comfy_api.latest import io

from ..techniques.face_refiner.prompt_combinations import ORDERS, PromptCombinations
from .checked_inputs import checks_inputs

MOST = 0xFFFFFFFFFFFFFFFF  # of a seed


@checks_inputs
class PromptCombinationsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PromptCombinations",
            display_name="Prompt Combinations",
            category="chorus/train",
            description=(
                "Gives one prompt a run: every combination of a template's alternatives, each with a seed of its own. Set"
                " index to increment and queue as many runs as you like; it goes on where it stopped."
            ),
            search_aliases=["wildcards", "prompt list", "prompt matrix", "dynamic prompts", "prompt template"],
            inputs=[
                io.String.Input(
                    "template",
                    multiline=True,
                    dynamic_prompts=False,
                    default="a photo of a {young|old} {who}",
                    tooltip="A prompt in each line. {a|b} is a or b; {who} is a choice of the variable of that name.",
                ),
                io.String.Input(
                    "variables",
                    multiline=True,
                    dynamic_prompts=False,
                    default="who = man | woman",
                    tooltip="One in each line: name = one | two | three. What stands twice in a prompt has one value.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=MOST,
                    control_after_generate=io.ControlAfterGenerate.increment,
                    tooltip="Which prompt. Past the last one they come again, with other seeds.",
                ),
                io.Int.Input(
                    "first_seed",
                    default=0,
                    min=0,
                    max=MOST,
                    control_after_generate=False,
                    tooltip="The seed of index 0. Another one gives another data set of the same prompts.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=ORDERS[0],
                    tooltip="spread: a set that is stopped early has some of everything. listed: the last choice changes first.",
                ),
            ],
            outputs=[
                io.String.Output("prompt", display_name="prompt"),
                io.Int.Output("seed", display_name="seed", tooltip="first_seed + index. For both samplers of a pair."),
                io.Int.Output(
                    "total", display_name="total", tooltip="How many prompts there are before they come again."
                ),
            ],
        )

    @classmethod
    def execute(cls, template: str, variables: str, index: int, first_seed: int, order: str) -> io.NodeOutput:
        prompts = PromptCombinations(template, variables, order)
        return io.NodeOutput(prompts.prompt(index), (first_seed + index) & MOST, prompts.total)


NODES: list[type[io.ComfyNode]] = [PromptCombinationsNode]
