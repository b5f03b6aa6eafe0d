"""What nodes/ loads: the demo checkpoints as the host's own objects."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ..techniques.masked_tokens.comfy_files import read_networks
from ..techniques.masked_tokens.comfy_model import MaskedTokenModel
from . import face_pairs, references, text, weights
from .latent import DemoVAE, PatchPCA, make_vae
from .text import make_clip
from .unet import make_model

if TYPE_CHECKING:
    from .vision import ChorusDemoClipVision

CHECKPOINTS = ("general", "expert-animals")
STUDENTS = {  # a checkpoint, and the LoRA that makes it one of few steps
    "general-4-steps": ("general", "student/general-4-steps"),
    "general-1-step": ("general", "student/general-1-step"),
}
ALL_CONCEPTS = "all concepts"
FACE_PAIRS = "chorus-demo faces"  # as LoadTrainingPairs names them
MASKED_TOKENS = "masked_token"  # the folder in demo/weights
MASKED_TOKENS_CFG = 3.0
SEEDS = weights.FOLDER.parent / "seeds"


def load_pca() -> PatchPCA:
    pca = PatchPCA()
    with weights.fitting("pca"):
        pca.load_state_dict(weights.load("pca"))
    return pca


def load_vae_module() -> DemoVAE:
    """The latent space's encoder and decoder as one nn.Module."""
    module = DemoVAE()
    module.pca = load_pca()
    with weights.fitting("decoder"):
        module.cleaner.load_state_dict(weights.load("decoder"))
    return module


def load_model(
    name: str, disable_dynamic: bool = False, model_options: Mapping[str, Any] | None = None
) -> ModelPatcher:
    """The MODEL `name`; the host calls this again when it wants a copy with weights of its own."""
    if name not in (*CHECKPOINTS, *STUDENTS):
        raise ValueError(f"There is no demo checkpoint {name!r}; there are {', '.join((*CHECKPOINTS, *STUDENTS))}.")
    with weights.fitting(name if name in CHECKPOINTS else STUDENTS[name][1]):
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
    with weights.fitting("text"):
        return make_clip(weights.load("text"))


def load_masked_tokens() -> tuple[MaskedTokenModel, CLIP]:
    """(MASKED_TOKEN_MODEL, CLIP) of the small masked token model, which reads prompts as the checkpoints do."""
    folder = weights.FOLDER / MASKED_TOKENS
    for part in ("transformer", "vqvae"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing: make it with `python run.py train-demo`.")
    model = read_networks(folder, text.KIND, name="chorus-demo", cfg=MASKED_TOKENS_CFG)
    return model, load_text()


def load_vision() -> "ChorusDemoClipVision":
    """The image-text encoder as a CLIP_VISION."""
    from .vision import make_clip_vision

    with weights.fitting("vision"):
        return make_clip_vision(weights.load("vision"))


def reference_names() -> list[str]:
    """All concepts, those that training saw least first, and a name for all of them."""
    return [*references.names(), ALL_CONCEPTS]


def load_references(concept: str) -> tuple[Tensor, list[str]]:
    """IMAGE [4, 64, 64, 3], four renderings of a concept that no training saw, or of every concept; and their prompts."""
    return references.load_references(*(references.names() if concept == ALL_CONCEPTS else [concept]))


def load_face_pairs() -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Source and target pictures [1, 64, 64, 3] in 0..1 and prompts, of the pairs that come with the pack."""
    *sides, prompts = face_pairs.load_face_pairs()
    source, target = ([torch.from_numpy(image).float()[None] / 255 for image in side] for side in sides)
    return source, target, prompts


def found_seeds() -> dict[str, Path]:
    """Files of SaveSeed that come with the pack, by the names under which LoadSeed shows them."""
    ending = ".seed.safetensors"
    return {f"chorus-demo {file.name.removesuffix(ending)}": file for file in sorted(SEEDS.glob(f"*{ending}"))}
