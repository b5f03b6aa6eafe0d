"""Training pairs on disk: source image, target image and prompt.

A data set is a folder. Its first pair consists of source/00001.png, target/00001.png and the line
{"number": 1, "prompt": "..."} in prompts.jsonl. A pair is complete when all three exist. Existing files are never
overwritten.

A pair is saved in three steps, so that a killed process leaves only complete pairs. First both images are written as
.png.part, then the line is appended to prompts.jsonl, and finally the images are renamed to .png. If the process is
killed between the last two steps, the next read or write renames the images. If a pair has no line, its .png.part files
are never read, and its number is skipped. Several processes may save into one folder: a .png.part file reserves its
number for the process that created it.

Images are [H, W, 3] in 0..1. On disk they have 8 bits per channel.
"""

import errno
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import comfy.model_management
import folder_paths
import node_helpers
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...host.files import INVALID_PATH, is_invalid_path, outside_output
from ...host.folder_listing import files_below
from .refine import check_images

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SIDES = ("source", "target")
LIST = "prompts.jsonl"
MAX_NUMBER = 10**9  # largest number of a pair
LOCKED_BYTE = 2**30  # position in prompts.jsonl that Windows locks; far after the end, so that the lines can be read
MARK = " [output]"  # ComfyUI's suffix for files of the output folder
COMPRESSION = 4  # as in ComfyUI's Save Image


class PairFolder:
    """A data set. ``root`` may not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def to_write(cls, name: str) -> "PairFolder":
        """The folder ``name`` below the output folder; a ValueError for any other place."""
        if is_invalid_path(name):
            raise ValueError(f"folder {name[:40]!r} {INVALID_PATH}; use a name such as training_pairs/faces")
        output = folder_paths.get_output_directory()
        root = os.path.abspath(os.path.join(output, name))
        inside = all(folder_paths.is_within_directory(output, os.path.join(root, part)) for part in ("", *SIDES, LIST))
        if not name.strip() or root == os.path.abspath(output):
            raise ValueError(f"folder {name!r} is the output folder itself; use a name such as training_pairs/faces")
        if os.path.isabs(name) or not inside:
            raise ValueError(
                f"folder '{name}' is {outside_output(name)}; use a relative name such as training_pairs/faces"
            )
        if os.path.lexists(root) and not os.path.isdir(root):
            raise ValueError(f"folder '{name}' is a file in the output folder; use another name")
        return cls(Path(root))

    @classmethod
    def to_read(cls, name: str) -> "PairFolder":
        """One of ``pair_folders()``; a ValueError for anything else."""
        if name not in pair_folders():
            raise ValueError(missing_folder(name))
        bare, folder = folder_paths.annotated_filepath(name)
        return cls(Path(folder or folder_paths.get_input_directory(), bare))

    def image(self, side: str, number: int) -> Path:
        return self.root / side / f"{number:05}.png"

    def _part(self, side: str, number: int) -> Path:
        return self.root / side / f"{number:05}.png.part"

    def prompts(self) -> dict[int, str]:
        """Prompts by number, from all valid lines."""
        result = {}
        with suppress(FileNotFoundError):
            for line in (self.root / LIST).read_bytes().splitlines():
                # skip invalid lines: the disk was full when they were written, or they were edited by hand
                with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    entry = json.loads(line)
                    number = int(entry["number"])
                    if 0 < number <= MAX_NUMBER:
                        result[number] = str(entry["prompt"])
        return result

    def numbers(self) -> list[int]:
        """The numbers of the complete pairs, in order."""
        self._publish_indexed()
        return [n for n in sorted(self.prompts()) if all(self.image(side, n).is_file() for side in SIDES)]

    def add(self, pair: Sequence[Tensor], prompt: str, metadata: Mapping[str, str]) -> int:
        """Write a pair and return its number, which is the next free number."""
        files = [_png(image, metadata) for image in pair]
        for side in SIDES:
            (self.root / side).mkdir(parents=True, exist_ok=True)
        self._publish_indexed()
        number = 0
        while True:
            number = max(number + 1, self._next_number())
            # another process that saves here may have taken this number since the folder was read
            with suppress(FileExistsError):
                self._write(number, files, prompt)
                return number

    def _write(self, number: int, files: Sequence[bytes], prompt: str) -> None:
        """Write the pair ``number``. FileExistsError, and no change, if another process has taken this number."""
        written = []
        try:
            for side, data in zip(SIDES, files):
                # mode x: only one process at a time can create the file
                with open(self._part(side, number), "xb") as file:
                    written.append(self._part(side, number))
                    # a process that has finished this number has renamed its .part files
                    if os.path.lexists(self.image(side, number)):
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.image(side, number)))
                    file.write(data)
            self._append({"number": number, "prompt": prompt})
        except BaseException:
            for part in written:
                part.unlink(missing_ok=True)
            raise
        self._publish(number)

    def _next_number(self) -> int:
        names = [path.name.partition(".")[0] for side in SIDES for path in (self.root / side).iterdir()]
        return 1 + max([0, *self.prompts(), *(int(name) for name in names if name.isdecimal())])

    def _append(self, entry: Mapping) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with open(self.root / LIST, "ab+", buffering=0) as file, _locked(file):
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root / LIST))

    def _publish_indexed(self) -> None:
        """Rename the .part images of pairs that have a line in prompts.jsonl."""
        waiting = {path.name.partition(".")[0] for side in SIDES for path in (self.root / side).glob("*.png.part")}
        if waiting:
            for number in self.prompts():
                if f"{number:05}" in waiting:
                    self._publish(number)

    def _publish(self, number: int) -> None:
        for side in SIDES:
            with suppress(FileNotFoundError):  # another process was faster
                _rename(self._part(side, number), self.image(side, number))


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Let other processes that append to ``file`` wait meanwhile, so that every line is written whole."""
    with suppress(OSError):  # the file system has no locks
        if sys.platform == "win32":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            if sys.platform == "win32":
                file.seek(LOCKED_BYTE)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_UN)


def _rename(part: Path, target: Path) -> None:
    """Rename ``part`` to ``target``; an existing ``target`` is kept. FileNotFoundError if ``part`` does not exist."""
    try:
        # unlike a renaming, a hard link never replaces an image that another process has just written
        os.link(part, target)
    except FileExistsError:
        # the same file if a process was killed before it deleted the name .part
        if os.path.samefile(part, target):
            os.unlink(part)
    except FileNotFoundError:
        raise
    except OSError:  # the file system has no hard links
        if not os.path.lexists(target):
            os.rename(part, target)
    else:
        os.unlink(part)


def save_pairs(
    folder: str,
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    prompts: Sequence[str],
    metadata: Mapping[str, str],
) -> list[dict[str, str]]:
    """Write ``source`` and ``target``, lists of batches [B, H, W, 3], as pairs. Returns the images for ComfyUI's ``ui``.

    ``prompts``: one prompt for all pairs, one for each pair, or one for each batch of ``source``. Before anything is
    written, a ValueError is raised if the folder is outside the output folder, if source and target differ in number or
    size, or if an image is not RGB or not finite.
    """
    data_set = PairFolder.to_write(folder)
    pairs = list(_paired(_checked_images("source", source), _checked_images("target", target)))
    prompts = _one_each(prompts, [len(batch) for batch in source])
    saved = []
    for pair, prompt in zip(pairs, prompts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        number = data_set.add(pair, prompt, metadata)
        for side in SIDES:
            place = os.path.relpath(data_set.root / side, folder_paths.get_output_directory())
            saved.append({"filename": data_set.image(side, number).name, "subfolder": place, "type": "output"})
    return saved


def load_pairs(name: str, first: int = 0, count: int = 0) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Source and target images [1, H, W, 3] in 0..1 and prompts of a folder's complete pairs, in order of number.

    ``first``: number of pairs to skip at the beginning. ``count``: number of pairs to read; 0 reads all.
    """
    data_set = PairFolder.to_read(name)
    numbers = selected(data_set.numbers(), name, first, count)
    prompts, sides = data_set.prompts(), ([], [])
    for number in numbers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for side, images in zip(SIDES, sides):
            images.append(_read(data_set.image(side, number)))
        sizes = [f"{images[-1].shape[2]}x{images[-1].shape[1]}" for images in sides]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"pair {number} of '{name}' is {sizes[0]} in source and {sizes[1]} in target; delete {number:05}.png from"
                " source and target"
            )
    return *sides, [prompts[number] for number in numbers]


def selected(pairs: list, name: str, first: int, count: int) -> list:
    """The next ``count`` entries of ``pairs`` after the first ``first`` entries, or all of them if ``count`` is 0.

    ``name``: the folder of the pairs, for the error message.
    """
    result = pairs[first : first + count if count else None]
    if not result:
        raise ValueError(
            f"no pairs to load: '{name}' holds {len(pairs)} complete pairs, and 'first' {first} skips all of them;"
            " use a smaller 'first', or save more pairs"
        )
    return result


def pair_folders() -> list[str]:
    """Names of the data sets: first those in the input folder, then those in the output folder with MARK appended."""
    folders = (folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), MARK)
    return [
        place.replace(os.sep, "/") + mark
        for folder, mark in folders
        for place, name in map(os.path.split, files_below(folder, LIST))
        if place and name == LIST
    ]


def missing_folder(name: str) -> str:
    """The error message for a folder that is not one of ``pair_folders()``."""
    return (
        f"there is no folder of pairs '{name}' in the input or output folder; save pairs with Save Training Pairs, or"
        " refresh the list"
    )


def fingerprint(name: str | None) -> str | float:
    """A value that changes when the pairs change.

    If ``name`` is None, because it comes from another node, the value is NaN, which never equals the previous value.
    """
    if name is None:
        return float("nan")
    data_set = PairFolder.to_read(name)
    data_set.numbers()
    places = (data_set.root / part for part in (LIST, *SIDES))
    return hashlib.sha256(
        " ".join(str(place.stat().st_mtime_ns) for place in places if place.exists()).encode()
    ).hexdigest()


def _checked_images(name: str, batches: Sequence[Tensor]) -> list[Tensor]:
    for batch in batches:
        check_images(batch, name)
        if not bool(batch.isfinite().all()):
            raise ValueError(
                f"the images of {name} are not finite (NaN or infinite), so nothing is saved; generate them again"
            )
    return [image for batch in batches for image in batch]


def _paired(source: list[Tensor], target: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if len(source) != len(target):
        raise ValueError(
            f"got {len(source)} source and {len(target)} target images; connect equal numbers in the same order"
        )
    for k, pair in enumerate(zip(source, target)):
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in pair]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"pair {k + 1} is {sizes[0]} in source and {sizes[1]} in target; scale both to the same size"
            )
        yield pair


def _one_each(prompts: Sequence[str], batches: Sequence[int]) -> list[str]:
    """A prompt for every image; ``batches``: the sizes of the batches."""
    total = sum(batches)
    if len(prompts) == total:
        return list(prompts)
    if len(prompts) == 1:
        return [prompts[0]] * total
    if len(prompts) == len(batches):
        return [prompt for prompt, count in zip(prompts, batches) for _ in range(count)]
    raise ValueError(
        f"got {len(prompts)} prompts for {total} pairs in {len(batches)} batches; connect one prompt for all pairs,"
        " one for each pair, or one for each batch"
    )


def _png(image: Tensor, metadata: Mapping[str, str]) -> bytes:
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, value)
    pixels = (image.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", pnginfo=info, compress_level=COMPRESSION)
    return data.getvalue()


def _read(path: Path) -> Tensor:
    try:
        image = node_helpers.pillow(Image.open, path).convert("RGB")
    except Exception as error:  # Pillow raises errors of many types
        raise ValueError(
            f"{path} cannot be read as an image: {str(error)[:200]}; delete {path.name} from source and target"
        ) from error
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)[None]
