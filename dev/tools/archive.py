"""The archive that registry.comfy.org offers: the files that git tracks, without those of .comfyignore."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

from .setup import ROOT

LIMIT = 60_000_000  # bytes: ComfyUI-Manager downloads the archive at every update


def git_files(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return {name for name in names if name and (ROOT / name).is_file()}


def tracked() -> list[str]:
    """Files that a clone of this repository would hold if everything were committed."""
    return sorted(git_files("--others", "--exclude-standard"))


def packed() -> list[str]:
    """Files that the archive would hold if everything were committed."""
    new = git_files("--others", "--exclude-standard", "--exclude-from=.comfyignore")
    # the patterns above do not apply to the files that git tracks already
    return sorted(new - git_files("--ignored", "--exclude-from=.comfyignore"))


def pack(archive: Path) -> None:
    """Write the archive, compressed as comfy-cli does it."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in packed():
            file.write(ROOT / name, name)
