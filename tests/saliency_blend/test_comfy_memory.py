"""A run says before it samples which models are loaded together, and its report repeats it."""

import logging

import comfy.model_management
import pytest
import torch

from chorus.tests.support.tiny_models import blend, conditioning, controlnet, ksample, latent, unet, view

PROMPTS = conditioning(10), conditioning(11)
LOG = "comfyui-chorus"


@pytest.fixture(scope="module")
def models():
    return unet(0), unet(1)


@pytest.fixture(autouse=True)
def nothing_loaded():
    comfy.model_management.unload_all_models()


def notes(trace):
    return [note for note in trace.record.notes if note.startswith("memory: ")]


def mib(model):
    return f"{comfy.model_management.module_size(model.model) / 2**20:.1f} MiB"


def test_report_and_log_name_the_models_and_their_sizes(models, caplog):
    blended, trace = blend(*models, *PROMPTS, label="cats")
    with caplog.at_level(logging.INFO, LOG):
        samples = ksample(blended, *PROMPTS)
    expected = f"memory: base ({mib(models[0])}) and 'cats' ({mib(models[1])}) are loaded together in main memory"
    assert notes(trace) == [expected]
    assert expected in view(trace, {"samples": samples})[2].splitlines()
    assert [r.getMessage() for r in caplog.records if r.name == LOG].count(expected) == 1


def test_models_that_are_loaded_already_are_not_logged_again(models, caplog):
    blended, trace = blend(*models, *PROMPTS)
    ksample(blended, *PROMPTS)
    with caplog.at_level(logging.INFO, LOG):
        ksample(blended, *PROMPTS)
    assert not [r for r in caplog.records if r.getMessage().startswith("memory: ")]
    assert len(notes(trace)) == 1


def test_one_checkpoint_with_two_prompts_counts_once(models):
    blended, trace = blend(models[0], models[0], conditioning(20), label="cats")
    ksample(blended, *PROMPTS)
    assert notes(trace) == [f"memory: base and 'cats' ({mib(models[0])}, one checkpoint) are loaded in main memory"]


@pytest.mark.parametrize("off", [dict(expert_strength=0.0), dict(start_percent=0.8, end_percent=0.2)], ids=str)
def test_expert_that_is_off_is_neither_counted_nor_loaded(models, off):
    blended = blend(*models, **off, label="off")[0]
    blended, trace = blend(blended, unet(2), label="cats")
    ksample(blended, *PROMPTS)
    (note,) = notes(trace)
    assert "'cats'" in note and "'off'" not in note
    assert all(loaded.model.model is not models[1].model for loaded in comfy.model_management.current_loaded_models)


def test_controlnet_is_counted(models):
    control = controlnet(3)
    hint = control.set_cond_hint(torch.zeros(1, 3, 128, 128), 1.0, (0.0, 1.0))
    blended, trace = blend(*models, conditioning(20, control=hint, control_apply_to_uncond=False), label="cats")
    ksample(blended, *PROMPTS, latent())
    assert (
        f" and ControlNet ({comfy.model_management.module_size(control.control_model) / 2**20:.1f} MiB)"
        in (notes(trace)[0])
    )


def test_nothing_is_said_where_the_free_memory_is_unknown(models, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "directml_enabled", True)
    blended, trace = blend(*models, *PROMPTS)
    ksample(blended, *PROMPTS)
    assert notes(trace) == []
