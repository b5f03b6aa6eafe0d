import pytest

from chorus.tests.support.allowed_waits import RUNS, STEPS
from chorus.tests.support.fake_gpu import FakeGPUs


@pytest.fixture
def gpus(one_thread):
    """A context of fake GPUs, which the test enters. Only the code listed in allowed_waits.py may wait for them."""
    return FakeGPUs([*STEPS, *RUNS])


class Everywhere(frozenset):
    def __contains__(self, place):
        return True


@pytest.fixture
def waiting_gpus(one_thread):
    """A context of fake GPUs for which any code may wait, as ComfyUI's samplers do at each step."""
    import comfy.model_management  # the tests of pure code run without ComfyUI

    gpus = FakeGPUs()
    gpus.allowed = Everywhere()
    yield gpus
    with gpus:
        comfy.model_management.unload_all_models()
