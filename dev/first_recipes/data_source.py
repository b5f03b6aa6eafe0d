"""Fetches the two emoji packages by npm name into the project's cache, and verifies them.

Noto pictures come from `emoji-datasource-google`, Twemoji pictures from `emoji-datasource-twitter`.
"""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "emoji"
VERSION = "16.0.0"
PACKAGES = {  # style -> (npm package, folder of pictures inside it, sha256 of the tarball)
    "noto": (
        "emoji-datasource-google",
        "img/google/64",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "twemoji": (
        "emoji-datasource-twitter",
        "img/twitter/64",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
}


def pictures(style: str) -> Path:
    """The folder with the 64x64 PNGs of a style; downloads (60 MB) at the first call."""
    package, inside, sha256 = PACKAGES[style]
    folder = CACHE / f"{package}-{VERSION}"
    if not (folder / "complete").exists():
        tarball = _pack(package)
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != sha256:
            raise RuntimeError(f"{tarball} has sha256 {found}, expected {sha256}: delete it and run the recipe again.")
        _unpack(tarball, folder, inside)
    return folder / inside


def _pack(package: str) -> Path:
    tarball = CACHE / f"{package}-{VERSION}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"npm is not installed: install Node.js, or put the output of `npm pack {package}@{VERSION}` at {tarball}."
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [npm, "pack", f"{package}@{VERSION}", "--silent", "--cache", str(CACHE / "npm")], cwd=CACHE, check=True
    )
    return tarball


def _unpack(tarball: Path, folder: Path, inside: str) -> None:
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            wanted = name.startswith(inside) or name in ("emoji.json", "LICENSE", "package.json")
            if member.isfile() and wanted and (content := archive.extractfile(member)) is not None:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    (folder / "complete").touch()
