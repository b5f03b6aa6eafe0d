"""Safetensors that nodes keep between runs: written whole or not at all, found again in the input and output folders."""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import safetensors.torch
from comfy.cli_args import args
from comfy_api.latest import io
from torch import Tensor

LONGEST = 180  # bytes of a name; file systems have room for 255, and number, ending and .part come behind


def write_whole(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``target`` at once, so that no half file has its name whatever happens; a FileExistsError where there is one.

    A program that is killed meanwhile leaves ``<target>.<number>.part``, which nobody lists and whoever likes may delete.
    """
    # the ending keeps it out of the host's lists, the number out of the way of another program that saves here
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        data = safetensors.torch.save(dict(tensors), dict(metadata))  # save_file would make it private
        part.unlink(missing_ok=True)
        # x: not through a link that somebody put there
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            # else a name may outlive a power cut that its content did not
            os.fsync(file.fileno())
        if target.exists():
            raise FileExistsError(f"{target} was written meanwhile; nothing is overwritten, save again")
        os.replace(part, target)
    except FileExistsError:
        raise
    except OSError as error:
        why = f"{error.strerror or error}: {target} could not be written, and nothing of it is left; make room and save again"
        raise OSError(error.errno, why) from error
    finally:
        part.unlink(missing_ok=True)


def next_file(prefix: str, ending: str, example: str) -> tuple[Path, str]:
    """The next free file of a ``filename_prefix`` in the output folder, and its subfolder as the host shows it.

    A ValueError where the prefix names no file below the output folder; ``example``: one that does.
    """
    check_prefix(prefix, example)
    # in its plain form: of a/b/ the host would not see the numbers that are taken
    place = os.path.normpath(prefix), folder_paths.get_output_directory()
    folder, name, number, subfolder, _ = folder_paths.get_save_image_path(*place)
    return Path(folder, f"{name}_{number:05}_{ending}"), subfolder


def check_prefix(prefix: str, example: str) -> None:
    """Raise a ValueError where a ``filename_prefix`` can never name a file below the output folder."""
    folder, name = os.path.split(os.path.normpath(prefix))
    output = folder_paths.get_output_directory()
    if not name.strip(". "):
        raise ValueError(f"filename_prefix '{prefix[:40]}' names no file; give a name such as {example}")
    if cannot_be(prefix):
        raise ValueError(f"filename_prefix {prefix[:40]!r} {CANNOT}; give a name such as {example}")
    if not folder_paths.is_within_directory(output, os.path.join(output, folder)):
        raise ValueError(f"filename_prefix '{prefix}' is outside the output folder; give a name such as {example}")


CANNOT = f"is too long ({LONGEST} bytes for a name, {5 * LONGEST} for all of it) or has characters that no file name may have"


def cannot_be(path: str) -> bool:
    """Whether no file system takes a path with something behind its last name, as CANNOT says."""
    if "\0" in path or any("\ud800" <= character <= "\udfff" for character in path):
        return True
    return len(path) > 5 * LONGEST or any(len(name.encode()) > LONGEST for name in path.replace(os.sep, "/").split("/"))


def need_name(name: Any, kind: str) -> None:
    """Raise a ValueError for what is no text: a prompt may hold anything in place of a file's name."""
    if not isinstance(name, str):
        raise ValueError(f"{str(name)[:80]} is no name of a {kind} file; choose one of the list")


@dataclass(frozen=True)
class KeptFiles:
    """The files of one kind."""

    ending: str
    kind: str  # as errors name one
    saver: str  # the node that writes them
    example: str  # of a prefix

    def save(self, prefix: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Write the next free number of ``prefix``. Returns where it is, as the host shows it: filename, subfolder, type.

        A prefix that names no file of the output folder is a ValueError.
        """
        target, subfolder = next_file(prefix, self.ending, self.example)
        write_whole(target, tensors, metadata)
        return {"filename": target.name, "subfolder": subfolder, "type": "output"}

    def names(self) -> list[str]:
        """The files of the input folder, and those of the output folder with the host's mark for it."""
        folders = (folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")
        return [
            name + mark
            for folder, mark in folders
            for name in sorted(folder_paths.recursive_search(folder)[0])
            if name.endswith(self.ending)
        ]

    def find(self, name: str) -> Path:
        """The file of one of the ``names``; a ValueError where there is none or it is not one of ours."""
        need_name(name, self.kind)
        bare, folder = folder_paths.annotated_filepath(name)
        folder = folder or folder_paths.get_input_directory()
        path = Path(folder, bare)
        if not bare.endswith(self.ending) or not folder_paths.is_within_directory(folder, str(path)):
            raise ValueError(
                f"'{name}' is no {self.kind} file of the input or output folder; its name ends on {self.ending}"
            )
        if not os.path.isfile(path):  # which a name that is too long is not either, where pathlib raises
            raise ValueError(f"there is no {self.kind} file '{name}'; save one with {self.saver}, or refresh the list")
        return path

    def validate(self, name: str | None) -> bool | str:
        """What validate_inputs gives; None is a wired name, known only when the node runs."""
        try:
            if name is not None:
                self.find(name)
        except ValueError as error:
            return str(error)
        return True

    def fingerprint(self, name: str | None) -> str | float:
        """What fingerprint_inputs gives: another value when the file changes, or always where the name is wired."""
        return float("nan") if name is None else hashlib.sha256(self.find(name).read_bytes()).hexdigest()


def workflow_metadata(hidden: io.HiddenHolder | None) -> dict[str, str]:
    """What the host saves beside its own results, so that a file dropped on the canvas opens its workflow; nothing
    where the user forbids it, or where there is no workflow. ``hidden``: a node's, with prompt and extra_pnginfo."""
    if hidden is None or args.disable_metadata:
        return {}
    found = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in found.items() if value is not None}


def diagnosis(path: Path, error: Exception | None = None, weights_only: bool = False) -> str:
    """Why a file of weights cannot be read, by how it begins and by the ``error`` of reading it.

    ``weights_only``: pickles of plain weights (.pth) are read too; otherwise only safetensors are.
    """
    with path.open("rb") as file:
        start = file.read(64)
    pickled = start.startswith((b"PK\x03\x04", b"\x80"))
    if not start:
        return "it is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is only git's pointer to the file; download the file itself (git lfs pull)"
    if pickled and not weights_only:
        return "it is a pickle under another name; only safetensors are read, which cannot run code"
    if pickled and path.suffix == ".safetensors":
        return "it is a pickle under another name; name it .pth, so that only its weights are read"
    if pickled and isinstance(error, pickle.UnpicklingError) and "weights only" in str(error).lower():
        return "it holds more than weights, and code from a file is never run; save net.state_dict() alone"
    return "it is damaged or not whole; download it again" + (f" ({str(error)[:200]})" if error else "")
