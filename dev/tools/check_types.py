"""Type checks of the shipped code with ty. ruff's ANN rules require that every definition is annotated.

The pack uses relative imports, and its folder can have a name that is not a Python identifier. So ty checks a copy of
the files, in a folder named chorus.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ty._find_ty import find_ty_bin

from .setup import CACHE, ROOT, SHIPPED

MAX_IGNORES = 20  # lines with `# ty: ignore[...]`; a second comment explains each


def copy_to(target: Path) -> int:
    """Copy the Python files of the shipped code to ``target``; returns the number of lines excluded from the checks."""
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
        print(f"expected at most {MAX_IGNORES} lines with `# ty: ignore`, got {ignores}; fix the type errors of some")
        return 1
    # ty is started as a program and not as a module, because it may be in .tools, outside the user's environment
    command = [find_ty_bin(), "check", "--python", sys.prefix]
    command += ["--extra-search-path", os.environ["COMFYUI_PATH"], "--config-file", str(ROOT / "dev" / "ty.toml")]
    return subprocess.run([*command, "--output-format", "concise", *options, "chorus"], cwd=base).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
