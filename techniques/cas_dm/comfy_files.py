"""Cas-DM heads on disk: safetensors, read from models/cas_dm and the host's output folder, written to the latter."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...host.files import KeptFiles, diagnosis, need_name
from ...host.model_folders import register_folder
from .network import Head, from_file

FOLDER, SUFFIX = "cas_dm", ".safetensors"
FILES = KeptFiles(".cas_dm.safetensors", "Cas-DM head", "Save Cas-DM Head", "cas_dm/head")  # those that were saved
OUTPUT = " [output]"  # the host's mark for its output folder


register_folder(FOLDER, {SUFFIX})


def head_files() -> list[str]:
    """What a combo offers: the files of the model folder, then the saved ones of the output folder."""
    kept = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]
    return kept + [name for name in FILES.names() if name.endswith(OUTPUT)]


def find_head(name: str) -> Path:
    """The file of one of ``head_files``; a ValueError where there is none."""
    need_name(name, FILES.kind)
    if name.endswith(OUTPUT):
        return FILES.find(name)
    if not name.endswith(SUFFIX):
        raise ValueError(f"'{name}' is not a {SUFFIX} file; only those are read, which cannot run code")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(
            f"there is no head '{name}' in {' or '.join(folder_paths.get_folder_paths(FOLDER))}; save one with Save"
            " Cas-DM Head, or refresh the list"
        )
    return Path(path)


def validate_head(name: str | None) -> bool | str:
    """What validate_inputs gives; None is a wired name, known only when the node runs."""
    try:
        if name is not None:
            find_head(name)
    except ValueError as error:
        return str(error)
    return True


def fingerprint_head(name: str | None) -> str | float:
    """What fingerprint_inputs gives: another value when the file changes, or always where the name is wired."""
    return float("nan") if name is None else hashlib.sha256(find_head(name).read_bytes()).hexdigest()


def read_head(name: str) -> Head:
    """One of ``head_files``; a ValueError that names it where it is no head."""
    return read_head_file(find_head(name), name)


@torch.inference_mode(False)  # training needs weights of which autograd may know
def read_head_file(path: Path, name: str = "") -> Head:
    """The head of any file, which errors call ``name``."""
    name = name or str(path)
    try:
        with safe_open(path, framework="pt") as file:
            # copies: the file does not stay open
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{name}' cannot be read: {diagnosis(path)} ({str(error)[:200]})") from error
    try:
        return from_file(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"'{name}' cannot be read as a Cas-DM head: {error}") from error


def save_head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str) -> Path:
    """A new numbered file of the output folder: whole or not at all, and never in place of another."""
    place = FILES.save(prefix, tensors, metadata)
    return Path(folder_paths.get_output_directory(), place["subfolder"], place["filename"])
