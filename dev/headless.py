"""ComfyUI without its server: for tests, recipes and benchmarks."""

import os
import sys

import torch


def start(path: str | None = None) -> None:
    """Make the host importable and choose the device. Call it before the first import of comfy.

    The host is ``path``, else $COMFYUI_PATH, else what is on the path already.
    """
    if path := path or os.environ.get("COMFYUI_PATH"):
        # first on the path: our nodes/ folder must not shadow the host's nodes.py
        sys.path.insert(0, str(path))

    from comfy.cli_args import args

    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        args.cpu = True  # else the host's import fails without a GPU
