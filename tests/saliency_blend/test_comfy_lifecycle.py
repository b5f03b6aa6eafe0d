"""Cleanup after a blend, an interrupt or an error: the models sample as in a new process, and they are freed."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import comfy.hooks
import comfy.model_management
import pytest
import torch

from chorus.tests.support.lifecycle import check_unchanged, interrupt_at, make_models, plain_digests, sample
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    in_inference_mode,
    lora_weights,
    unet,
    view,
)

ROOT = Path(__file__).parents[2]
EXPERT_PROMPTS = conditioning(30), conditioning(31)


@in_inference_mode
def hooked(prompts, model):
    hooks = comfy.hooks.create_hook_lora(lora_weights(model, 8), 1.0, 0.0)
    return tuple(comfy.hooks.set_hooks_for_conditioning(w, hooks) for w in prompts)


def blend_of(models):
    """A chain of two experts on ``base``: ``stack``, and ``other`` with LoRA hooks on its prompts."""
    chained, _ = blend(models["base"], models["stack"], *EXPERT_PROMPTS)
    return blend(chained, models["other"], *hooked(EXPERT_PROMPTS, models["other"]))


@pytest.fixture(scope="module")
def fresh_digests() -> dict[str, str]:
    """The digests of ``make_models()``, computed in a new process that has run no blend."""
    script = (
        f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); import run, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from chorus.dev import headless; headless.start()\n"
        "from chorus.tests.support.lifecycle import make_models, plain_digests\n"
        "print(json.dumps(plain_digests(make_models())))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_after_an_interrupt_every_model_samples_as_in_a_new_process(fresh_digests, call):
    models = make_models()
    blended, trace = blend_of(models)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(interrupt_at(blended, call))
    check_unchanged(models)
    assert trace.record is None
    assert plain_digests(models) == fresh_digests
    assert torch.equal(sample(blended), sample(blend_of(make_models())[0]))


@pytest.mark.slow
def test_after_a_run_every_model_samples_as_in_a_new_process(fresh_digests):
    models = make_models()
    sample(blend_of(models)[0])
    check_unchanged(models)
    assert plain_digests(models) == fresh_digests


def test_rerun_after_freeing_all_models_gives_the_same_bits():
    models = make_models()
    blended, trace = blend_of(models)
    first = sample(blended)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(blended), first)
    assert trace.record.belongs_to(first)


def test_failed_preparation_of_an_expert_cleans_up_the_earlier_ones():
    models = make_models()
    before = plain_digests(models)
    unusable = [[torch.zeros(1, 5, 32), {"area": ("percentage", "no number", 1, 0, 0)}]]
    blended, _ = blend(blend_of(models)[0], unet(2), unusable, unusable)
    with pytest.raises((TypeError, ValueError)):
        sample(blended)
    check_unchanged(models)
    assert plain_digests(models) == before


def test_models_are_freed_after_a_run():
    """Neither ComfyUI's caches nor the trace, which stays in the node cache, keep references to the models."""
    models = make_models()
    modules = [weakref.ref(m.model) for m in models.values()]
    blended, trace = blend_of(models)
    sample(blended)
    copies = [weakref.ref(m.model) for m in loaded()]
    assert len(set(copies)) >= 3  # one is the copy of the checkpoint for the second LoRA
    del models, blended
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert [ref() for ref in (*modules, *copies) if ref() is not None] == []
    assert trace.record.labels == ("base", "expert 1", "expert 2")


def loaded():
    return [m.model for m in comfy.model_management.current_loaded_models if m.model is not None]


def test_repeated_run_makes_no_further_copy_of_a_model():
    models = make_models()
    comfy.model_management.unload_all_models()
    blended, _ = blend_of(models)
    sample(blended)
    first = {id(m.model) for m in loaded()}
    sample(blended)
    assert {id(m.model) for m in loaded()} == first


def test_trace_holds_the_last_finished_run():
    models = make_models()
    blended, trace = blend_of(models)
    assert trace.record is None
    samples = sample(blended)
    image, mask, report = view(trace, {"samples": samples})
    assert image.shape[0] == 2
    assert mask.shape == (2, 12, 10)
    assert "not from the run shown here" not in report
    assert "not from the run shown here" in view(trace, {"samples": samples + 1})[2]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(interrupt_at(blended, 2))
    with pytest.raises(ValueError, match="no finished run"):
        view(trace, {"samples": samples})
