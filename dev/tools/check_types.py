"""Type checks of what ships, by ty. Every definition is annotated, which ruff's ANN rules require.

The pack imports itself relatively, and the name of its folder need not be a Python identifier; so ty reads a copy of the
files under a name that is one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ty._find_ty import find_ty_bin

from .setup import CACHE, ROOT, SHIPPED

MAX_IGNORES = 20  # lines with `# ty: ignore[...]`, each with its reason


def copy_to(target: Path) -> int:
    """Copy the Python files that ship to ``target``, and count the lines that are excused from the checks."""
    shutil.rmtree(target, ignore_errors=True)
    ignores = 0
    for path in [ROOT / "__init__.py", *(p for folder in SHIPPED for p in (ROOT / folder).rglob("*.py"))]:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        ignores += path.read_text(encoding="utf-8").count("# ty: ignore")
    return ignores


def main(options: list[str]) -> int:
    base = CACHE / "types"
    ignores = copy_to(base / "chorus")
    if ignores > MAX_IGNORES:
        print(f"{ignores} lines have `# ty: ignore`, at most {MAX_IGNORES} may")
        return 1
    # its program, not its module: it may lie in .tools, beside a user's environment
    command = [find_ty_bin(), "check", "--python", sys.prefix]
    command += ["--extra-search-path", os.environ["COMFYUI_PATH"], "--config-file", str(ROOT / "dev" / "ty.toml")]
    return subprocess.run([*command, "--output-format", "concise", *options, "chorus"], cwd=base).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
