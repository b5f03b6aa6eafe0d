"""Renders the icon and the banner for the registry in headless Chromium: docs/pictures/*.svg to PNG files of their size.

python dev/tools/icons.py
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "run.py"))  # makes this repository importable as chorus

from chorus.dev.tools.page import find_chromium  # noqa: E402
from chorus.dev.tools.setup import ROOT  # noqa: E402


def main() -> None:
    if not (chromium := find_chromium()):
        sys.exit("Chromium is not on the path; install it or set CHORUS_CHROMIUM to its program")
    # a transparent background, because the icon has round corners
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--default-background-color=00000000"]
    for source in sorted((ROOT / "docs" / "pictures").glob("*.svg")):
        width, height = re.search(r'width="(\d+)" height="(\d+)"', source.read_text(encoding="utf-8")).groups()
        target = source.with_suffix(".png")
        options = [f"--window-size={width},{height}", f"--screenshot={target}", source.as_uri()]
        subprocess.run([*command, *options], check=True, capture_output=True)
        print(f"{target}: {width} x {height}, {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
