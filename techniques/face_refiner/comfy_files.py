"""Face refiners on disk: read from models/face_refiner, the input or the output folder, and written as safetensors.

The published generators are files of torch.save. They are read with torch's weights-only loading, which runs no code.
"""

import hashlib
import logging
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.ops
import folder_paths
import torch
from torch import Tensor

from ...common.torch_files import explain_format, pickled_names
from ...common.weights import shorten
from ...host.files import SAFETENSORS, OutputFiles, check_file_name, explain_read_errors, read_weights
from ...host.model_folders import places, register_folder
from .comfy_model import FaceRefinerModel, wrap
from .networks.image_generators import find_generator, load_generator, unused_statistics
from .networks.state_dicts import generators_in

MODELS = "face_refiner"
# in lower case, as ComfyUI compares them: it lists net.PTH too
SUFFIXES = {*SAFETENSORS, ".pth", ".pt", ".ckpt", ".bin"}
FORMAT = "chorus-face-refiner-1"  # the "format" in the metadata
WORKFLOW = {"prompt", "workflow"}  # entries of ComfyUI in the metadata
NONE = "none"  # the only option of the file widget if there is no file

log = logging.getLogger("comfyui-chorus")

register_folder(MODELS, SUFFIXES)


class RefinerFiles(OutputFiles):
    """The files in the model folders, then those in the input and output folders."""

    def names(self) -> list[str]:
        """The options of the file widget: the names of all files, or NONE if there is no file."""
        models = [name for name in folder_paths.get_filename_list(MODELS) if _is_model(name)]
        return [*models, *super().names()] or [NONE]

    def find(self, name: str) -> Path:
        """The path of one of the ``names``; a ValueError if it does not exist."""
        check_file_name(name, self.kind)
        path = folder_paths.get_full_path(MODELS, name)
        if path is not None and _is_model(name):
            return Path(path)
        if name.endswith(("]", self.ending)):
            return super().find(name)
        if path is not None:
            why = explain_format(Path(path)) or f"a face refiner is a file of {', '.join(sorted(SUFFIXES))}"
            raise ValueError(f"'{name}' is not a face refiner: {why}")
        raise ValueError(
            f"there is no {self.kind} file '{name}'; put a .pth or .safetensors file of a generator into {places(MODELS)}, or"
            " refresh the list"
        )

    def fingerprint(self, name: str | None) -> str | float:
        """A hash of the file's path, modification time and size: hashing the file before every run takes too long.

        ComfyUI saves the value in images, as a part of the prompt, so it must not contain the path.
        """
        if name is None:
            return super().fingerprint(name)
        path = self.find(name)
        stat = path.stat()
        return hashlib.sha256(
            f"{path} {stat.st_mtime_ns} {stat.st_size}".encode("utf-8", "surrogateescape")
        ).hexdigest()


def _is_model(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


FILES = RefinerFiles(".refiner.safetensors", "face refiner", "Save Face Refiner", "face_refiner/ComfyUI")


@torch.inference_mode(False)  # resumed training needs normal tensors: autograd cannot save inference tensors
def load_refiner(name: str, generator: str = "") -> FaceRefinerModel:
    """The refiner ``generator`` in the file ``name``; "" selects the only generator in the file.

    Raises a ValueError with the path if the file does not hold exactly one supported generator of that name.
    """
    path = FILES.find(name)
    content, metadata = read(path)
    place = ""
    try:
        place, state_dict = find_generator(content, generator.strip())
        network = load_generator(state_dict, comfy.ops.manual_cast)
    except ValueError as error:
        raise ValueError(f"{path}: {f'in {place}: ' if place else ''}{error}") from error
    if unused := unused_statistics(state_dict):
        log.info("%s: %d running statistics of instance norms are not used, as in pix2pix's code", path, len(unused))
    title = Path(name).name.split(".")[0]
    # the weights stay in float32, which costs little memory; the layers cast them to the dtype in which they compute
    return wrap(f"{title}: {place}" if place else title, network.float(), metadata)


def save_refiner(model: FaceRefinerModel, prefix: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Write ``model`` in half precision with OutputFiles.save; the file also contains ``model.details`` and ``metadata``.

    The workflow of the file that the model was loaded from is not part of the new file.
    """
    weights = {
        # the weights and the statistics of norms are saved in float32: they are small, and norms compute in float32
        name: (weight.half() if weight.ndim == 4 and not name.endswith("filt") else weight.float()).cpu().contiguous()
        for name, weight in model.patcher.model.state_dict().items()
    }
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ValueError(
            f"{len(broken)} weights of the face refiner are not finite (NaN or infinite) in float16, so nothing is saved:"
            f" {shorten(broken)}; train it again"
        )
    known = {"format": FORMAT, "size": str(model.size), "network": str(model.patcher.model.config)}
    details = {key: value for key, value in model.details.items() if key not in WORKFLOW}
    return FILES.save(prefix, weights, {**details, **metadata, **known})


def read(path: Path) -> tuple[Any, dict[str, str]]:
    """The content and the metadata of a file. Raises a ValueError with the path and the remedy."""
    if path.suffix.lower() in SAFETENSORS:
        return read_weights(path, copy=True, weights_only=True)
    with explain_read_errors(path, weights_only=True):
        _check_uncompressed(path)
        content = _load_weights(path)
        _check_dense(content, path)
        return content, {}


def _load_weights(path: Path) -> Any:
    """The content of a file of torch.save; objects beside the weights become empty dictionaries.

    A training saves, for example, its settings as an argparse.Namespace and its best loss as a number of numpy. No code
    of the file or of another package is run. A file is rejected if it names functions that have no place beside
    weights, or if it consists of an object.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        found = pickled_names(path)
        allow = getattr(torch.serialization, "safe_globals", None)  # missing in older torch
        if found is None or not found.names or found.root or found.has_code or allow is None:
            raise
        replaced = [(_Replaced if name.startswith("numpy") else _Empty, name) for name in found.names]
        try:
            with allow(replaced):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # the first error has the reason
            content = None
        if not isinstance(content, Mapping) or not generators_in(content):
            raise
        log.info("%s: only the weights are read, without the objects of %s", path, ", ".join(found.names))
        return content


class _Replaced:
    """Takes the place of an object in a pickle, and of the function that creates it; it ignores its state."""

    def __new__(cls, *arguments: Any) -> "_Replaced":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


class _Empty:
    """As _Replaced, for classes derived from dict: torch adds items only to dictionaries of its own types."""

    def __new__(cls, *arguments: Any) -> OrderedDict:
        return OrderedDict()


def _check_uncompressed(path: Path) -> None:
    """Reject compressed zip files: torch does not write them, and they may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            size = sum(record.file_size for record in file.infolist())
        if size > path.stat().st_size:
            raise ValueError(f"it unpacks to {size} bytes, but the file has only {path.stat().st_size}")


def _check_dense(content: Any, path: Path) -> None:
    """Reject tensors that are not dense or not on the CPU, or that are together larger than the file."""
    tensors = list(_tensors(content))
    if any(t.is_nested or t.layout != torch.strided or t.is_quantized or t.device.type != "cpu" for t in tensors):
        raise ValueError("it holds tensors that are sparse, quantized, nested or without data")
    # a file holds the numbers of two equal entries once
    sizes = {(t.data_ptr(), t.dtype, t.shape, t.stride()): t.nbytes for t in tensors}
    if (size := sum(sizes.values())) > path.stat().st_size:
        raise ValueError(f"its tensors take {size} bytes, but the file has only {path.stat().st_size}")


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))  # a list may contain itself
            waiting += value.values() if isinstance(value, Mapping) else value
