"""Pairs of pictures on disk, for training: what is to be changed, what it is to become, and the prompt of both.

A data set is a folder with source/00001.png, target/00001.png and a line {"number": 1, "prompt": "..."} in prompts.jsonl. A
pair counts when all three are there. Nothing is overwritten, and a program that is killed at any moment leaves whole pairs:
the pictures are written as source/00001.png.part and so on, which nobody lists, then the line, then they get their names. If
that end is missing, whoever next writes or reads here catches up on it; parts without a line stay as they are, and their
number is skipped.

Pictures are [H, W, 3] in 0..1 and have 8 bits on disk.
"""

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import comfy.model_management
import folder_paths
import node_helpers
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...host.files import CANNOT, cannot_be

SIDES = ("source", "target")
LIST = "prompts.jsonl"
MOST = 10**9  # a number in it
MARK = " [output]"  # the host's, behind what is in the output folder
COMPRESSION = 4  # as the host's Save Image


class PairFolder:
    """A data set. ``root`` need not be there yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def to_write(cls, name: str) -> "PairFolder":
        """The folder ``name`` below the output folder; a ValueError for any other place."""
        if cannot_be(name):
            raise ValueError(f"folder {name[:40]!r} {CANNOT}; give a name such as training_pairs/faces")
        output = folder_paths.get_output_directory()
        root = os.path.abspath(os.path.join(output, name))
        inside = all(folder_paths.is_within_directory(output, os.path.join(root, part)) for part in ("", *SIDES, LIST))
        if not name.strip() or os.path.isabs(name) or not inside or root == os.path.abspath(output):
            raise ValueError(
                f"folder '{name}' is no folder below the output folder; give a relative name such as training_pairs/faces"
            )
        if os.path.lexists(root) and not os.path.isdir(root):
            raise ValueError(f"folder '{name}' is a file in the output folder; give another name")
        return cls(Path(root))

    @classmethod
    def to_read(cls, name: str) -> "PairFolder":
        """One of ``pair_folders()``; a ValueError for anything else."""
        if name not in pair_folders():
            raise ValueError(
                f"there is no folder of pairs '{name}' in the input or output folder; save some with Save Training Pairs,"
                " or refresh the list"
            )
        bare, folder = folder_paths.annotated_filepath(name)
        return cls(Path(folder or folder_paths.get_input_directory(), bare))

    def picture(self, side: str, number: int) -> Path:
        return self.root / side / f"{number:05}.png"

    def _part(self, side: str, number: int) -> Path:
        return self.root / side / f"{number:05}.png.part"

    def prompts(self) -> dict[int, str]:
        """By number, of all lines that are whole."""
        found = {}
        with suppress(FileNotFoundError):
            for line in (self.root / LIST).read_bytes().splitlines():
                # a line that was cut off when the disk was full is none, nor one that somebody wrote otherwise
                with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    entry = json.loads(line)
                    number = int(entry["number"])
                    if 0 < number <= MOST:
                        found[number] = str(entry["prompt"])
        return found

    def numbers(self) -> list[int]:
        """Of the pairs that are whole, in order."""
        self._catch_up()
        return [n for n in sorted(self.prompts()) if all(self.picture(side, n).is_file() for side in SIDES)]

    def add(self, pair: Sequence[Tensor], prompt: str, metadata: Mapping[str, str]) -> int:
        """Write a pair as the next free number, which is returned."""
        files = [_png(picture, metadata) for picture in pair]
        for side in SIDES:
            (self.root / side).mkdir(parents=True, exist_ok=True)
        self._catch_up()
        number, written = self._free(), []
        try:
            for side, data in zip(SIDES, files):
                # x: not the file of another program that has found the same number
                with open(self._part(side, number), "xb") as file:
                    written.append(self._part(side, number))
                    file.write(data)
            self._append({"number": number, "prompt": prompt})
        except BaseException:
            for part in written:
                part.unlink(missing_ok=True)
            raise
        self._publish(number)
        return number

    def _free(self) -> int:
        names = [path.name.partition(".")[0] for side in SIDES for path in (self.root / side).iterdir()]
        return 1 + max([0, *self.prompts(), *(int(name) for name in names if name.isdecimal())])

    def _append(self, entry: Mapping) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with open(self.root / LIST, "ab+", buffering=0) as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            # in one piece, so that no other program's line comes between
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / LIST))

    def _catch_up(self) -> None:
        """Give the pictures of pairs that have their line their names."""
        waiting = {path.name.partition(".")[0] for side in SIDES for path in (self.root / side).glob("*.png.part")}
        if waiting:
            for number in self.prompts():
                if f"{number:05}" in waiting:
                    self._publish(number)

    def _publish(self, number: int) -> None:
        for side in SIDES:
            if not self.picture(side, number).exists():
                with suppress(FileNotFoundError):  # another program was faster
                    os.rename(self._part(side, number), self.picture(side, number))


def save_pairs(
    folder: str,
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    prompts: Sequence[str],
    metadata: Mapping[str, str],
) -> list[dict[str, str]]:
    """Write the pairs of some batches [B, H, W, 3]; returns their pictures as the host shows them.

    ``prompts``: one for all, for each pair, or for each batch of ``source``. Errors (ValueError), before anything is written: a
    folder elsewhere, other numbers or sizes on the two sides, pictures that are no RGB or hold NaN.
    """
    data_set = PairFolder.to_write(folder)
    pairs = list(_paired(_pictures("source", source), _pictures("target", target)))
    prompts = _one_each(prompts, [len(batch) for batch in source])
    saved = []
    for pair, prompt in zip(pairs, prompts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        number = data_set.add(pair, prompt, metadata)
        for side in SIDES:
            place = os.path.relpath(data_set.root / side, folder_paths.get_output_directory())
            saved.append({"filename": data_set.picture(side, number).name, "subfolder": place, "type": "output"})
    return saved


def load_pairs(name: str, first: int = 0, count: int = 0) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Source and target pictures [1, H, W, 3] in 0..1 and prompts of the whole pairs of a folder, by number.

    ``first``: pairs that are left out at the beginning; ``count``: how many are read, 0 for all.
    """
    data_set = PairFolder.to_read(name)
    numbers = chosen(data_set.numbers(), name, first, count)
    prompts, found = data_set.prompts(), ([], [])
    for number in numbers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for side, pictures in zip(SIDES, found):
            pictures.append(_read(data_set.picture(side, number)))
        if found[0][-1].shape != found[1][-1].shape:
            raise ValueError(
                f"pair {number} of '{name}' has pictures of two sizes; delete {number:05}.png from both sides"
            )
    return *found, [prompts[number] for number in numbers]


def chosen(pairs: list, name: str, first: int, count: int) -> list:
    """Those of the ``pairs`` of ``name`` that are read, see ``load_pairs``."""
    found = pairs[first : first + count if count else None]
    if not found:
        raise ValueError(f"'{name}' holds {len(pairs)} whole pairs, none from {first} on; lower 'first', or save more")
    return found


def pair_folders() -> list[str]:
    """The data sets of the input folder, and those of the output folder with the host's mark for it."""
    folders = (folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), MARK)
    return [
        os.path.relpath(place, folder).replace(os.sep, "/") + mark
        for folder, mark in folders
        for place, _, files in sorted(os.walk(folder))
        if LIST in files
        and os.path.isfile(os.path.join(place, LIST))
        and os.path.abspath(place) != os.path.abspath(folder)
    ]


def fingerprint(name: str | None) -> str | float:
    """Another value when pairs came or went; always another where the name is wired."""
    if name is None:
        return float("nan")
    data_set = PairFolder.to_read(name)
    data_set.numbers()
    places = (data_set.root / part for part in (LIST, *SIDES))
    return hashlib.sha256(
        " ".join(str(place.stat().st_mtime_ns) for place in places if place.exists()).encode()
    ).hexdigest()


def _pictures(name: str, batches: Sequence[Tensor]) -> list[Tensor]:
    for batch in batches:
        if batch.ndim != 4 or batch.shape[-1] != 3:
            raise ValueError(
                f"{name} {tuple(batch.shape)} is no RGB [batch, height, width, 3]; drop the alpha (Split Image with Alpha),"
                " or repeat grey three times"
            )
        if not bool(batch.isfinite().all()):
            raise ValueError(
                f"{name} holds numbers that are NaN or infinite; nothing was saved, make the pictures anew"
            )
    return [picture for batch in batches for picture in batch]


def _paired(source: list[Tensor], target: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if len(source) != len(target):
        raise ValueError(f"{len(source)} source and {len(target)} target pictures are no pairs; wire as many of both")
    for k, pair in enumerate(zip(source, target)):
        sizes = [f"{picture.shape[1]}x{picture.shape[0]}" for picture in pair]
        if sizes[0] != sizes[1]:
            raise ValueError(f"pair {k + 1} has {sizes[0]} and {sizes[1]} pixels; paint or scale both to one size")
        yield pair


def _one_each(prompts: Sequence[str], batches: Sequence[int]) -> list[str]:
    """A prompt for every picture of ``batches`` pictures."""
    total = sum(batches)
    if len(prompts) == total:
        return list(prompts)
    if len(prompts) == 1:
        return [prompts[0]] * total
    if len(prompts) == len(batches):
        return [prompt for prompt, count in zip(prompts, batches) for _ in range(count)]
    raise ValueError(
        f"{len(prompts)} prompts for {total} pairs in {len(batches)} batches; wire one for all, for each pair or for each batch"
    )


def _png(picture: Tensor, metadata: Mapping[str, str]) -> bytes:
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value)
    pixels = (picture.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", pnginfo=info, compress_level=COMPRESSION)
    return data.getvalue()


def _read(path: Path) -> Tensor:
    try:
        picture = node_helpers.pillow(Image.open, path).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(
            f"{path} cannot be read as a picture: {str(error)[:200]}; delete {path.name} from both sides"
        ) from error
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255.0)[None]
