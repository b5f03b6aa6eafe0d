"""The demo checkpoints as ComfyUI objects, for nodes/."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ..common.settings import check_choice
from ..techniques.masked_tokens.comfy_files import read_networks
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from . import face_pairs, references, weights
from .autoencoder import Autoencoder
from .comfy_denoisers import NETWORKS, make_model
from .comfy_latent import make_vae
from .comfy_text import KIND, make_clip

if TYPE_CHECKING:
    from .comfy_vision import ChorusEmojiVision

CHECKPOINTS = tuple(NETWORKS)
STUDENTS = {  # few-step checkpoints: base checkpoint and LoRA
    "general-4-steps": ("general", "student/general-4-steps"),
    "general-1-step": ("general", "student/general-1-step"),
}
ALL_CONCEPTS = "all concepts"
FACE_PAIRS = "chorus-demo faces"  # the name of the shipped face pairs in the node LoadTrainingPairs
SEEDS = weights.FOLDER.parent / "seeds"
MASKED_TOKENS_CFG = 3.0


def load_autoencoder() -> Autoencoder:
    model = Autoencoder()
    with weights.errors_naming("autoencoder"):
        model.load_state_dict(weights.load("autoencoder"))
    return model


def load_model(
    name: str, disable_dynamic: bool = False, model_options: Mapping[str, Any] | None = None
) -> ModelPatcher:
    """The MODEL ``name``. ComfyUI calls this function again when it needs a copy with separate weights."""
    check_choice("the demo checkpoint", name, (*CHECKPOINTS, *STUDENTS))
    base, lora = STUDENTS.get(name, (name, None))
    with weights.errors_naming(lora or base):
        state = weights.load(base)
        if lora:
            state = weights.with_lora(state, weights.load(lora))
        patcher = make_model(base, state, load_autoencoder(), disable_dynamic)
    patcher.cached_patcher_init = (load_model, (name,))
    return patcher


def load_text() -> CLIP:
    """The text encoder as a CLIP, for all checkpoints and the masked token model."""
    with weights.errors_naming("text"):
        return make_clip(weights.load("text"))


def load_checkpoint(name: str) -> tuple[ModelPatcher, CLIP, VAE]:
    """(model, clip, vae) of a demo checkpoint. All checkpoints share the text encoder and the latent space."""
    return load_model(name), load_text(), make_vae(load_autoencoder())


def load_vision() -> "ChorusEmojiVision":
    """The image-text encoder as a CLIP_VISION."""
    from .comfy_vision import make_clip_vision

    with weights.errors_naming("vision"):
        return make_clip_vision(weights.load("vision"))


def load_masked_tokens() -> tuple[MaskedTokenModel, CLIP]:
    """(MASKED_TOKEN_MODEL, CLIP) of the small masked token model. The CLIP is the text encoder of the demo
    checkpoints."""
    folder = weights.FOLDER / "masked_token"
    for part in ("transformer", "vqvae"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing; {weights.REMEDY}")
    return read_networks(folder, KIND, name="chorus-demo", cfg=MASKED_TOKENS_CFG), load_text()


def reference_names() -> list[str]:
    """All concepts, rarest in training first, and ALL_CONCEPTS."""
    return [*references.names(), ALL_CONCEPTS]


def load_references(concept: str) -> tuple[Tensor, list[str]]:
    """(IMAGE, prompts) of renderings that are not used in training: [4, 128, 128, 3] for a concept, [4 N, 128, 128, 3]
    for all N."""
    return references.load_references(*(references.names() if concept == ALL_CONCEPTS else [concept]))


def load_face_pairs() -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The source images, target images (each [1, 128, 128, 3] in 0..1) and prompts of the shipped pairs."""
    *sides, prompts = face_pairs.load_face_pairs()
    source, target = ([torch.from_numpy(image).float()[None] / 255 for image in side] for side in sides)
    return source, target, prompts


def shipped_seeds() -> dict[str, Path]:
    """The seed files (as written by SaveSeed) that ship with the pack, by their names in LoadSeed."""
    ending = ".seed.safetensors"
    return {f"chorus-demo {file.name.removesuffix(ending)}": file for file in sorted(SEEDS.glob(f"*{ending}"))}
