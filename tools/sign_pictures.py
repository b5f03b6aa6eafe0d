"""Lays the pack's reference pictures out as data-set nodes read them: a folder of pictures, each with its caption in a .txt.

FOLDER is made, whole or not at all.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..demo.canvas import phrase
from ..demo.references import ACROSS, EACH, FILE, SIZE
from ..demo.signs import load_signs


def main(folder: str) -> None:
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet = Image.open(FILE).convert("RGB")
    with tempfile.TemporaryDirectory(dir=target.parent) as half_made:
        part = Path(half_made, target.name)
        part.mkdir()
        for place, sign in enumerate(load_signs()):
            row, column = divmod(place, ACROSS)
            for k in range(EACH):
                left, top = (column * EACH + k) * SIZE, row * SIZE
                file = part / f"{sign.name} {k + 1}.png"
                sheet.crop((left, top, left + SIZE, top + SIZE)).save(file)
                file.with_suffix(".txt").write_text(phrase(sign.name), encoding="utf-8")
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # another server of this folder has made it meanwhile
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
