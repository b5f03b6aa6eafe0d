"""Starts ComfyUI as a library, without its server, for tests, recipes and benchmarks."""

import os
import sys

import torch


def start(path: str | None = None) -> None:
    """Make ComfyUI importable and choose the device. Call this before the first import of comfy.

    ComfyUI is imported from ``path``, or from $COMFYUI_PATH if ``path`` is None. If neither is given, sys.path is not
    changed.
    """
    if path := path or os.environ.get("COMFYUI_PATH"):
        # first on the path: our nodes/ folder must not shadow ComfyUI's nodes.py
        sys.path.insert(0, str(path))

    from comfy.cli_args import args

    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        args.cpu = True  # otherwise importing ComfyUI's modules fails on a machine without a GPU
