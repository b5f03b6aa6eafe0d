"""Runs workflow files on a ComfyUI server, and saves their images and a page that shows them.

Arguments: ADDRESS OUTPUT_FOLDER WORKFLOW.json ...
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

from . import gallery
from .client import Comfy, WorkflowError, needs


def progress_bar(title: str, prompt: dict):
    """A tqdm bar and the event listener that updates it. Each node counts as one unit, and as a fraction while it
    runs."""
    bar = tqdm(
        total=len(prompt),
        desc=title,
        file=sys.stdout,
        bar_format="{desc} |{bar:30}| {percentage:3.0f}% {elapsed}{postfix}",
        mininterval=0.1 if sys.stdout.isatty() else 5,
    )
    done: dict[str, float] = {}

    def listen(kind: str, data: dict):
        if kind == "execution_cached":
            done.update(dict.fromkeys(data["nodes"], 1.0))
        elif kind == "progress_state":
            done.update({n: s["value"] / max(s["max"], 1) for n, s in data["nodes"].items() if n in prompt})
        elif kind == "executing" and data.get("node") in prompt:
            bar.set_postfix_str(prompt[data["node"]]["class_type"], refresh=False)
        bar.n = round(sum(done.values()), 2)
        bar.update(0)

    return bar, listen


def save(image: bytes, folder: Path, stem: str, suffix: str) -> Path:
    """Write an image to a file with the next free number, without overwriting any file; returns its path."""
    number = 1
    while (path := folder / f"{stem}_{number:05}{suffix}").exists():
        number += 1
    path.write_bytes(image)
    return path


def run_file(comfy: Comfy, file: Path, folder: Path) -> gallery.Entry:
    """Run a workflow, unless it needs models that are not in the pack, and save its images."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    entry = gallery.Entry(file.stem, gallery.first_paragraph(workflow))
    if files := needs(workflow):
        print(f"{file.stem}: skipped, it needs {', '.join(files)}")
        entry.remark = f"Skipped: it needs {', '.join(files)}."
        return entry
    prompt = comfy.to_api(workflow)
    bar, listen = progress_bar(file.stem, prompt)
    try:
        result = comfy.run(prompt, listen)
        bar.n = len(prompt)
    finally:
        bar.close()
    print(f"{file.stem}: {result.seconds:.1f} s")
    entry.seconds = result.seconds
    for _, name, image in comfy.images(result):
        # ComfyUI's file name ends in a counter, which is removed; the prefix distinguishes several images of one
        # workflow
        prefix = re.sub(r"_\d+_?$", "", Path(name).stem)
        plain = prefix in ("ComfyUI", file.stem)
        path = save(image, folder, file.stem if plain else f"{file.stem} - {prefix}", Path(name).suffix)
        entry.pictures.append((path, "" if plain else prefix))
        print(f"    {path}")
    for node, name, image in comfy.images(result, kind="temp"):  # preview images
        shown_by = prompt[node]["class_type"]
        path = save(image, folder, f"{file.stem} - {shown_by}", Path(name).suffix)
        entry.pictures.append((path, shown_by))
        print(f"    {path}")
    return entry


def main(address: str, output: str, *files: str) -> int:
    folder, failed, entries = Path(output), [], []
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    folder.mkdir(exist_ok=True)
    with Comfy(address) as comfy:
        for file in map(Path, files):
            try:
                entries.append(run_file(comfy, file, folder))
            except (WorkflowError, OSError) as error:  # OSError: the server ended or timed out
                print(f"{file.stem} failed: {error}", file=sys.stderr)
                entries.append(gallery.Entry(file.stem, "", remark=f"Failed: {error}"))
                failed.append(file.stem)
    print(f"\nAll pictures: {gallery.write(entries, folder)}")
    if failed:
        print(f"{len(failed)} of {len(files)} workflows failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
