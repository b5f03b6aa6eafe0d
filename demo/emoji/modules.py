"""The demo checkpoints as ComfyUI objects."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...common.settings import check_choice
from ...techniques.masked_tokens.comfy_files import read_networks
from ...techniques.masked_tokens.comfy_model import MaskedTokenModel
from .. import weights
from .autoencoder import Autoencoder
from .comfy_denoisers import NETWORKS, make_model
from .comfy_latent import make_vae
from .comfy_text import KIND, make_clip

if TYPE_CHECKING:
    from .comfy_vision import ChorusEmojiVision

FOLDER = "emoji"  # subfolder of demo/weights
CHECKPOINTS = tuple(NETWORKS)
STUDENTS = {  # few-step checkpoints: base checkpoint and LoRA
    "general-4-steps": ("general", "student/general-4-steps"),
    "general-1-step": ("general", "student/general-1-step"),
}
MASKED_TOKENS_CFG = 3.0


def load_weights(name: str) -> dict[str, Tensor]:
    return weights.load(f"{FOLDER}/{name}")


def load_autoencoder() -> Autoencoder:
    model = Autoencoder()
    with weights.errors_naming(f"{FOLDER}/autoencoder"):
        model.load_state_dict(load_weights("autoencoder"))
    return model


def load_model(
    name: str, disable_dynamic: bool = False, model_options: Mapping[str, Any] | None = None
) -> ModelPatcher:
    """The MODEL ``name``. ComfyUI calls this function again when it needs a copy with separate weights."""
    check_choice("the demo checkpoint", name, (*CHECKPOINTS, *STUDENTS))
    base, lora = STUDENTS.get(name, (name, None))
    with weights.errors_naming(f"{FOLDER}/{lora or base}"):
        state = load_weights(base)
        if lora:
            state = weights.with_lora(state, load_weights(lora))
        patcher = make_model(base, state, load_autoencoder(), disable_dynamic)
    patcher.cached_patcher_init = (load_model, (name,))
    return patcher


def load_text() -> CLIP:
    """The text encoder as a CLIP, for all checkpoints and the masked token model."""
    with weights.errors_naming(f"{FOLDER}/text"):
        return make_clip(load_weights("text"))


def load_checkpoint(name: str) -> tuple[ModelPatcher, CLIP, VAE]:
    """(model, clip, vae) of a demo checkpoint. All checkpoints share the text encoder and the latent space."""
    return load_model(name), load_text(), make_vae(load_autoencoder())


def load_vision() -> "ChorusEmojiVision":
    """The image-text encoder as a CLIP_VISION."""
    from .comfy_vision import make_clip_vision

    with weights.errors_naming(f"{FOLDER}/vision"):
        return make_clip_vision(load_weights("vision"))


def read_masked_tokens(folder: Path, kind: str) -> MaskedTokenModel:
    """The small masked token model in ``folder``. ``kind``: the text encoder that it was trained with, see
    ``comfy_text.KIND``."""
    for part in ("transformer", "vqvae"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing; {weights.REMEDY}")
    return read_networks(folder, kind, name="chorus-demo", cfg=MASKED_TOKENS_CFG)


def load_masked_tokens() -> tuple[MaskedTokenModel, CLIP]:
    """(MASKED_TOKEN_MODEL, CLIP) of the small masked token model. The CLIP is the text encoder of the demo
    checkpoints."""
    return read_masked_tokens(weights.FOLDER / FOLDER / "masked_token", KIND), load_text()
