"""Models that do not treat the rows of a batch independently."""

from comfy.model_patcher import ModelPatcher

# model classes of ComfyUI: SeedVR2 treats the rows as parts of one video, MiniMaxH3 accepts only one row, and ACEStep15
# adds the timbres of all rows to the first
RELATED_ROWS = ("SeedVR2", "MiniMaxH3", "ACEStep15")


def relates_rows(model: ModelPatcher) -> bool:
    """Whether each row that ``model`` predicts may depend on the other rows of the batch."""
    return type(model.model).__name__ in RELATED_ROWS
