"""The sentence about the memory of a blend, and the part of the weights that does not fit."""

import dataclasses

import pytest

from chorus.techniques.saliency_blend.memory import ALL, DYNAMIC, FIT, MAIN, NONE, DeviceMemory, ModelMemory

GIB = 1 << 30
BASE, CATS = ModelMemory(("base",), 2 * GIB), ModelMemory(("'cats'",), 3 * GIB)


def memory(free, *models, **options):
    return DeviceMemory("cuda:0", models or (BASE, CATS), GIB, free * GIB, **options)


def test_models_that_fit_stay_loaded():
    assert str(memory(8.0)) == (
        "memory: base (2.0 GiB) and 'cats' (3.0 GiB) together need about 6.0 GiB on cuda:0, with 1.0 GiB for the"
        " computation; 8.0 GiB can be used: all weights stay loaded"
    )
    assert memory(8.0).offloaded == 0


@pytest.mark.parametrize("placement", [FIT, DYNAMIC])
def test_weights_that_do_not_fit_are_offloaded(placement):
    found = memory(4.5, placement=placement)
    assert found.offloaded == pytest.approx(1.5 * GIB)
    assert "4.5 GiB can be used: ComfyUI will keep about 1.5 GiB of the weights in main memory, which is slower" in str(
        found
    )


def test_weights_that_are_loaded_already_count_once():
    loaded = dataclasses.replace(CATS, loaded=CATS.size)
    found = memory(3.5, BASE, loaded)
    assert found.usable == 6.5 * GIB and found.offloaded == 0
    assert not found.is_loaded
    assert memory(0.0, loaded).is_loaded


def test_other_models_are_unloaded_if_their_memory_is_needed():
    found = memory(4.0, others=3.0 * GIB)
    assert found.offloaded == 0
    assert "7.0 GiB can be used, after ComfyUI has unloaded other models (3.0 GiB): all weights stay loaded" in str(
        found
    )
    assert "unloaded" not in str(memory(7.0, others=3.0 * GIB))


def test_one_checkpoint_of_two_models_counts_once():
    both = memory(8.0, ModelMemory(("base", "'cats'"), 2 * GIB))
    assert "base and 'cats' (2.0 GiB, one checkpoint) need about 3.0 GiB" in str(both)


def test_options_that_load_all_weights_or_none():
    assert memory(5.0, placement=ALL).offloaded == 0
    assert "loads all weights nevertheless" in str(memory(5.0, placement=ALL))
    assert "all weights stay loaded" in str(memory(8.0, placement=ALL))
    assert memory(8.0, placement=NONE).offloaded == 5 * GIB
    assert "--novram" in str(memory(8.0, placement=NONE))


def test_models_on_the_cpu_are_in_main_memory():
    small = ModelMemory(("base",), 3 << 20)
    expected = "memory: base (3.0 MiB), 'cats' (3.0 GiB) and 'dogs' (2.0 GiB) are loaded together in main memory"
    assert str(memory(0, small, CATS, ModelMemory(("'dogs'",), 2 * GIB), placement=MAIN)) == expected


def test_share_of_the_memory_that_always_holds_weights():
    # of 4 GiB free, 0.4 hold weights even if the computation wants 3.5 GiB, and 1 GiB is left in any case
    found = DeviceMemory("cuda:0", (BASE,), 3.5 * GIB, 4.0 * GIB, least_share=0.4, least_working=GIB)
    assert found.offloaded == pytest.approx(0.4 * GIB)
