"""What a blend leaves behind: nothing. After an interrupt, too, every model samples as in a fresh process."""

import gc
import hashlib
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

from chorus.tests.support.lifecycle import check_untouched, stop_at
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    in_inference_mode,
    ksample,
    latent,
    lora,
    lora_weights,
    unet,
    view,
)

ROOT = Path(__file__).parents[2]
WORDS, EXPERT_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]


def sample(model, words=WORDS):
    return ksample(model, *words, latent(2, 12, 10))


def digest(samples) -> str:
    return hashlib.sha256(samples.numpy().tobytes()).hexdigest()


def family():
    """A base, a LoRA stack on it, and another checkpoint."""
    base = unet(0)
    return {"base": lora(base, 1), "stack": lora(base, 2), "other": unet(1)}


def plain(models) -> dict[str, str]:
    return {name: digest(sample(model)) for name, model in models.items()}


@in_inference_mode
def hooked(words, model):
    hooks = comfy.hooks.create_hook_lora(lora_weights(model, 8), 1.0, 0.0)
    return tuple(comfy.hooks.set_hooks_for_conditioning(w, hooks) for w in words)


def blend_of(models):
    """The base, its other LoRA stack, and the other checkpoint under LoRA hooks, in one chain."""
    chained, _ = blend(models["base"], models["stack"], *EXPERT_WORDS)
    return blend(chained, models["other"], *hooked(EXPERT_WORDS, models["other"]))


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    """Plain samples of every model, from a process that has never seen a blend."""
    script = (
        f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); import run, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from chorus.dev import headless; headless.start()\n"
        "from chorus.tests.saliency_blend.test_comfy_lifecycle import family, plain\n"
        "print(json.dumps(plain(family())))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_after_an_interrupt_every_model_samples_as_in_a_fresh_process(fresh, call):
    models = family()
    blended, trace = blend_of(models)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(stop_at(blended, call))
    check_untouched(models)
    assert trace.record is None
    assert plain(models) == fresh
    assert torch.equal(sample(blended), sample(blend_of(family())[0]))


@pytest.mark.slow
def test_after_a_run_every_model_samples_as_in_a_fresh_process(fresh):
    models = family()
    sample(blend_of(models)[0])
    check_untouched(models)
    assert plain(models) == fresh


def test_the_same_queue_after_freeing_all_models_gives_the_same_bits():
    models = family()
    blended, trace = blend_of(models)
    first = sample(blended)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(blended), first)
    assert trace.record.belongs_to(first)


def test_a_failure_while_an_expert_is_prepared_undoes_the_ones_before():
    models = family()
    before = plain(models)
    unusable = [[torch.zeros(1, 5, 32), {"area": ("percentage", "no number", 1, 0, 0)}]]
    blended, _ = blend(blend_of(models)[0], unet(2), unusable, unusable)
    with pytest.raises((TypeError, ValueError)):
        sample(blended)
    check_untouched(models)
    assert plain(models) == before


def test_nothing_keeps_the_models_alive():
    """Neither the host's caches nor the trace, which outlives them in the node cache."""
    models = family()
    modules = [weakref.ref(m.model) for m in models.values()]
    blended, trace = blend_of(models)
    sample(blended)
    copies = [weakref.ref(m.model) for m in loaded()]
    assert len(set(copies)) >= 3  # one of them the copy for the second LoRA stack
    del models, blended
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert [ref() for ref in (*modules, *copies) if ref() is not None] == []
    assert trace.record.labels == ("base", "expert 1", "expert 2")


def loaded():
    return [m.model for m in comfy.model_management.current_loaded_models if m.model is not None]


def test_a_repeated_run_takes_no_further_copy():
    models = family()
    comfy.model_management.unload_all_models()
    blended, _ = blend_of(models)
    sample(blended)
    first = {id(m.model) for m in loaded()}
    sample(blended)
    assert {id(m.model) for m in loaded()} == first


def test_trace_holds_the_last_finished_run():
    models = family()
    blended, trace = blend_of(models)
    assert trace.record is None
    samples = sample(blended)
    image, mask, report = view(trace, {"samples": samples})
    assert image.shape[0] == 2
    assert mask.shape == (2, 12, 10)
    assert "not from the run shown here" not in report
    assert "not from the run shown here" in view(trace, {"samples": samples + 1})[2]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(stop_at(blended, 2))
    with pytest.raises(ValueError, match="no finished run"):
        view(trace, {"samples": samples})
