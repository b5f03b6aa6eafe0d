"""The demo checkpoints as ComfyUI objects, for nodes/."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ..common.settings import check_choice
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from . import face_pairs, references, text, weights
from .emoji.modules import STUDENTS, read_masked_tokens
from .latent import DemoVAE, PatchPCA, make_vae
from .text import make_clip
from .unet import make_model

if TYPE_CHECKING:
    from .emoji.comfy_vision import ChorusEmojiVision

CHECKPOINTS = ("general", "expert-animals")
ALL_CONCEPTS = "all concepts"
FACE_PAIRS = "chorus-demo faces"  # the name of the shipped face pairs in the node LoadTrainingPairs
SEEDS = weights.FOLDER.parent / "seeds"


def load_pca() -> PatchPCA:
    pca = PatchPCA()
    with weights.errors_naming("pca"):
        pca.load_state_dict(weights.load("pca"))
    return pca


def load_vae_module() -> DemoVAE:
    """The encoder and decoder of the latent space."""
    module = DemoVAE()
    module.pca = load_pca()
    with weights.errors_naming("decoder"):
        module.cleaner.load_state_dict(weights.load("decoder"))
    return module


def load_model(
    name: str, disable_dynamic: bool = False, model_options: Mapping[str, Any] | None = None
) -> ModelPatcher:
    """The MODEL ``name``. ComfyUI calls this function again when it needs a copy with separate weights."""
    check_choice("the demo checkpoint", name, (*CHECKPOINTS, *STUDENTS))
    with weights.errors_naming(name if name in CHECKPOINTS else STUDENTS[name][1]):
        patcher = make_model(_denoiser(name), load_pca(), disable_dynamic)
    patcher.cached_patcher_init = (load_model, (name,))
    return patcher


def _denoiser(name: str) -> dict[str, Tensor]:
    if name in CHECKPOINTS:
        return weights.load(name)
    base, lora = STUDENTS[name]
    return weights.with_lora(weights.load(base), weights.load(lora))


def load_checkpoint(name: str) -> tuple[ModelPatcher, CLIP, VAE]:
    """(model, clip, vae) of a demo checkpoint. All checkpoints share the text encoder and the latent space."""
    return load_model(name), load_text(), make_vae(load_vae_module())


def load_text() -> CLIP:
    """The text encoder as a CLIP, for all checkpoints and the masked token model."""
    with weights.errors_naming("text"):
        return make_clip(weights.load("text"))


def load_masked_tokens() -> tuple[MaskedTokenModel, CLIP]:
    """(MASKED_TOKEN_MODEL, CLIP) of the small masked token model. The CLIP is the text encoder of the demo
    checkpoints."""
    return read_masked_tokens(weights.FOLDER / "masked_token", text.KIND), load_text()


def load_vision() -> "ChorusEmojiVision":
    """The image-text encoder as a CLIP_VISION."""
    from .vision import make_clip_vision

    with weights.errors_naming("vision"):
        return make_clip_vision(weights.load("vision"))


def reference_names() -> list[str]:
    """All concepts, rarest in training first, and ALL_CONCEPTS."""
    return [*references.names(), ALL_CONCEPTS]


def load_references(concept: str) -> tuple[Tensor, list[str]]:
    """(IMAGE, prompts) of renderings that are not used in training: [4, 64, 64, 3] for a concept, [4 N, 64, 64, 3] for
    all N."""
    return references.load_references(*(references.names() if concept == ALL_CONCEPTS else [concept]))


def load_face_pairs() -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The source images, target images (each [1, 64, 64, 3] in 0..1) and prompts of the shipped pairs."""
    *sides, prompts = face_pairs.load_face_pairs()
    source, target = ([torch.from_numpy(image).float()[None] / 255 for image in side] for side in sides)
    return source, target, prompts


def shipped_seeds() -> dict[str, Path]:
    """The seed files (as written by SaveSeed) that ship with the pack, by their names in LoadSeed."""
    ending = ".seed.safetensors"
    return {f"chorus-demo {file.name.removesuffix(ending)}": file for file in sorted(SEEDS.glob(f"*{ending}"))}
