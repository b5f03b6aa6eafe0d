"""Make this folder importable as ``chorus`` and, where there is a ComfyUI, its modules by their own names.

The ComfyUI is $COMFYUI_PATH, else the one that run.py puts into .host/. Without one, only the tests of pure code are
left: those of adapters lie in files named test_comfy_*.py, as the adapters in files named comfy_*.py.
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
    # first on the path: our nodes/ folder must not shadow the host's nodes.py
    sys.path.insert(0, str(HOST))
else:
    collect_ignore = ["robustness", "browser"]
    collect_ignore_glob = ["*/test_comfy_*.py"]

# without a GPU the Triton kernels run in its CPU interpreter; this must be set before they are imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# loaded from its path: `import run` would find any run.py on the path before ours
spec = importlib.util.spec_from_file_location("chorus_run", ROOT / "run.py")
sys.modules["chorus_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["chorus_run"])  # makes this folder the package chorus

if os.environ.get("COMFYUI_PATH"):
    from chorus.dev import headless  # ComfyUI as a library in this process
    from chorus.tests.support.real_comfyui import comfy, server  # noqa: F401 (fixtures: one real server)

    headless.start()


def pytest_report_header():
    return f"ComfyUI: {HOST}" if os.environ.get("COMFYUI_PATH") else "ComfyUI: none; test_comfy_*.py are left out"


@pytest.fixture(autouse=True)
def same_draws():
    """Every test draws the same numbers in every run, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """On layers as small as ours, threads that wait for each other on a busy machine cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def full_disk(monkeypatch):
    """Every file is half written, then there is no room."""

    def full(file):
        os.truncate(file, os.fstat(file).st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
