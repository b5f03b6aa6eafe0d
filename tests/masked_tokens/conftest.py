"""Fixtures for the nodes of masked tokens."""

import pytest
import torch


@pytest.fixture
def exact():
    """No TF32 convolutions, whose rounding would change sampled ids compared to the CPU."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def tiny():
    """A tiny random model; see tests/support/tiny_masked_tokens.py, which needs ComfyUI."""
    from chorus.tests.support.tiny_masked_tokens import tiny_model

    return tiny_model()
