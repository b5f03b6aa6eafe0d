"""The tool for docs/memory.md: its numbers equal those of models that are really built, and a measurement on the CPU."""

import math
from dataclasses import asdict

import comfy.model_detection
import comfy.model_management as management
import comfy.supported_models
import psutil
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from chorus.dev.benchmarks.fresh_process import in_fresh_process
from chorus.dev.benchmarks.fusion_case import Setting
from chorus.dev.benchmarks.peak_memory import measure_peak_in_child
from chorus.dev.benchmarks.random_models import sd15
from chorus.dev.tools import memory
from chorus.dev.tools.published_models import MODELS, PAIRS, Size
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.support.tiers import quick
from chorus.tests.support.tiny_models import unet

GIB, MIB = 1 << 30, 1 << 20


def line(cells):
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", quick(["SD 1.5", "Chroma", "Flux.2 klein 4B"], list(MODELS)))
def test_configuration_is_the_one_that_comfyui_detects_in_a_file_of_these_weights(name):
    published, model = MODELS[name], memory.built(name, "16 bit")
    weights = model.model.diffusion_model.state_dict()
    detected = comfy.model_detection.model_config_from_unet(weights, "")
    assert type(detected) is published.kind
    # ComfyUI also adds settings that the class has in any case
    assert {key: detected.unet_config.get(key, value) for key, value in published.config.items()} == published.config
    detected.set_inference_dtype(torch.bfloat16, None)
    again = detected.get_model({}, device=memory.META)
    shapes = {key: value.shape for key, value in again.diffusion_model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize("name", ["SD15", "Flux", "WAN21_T2V"])
def test_model_without_memory_has_the_size_of_a_built_one(name):
    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.class_name)(family.config)
    config.set_inference_dtype(torch.float32, None)
    model = ModelPatcher(config.get_model({}, device=memory.META), memory.META, memory.META)
    assert model.model_size() == family.model(0).model_size()


@pytest.mark.slow
def test_weights_of_sd15_equal_those_of_a_built_model():
    built = sd15(0, torch.bfloat16)
    assert memory.built("SD 1.5", "16 bit").model_size() == built.model_size()
    assert memory.needs("SD 1.5", "16 bit", Size(512, 512)).parameters == sum(
        p.numel() for p in built.model.diffusion_model.parameters()
    )


@pytest.mark.parametrize(
    ("name", "size", "area"), [("SDXL", Size(), 128 * 128), ("Wan 2.1 T2V 1.3B", None, 21 * 60 * 104)]
)
def test_computation_is_comfyui_s_estimate_for_nvidia_cards(name, size, area):
    model = memory.built(name, "16 bit")
    factor = model.model.memory_usage_factor
    assert memory.needs(name, "16 bit", size or MODELS[name].size).row == pytest.approx(area * 2 * 0.01 * factor * MIB)


PAIR = ("Flux.2 klein 9B", "Flux.2 klein 4B", False)


def test_blend_needs_the_weights_of_both_models_and_the_larger_computation():
    found = memory.blend(*PAIR, "16 bit")
    each = [memory.needs(name, "16 bit", Size()) for name in PAIR[:2]]
    assert found.weights == sum(n.weights for n in each)
    assert found.computation == pytest.approx(2 * max(n.row for n in each))
    assert found.least == max(n.row + n.buffer for n in each)
    one = memory.blend(PAIR[0], PAIR[0], True, "16 bit")
    assert one.weights == each[0].weights
    assert one.computation == pytest.approx(4 * each[0].row)


def test_cards_hold_what_fits_beside_the_memory_that_comfyui_keeps_free():
    found = memory.blend(*PAIR, "16 bit")
    each = [memory.needs(name, "16 bit", Size()) for name in PAIR[:2]]
    kept = max(0.8 * GIB, each[0].row) + 400 * MIB
    for card in memory.CARDS:
        missing = found.weights - (card * GIB - kept)
        if missing < 0:
            assert found.offloaded[card] == 0
            assert memory.cell(found, card) == "whole"
        else:
            # ComfyUI loads whole layers, and keeps room for the largest ones that it leaves out
            assert missing <= found.offloaded[card] <= missing + sum(n.buffer for n in each)
            assert " offloaded" in memory.cell(found, card)


def test_nothing_of_the_simulated_card_stays():
    before = management.get_free_memory, management.vram_state, management.NUM_STREAMS
    with pytest.raises(KeyError), memory.card(8 * GIB):
        raise KeyError
    assert before == (management.get_free_memory, management.vram_state, management.NUM_STREAMS)
    assert not any(m is not None and m.load_device == memory.META for m in management.loaded_models())


def test_models_on_other_devices_do_not_occupy_the_simulated_card():
    other = unet(0)
    management.load_models_gpu([other])
    assert other.loaded_size() > 0 and other in management.loaded_models()
    with memory.card(8 * GIB):
        assert management.get_free_memory(memory.META) == 8 * GIB


def test_rows_of_the_file_are_up_to_date():
    lines = memory.PATH.read_text(encoding="utf-8").splitlines()
    assert all(line(memory.model_row(name)) in lines for name in ("SD 1.5", "Chroma", *PAIR[:2]))
    for pair in (PAIR, ("Z-Image", "Z-Image", True)):
        assert line(memory.blend_row(pair, "16 bit")) in lines, f"run `{memory.COMMAND}`"
    assert all(line(row) in lines for row in memory.check_rows())
    assert ", ".join(memory.left_out()) + "." in lines
    for pair in PAIRS:
        assert sum(text.startswith(f"| {memory.title(*pair)} |") for text in lines) == len(memory.PRECISIONS)


@pytest.mark.exhaustive
def test_file_is_up_to_date():
    import comfyui_version

    assert memory.page(comfyui_version.__version__) == memory.PATH.read_text(encoding="utf-8")


@pytest.mark.exhaustive  # a minute, and 9 GiB
def test_measured_peak_of_a_blend_lies_between_the_computed_weights_and_the_computed_peak():
    setting = Setting("sd15", 32, 1, "fp32", 1)
    if psutil.virtual_memory().available < 9 * GIB:
        pytest.skip("two models of SD 1.5's size in fp32 need 9 GiB of main memory")
    found = in_fresh_process(measure_peak_in_child, asdict(setting), ["fusion"])
    model = memory.built("SD 1.5", "fp32")
    weights = 2 * model.model_size()
    computation = model.model.memory_required([2, 4, 32, 32])
    peak = found["peak"] - found["before"]
    assert weights <= peak <= weights + max(computation, management.minimum_inference_memory())
    assert math.isclose(found["weights"], weights, rel_tol=1e-4)
