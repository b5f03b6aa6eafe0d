"""A real ComfyUI server with this pack, as fixtures for the rooms of the tests that talk to one."""

import os
import sys
from pathlib import Path

import pytest
import torch

from chorus.dev.tools.client import Comfy
from chorus.dev.tools.server import server as start_server
from chorus.dev.tools.setup import Host


def fresh_server(base: Path):
    """A context of a server of its own with its folders in ``base``: .address, .base, .log, .process."""
    host = Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), None)
    return start_server(host, base=base, args=() if torch.cuda.is_available() else ("--cpu",))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real ComfyUI with this pack: .address, .base (its models, input, output, ... folders), .log."""
    with fresh_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def comfy(server):
    """A client of the server: run(prompt), to_api(workflow), images(result), interrupt(), free()."""
    with Comfy(server.address) as client:
        yield client
