"""Lays pictures that come with the pack out as folders of ComfyUI's input, for the nodes that read folders: INPUT NAME ...

Each folder is made whole or not at all.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..demo.canvas import phrase
from ..demo.face_pairs import load_face_pairs
from ..demo.references import ACROSS, EACH, FILE, SIZE
from ..demo.signs import load_signs
from .server import FACE_PAIRS, SIGNS


def write_signs(folder: Path) -> None:
    """The reference pictures as data-set nodes read them: each with its caption in a .txt."""
    sheet = Image.open(FILE).convert("RGB")
    for place, sign in enumerate(load_signs()):
        row, column = divmod(place, ACROSS)
        for k in range(EACH):
            left, top = (column * EACH + k) * SIZE, row * SIZE
            file = folder / f"{sign.name} {k + 1}.png"
            sheet.crop((left, top, left + SIZE, top + SIZE)).save(file)
            file.with_suffix(".txt").write_text(phrase(sign.name), encoding="utf-8")


def write_face_pairs(folder: Path) -> None:
    """The pairs of face signs as Save Training Pairs writes them, see host/training_pairs.py."""
    source, target, prompts = load_face_pairs()
    for side, pictures in (("source", source), ("target", target)):
        (folder / side).mkdir()
        for number, picture in enumerate(pictures, 1):
            Image.fromarray(picture).save(folder / side / f"{number:05}.png")
    lines = [json.dumps({"number": number, "prompt": prompt}) for number, prompt in enumerate(prompts, 1)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS = {SIGNS: write_signs, FACE_PAIRS: write_face_pairs}


def main(place: str, *names: str) -> None:
    inputs = Path(place)
    inputs.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory(dir=inputs) as half_made:
            part = Path(half_made, name)
            part.mkdir()
            WRITERS[name](part)
            try:
                part.rename(inputs / name)
            except OSError:
                if not (inputs / name).is_dir():  # another server of this folder has made it meanwhile
                    raise


if __name__ == "__main__":
    main(*sys.argv[1:])
