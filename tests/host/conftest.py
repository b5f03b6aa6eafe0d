"""ComfyUI for the host tests: as a library in this process, and as one real server."""

import errno
import os

import pytest

from chorus.dev import headless
from chorus.tests.support.real_comfyui import comfy, server  # noqa: F401 (fixtures)

headless.start()


@pytest.fixture
def full_disk(monkeypatch):
    """Every file is half written, then there is no room."""

    def full(file):
        os.truncate(file, os.fstat(file).st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
