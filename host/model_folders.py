"""The pack's folders below the host's models/."""

import os
from collections.abc import Collection
from pathlib import Path

import folder_paths


def register_folder(name: str, suffixes: Collection[str]) -> None:
    """Make models/``name`` a model folder of the host, beside those that extra_model_paths.yaml names."""
    folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
    # the host registers for files of any kind
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(name), set(suffixes))


def add_shipped_files(name: str, folder: Path) -> None:
    """Offer the files of ``folder``, which come with the pack, after those of the user in models/``name``.

    A folder that does not exist is left out.
    """
    if folder.is_dir():
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
        folder_paths.add_model_folder_path(name, str(folder))
