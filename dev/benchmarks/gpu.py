"""Measures the pack on one NVIDIA GPU, in at most 8 minutes, and writes one result file.

The part ``kernels`` needs torch, Triton, einops and safetensors: errors of the kernels compared with float64, their speed
relative to a copy on the device, and the networks of aMUSEd, the face refiners and the Cas-DM head, eager, with
torch.compile, as CUDA graphs and, if it is installed, in diffusers. The part ``host`` needs ComfyUI: overhead of the
blend for models of the sizes of SD 1.5 and SDXL in fp16 and bf16, its cost at cfg 1 and with refresh 3, and the memory
of SeedSelect. All weights are random; nothing is downloaded.

A section for which the time does not suffice is recorded as skipped. A section that fails is recorded with its error, and
the exit code is then 1. See docs/gpu.md.
"""

import argparse
import datetime
import gc
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .environment import RESULTS, card, versions
from .sections import FAILED, Budget, Section, run_sections

ROOT = Path(__file__).parents[2]
PARTS = {"kernels": ("gpu_kernels", "gpu_networks"), "host": ("gpu_host",)}
MINUTES = 8.0


def main(
    argv: Sequence[str] | None = None,
    parts: Sequence[str] = tuple(PARTS),
    folder: Path = ROOT / "output",
    program: str = "python run.py bench gpu",
    description: str | None = __doc__,
) -> int:
    """Run the command. ``parts``: those that can run here; ``folder``: of the result file."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv, parts, program, description)
    if options.show:
        return show(options.show)
    if getattr(options, "bundle", None):
        from . import gpu_bundle

        size = gpu_bundle.write(options.bundle)
        print(f"written to {options.bundle.resolve()}, {size / 2**20:.1f} MB; run it there with: python bench_gpu.py")
        return 0
    budget = Budget(60.0 * options.minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit(
            f"expected an NVIDIA GPU, but torch {torch.__version__} finds none; install a build of torch for CUDA and"
            " the driver of the GPU, or try the command on the CPU with --smoke, which measures nothing of a GPU"
        )
    path = output_file(options, folder, device)
    if device.type == "cpu" and importlib.util.find_spec("numpy"):
        # Triton reads it at import. Its interpreter runs the kernels without a GPU, and needs numpy
        os.environ.setdefault("TRITON_INTERPRET", "1")
    chosen = list(parts) if options.part == "all" else [options.part]
    result = {
        "environment": {**facts(device), "command": command(program, options)},
        "date": datetime.date.today().isoformat(),
        "smoke": options.smoke,
        "parts": chosen,
        "minutes": options.minutes,
        "sections": [],
    }
    for part in chosen:
        sections, further = sections_of(part, device, options.smoke)
        result["environment"] |= further
        before = list(result["sections"])

        def record(outcomes: list[dict], before: list[dict] = before) -> None:
            result["sections"] = before + outcomes
            write(path, result)

        run_sections(sections, budget, record, lambda: free(device))
    from .gpu_tables import text

    print(f"\n{text(result)}\nwritten to {path}")
    return int(any(section["status"] == FAILED for section in result["sections"]))


def sections_of(part: str, device: torch.device, smoke: bool) -> tuple[list[Section], dict]:
    """(sections of a part, its versions). If the part cannot be imported, one section that fails with the reason."""
    try:
        modules = [importlib.import_module(f".{name}", __package__) for name in PARTS[part]]
        found = [section for module in modules for section in module.sections(device, smoke)]
        return found, {key: value for module in modules for key, value in getattr(module, "VERSIONS", {}).items()}
    except Exception as error:
        return [Section(f"the part {part}", part, "import", 0.0, partial(fail, error))], {}


def fail(error: Exception) -> dict:
    raise error


def arguments(argv: Sequence[str], parts: Sequence[str], program: str, description: str | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=form)
    if len(parts) > 1:
        parser.add_argument("--part", choices=(*parts, "all"), default="all", help="the part to run (default all)")
        parser.add_argument(
            "--bundle", type=Path, metavar="DIR", help="write a folder that runs the part kernels alone"
        )
    else:
        parser.set_defaults(part=parts[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also on a CPU; to test the command itself")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"limit of the time (default {MINUTES:g})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the result file, which must not exist")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print the tables of a result file, and measure nothing"
    )
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"expected --minutes above 0, got {options.minutes:g}")
    return options


def show(path: Path) -> int:
    from .gpu_tables import text

    print(text(json.loads(path.read_text(encoding="utf-8"))))
    return 0


def command(program: str, options: argparse.Namespace) -> str:
    """The command of a run, without the names of files."""
    words = [program, f"--part {options.part}", "--smoke" if options.smoke else "", f"--minutes {options.minutes:g}"]
    return " ".join(filter(None, words))


def output_file(options: argparse.Namespace, folder: Path, device: torch.device) -> Path:
    """The new result file. Raises SystemExit for a file that exists, or for a smoke run among the committed results."""
    if options.output:
        path = options.output.absolute()
        if options.smoke and path.resolve().is_relative_to(RESULTS.resolve()):
            raise SystemExit(
                f"the result of --smoke cannot be in {RESULTS}, where measurements are; choose another file"
            )
        if path.exists():
            raise SystemExit(f"{path} exists; choose another name for --output")
    else:
        name = card(device)["device"] if not options.smoke else "smoke"
        stem = f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.date.today().isoformat()}"
        names = (folder / f"{stem}{f'-{n}' if n > 1 else ''}.json" for n in range(1, 10_000))
        path = next(path for path in names if not path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def facts(device: torch.device) -> dict:
    """Card and versions, without names of users, computers or folders."""
    found = {**card(device), "system": sys.platform, **versions()}
    for package in ("einops", "safetensors", "diffusers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return {**found, "chorus": match[1] if match else "unknown"}


def write(path: Path, result: dict) -> None:
    """Write the result file as a whole, so that an interruption leaves the last complete one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def free(device: torch.device) -> None:
    """Free the memory of a section. Raises an error if the GPU cannot be used any longer."""
    gc.collect()
    torch.compiler.reset()  # compiled functions keep their networks
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
