"""Compatibility with ComfyUI's model families and nodes: checks with small models, compared with docs/compatibility.md.

python run.py families                      try every cell and print the differences (about ten minutes)
python run.py families --write              also write docs/compatibility.md
python run.py families SD15 RescaleCFG      only these families and nodes; with --write only their rows change
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from .setup import ROOT

PATH = ROOT / "docs" / "compatibility.md"
COMMAND = "python run.py families --write"
HEAD = f"""# Compatibility

This file shows which models can be blended with each other, how the pack works with every model family that ComfyUI
can load, and with every node of ComfyUI that takes a MODEL and returns one. The command `{COMMAND}`
writes this file. The tests repeat the checks and compare their outcomes with this file.
"""
FAMILIES = """## Model families

Each cell of this table and of the next one is the outcome of one check with small models whose weights are random:

- *equal*: the result equals an independent computation.
- *refused*: the pack raises an error that names the reason. The notes hold the messages.
- *not built*: the check was not possible. The notes hold the reason.

The columns are the checks:

- *blend*: the masks and predictions of a blend equal an independent computation in float64 (*the definition*).
- *expert everywhere*: if the expert's region is forced on the whole image, the result is that of the expert alone.
- *same checkpoint*: a blend whose expert has the base's weights and another prompt equals sampling with each prompt alone.
- *other family*: a blend whose expert is of another family with the same latent space equals the definition.
- *neutral*: with strength 0 or an empty region, the result has the same bits as the base alone.
- *grid image*: the images of BlendGrid are those of KSampler, bit for bit, and up to rounding if images share steps.
- *seed search*: KSampler generates the same samples, bit for bit, from the seed that SeedSelect chose.
- *seed gradient*: the gradient of SeedSelect equals finite differences.
- *seed map*: SeedMap samples as KSampler does, and CombineNoise gives the noises that SeedMap samples, bit for bit.
- *untrained head*: CasDMHead with an untrained head changes nothing.
"""
NODES = """## Nodes of ComfyUI

Each node is applied to the base, to the expert, to both, and to the MODEL after Saliency Noise Blend. The expert is
forced into one half of the image. In this half, the predictions must equal those of the expert in a separate run with
its nodes. In the other half, they must equal those of the base with its nodes.
"""
SPACES = """## Latent spaces

Models of one latent space can be blended, whatever their architectures are: each line of the table is one space, with all model
families of this ComfyUI that have it. The blend converts between their noise processes. A fine-tune belongs to the family of its
model: Illustrious, NoobAI and Pony V6 are SDXL.

**Distilled models are less suitable.** The blend compares predictions with the prompt and with the negative prompt. Models that were
distilled with guidance, such as Flux.1 dev and schnell, Z-Image Turbo and Klein, hardly learned negative prompts, so that the masks say
little. Prefer models that are sampled at a cfg above 1, or draw the mask: a `region` with `region_mode` *force*. See *Distilled models*
in the [help of Saliency Noise Blend](../web/docs/SaliencyNoiseBlend.md#good-to-know).
"""
NOTE = re.compile(r"^\[\^(\d+)\]: `(.*)`$", re.M)
CELL = re.compile(r"^(equal|refused|not built|wrong)(?:\[\^(\d+)\])?$")

Cells = dict[tuple[str, str], tuple[str, str]]  # (row, column) -> (kind, text)


def table(cells: Cells, notes: dict[str, int]) -> str:
    """A table of ``cells``. Each new text gets a number in ``notes``."""
    rows, columns = (list(dict.fromkeys(key[side] for key in cells)) for side in (0, 1))

    def entry(row: str, column: str) -> str:
        kind, text = cells[row, column]
        return f"{kind}[^{notes.setdefault(text, len(notes) + 1)}]" if text else kind

    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(entry(row, column) for column in columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def space_table(spaces: dict[str, list[str]]) -> str:
    """A table of the model families (values) of latent spaces (keys) that several families share."""
    lines = [["latent space", "model families"], ["---"] * 2]
    lines += [[space, "; ".join(names)] for space, names in spaces.items() if len(names) > 1]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(families: Cells, nodes: Cells, spaces: dict[str, list[str]], version: str) -> str:
    """The text of docs/compatibility.md."""
    notes: dict[str, int] = {}
    tables = [SPACES + "\n" + space_table(spaces)]
    tables += [FAMILIES + "\n" + table(families, notes), NODES + "\n" + table(nodes, notes)]
    listed = "".join(f"[^{number}]: `{text}`\n" for text, number in notes.items())
    return "\n".join([HEAD, f"Tested with ComfyUI {version}.\n", *tables, listed])


def read(text: str) -> tuple[Cells, Cells]:
    """The cells of the families and of the nodes in the text of docs/compatibility.md."""
    notes = dict(NOTE.findall(text))
    found: list[Cells] = []
    parts = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    for part in (parts["Model families"], parts["Nodes of ComfyUI"]):
        rows = [[word.strip() for word in line.strip("| ").split("|")] for line in part.splitlines() if line[:1] == "|"]
        columns, cells = rows[0] if rows else [], {}
        for row in rows[2:]:
            for column, word in zip(columns[-len(row) + 1 :], row[1:], strict=True):
                match = CELL.match(word)
                if match is None:
                    raise ValueError(
                        f"expected equal, refused or not built in {PATH.name}, got {word}; run `{COMMAND}`"
                    )
                cells[row[0], column] = match[1], notes.get(match[2], "")
        found.append(cells)
    return found[0], found[1]


def documented() -> tuple[Cells, Cells]:
    """The cells of docs/compatibility.md; empty if it does not exist."""
    return read(PATH.read_text(encoding="utf-8")) if PATH.is_file() else ({}, {})


def differences(known: Cells, found: Cells, rows: Iterable[str] | None) -> list[str]:
    """Messages about cells that are wrong or differ from the documented ones.

    ``rows``: all rows of a complete run, to report documented rows that are missing; None for an incomplete run.
    """
    problems = []
    for key, (kind, text) in found.items():
        was = known.get(key, ("missing", ""))
        if kind == "wrong" or was != (kind, text):
            name = ", ".join(key)
            problems.append(f"{name}: {' '.join(filter(None, was))}\n    now: {' '.join(filter(None, (kind, text)))}")
    if rows is not None:
        gone = dict.fromkeys(row for row, _ in known if row not in set(rows))
        problems += [f"{row}: this ComfyUI does not have it" for row in gone]
    return problems


def main(*words: str) -> int:
    """Try the cells, print the differences, and write the file if asked. Returns the number of differences."""
    import comfyui_version

    from chorus.tests.families.family_cells import family_cells, latent_spaces
    from chorus.tests.families.node_cells import node_cells

    write, names = "--write" in words, [word for word in words if word != "--write"]
    known, problems, now = documented(), [], []
    for before, cells in zip(known, (family_cells, node_cells), strict=True):
        found: Cells = {}
        for row, group in itertools.groupby(cells(names or None), key=lambda cell: cell[0]):
            new = {(row, column): (outcome.kind, outcome.text) for _, column, outcome in group}
            for message in differences(before, new, None):
                print(message, flush=True)
                problems.append(message)
            found |= new
        if not names:
            gone = differences(before, {}, {row for row, _ in found})
            print("".join(f"{message}\n" for message in gone), end="")
            problems += gone
        now.append(found if not names else before | found)
    if write:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(page(*now, latent_spaces(), comfyui_version.__version__), encoding="utf-8")
        print(f"wrote {Path(PATH).relative_to(ROOT)}")
    elif not problems:
        print(f"{PATH.name}: up to date")
    else:
        print(f"{len(problems)} differences; after reading them, run `{COMMAND}`")
    return len(problems)


if __name__ == "__main__":
    import logging
    import sys
    import warnings

    import torch

    from .. import headless

    headless.start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    wrong = main(*sys.argv[1:])
    sys.exit(0 if "--write" in sys.argv else min(wrong, 1))
