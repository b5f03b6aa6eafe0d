"""Writes the lock file in locks/: every package of the set-up with its version, for the current Python and platform.

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
    python, env = setup.find_host(None).python, setup.environment()
    requirements = setup.CACHE / "pins.txt"
    lines = [*setup.TORCH, f"-r {setup.HOST / 'requirements.txt'}", *setup.TOOL_PINS]
    requirements.write_text("\n".join(lines), encoding="utf-8")
    uv = packages.uv_program([python, "-m", "pip", "install"], env, setup.LOG)
    command = [uv, "pip", "compile", "--python", python, "--index-strategy", "unsafe-best-match", "--no-annotate"]
    command += ["--custom-compile-command", "python dev/tools/lock.py", "-o", setup.LOCK, *options, requirements]
    setup.LOCK.parent.mkdir(exist_ok=True)
    step("resolving", command, packages.uv_environment(python, env), setup.LOG)
    with open(setup.LOCK, "a", encoding="utf-8") as file:
        file.write("".join(f"{pin}\n" for pin in setup.REFERENCE_PINS))


if __name__ == "__main__":
    main(sys.argv[1:])
