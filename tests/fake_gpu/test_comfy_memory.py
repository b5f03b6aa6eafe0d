"""The report of a run on a GPU says what ComfyUI then does: all weights stay loaded, or a part is offloaded."""

import re

import comfy.model_management as management
import pytest
import torch

from chorus.tests.support.tiny_models import blend, conditioning, ksample, latent, unet

PROMPTS = conditioning(10), conditioning(11)
DEVICE = torch.device("cuda:0")


def on(model, device=DEVICE):
    out = model.clone()
    out.load_device = torch.device(device)
    return out


@pytest.fixture
def card(waiting_gpus, monkeypatch):
    """A function that sets the memory of each GPU, in bytes beyond what ComfyUI keeps free for the computation."""
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)

    def resize(size):
        def free(device=None, torch_free_too=False):
            loaded = [m for m in management.loaded_models() if m is not None and m.load_device == device]
            left = management.minimum_inference_memory() + size - sum(m.loaded_size() for m in loaded)
            return (left, 0) if torch_free_too else left

        monkeypatch.setattr(management, "get_free_memory", free)

    with waiting_gpus:
        yield resize
        for index in range(2):
            management.free_memory(1e32, torch.device("cuda", index))


def sampled(*models, **inputs):
    """The notes of a run with a blend of ``models``, and the bytes of each that ComfyUI had loaded in its steps."""
    loaded = {}

    def at_forward(model):
        return model.model.diffusion_model.register_forward_pre_hook(
            lambda module, args: loaded.__setitem__(id(model.model), model.loaded_size())
        )

    blended, trace = blend(*models, conditioning(20), label="cats", **inputs)
    handles = [at_forward(model) for model in models]
    ksample(blended, *PROMPTS, latent(1, 4, 4), steps=1)
    for handle in handles:
        handle.remove()
    return [n for n in trace.record.notes if n.startswith("memory: ")], [loaded[id(m.model)] for m in models]


@pytest.mark.slow
def test_models_that_fit_stay_loaded(card):
    models = on(unet(0)), on(unet(1))
    sizes = [m.model_size() for m in models]
    card(sum(sizes) + (1 << 16))
    (note,), loaded = sampled(*models)
    assert loaded == sizes
    assert note.startswith("memory: base (") and " and 'cats' (" in note and " on cuda:0, " in note
    assert note.endswith(": all weights stay loaded")


def test_weights_that_do_not_fit_are_offloaded(card):
    models = on(unet(0)), on(unet(1))
    size = models[0].model_size()
    card(int(1.5 * size))
    (note,), loaded = sampled(*models)
    left_out = 2 * size - sum(loaded)
    found = re.search(r": ComfyUI will keep about ([\d.]+) MiB of the weights in main memory, which is slower", note)
    # ComfyUI loads whole layers, and reserves room for the largest layers that it leaves out
    assert size / 2 <= left_out
    assert float(found[1]) * 2**20 == pytest.approx(size / 2, abs=0.06 * 2**20)
    assert loaded[1] == size, "the expert is loaded first"


@pytest.mark.slow
def test_models_that_are_loaded_already_count_once(card):
    models = on(unet(0)), on(unet(1))
    card(sum(m.model_size() for m in models) + (1 << 16))
    assert sampled(*models) == sampled(*models)


@pytest.mark.slow
def test_other_models_give_up_their_memory(card):
    models, other = (on(unet(0)), on(unet(1))), on(unet(2))
    card(sum(m.model_size() for m in models) + (1 << 16))
    management.load_models_gpu([other])
    assert other.loaded_size() == other.model_size()
    (note,), loaded = sampled(*models)
    assert re.search(r"after ComfyUI has unloaded other models \([\d.]+ MiB\): all weights stay loaded", note)
    assert loaded == [m.model_size() for m in models] and other.loaded_size() < other.model_size()


def test_each_gpu_has_its_own_note(card):
    models = on(unet(0)), on(unet(1), "cuda:1")
    card(models[0].model_size() + (1 << 16))
    found, _ = sampled(*models)
    assert ["base" in n and " on cuda:0," in n for n in found] == [True, False]
    assert ["'cats'" in n and " on cuda:1," in n for n in found] == [False, True]
    assert all(n.endswith("all weights stay loaded") for n in found)


@pytest.mark.slow
def test_start_options_that_load_all_weights_or_none(card, monkeypatch):
    models = on(unet(0)), on(unet(1))
    card(models[0].model_size())
    monkeypatch.setattr(management, "vram_state", management.VRAMState.HIGH_VRAM)
    (note,), loaded = sampled(*models)
    assert "ComfyUI loads all weights nevertheless" in note and loaded == [m.model_size() for m in models]
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    (note,), loaded = sampled(on(unet(2)), on(unet(3)))
    assert "because of its option --novram" in note and sum(loaded) < sum(m.model_size() for m in models) / 10
