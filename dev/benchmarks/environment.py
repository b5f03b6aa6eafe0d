"""Writes the result file of a benchmark, with the machine and the versions of the software."""

import argparse
import json
import os
import platform
import subprocess
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


def load() -> float | None:
    """The load average of the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def last_level_cache(device: torch.device) -> int:
    """Bytes of the L2 cache of a GPU, or of the largest cache of the first CPU core; 32 MiB if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)


def clocks() -> str | None:
    """Current and maximum clocks as reported by nvidia-smi; None if it is not available."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,temperature.gpu"
    found = _nvidia_smi(query)
    return None if found is None else f"{query}: {found}"


def _nvidia_smi(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def card(device: torch.device) -> dict:
    """Name, memory in bytes, compute capability and driver of a GPU, and the CUDA of torch; of a CPU only its name."""
    if device.type != "cuda":
        return {"device": processor()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": _nvidia_smi("driver_version"),
        "cuda": torch.version.cuda,
        "processor": processor(),
    }


def triton_version() -> dict[str, str]:
    try:
        import triton
    except Exception:  # not installed or broken; most benchmarks do not need it
        return {}
    return {"triton": triton.__version__}


def busy_percent() -> float:
    """CPU utilisation by other processes, measured for one second; prints a warning above 20 %."""
    import psutil  # not needed by the other functions, which also run where only torch is installed

    if (busy := psutil.cpu_percent(interval=1.0)) > 20.0:
        print(f"warning: other processes use {busy:.0f} % of the CPU; times will vary", flush=True)
    return busy


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a script as its help, without reformatting."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": version("torch"), **triton_version()}


def facts() -> dict:
    """Device, versions and command, stored in every result file."""
    import comfyui_version

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        **versions(),
        "comfyui": comfyui_version.__version__,
        "command": f"python run.py bench {Path(sys.argv[0]).stem.split('.')[-1]} {' '.join(sys.argv[1:])}".strip(),
    }


def write_results(name: str, results: dict) -> Path:
    """Write results/<name>.json and return its path. An interrupted write leaves the old file unchanged."""
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": facts(), **results}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def publish(name: str, results: dict, text: str) -> None:
    """Write a result file; print ``text``, the device and the file's name."""
    path = write_results(name, results)
    print(f"{text}\n\n{facts()['device']}; written to {path.name}")
