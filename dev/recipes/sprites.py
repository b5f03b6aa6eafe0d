"""Downloads and verifies the npm packages of the emoji, and renders the emoji as premultiplied RGBA sprites.

Style ``glossy``: Fluent emoji in 3D (Microsoft, MIT), images of 256 pixels. Style ``flat``: Twemoji (CC-BY 4.0), vector
graphics.
"""

import functools
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...demo.concepts import load_concepts
from .errors import RecipeError

CACHE = Path(os.environ.get("CHORUS_EMOJI_CACHE") or Path(__file__).resolve().parents[2] / ".cache" / "emoji")
BUNDLE = "CHORUS_SPRITES"  # environment variable: path of an archive of rendered sprites, for machines without network


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    folder: str  # inside the tarball
    suffix: str
    sha256: str

    @property
    def tarball(self):
        return CACHE / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def spec(self):
        return f"{self.name}@{self.version}"


PACKAGES = {
    "glossy": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "package/assets",
        ".webp",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "flat": Package(
        "@twemoji/svg",
        "15.0.0",
        "package",
        ".svg",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
    ),
}


def tarball(package):
    """The path of an npm package's verified tarball. The first call downloads it; both packages have 17 MB together."""
    path = package.tarball
    if not path.exists():
        _download(package)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        path.unlink()
        raise RecipeError(
            f"{path.name} was deleted: expected sha256 {package.sha256}, got {found}; run the recipe again"
        )
    return path


def _download(package):
    npm = shutil.which("npm")
    by_hand = f"put the output of `npm pack {package.spec}` at {package.tarball}"
    if npm is None:
        raise RecipeError(f"npm is not on the path; install Node.js, or {by_hand}")
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = CACHE / f"download-{os.getpid()}"
    fresh.mkdir(exist_ok=True)
    try:
        command = [npm, "pack", package.spec, "--silent", "--cache", str(CACHE / "npm"), "--fetch-retries", "1"]
        result = subprocess.run(command, cwd=fresh, capture_output=True, text=True, errors="replace")
        packed = list(fresh.glob("*.tgz"))
        if result.returncode or not packed:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"exit status {result.returncode}"
            raise RecipeError(
                f"npm could not download {package.spec} ({reason}); check the network and run again, or {by_hand}"
            )
        os.replace(packed[0], package.tarball)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@functools.cache  # it takes several seconds, and a stage has up to eight collections of scenes of one style
def read_images(style):
    """{code: premultiplied RGBA image of 256 x 256 pixels} for every concept and skin tone."""
    package, found = PACKAGES[style], {}
    codes = [code for concept in load_concepts() for code in (concept.code, *concept.tones.values())]
    with tarfile.open(tarball(package)) as archive:
        for code in codes:
            member = None
            for name in (code, code.replace("-fe0f", "")):
                try:
                    member = archive.extractfile(f"{package.folder}/{name}{package.suffix}")
                    break
                except KeyError:
                    continue
            if member is None:
                raise RecipeError(f"{package.spec} has no image of {code}; correct the code in demo/data/concepts.json")
            found[code] = _rasterise(member.read(), package.suffix)
    return found


def _rasterise(content, suffix):
    from PIL import Image

    if suffix == ".svg":
        try:
            import resvg_py
        except ImportError as error:
            raise RecipeError(
                "resvg-py, which renders the vector emoji, is not installed; run `pip install resvg-py`"
            ) from error
        # Twemoji fill their whole square; with a margin they are as large as the 3D emoji
        side = 236
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=side, height=side))
        canvas = Image.new("RGBa", (256, 256))
        canvas.paste(Image.open(io.BytesIO(drawn)).convert("RGBa"), ((256 - side) // 2, (256 - side) // 2))
        return canvas
    return Image.open(io.BytesIO(content)).convert("RGBa")


class Sprites:
    """Premultiplied RGBA sprites, uint8 [size, size, 4], by (concept, tone, size). Each is resized once and cached."""

    def __init__(self, style):
        self.style, self.concepts, self.cache, self.images = style, load_concepts(), {}, None
        if bundle := os.environ.get(BUNDLE):
            with np.load(bundle) as archive:
                self.cache = {key: archive[key] for key in archive.files if key.startswith(f"{style}/")}

    def get(self, concept, tone, size):
        key = f"{self.style}/{concept}/{tone}/{size}"
        if key not in self.cache:
            self.cache[key] = self._make(self.concepts[concept], tone, size)
        return self.cache[key]

    def _make(self, concept, tone, size):
        from PIL import Image

        if self.images is None:
            self.images = read_images(self.style)
        image = self.images[concept.tones[tone] if tone else concept.code]
        return np.ascontiguousarray(image.resize((size, size), Image.Resampling.LANCZOS))


def write_bundle(path, sizes):
    """Write all sprites of the given sizes to one archive, which ``$CHORUS_SPRITES`` can point to."""
    rendered = {}
    for style in PACKAGES:
        sprites = Sprites(style)
        for index, concept in enumerate(sprites.concepts):
            for tone in ("", *concept.tones):
                for size in sizes:
                    rendered[f"{style}/{index}/{tone}/{size}"] = sprites.get(index, tone, size)
    np.savez_compressed(path, **rendered)
