"""Runs that are stopped, and what must be left as it was."""

import comfy.hooks
import comfy.model_management


def stop_at(model, call: int):
    """A clone of ``model`` whose run is interrupted at its ``call``-th prediction, by the host's own means."""
    out, count = model.clone(), [0]

    def interrupt(args):
        count[0] += 1
        if count[0] == call:
            comfy.model_management.interrupt_current_processing(True)
        return args["denoised"]

    out.set_model_sampler_post_cfg_function(interrupt)
    return out


def check_untouched(models):
    for model in models.values():
        assert model.model.current_patcher is None
        assert not model.hook_patches
        assert model.hook_patches_backup is None
        assert not model.hook_backup
        assert not any(model.wrappers.values())
        assert not model.attachments
        assert set(model.model_options) == {"transformer_options"}
