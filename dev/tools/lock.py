"""Writes the lock files: every package with its version. That in locks/ is for the set-up with the current Python and
platform, dev/docs_site/requirements.txt for the website with any Python and platform.

python dev/tools/lock.py            run this after changing the pins in setup.py
python dev/tools/lock.py --upgrade  also take the newest versions that the pins allow
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "run.py"))  # makes this repository importable as chorus

from chorus.dev.tools import packages, setup  # noqa: E402
from chorus.dev.tools.progress import step  # noqa: E402


def main(options: list[str]) -> None:
    python = setup.find_host(None).python
    lines = [*setup.TORCH, f"-r {setup.HOST / 'requirements.txt'}", *setup.TOOL_PINS]
    compile_lock(python, setup.LOCK, lines, options)
    with open(setup.LOCK, "a", encoding="utf-8") as file:
        file.write("".join(f"{pin}\n" for pin in setup.REFERENCE_PINS))
    compile_lock(python, setup.DOCS_LOCK, setup.DOCS_PINS, ["--universal", "--python-version", "3.11", *options])


def compile_lock(python: Path, lock: Path, lines: list[str], options: list[str]) -> None:
    env, requirements = setup.environment(), setup.CACHE / "pins.txt"
    requirements.write_text("\n".join(lines), encoding="utf-8")
    uv = packages.uv_program([python, "-m", "pip", "install"], env, setup.LOG)
    command = [uv, "pip", "compile", "--python", python, "--index-strategy", "unsafe-best-match", "--no-annotate"]
    command += ["--custom-compile-command", "python dev/tools/lock.py", "-o", lock, *options, requirements]
    lock.parent.mkdir(exist_ok=True)
    step(f"resolving {lock.name}", command, packages.uv_environment(python, env), setup.LOG)


if __name__ == "__main__":
    main(sys.argv[1:])
