"""Files of torch and of other programs that are not plain state dicts: recognised from their bytes, without running them.

The messages contain the command that converts such a file to a state dict.
"""

import _compat_pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

MAX_PICKLE = 2**22  # bytes of a pickle that is scanned; Python reads about one megabyte per second
OLD_PICKLES = 4  # pickles at the start of a file of torch before 1.6; the last one is the content
LISTED = 6  # classes in a message
PLAIN = (
    "collections.OrderedDict",
    "collections.Counter",
    "torch._utils.",
    "torch.serialization.",
    "torch._tensor.",
)  # used by every state dict
TYPES = {"bytearray", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "slice", "str", "tuple"}
# modules whose functions have no place in a file of weights
CODE = {"_io", "asyncio", "codecs", "ctypes", "importlib", "io", "multiprocessing", "nt", "os", "posix", "pty", "runpy"}
CODE |= {"_pickle", "marshal", "pickle", "shutil", "socket", "subprocess", "sys", "threading", "webbrowser"}


class Pickled(NamedTuple):
    """The classes and functions that a file of torch.save names, as module.name."""

    root: str  # the class of the content, or "" for a dictionary
    names: list[str]  # without those of plain state dicts

    @property
    def has_code(self) -> bool:
        """Whether it names functions that have no place in a file of weights, such as eval."""
        return any(map(_is_code, self.names))


def _is_code(name: str) -> bool:
    module, _, function = name.partition(".")
    return module in CODE or (module == "builtins" and function not in TYPES)


def pickled_names(path: Path) -> Pickled | None:
    """The classes and functions named in a file of torch.save; None if it is not such a file, or too large to scan."""
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    [record] = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
                    if record.file_size > MAX_PICKLE:
                        return None
                    with archive.open(record) as data:
                        return _scan(data)
            file.seek(0)
            if file.read(1) != b"\x80":
                return None
            file.seek(0)
            for _ in range(OLD_PICKLES - 1):
                _scan(file)
            return _scan(file)
    except Exception:  # a damaged file; pickletools and zipfile raise many types
        return None


def _scan(file: IO[bytes]) -> Pickled:
    names, root = [], None
    for name in _globals(file):
        if name and not name.startswith(PLAIN) and name not in names and not _is_storage(name):
            names.append(name)
        root = name if root is None else root
    foreign = bool(root) and root in names
    return Pickled(root if foreign and root else "", names)


def _is_storage(name: str) -> bool:
    return name.startswith("torch.") and name.endswith(("Storage", "Tensor", "Parameter"))


def _globals(file: IO[bytes]) -> Iterator[str]:
    """The names in a pickle as module.name, in order; "" for a dictionary."""
    for code, argument, position in pickletools.genops(file):
        if position is not None and position > MAX_PICKLE:
            raise ValueError("the pickle is too large to scan")
        if code.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # torch.save writes the names of Python 2, and torch.load reads them as those of Python 3
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        elif code.name in ("EMPTY_DICT", "DICT"):
            yield ""


def explain_format(path: Path) -> str | None:
    """The reason why a file is not a plain state dict, with the command that converts it; None for any other file."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"PK\x03\x04"):
        names = _records(path)
        if any(name.endswith("/constants.pkl") for name in names):
            return f"it is a TorchScript program, not a state dict; {_convert(path, _TORCHSCRIPT)}"
        if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in names):
            return f"it is a program of torch.export, not a state dict; {_convert(path, _EXPORTED)}"
    if _is_onnx(start):
        return (
            "it is an ONNX graph, which has no names of layers if its norms were merged. Use the file from which it was"
            f" exported. If you do not have that file, {_convert(path, _ONNX)} (pip install onnx first)"
        )
    if start[8:9] == b"{" and path.suffix.lower() not in (".safetensors", ".sft"):
        return "it is a safetensors file with the wrong ending; rename it to .safetensors"
    return None


def explain_pickle(path: Path) -> str:
    """The reason why the weights-only loading of torch rejects a pickle, with the command that converts it."""
    found = pickled_names(path)
    if found is None or not found.names:
        return "it contains more than weights, and code in a file is never run; save only net.state_dict()"
    if found.root and not _is_code(found.root):
        return (
            f"it is a pickled object of the class {found.root}, not a state dict, and code in a file is never run. Only"
            f" if you trust the file, {_convert(path, _MODULE)} (in the folder of the code that defines the class)"
        )
    listed = ", ".join(name[:80] for name in found.names[:LISTED])
    return (
        f"it contains more than weights, and code in a file is never run: it names {listed}. Only if you trust the file,"
        f" {_convert(path, _DICTIONARY)}"
    )


_TORCHSCRIPT = "torch.save(torch.jit.load({source}, map_location='cpu').state_dict(), {target})"
_EXPORTED = "torch.save(dict(torch.export.load({source}).state_dict), {target})"
_ONNX = (
    "import onnx; from onnx.numpy_helper import to_array; ends = ('weight', 'bias', 'mean', 'var', 'filt');"
    " torch.save({{i.name: torch.tensor(to_array(i)) for i in onnx.load({source}).graph.initializer"
    " if i.name.endswith(ends)}}, {target})"
)
_MODULE = "torch.save(torch.load({source}, map_location='cpu', weights_only=False).state_dict(), {target})"
_DICTIONARY = (
    "c = torch.load({source}, map_location='cpu', weights_only=False); torch.save({{k: v.state_dict()"
    " if hasattr(v, 'state_dict') else v for k, v in c.items() if hasattr(v, 'state_dict') or isinstance(v, dict)}},"
    " {target})"
)


def _convert(path: Path, code: str) -> str:
    """The command that runs ``code`` with the ``source`` file and the ``target`` beside it."""
    target = path.with_name(f"{path.stem}_state_dict.pth")
    source, target = ("'" + file.as_posix().replace("'", "\\'") + "'" for file in (path, target))
    return f'run: python -c "import torch; {code.format(source=source, target=target)}"'


def _records(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # a damaged file
        return []


def _is_onnx(start: bytes) -> bool:
    """Whether a file starts as ONNX's protobuf: field 1, the version of the format, then another field of a model."""
    return (
        len(start) > 3 and start[0] == 0x08 and 0 < start[1] < 64 and start[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A)
    )
