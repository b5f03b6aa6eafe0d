"""Face refiners on disk: read from models/face_refiner, or as saved into the output folder; written as safetensors.

The published generators are .pth files. Those are read by torch's weights-only loading, which runs no code.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from ...host.files import KeptFiles, diagnosis, need_name
from ...host.model_folders import register_folder
from .comfy_model import FaceRefinerModel, wrap
from .networks.image_generators import load_generator

MODELS = "face_refiner"
SUFFIXES = {".safetensors", ".pth"}
FILES = KeptFiles(".refiner.safetensors", "face refiner", "Save Face Refiner", "face_refiner/ComfyUI")
FORMAT = "chorus-face-refiner-1"  # in the metadata
NONE = "none"  # a combo without any file must still have an entry

register_folder(MODELS, SUFFIXES)


def refiner_files() -> list[str]:
    """What a combo offers: the model folders, then what was saved; NONE where there is nothing."""
    models = [name for name in folder_paths.get_filename_list(MODELS) if Path(name).suffix in SUFFIXES]
    return [*models, *FILES.names()] or [NONE]


def find(name: str) -> Path:
    """The path of one of ``refiner_files``."""
    need_name(name, FILES.kind)
    path = folder_paths.get_full_path(MODELS, name)
    if path is not None and Path(name).suffix in SUFFIXES:
        return Path(path)
    if name.endswith(("]", FILES.ending)):
        return FILES.find(name)
    places = " or ".join(folder_paths.get_folder_paths(MODELS))
    raise ValueError(f"there is no face refiner '{name}'; put a .pth or .safetensors file of a generator into {places}")


def validate(name: str | None) -> bool | str:
    """What validate_inputs gives; None is a wired name, known only when the node runs."""
    try:
        if name is not None:
            find(name)
    except ValueError as error:
        return str(error)
    return True


def fingerprint(name: str | None) -> str | float:
    """Another value when the file changes, or always where the name is wired."""
    if name is None:
        return float("nan")
    path = find(name)
    state = path.stat()
    return f"{path} {state.st_mtime_ns} {state.st_size}"


@torch.inference_mode(False)  # training goes on from weights of which autograd may know
def load_refiner(name: str) -> FaceRefinerModel:
    """The refiner of a file; a ValueError that names the file where it holds none."""
    path = find(name)
    state_dict, metadata = read(path)
    try:
        network = load_generator(state_dict, comfy.ops.manual_cast)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # few weights: what a device computes in, the layers cast them to
    return wrap(Path(name).name.split(".")[0], network.float(), metadata)


def save_refiner(model: FaceRefinerModel, prefix: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write ``model`` in half precision as KeptFiles.save does, with what is known of it and ``metadata``."""
    weights = {
        # statistics and weights of norms are few, and read in float32
        name: (weight.half() if weight.ndim == 4 and not name.endswith("filt") else weight.float()).cpu().contiguous()
        for name, weight in model.patcher.model.state_dict().items()
    }
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(
            f"the weights {', '.join(broken[:8])} are not finite in float16, so nothing is saved; train anew"
        )
    known = {"format": FORMAT, "size": str(model.size), "network": str(model.patcher.model.config)}
    return FILES.save(prefix, weights, {**model.details, **metadata, **known})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; a ValueError that names it and the remedy."""
    try:
        if path.suffix == ".safetensors":
            tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
            # copies: the file does not stay open
            return {name: weight.clone() for name, weight in tensors.items()}, metadata or {}
        _check_packed(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        _check_plain(found, path)
        return found, {}
    except Exception as error:  # torch, pickle and safetensors raise many kinds
        raise ValueError(f"{path} cannot be read: {diagnosis(path, error, weights_only=True)}") from error


def _check_packed(path: Path) -> None:
    """torch packs nothing; what is packed may be any number of times as large as the file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(record.file_size for record in file.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"it unpacks to {size} bytes, more than it has")


def _check_plain(found: Any, path: Path) -> None:
    """Pickles can hold tensors of other kinds than numbers in a row, and some whose numbers are not in the file."""
    tensors = [value for value in found.values() if isinstance(value, Tensor)] if isinstance(found, Mapping) else []
    if any(t.is_nested or t.layout != torch.strided or t.is_quantized or t.device.type != "cpu" for t in tensors):
        raise ValueError("it holds tensors that are sparse, quantized, nested or without numbers")
    if (size := sum(t.nbytes for t in tensors)) > path.stat().st_size:
        raise ValueError(f"its tensors are of {size} bytes, more than it has")
