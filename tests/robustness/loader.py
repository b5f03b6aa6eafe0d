"""What all loaders of the fuzzing share: the host's folders, a case, a node asked as the host asks it, what must hold."""

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
    """The host's folders below ``home``, and no others."""
    for name in ("input", "output", "temp"):
        (home / name).mkdir(parents=True, exist_ok=True)
        getattr(folder_paths, f"set_{name}_directory")(str(home / name))
    for name in ("cas_dm", "face_refiner", "masked_token", "loras", "text_encoders"):
        (home / "models" / name).mkdir(parents=True, exist_ok=True)
        kinds = folder_paths.folder_names_and_paths[name][1]
        folder_paths.folder_names_and_paths[name] = ([str(home / "models" / name)], kinds)


class Loader:
    """``names``: one of these is in every error."""

    names: tuple[str, ...]

    def __init__(self, home: Path):
        self.home, self.marker = home, home / MARKER

    def cases(self) -> SearchStrategy[Mapping[str, bytes]]:
        """Files by their path below ``home``."""
        raise NotImplementedError

    def write(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            (self.home / path).parent.mkdir(parents=True, exist_ok=True)
            (self.home / path).write_bytes(data)

    def load(self) -> None:
        raise NotImplementedError

    def content(self, tensors, metadata) -> SearchStrategy[bytes]:
        """Of a safetensors file; one in 40 is something that would run."""
        return mixed((39, safetensors_files(tensors, metadata)), (1, dangerous(tensors, self.marker)))


def at(path: str, content: SearchStrategy[bytes]) -> SearchStrategy[dict[str, bytes]]:
    """One file."""
    return content.map(lambda data: {path: data})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def node(name: str, **inputs):
    """What a loading node gives, asked as the host asks it."""
    cls = NODES[name]
    told = {key: value for key, value in inputs.items() if key in ("file", "folder")}
    with torch.inference_mode():
        if hasattr(cls, "validate_inputs") and told:
            assert cls.validate_inputs(**told) is True
        if cls.fingerprint_inputs.__func__ is not _NO_FINGERPRINT:
            assert cls.fingerprint_inputs(**inputs)
        return cls.execute(**inputs).args


_NO_FINGERPRINT = nodes.demo.ChorusDemoVision.fingerprint_inputs.__func__


def finite(weights) -> None:
    assert all(torch.as_tensor(w).float().isfinite().all() for w in weights), "a weight is not finite"
