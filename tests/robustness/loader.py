"""Base class of the fuzzed loaders, and helpers that set ComfyUI's folders and call loading nodes as ComfyUI does."""

from collections.abc import Mapping
from pathlib import Path

import folder_paths
import torch
from hypothesis.strategies import SearchStrategy

from chorus import nodes

from .mutations import mixed, safetensors_files
from .pickled import dangerous

MARKER = "code-ran"
NODES = {node.__name__: node for node in nodes.NODES}


def prepare(home: Path) -> None:
    """Make ComfyUI use only folders below ``home``."""
    for name in ("input", "output", "temp"):
        (home / name).mkdir(parents=True, exist_ok=True)
        getattr(folder_paths, f"set_{name}_directory")(str(home / name))
    for name in ("cas_dm", "face_refiner", "masked_token", "loras", "text_encoders"):
        (home / "models" / name).mkdir(parents=True, exist_ok=True)
        kinds = folder_paths.folder_names_and_paths[name][1]
        folder_paths.folder_names_and_paths[name] = ([str(home / "models" / name)], kinds)


class Loader:
    """A loader under test. Every error message must contain one of ``names``."""

    names: tuple[str, ...]

    def __init__(self, home: Path):
        self.home, self.marker = home, home / MARKER

    def cases(self) -> SearchStrategy[Mapping[str, bytes]]:
        """File contents by their path below ``home``."""
        raise NotImplementedError

    def write(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            (self.home / path).parent.mkdir(parents=True, exist_ok=True)
            (self.home / path).write_bytes(data)

    def load(self) -> None:
        raise NotImplementedError

    def content(self, tensors, metadata) -> SearchStrategy[bytes]:
        """Contents of a safetensors file. One in 40 is a pickle that would run code."""
        return mixed((39, safetensors_files(tensors, metadata)), (1, dangerous(tensors, self.marker)))


def at(path: str, content: SearchStrategy[bytes]) -> SearchStrategy[dict[str, bytes]]:
    """Cases of one file at ``path``."""
    return content.map(lambda data: {path: data})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def node(name: str, **inputs):
    """Outputs of a loading node, called as ComfyUI calls it."""
    cls = NODES[name]
    validated = {key: value for key, value in inputs.items() if key in ("file", "folder")}
    with torch.inference_mode():
        if hasattr(cls, "validate_inputs") and validated:
            assert cls.validate_inputs(**validated) is True
        if cls.fingerprint_inputs.__func__ is not _NO_FINGERPRINT:
            assert cls.fingerprint_inputs(**inputs)
        return cls.execute(**inputs).args


_NO_FINGERPRINT = nodes.demo.ChorusDemoVision.fingerprint_inputs.__func__


def check_finite(weights) -> None:
    assert all(torch.as_tensor(w).float().isfinite().all() for w in weights), "a weight is not finite"
