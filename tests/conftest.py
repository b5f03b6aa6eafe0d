"""Make the repository importable as the package ``chorus``, and ComfyUI's modules importable under their names.

ComfyUI is at $COMFYUI_PATH, or where run.py installs it in .host/. Without ComfyUI, only the tests of pure code run.
The tests of adapters (comfy_*.py) are in files named test_comfy_*.py.
"""

import errno
import functools
import gc
import importlib.util
import os
import sys
import zlib
from pathlib import Path

# read when torch loads OpenMP: its waiting threads must not spin on the cores that the other test process needs
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# torch, ComfyUI and the collected tests are a million objects, which live until the end. The garbage collector would walk
# through them again and again while they are imported (a quarter of the time) and in every later full collection, so it
# pauses until the tests are collected, and then leaves them out.
gc.disable()

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
    from chorus.tests.support.real_comfyui import client, server  # noqa: F401 (fixtures: one real server)

    headless.start()


def pytest_report_header():
    return f"ComfyUI: {HOST}" if os.environ.get("COMFYUI_PATH") else "ComfyUI: not found; test_comfy_*.py are skipped"


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Mark tests with a real server as slow, except those of pack/, which test that the server offers the pack.

    A server takes as much time to start as fifty tests.
    """
    for item in items:
        if "server" in item.fixturenames and item.path.parent.name != "pack":
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Distribute the tests by file, with two exceptions.

    Those of pack/ run in one process, so that the quick tests start one server. Those of the longest file of the web page,
    which run last, are divided in two, so that no process waits for the other for many minutes.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            folder = file.rpartition("/")[0]
            if file == "tests/browser/test_workflows.py":
                return f"{file}, part {zlib.crc32(nodeid.encode()) % 2 + 1} of 2"
            return folder if folder == "tests/pack" else file

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


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


@pytest.fixture(autouse=True, scope="session")
def one_clip_tokenizer():
    """Load the tokenizer of CLIP once per process: reading its vocabulary takes longer than a small model."""
    if not os.environ.get("COMFYUI_PATH"):
        yield
        return
    from transformers import CLIPTokenizer  # ComfyUI has imported it

    original = CLIPTokenizer.from_pretrained

    @functools.cache
    def load(*args, **kwargs):
        tokenizer = original(*args, **kwargs)
        tokenizer.get_vocab = functools.cache(tokenizer.get_vocab)
        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTokenizer, "from_pretrained", load)
        yield


@pytest.fixture
def full_disk(monkeypatch):
    """Make every file write fail halfway, as on a full disk."""

    def full(file):
        os.truncate(file, os.fstat(file).st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
