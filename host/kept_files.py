"""Safetensors that nodes keep between runs: written whole or not at all, found again in the input and output folders."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import safetensors.torch
from torch import Tensor


def write_whole(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``target`` at once, so that no half file is left whatever happens; a FileExistsError where there is one."""
    part = target.with_name(target.name + ".part")  # the ending keeps it out of the host's lists
    try:
        part.write_bytes(safetensors.torch.save(dict(tensors), dict(metadata)))  # save_file would make it private
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


@dataclass(frozen=True)
class KeptFiles:
    """The files of one kind."""

    ending: str
    kind: str  # as errors name one
    saver: str  # the node that writes them
    example: str  # of a prefix

    def save(self, prefix: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Write the next free number of ``prefix``. Returns where it is, as the host shows it: filename, subfolder, type.

        A prefix that names no file is a ValueError, one outside of the output folder an error of the host's.
        """
        if not os.path.basename(os.path.normpath(prefix)).strip("."):
            raise ValueError(f"filename_prefix '{prefix}' names no file; give a name such as {self.example}")
        output = folder_paths.get_output_directory()
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
        target = Path(folder, f"{name}_{number:05}_{self.ending}")
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
        bare, folder = folder_paths.annotated_filepath(name)
        folder = folder or folder_paths.get_input_directory()
        path = Path(folder, bare)
        if not bare.endswith(self.ending) or not folder_paths.is_within_directory(folder, str(path)):
            raise ValueError(
                f"'{name}' is no {self.kind} file of the input or output folder; its name ends on {self.ending}"
            )
        if not path.is_file():
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
