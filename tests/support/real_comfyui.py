"""Fixtures: a real ComfyUI server with this pack, and a client of it."""

import os
import sys
from pathlib import Path

import pytest
import torch

from chorus.dev.tools.client import Comfy
from chorus.dev.tools.server import server as start_server
from chorus.dev.tools.setup import Host


def fresh_server(base: Path):
    """Context that starts a new server with its folders in ``base``. It yields .address, .base, .log and .process."""
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), None)
    return start_server(host, base=base, args=() if torch.cuda.is_available() else ("--cpu",))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real ComfyUI server with this pack: .address, .base (the parent of models/, input/, output/, ...), .log."""
    with fresh_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def client(server):
    """A client of the server: run(prompt), to_api(workflow), images(result), interrupt(), free()."""
    with Comfy(server.address) as client:
        yield client
