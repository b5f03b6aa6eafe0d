"""SaveTrainingPairs and LoadTrainingPairs: image pairs for Train Face Refiner, collected on disk over many runs."""

from comfy_api.latest import io
from torch import Tensor

from ..demo import modules
from ..host.files import workflow_metadata
from ..techniques.face_refiner.comfy_pairs import (
    fingerprint,
    load_pairs,
    missing_folder,
    pair_folders,
    save_pairs,
    selected,
)
from .checked_inputs import checks_inputs


def data_sets() -> list[str]:
    """Data sets that can be loaded: the user's, then the data set that comes with the pack."""
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
                "Adds image pairs to a data set on disk; numbers continue after the last pair. Queue as many runs as you"
                " like, stop at any time and continue later."
            ),
            search_aliases=["save dataset", "paired images", "pix2pix", "collect pairs"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "source",
                    tooltip="Images of the distilled model, which Train Face Refiner takes as source. RGB; batches and lists.",
                ),
                io.Image.Input(
                    "target",
                    tooltip="Images of the base model with the same prompts and seeds, in the same number and sizes as"
                    " source.",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="Saved with the images: one prompt for all, for each pair, or for each batch.",
                ),
                io.String.Input(
                    "folder",
                    default="training_pairs",
                    tooltip="Folder below the output folder, for source/00001.png, target/00001.png and prompts.jsonl.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "source", display_name="source", is_output_list=True, tooltip="The saved source images."
                ),
                io.Image.Output(
                    "target", display_name="target", is_output_list=True, tooltip="The saved target images."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls, source: list[Tensor], target: list[Tensor], folder: list[str], prompt: list[str] | None = None
    ) -> io.NodeOutput:
        if len(set(folder)) != 1:
            raise ValueError(
                f"folder has {len(set(folder))} different values, but a run saves to one folder; connect a single"
                " folder name"
            )
        saved = save_pairs(folder[0], source, target, prompt or [""], workflow_metadata(cls.hidden))
        return io.NodeOutput(source, target, ui={"images": saved})


@checks_inputs
class LoadTrainingPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadTrainingPairs",
            display_name="Load Training Pairs",
            category="chorus/train",
            description="Loads the pairs that Save Training Pairs wrote, as lists in matching order. Incomplete pairs are skipped.",
            search_aliases=["load dataset", "paired images", "pix2pix"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=data_sets(),
                    tooltip="Folders with a prompts.jsonl in the input or output folder, and a set of small emoji faces that"
                    " comes with the pack.",
                ),
                io.Int.Input(
                    "first", default=0, min=0, max=1_000_000, tooltip="Number of pairs to skip at the beginning."
                ),
                io.Int.Input("count", default=0, min=0, max=1_000_000, tooltip="Number of pairs to load. 0: all."),
            ],
            outputs=[
                io.Image.Output("source", display_name="source", is_output_list=True),
                io.Image.Output("target", display_name="target", is_output_list=True),
                io.String.Output("prompt", display_name="prompt", is_output_list=True),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        # None: the name comes from another node and is known only when this node runs
        return folder is None or folder in data_sets() or missing_folder(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, first: int | None, count: int | None) -> str | float:
        return folder if folder == modules.FACE_PAIRS else fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, first: int, count: int) -> io.NodeOutput:
        if folder != modules.FACE_PAIRS:
            return io.NodeOutput(*load_pairs(folder, first, count))
        return io.NodeOutput(*(selected(side, folder, first, count) for side in modules.load_face_pairs()))


NODES: list[type[io.ComfyNode]] = [SaveTrainingPairs, LoadTrainingPairs]
