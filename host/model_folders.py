"""The pack's folders below the host's models/."""

import os
from collections.abc import Collection
from pathlib import Path

import folder_paths


def register_folder(name: str, suffixes: Collection[str], shipped: Path | None = None) -> None:
    """Make models/``name`` a model folder of the host, beside those that extra_model_paths.yaml names.

    ``shipped``: where such files come with the pack; a place that is not there is left out.
    """
    folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))
    if shipped is not None and shipped.is_dir():
        folder_paths.add_model_folder_path(name, str(shipped))
    # the host registers for files of any kind
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(name), set(suffixes))
