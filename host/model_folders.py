"""The pack's folders below ComfyUI's models/."""

import os
from collections.abc import Collection
from pathlib import Path

import folder_paths

_shipped: set[str] = set()  # folders of add_shipped_files, which an update of the pack may replace


def register_folder(name: str, suffixes: Collection[str]) -> None:
    """Register models/``name`` as a model folder, beside those from extra_model_paths.yaml."""
    folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
    # ComfyUI registers new folders for all file types
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(name), set(suffixes))


def places(name: str) -> str:
    """The user's folders for the files of models/``name``, for error messages; it says which of them do not exist yet.

    Leaves out the folders that ship with the pack: an update may delete other files there.
    """
    folders = [folder for folder in folder_paths.get_folder_paths(name) if folder not in _shipped]
    missing = " (create this folder, it does not exist yet)"
    return " or ".join(folder if os.path.isdir(folder) else folder + missing for folder in folders)


def is_in_model_folder(path: str) -> bool:
    """Whether ``path`` is below one of the model folders that are registered in ComfyUI; links are not followed."""
    roots = [root for roots, _ in folder_paths.folder_names_and_paths.values() for root in roots]
    return any(Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)) for root in roots)


def add_shipped_files(name: str, folder: Path) -> None:
    """List the files of ``folder``, which ship with the pack, after those of the user in models/``name``.

    Does nothing if ``folder`` does not exist.
    """
    if folder.is_dir():
        _shipped.add(str(folder))
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        folder_paths.add_model_folder_path(name, str(folder))
