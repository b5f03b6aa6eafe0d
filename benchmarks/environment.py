"""Where a number was measured, and where it is kept."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def facts() -> dict:
    """Hardware and versions, as they belong beside every number."""
    import comfyui_version

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "comfyui": comfyui_version.__version__,
        "command": f"python run.py bench {Path(sys.argv[0]).stem.split('.')[-1]} {' '.join(sys.argv[1:])}".strip(),
    }


def keep(name: str, results: dict) -> Path:
    """Write results/<name>.json, whole or not at all."""
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": facts(), **results}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
