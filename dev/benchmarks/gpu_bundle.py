"""Writes the folder of ``bench gpu --bundle``: the modules that the first part needs, and a script that starts them.

The script runs with any Python that has torch, Triton, einops and safetensors, without ComfyUI and without a network.
"""

import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENTRIES = ("gpu.py", "gpu_kernels.py", "gpu_networks.py")  # gpu.py imports the parts by name
FURTHER = ("LICENSE", "pyproject.toml")  # the licence of the code, and the version of the pack
LIMIT = 60 << 20  # bytes of the folder
SCRIPT = '''"""Measures the kernels and networks of ComfyUI-Chorus on an NVIDIA GPU, within 8 minutes.

Run it with `python bench_gpu.py`. Needs Python 3.10 or newer with torch, Triton, einops and safetensors, and a C
compiler for Triton; on Windows the package triton-windows. diffusers is compared if it is installed. ComfyUI and a
network are not needed. The result is one JSON file in this folder. It holds the names of the GPU, of the processor and
of the driver, the versions of the packages, times and the texts of errors.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))
sys.dont_write_bytecode = True

from chorus.dev.benchmarks import gpu

sys.exit(gpu.main(parts=("kernels",), folder=FOLDER, program="python bench_gpu.py", description=__doc__))
'''


def needed() -> set[Path]:
    """The entries and all files of the pack that their relative imports reach, also imports inside functions."""
    found, waiting = {ROOT / "__init__.py"}, {Path(__file__).with_name(name) for name in ENTRIES}
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= imported(path) - found  # not those of the pack's __init__.py, which imports the nodes for ComfyUI
    return found


def imported(path: Path) -> set[Path]:
    """The files that a file of the pack imports relatively, with the __init__.py of all packages around them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for module in (base, *(base / alias.name for alias in node.names)):
                found |= {file for file in (module.with_suffix(".py"), module / "__init__.py") if file.is_file()}
    packages = {
        folder / "__init__.py"
        for file in {path, *found}
        for folder in file.parents
        if ROOT in {folder, *folder.parents}
    }
    return found | {file for file in packages if file.is_file()}


def write(folder: Path) -> int:
    """Write the bundle to a new or empty folder; returns its size in bytes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"expected a new or empty folder for --bundle, got {folder}; choose another folder")
    for path in sorted({*needed(), *(ROOT / name for name in FURTHER)}):
        target = folder / "chorus" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "bench_gpu.py").write_text(SCRIPT, encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LIMIT:
        raise SystemExit(f"expected a bundle of at most {LIMIT >> 20} MB, got {size / 2**20:.0f} MB in {folder}")
    return size
