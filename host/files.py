"""Writes the safetensors files of nodes atomically, and lists those in the input and output folders.

Also reads weight files from other sources. A ValueError explains why a file cannot be read.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import safetensors.torch
from comfy.cli_args import args
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.torch_files import explain_format, explain_pickle
from .folder_listing import files_below

SAFETENSORS = (".safetensors", ".sft")  # in lower case; ComfyUI reads both
NONE = "none"  # the only option of the file widget if there is no file
WHITESPACE = b"\xef\xbb\xbf \t\r\n"  # which may precede the text of a web page, with the mark of UTF-8
CONVERT = "convert it to .safetensors; other formats are not read, because they can run code"  # last part of errors
MAX_NAME_BYTES = 180  # of a name in a prefix; number, ending and .part are appended, and file systems allow 255


def write_whole(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``target`` atomically: it never exists with partial content. FileExistsError if it already exists.

    The error is also raised while another process writes ``target``. A process killed while writing leaves
    ``<target>.part``, which appears in no list and can be deleted.
    """
    # .part hides the file from ComfyUI's lists
    part, created = target.with_name(f"{target.name}.part"), False
    try:
        data = safetensors.torch.save(
            dict(tensors), dict(metadata)
        )  # not save_file, which would restrict the file's permissions
        # mode x never writes through an existing link, and only one process at a time can create the file
        with open(part, "xb") as file:
            created = True
            file.write(data)
            file.flush()
            # otherwise a power cut may keep the name and lose the content
            os.fsync(file.fileno())
        # checked after the other file was created, so that no other process of the pack can write target in between
        if os.path.lexists(target):
            raise FileExistsError(
                f"{target} was written by another process meanwhile; nothing is overwritten, save again"
            )
        os.replace(part, target)
    except FileExistsError:
        raise
    except OSError as error:
        why = f"{error.strerror or error}: {target} could not be written, no partial file remains; free disk space and save again"
        raise OSError(error.errno, why) from error
    finally:
        if created:
            part.unlink(missing_ok=True)


def write_numbered(
    prefix: str, ending: str, example: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Path, str]:
    """Write the next numbered file for ``prefix`` to the output folder, with write_whole.

    Returns its path, and its subfolder as ComfyUI shows it. If another process takes the number first, the next number
    is used. ValueError if the prefix does not name a file below the output folder; the message suggests ``example``.
    """
    check_prefix(prefix, example)
    # normalised, since for a/b/ ComfyUI would not find the numbers already used
    place, tried = (os.path.normpath(prefix), folder_paths.get_output_directory()), 0
    while True:
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(*place)
        # at least one more than before, so that the loop ends even if ComfyUI returns a used number again
        tried = max(number, tried + 1)
        target = Path(folder, f"{name}_{tried:05}_{ending}")
        try:
            write_whole(target, tensors, metadata)
        except FileExistsError:
            continue
        return target, subfolder


def check_prefix(prefix: str, example: str) -> None:
    """Raise a ValueError if a ``filename_prefix`` cannot name a file below the output folder."""
    folder, name = os.path.split(os.path.normpath(prefix))
    output = folder_paths.get_output_directory()
    if not name.strip(". "):
        raise ValueError(f"filename_prefix '{prefix[:40]}' has no file name; use a name such as {example}")
    if is_invalid_path(prefix):
        raise ValueError(f"filename_prefix {prefix[:40]!r} {INVALID_PATH}; use a name such as {example}")
    if not folder_paths.is_within_directory(output, os.path.join(output, folder)):
        raise ValueError(f"filename_prefix '{prefix}' is {outside_output(prefix)}; use a name such as {example}")


def outside_output(name: str) -> str:
    """Reason why ``name`` is not the relative path of a place inside the output folder, for error messages."""
    if os.path.isabs(name):
        return "an absolute path"
    if path_below(folder_paths.get_output_directory(), name) is None:
        return "outside the output folder"
    return "behind a link that leads out of the output folder (ComfyUI's nodes do not save there)"


INVALID_PATH = (
    f"is too long (at most {MAX_NAME_BYTES} bytes per name and {5 * MAX_NAME_BYTES} in all)"
    " or has characters that no file name may have"
)


def is_invalid_path(path: str) -> bool:
    """Whether ``path`` is too long or has invalid characters, as INVALID_PATH states."""
    if "\0" in path or any("\ud800" <= character <= "\udfff" for character in path):
        return True
    return len(path) > 5 * MAX_NAME_BYTES or any(
        len(name.encode()) > MAX_NAME_BYTES for name in path.replace(os.sep, "/").split("/")
    )


def path_below(folder: str, name: str) -> Path | None:
    """Path of ``name`` below ``folder``, or None if ``name`` leads outside by ``..`` or an absolute path.

    Links below the folder are followed wherever they lead: only the user can have put them there.
    """
    folder = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(folder, name))  # resolves .. before any link is followed
    try:
        return Path(path) if os.path.commonpath((folder, path)) == folder else None
    except ValueError:  # another drive
        return None


def check_file_name(name: Any, kind: str) -> None:
    """Raise a ValueError unless ``name`` is a string: a prompt sent to the API may contain any JSON value here."""
    if not isinstance(name, str):
        raise ValueError(f"expected the name of a {kind} file, got {str(name)[:80]}; choose one from the list")


@dataclass(frozen=True)
class OutputFiles:
    """Files of one kind, which nodes save to the output folder and load from the input or output folder."""

    ending: str
    kind: str  # for error messages
    saver: str  # display name of the node that writes them
    example: str  # example of a filename_prefix

    def save(self, prefix: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Write the next numbered file for ``prefix``; returns its place in ComfyUI's form: filename, subfolder, type.

        ValueError if the prefix does not name a file below the output folder.
        """
        target, subfolder = write_numbered(prefix, self.ending, self.example, tensors, metadata)
        return {"filename": target.name, "subfolder": subfolder, "type": "output"}

    def names(self) -> list[str]:
        """Names of the files in the input folder, and of those in the output folder with ComfyUI's suffix ``[output]``."""
        folders = (folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")
        return [name + mark for folder, mark in folders for name in files_below(folder, self.ending)]

    def options(self) -> list[str]:
        """The ``names`` for a widget, which needs an option even if there is no file."""
        return self.names() or [NONE]

    def find(self, name: str) -> Path:
        """Path of one of the ``names``; ValueError if there is no such file or it has another ending or folder."""
        check_file_name(name, self.kind)
        if name == NONE:
            raise ValueError(f"there is no {self.kind} file; save one with {self.saver}, then refresh the list")
        bare, folder = folder_paths.annotated_filepath(name)
        path = path_below(folder or folder_paths.get_input_directory(), bare)
        if path is None or not bare.endswith(self.ending):
            raise ValueError(
                f"'{name}' is not a {self.kind} file in the input or output folder; save one with {self.saver}, or choose a"
                f" file that ends in {self.ending}"
            )
        if not os.path.isfile(path):  # pathlib would raise for a name that is too long
            raise ValueError(f"there is no {self.kind} file '{name}'; save one with {self.saver}, or refresh the list")
        return path

    def validate(self, name: str | None) -> bool | str:
        """Result of a node's validate_inputs; a connected name is None here and is checked when the node runs."""
        try:
            if name is not None:
                self.find(name)
        except ValueError as error:
            return str(error)
        return True

    def fingerprint(self, name: str | None) -> str | float:
        """Result of a node's fingerprint_inputs: changes with the file, or on every run if the name is connected."""
        return float("nan") if name is None else hashlib.sha256(self.find(name).read_bytes()).hexdigest()

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn errors about the content of the file ``name`` into a ValueError with its name and the remedy."""
        try:
            yield
        except (SafetensorError, ValueError, OSError, NotImplementedError) as error:
            # NotImplementedError: a tensor of 4-bit numbers
            why = f"{str(error)[:300]}; save it again with {self.saver}"
            raise ValueError(f"'{name}' cannot be read as a {self.kind} file: {why}") from error


def read_tensor(path: Path, name: str) -> tuple[Tensor, dict[str, str]]:
    """The tensor ``name`` of a file, which must be its only tensor, and the metadata. The file does not stay open.

    A ValueError if the file holds other tensors. Errors of safetensors while it reads the file are passed through.
    """
    tensors, metadata = read_tensors(path, name, most=1)
    return tensors[0], metadata


def read_tensors(path: Path, name: str, most: int) -> tuple[list[Tensor], dict[str, str]]:
    """As ``read_tensor``, for 1 to ``most`` tensors with the names that ``part_names`` lists."""
    with safe_open(path, framework="pt") as file:
        found = sorted(file.keys(), key=lambda key: (len(key), key))
        if found != part_names(name, len(found)) or not 1 <= len(found) <= most:
            raise ValueError(f"it holds {', '.join(found) or 'nothing'} instead of {name}")
        return [file.get_tensor(key).clone() for key in found], file.metadata() or {}


def part_names(name: str, count: int) -> list[str]:
    """Names of the tensors of a value with several parts: name, name_2, name_3, …"""
    return [name if number == 1 else f"{name}_{number}" for number in range(1, count + 1)]


def read_weights(
    path: Path, name: str = "", copy: bool = False, weights_only: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Errors (ValueError) call the file ``name``.

    ``copy``: clone the tensors, so that the file does not stay open; otherwise they are memory-mapped.
    ``weights_only``: see ``diagnose``.
    """
    if path.suffix.lower() not in SAFETENSORS:
        raise ValueError(f"{path} is not a .safetensors file; {CONVERT}")
    with explain_read_errors(path, name, weights_only):
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        return {key: t.clone() if copy else t for key, t in tensors.items()}, metadata or {}


@contextmanager
def explain_read_errors(path: Path, name: str = "", weights_only: bool = False) -> Iterator[None]:
    """Turn any error while reading a weight file into a ValueError with the reason; see ``diagnose``."""
    try:
        yield
    except Exception as error:  # ComfyUI, torch, pickle and safetensors raise many types
        raise ValueError(f"{name or path} cannot be read: {diagnose(path, error, weights_only)}") from error


def workflow_metadata(hidden: io.HiddenHolder | None) -> dict[str, str]:
    """Prompt and workflow as ComfyUI saves them in its outputs, so that a file dropped on the canvas opens its workflow.

    Empty with --disable-metadata or without a workflow. ``hidden``: the node's hidden inputs prompt and
    extra_pnginfo.
    """
    if hidden is None or args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in found.items() if value is not None}


def diagnose(path: Path, error: Exception, weights_only: bool = False) -> str:
    """Reason why a weight file cannot be read, with the remedy, from its first bytes and the ``error`` of reading it.

    ``weights_only``: whether pickles of plain weights (.pth) are accepted besides safetensors.
    """
    ends_in_safetensors = path.suffix.lower() in SAFETENSORS
    with path.open("rb") as file:
        start = file.read(64)
    pickled = start.startswith((b"PK\x03\x04", b"\x80"))
    if not start:
        return "it is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; download the file (git lfs pull)"
    if start.lstrip(WHITESPACE).startswith(b"<"):
        return "it is a web page, not the file; download the file itself"
    if pickled and not weights_only:
        return f"it is a pickle with the wrong extension; {CONVERT}"
    if weights_only and (reason := explain_format(path)):
        return reason
    if pickled and ends_in_safetensors:
        return "it is a pickle with the wrong extension; rename it to .pth, so that only its weights are read"
    if pickled and isinstance(error, pickle.UnpicklingError) and "weights only" in str(error).lower():
        return explain_pickle(path)
    # torch's text about pickles advises to switch the weights-only loading off
    why = "" if isinstance(error, pickle.UnpicklingError) else f" ({str(error)[:200]})"
    return f"it is damaged or incomplete; download it again{why}"
