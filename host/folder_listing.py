"""Cached lists of the pack's files below ComfyUI's input and output folders.

People keep hundreds of thousands of images there, and ComfyUI requests these lists whenever a page loads or a prompt is
queued. One walk per folder finds the files of all kinds. Later walks read a directory again only if its modification
time has changed, as ComfyUI's own lists of models do.

Links to files and folders are followed, as ComfyUI does in its model folders: outputs are often kept on another disk.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

# only files with these endings are cached and listed
ENDINGS = (".safetensors", ".jsonl")

# A directory is read again the next time if its last change was less than this many nanoseconds before it was read.
# The reason: file systems round modification times (FAT to 2 s), so that a further change may not alter the time.
COARSEST = 2_000_000_000
_READ_AGAIN = -1  # differs from every modification time


@dataclass(frozen=True)
class _Directory:
    changed: int  # modification time in ns, or _READ_AGAIN
    files: tuple[str, ...]
    folders: tuple[str, ...]


_known: dict[str, _Directory] = {}  # by path


def files_below(root: str, ending: str) -> list[str]:
    """Sorted paths relative to ``root`` of all files whose names end in ``ending``, for example ".seed.safetensors".

    ``ending`` must itself end in one of ENDINGS. Broken links are left out, and so are the files in directories that
    cannot be read.
    """
    return sorted(
        os.path.relpath(os.path.join(place, name), root)
        for place, names in _walk(root)
        for name in names
        if name.endswith(ending) and os.path.isfile(os.path.join(place, name))
    )


def _walk(place: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (directory, names of its files with one of ENDINGS) for ``place`` and every directory below it.

    ``above``: device and inode of each directory above ``place``. Links that lead back to one of these are not
    followed.
    """
    try:
        state = os.stat(place)
        identity = state.st_dev, state.st_ino
        if state.st_ino and identity in above:  # st_ino is 0 on file systems without inode numbers
            return
        found = _known.get(place)
        if found is None or found.changed != state.st_mtime_ns:
            found = _known[place] = _read(place, state.st_mtime_ns)
    except OSError:  # removed meanwhile, or not readable
        _known.pop(place, None)
        return
    yield place, found.files
    for folder in found.folders:
        yield from _walk(os.path.join(place, folder), (*above, identity))


def _read(place: str, changed: int) -> _Directory:
    recent = time.time_ns() - changed < COARSEST
    files, folders = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            # a broken link may become a directory when its disk is mounted; this does not alter the time of ``place``
            if entry.is_dir() or (entry.is_symlink() and not os.path.exists(entry.path)):
                folders.append(entry.name)
            if entry.name.endswith(ENDINGS):
                files.append(entry.name)
    return _Directory(_READ_AGAIN if recent else changed, tuple(files), tuple(folders))
