"""Reads Cas-DM heads from models/cas_dm and the output folder, and writes them to the output folder (safetensors)."""

from collections.abc import Mapping
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from ...host.files import CONVERT, OutputFiles, check_file_name, read_weights
from ...host.model_folders import places, register_folder
from .network import Head, from_file

FOLDER, SUFFIX = "cas_dm", ".safetensors"
OUTPUT = " [output]"  # ComfyUI's suffix for files of the output folder


register_folder(FOLDER, {SUFFIX})


class HeadFiles(OutputFiles):
    """The head files of the model folder and of the output folder."""

    def names(self) -> list[str]:
        """The options of the file widget: the files of the model folder, then those of the output folder."""
        names = [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(SUFFIX)]
        return names + [name for name in super().names() if name.endswith(OUTPUT)]

    def find(self, name: str) -> Path:
        """Path of the file ``name``, one of ``names()``. A ValueError if it does not exist."""
        check_file_name(name, self.kind)
        if name.endswith(OUTPUT):
            return super().find(name)
        if not name.lower().endswith(SUFFIX):
            raise ValueError(f"'{name}' is not a {SUFFIX} file; {CONVERT}")
        path = folder_paths.get_full_path(FOLDER, name)
        if path is None:
            raise ValueError(
                f"there is no {self.kind} file '{name}'; save one with {self.saver}, put one into {places(FOLDER)}, or"
                " refresh the list"
            )
        return Path(path)


FILES = HeadFiles(".cas_dm.safetensors", "Cas-DM head", "Save Cas-DM Head", "cas_dm/head")


def read_head(name: str) -> Head:
    """The head in the file ``name``, one of ``FILES.names()``. A ValueError with the name if the file is invalid."""
    return read_head_file(FILES.find(name), name)


@torch.inference_mode(False)  # training needs normal tensors: autograd cannot save inference tensors
def read_head_file(path: Path, name: str = "") -> Head:
    """The head in the file ``path``. Error messages refer to the file as ``name``."""
    name = name or str(path)
    tensors, metadata = read_weights(path, f"'{name}'", copy=True)
    try:
        return from_file(tensors, metadata)
    except ValueError as error:
        raise ValueError(
            f"'{name}' cannot be read as a {FILES.kind} file: {error}; save it again with {FILES.saver}"
        ) from error


def save_head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str) -> Path:
    """Write a new numbered file to the output folder and return its path.

    The file is written completely or not at all. Existing files are never overwritten.
    """
    place = FILES.save(prefix, tensors, metadata)
    return Path(folder_paths.get_output_directory(), place["subfolder"], place["filename"])
