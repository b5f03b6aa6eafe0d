"""Interrupted runs, and a check that models are unchanged after a run."""

import hashlib

import comfy.hooks
import comfy.model_management

from chorus.tests.support.tiny_models import conditioning, ksample, latent, lora, unet

PROMPTS = conditioning(10), conditioning(11)


def interrupt_at(model, call: int):
    """Clone of ``model`` that sets ComfyUI's interrupt flag at its ``call``-th prediction."""
    out, count = model.clone(), [0]

    def interrupt(args):
        count[0] += 1
        if count[0] == call:
            comfy.model_management.interrupt_current_processing(True)
        return args["denoised"]

    out.set_model_sampler_post_cfg_function(interrupt)
    return out


def check_unchanged(models):
    """Assert that no patcher state of a run remains on ``models``."""
    for model in models.values():
        assert model.model.current_patcher is None
        assert not model.hook_patches
        assert model.hook_patches_backup is None
        assert not model.hook_backup
        assert not any(model.wrappers.values())
        assert not model.attachments
        assert set(model.model_options) == {"transformer_options"}


def sample(model, prompts=PROMPTS):
    return ksample(model, *prompts, latent(2, 12, 10))


def digest(samples) -> str:
    return hashlib.sha256(samples.numpy().tobytes()).hexdigest()


def make_models():
    """Models by name: two different LoRAs on one checkpoint, and another checkpoint."""
    base = unet(0)
    return {"base": lora(base, 1), "stack": lora(base, 2), "other": unet(1)}


def plain_digests(models) -> dict[str, str]:
    """Digests of the latents that the models sample without a blend."""
    return {name: digest(sample(model)) for name, model in models.items()}
