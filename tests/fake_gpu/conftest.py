import pytest

from chorus.tests.support.allowed_waits import RUNS, STEPS
from chorus.tests.support.fake_gpu import FakeGPUs


@pytest.fixture
def gpus(one_thread):
    """A context of fake GPUs, which the test enters. Only the code listed in allowed_waits.py may wait for them."""
    return FakeGPUs([*STEPS, *RUNS])
