"""Pairs of pictures for Train Face Refiner: collected on disk over many runs, and read again in matching order."""

from comfy_api.latest import io
from torch import Tensor

from ..demo import modules
from ..host.files import workflow_metadata
from ..techniques.face_refiner.comfy_pairs import chosen, fingerprint, load_pairs, pair_folders, save_pairs
from .checked_inputs import checks_inputs


def offered() -> list[str]:
    """The data sets that can be read: the user's, then those that come with the pack."""
    return [*pair_folders(), modules.FACE_PAIRS]


@checks_inputs
class SaveTrainingPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveTrainingPairs",
            display_name="Save Training Pairs",
            category="chorus/train",
            description=(
                "Adds pairs of pictures to a data set on disk, numbered on from what is there. Queue it as often as you like,"
                " stop at any time and go on later."
            ),
            search_aliases=["save dataset", "paired images", "pix2pix", "collect pairs"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "source", tooltip="What is to be changed: of the distilled model. RGB; batches and lists."
                ),
                io.Image.Input(
                    "target",
                    tooltip="What it is to become: of the base model, by the same prompts and seeds. As many pictures, and as"
                    " large.",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="Kept beside the pictures: one for all, for each pair, or for each batch.",
                ),
                io.String.Input(
                    "folder",
                    default="training_pairs",
                    tooltip="Below the output folder. Gets source/00001.png, target/00001.png and prompts.jsonl.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, source: list[Tensor], target: list[Tensor], folder: list[str], prompt: list[str] | None = None
    ) -> io.NodeOutput:
        if len(set(folder)) != 1:
            raise ValueError(f"{len(set(folder))} folders are wired; pairs of one run go to one folder")
        saved = save_pairs(folder[0], source, target, prompt or [""], workflow_metadata(cls.hidden))
        return io.NodeOutput(ui={"images": saved})


@checks_inputs
class LoadTrainingPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadTrainingPairs",
            display_name="Load Training Pairs",
            category="chorus/train",
            description="Reads the pairs that Save Training Pairs wrote, as lists in matching order. Half pairs are left out.",
            search_aliases=["load dataset", "paired images", "pix2pix"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=offered(),
                    tooltip="Folders with a prompts.jsonl, in the input or the output folder, and pairs of small face signs that come"
                    " with the pack.",
                ),
                io.Int.Input(
                    "first", default=0, min=0, max=1_000_000, tooltip="Pairs that are left out at the beginning."
                ),
                io.Int.Input("count", default=0, min=0, max=1_000_000, tooltip="How many pairs are read. 0: all."),
            ],
            outputs=[
                io.Image.Output("source", display_name="source", is_output_list=True),
                io.Image.Output("target", display_name="target", is_output_list=True),
                io.String.Output("prompt", display_name="prompt", is_output_list=True),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        # None is a wired name, known only when the node runs
        return folder is None or folder in offered() or f"there is no folder of pairs '{folder}'; refresh the list"

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, first: int | None, count: int | None) -> str | float:
        return folder if folder == modules.FACE_PAIRS else fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, first: int, count: int) -> io.NodeOutput:
        if folder != modules.FACE_PAIRS:
            return io.NodeOutput(*load_pairs(folder, first, count))
        return io.NodeOutput(*(chosen(side, folder, first, count) for side in modules.load_face_pairs()))


NODES: list[type[io.ComfyNode]] = [SaveTrainingPairs, LoadTrainingPairs]
