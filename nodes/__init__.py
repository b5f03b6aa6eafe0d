"""The nodes of the pack. Each module lists its nodes in NODES."""

from comfy_api.latest import ComfyExtension, io

from . import (
    blend_grid,
    cas_dm,
    cas_dm_train,
    demo,
    face_realism_score,
    face_refiner,
    face_refiner_train,
    masked_token_editing,
    masked_token_files,
    masked_token_lora,
    masked_token_model,
    masked_token_video,
    masked_tokens,
    prompt_combinations,
    renames,
    saliency_noise_blend,
    seed_files,
    seed_map,
    seed_select,
    training_pairs,
    vary_prompt,
)

NODES: list[type[io.ComfyNode]] = [
    *saliency_noise_blend.NODES,
    *blend_grid.NODES,
    *seed_select.NODES,
    *seed_files.NODES,
    *seed_map.NODES,
    *vary_prompt.NODES,
    *cas_dm.NODES,
    *cas_dm_train.NODES,
    *masked_token_model.NODES,
    *masked_tokens.NODES,
    *masked_token_video.NODES,
    *masked_token_editing.NODES,
    *masked_token_files.NODES,
    *masked_token_lora.NODES,
    *face_refiner.NODES,
    *face_refiner_train.NODES,
    *training_pairs.NODES,
    *prompt_combinations.NODES,
    *face_realism_score.NODES,
    *demo.NODES,
]


class ChorusExtension(ComfyExtension):
    async def on_load(self) -> None:
        renames.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
