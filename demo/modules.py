"""What nodes/ loads: the demo checkpoints as the host's own objects."""

from ..host.masked_token_files import read_networks
from ..networks import amused
from . import references, text, weights
from .latent import DemoVAE, PatchPCA, make_vae
from .sign_classifier import SignClassifier
from .text import make_clip
from .unet import make_model

CHECKPOINTS = ("general", "expert-animals")
STUDENTS = {  # a checkpoint, and the LoRA that makes it one of few steps
    "general-4-steps": ("general", "student/general-4-steps"),
    "general-1-step": ("general", "student/general-1-step"),
}
MASKED_TOKENS = "masked_token"  # the folder in demo/weights
MASKED_TOKENS_CFG = 3.0
SEEDS = weights.FOLDER.parent / "seeds"


def load_pca():
    pca = PatchPCA()
    pca.load_state_dict(weights.load("pca"))
    return pca


def load_vae_module():
    """The latent space's encoder and decoder as one nn.Module."""
    module = DemoVAE()
    module.pca.load_state_dict(weights.load("pca"))
    module.cleaner.load_state_dict(weights.load("decoder"))
    return module


def load_model(name, disable_dynamic=False, model_options=None):
    """The MODEL `name`; the host calls this again when it wants a copy with weights of its own."""
    if name not in (*CHECKPOINTS, *STUDENTS):
        raise ValueError(f"There is no demo checkpoint {name!r}; there are {', '.join((*CHECKPOINTS, *STUDENTS))}.")
    patcher = make_model(_denoiser(name), load_pca(), disable_dynamic)
    patcher.cached_patcher_init = (load_model, (name,))
    return patcher


def _denoiser(name):
    if name in CHECKPOINTS:
        return weights.load(name)
    base, lora = STUDENTS[name]
    return weights.with_lora(weights.load(base), weights.load(lora))


def load_checkpoint(name):
    """(model, clip, vae) of a demo checkpoint. All checkpoints share the text encoder and the latent space."""
    return load_model(name), make_clip(weights.load("text")), make_vae(load_vae_module())


def load_masked_tokens():
    """(MASKED_TOKEN_MODEL, CLIP) of the small masked token model, which reads prompts as the checkpoints do."""
    folder = weights.FOLDER / MASKED_TOKENS
    for part in ("transformer", "vqvae"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing: make it with `python run.py train-demo`.")
    model = read_networks(folder, amused, text.KIND, name="chorus-demo", cfg=MASKED_TOKENS_CFG)
    return model, make_clip(weights.load("text"))


def load_vision():
    """The image-text encoder as a CLIP_VISION."""
    from .vision import make_clip_vision

    return make_clip_vision(weights.load("vision"))


def load_sign_classifier():
    """The second judge: images [B, 3, 64, 64] in 0..1 to logits of the signs."""
    classifier = SignClassifier()
    classifier.load_state_dict(weights.load("sign_classifier"))
    return classifier.eval().requires_grad_(False)


def reference_names():
    """All signs, those that training saw least first."""
    return references.names()


def load_references(sign):
    """IMAGE [4, 64, 64, 3]: renderings of a sign that no training saw."""
    return references.load_references(sign)


def found_seeds():
    """Files of SaveSeed that come with the pack, by the names under which LoadSeed shows them."""
    ending = ".seed.safetensors"
    return {f"chorus-demo {file.name.removesuffix(ending)}": file for file in sorted(SEEDS.glob(f"*{ending}"))}
