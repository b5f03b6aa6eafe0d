"""Make the repository importable as the package ``chorus``, and ComfyUI's modules importable under their names.

ComfyUI is at $COMFYUI_PATH, or where run.py installs it in .host/. Without ComfyUI, only the tests of pure code run.
The tests of adapters (comfy_*.py) are in files named test_comfy_*.py.
"""

import errno
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
HOST = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI")

if (HOST / "main.py").is_file():
    os.environ["COMFYUI_PATH"] = str(HOST)
    # first on the path, so that our nodes/ folder does not shadow ComfyUI's nodes.py
    sys.path.insert(0, str(HOST))
else:
    collect_ignore = ["robustness", "browser"]
    collect_ignore_glob = ["*/test_comfy_*.py"]

# without a GPU, Triton kernels run in its CPU interpreter; the variable must be set before they are imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# loaded by path, because `import run` could find another run.py
spec = importlib.util.spec_from_file_location("chorus_run", ROOT / "run.py")
sys.modules["chorus_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["chorus_run"])  # makes the repository the package chorus

if os.environ.get("COMFYUI_PATH"):
    from chorus.dev import headless  # ComfyUI as a library in this process
    from chorus.tests.support.real_comfyui import comfy, server  # noqa: F401 (fixtures: one real server)

    headless.start()


def pytest_report_header():
    return f"ComfyUI: {HOST}" if os.environ.get("COMFYUI_PATH") else "ComfyUI: not found; test_comfy_*.py are skipped"


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seed torch, so that a test gets the same random numbers whether it runs alone or with others."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Use a single torch thread: on small layers and a busy machine, synchronizing threads takes longer than it
    saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def full_disk(monkeypatch):
    """Make every file write fail halfway, as on a full disk."""

    def full(file):
        os.truncate(file, os.fstat(file).st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
