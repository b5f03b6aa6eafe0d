"""The weight file of a part of a masked token model: found in the part's folder, read, and explained if it is missing.

    transformer/diffusion_pytorch_model.safetensors             one file
    transformer/diffusion_pytorch_model.safetensors.index.json  or shards: the index has the shard of every weight
    transformer/diffusion_pytorch_model-00001-of-00002.safetensors

Only safetensors are opened. Files of other formats appear in error messages, with the command that converts them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...common.weights import shorten
from ...host.files import CONVERT, read_weights

SUFFIX = ".safetensors"
PRECISIONS = ("", ".fp16", ".bf16", ".fp32")  # in names of files, in the order of preference
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)  # needs no quotes in a command
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\..+)?\.safetensors")
WRAPPERS = {"module", "_orig_mod"}  # added to names of weights by DataParallel and torch.compile
LFS = b"version https://git-lfs"


def find_weights(folder: Path, stem: str) -> Path | None:
    """The weight file in ``folder``, or the index of its shards; None if there is neither."""
    names = [
        name
        for precision in PRECISIONS
        for name in (f"{stem}{precision}{SUFFIX}", f"{stem}{SUFFIX}.index{precision}.json")
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def whole(path: Path) -> Path:
    """``path`` itself, or the index of the shards if ``path`` is one of several shards."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        return path
    for index in sorted(path.parent.glob(f"*{SUFFIX}.index*.json")):
        if path.name in read_index(index).values():
            return index
    if int(match[2]) == 1:
        return path
    index = f"{match[1]}{SUFFIX}.index.json"
    raise ValueError(
        f"{path} is one of {int(match[2])} files with the weights of one network, and the file {index} that lists them is"
        f" missing; download {index} into the same folder"
    )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights of a file, or of all shards of an index, without the prefixes of DataParallel and torch.compile."""
    return unwrapped(_read_shards(path) if path.suffix == ".json" else read_weights(path)[0])


def unwrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without WRAPPERS in their names; ``state_dict`` itself if two of the names would be equal."""
    names = {name: ".".join(word for word in name.split(".") if word not in WRAPPERS) for name in state_dict}
    if len(set(names.values())) < len(names):
        return state_dict
    return {names[name]: weight for name, weight in state_dict.items()}


def read_index(index: Path) -> dict[str, str]:
    """The names of the shards by weight; a ValueError if the file is invalid."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map, which lists the file of every weight; download it again")
    # a name with a path could lead to another folder
    wrong = {str(name): None for name in shards.values() if not (isinstance(name, str) and _is_shard_name(name))}
    if wrong:
        raise ValueError(
            f"{index} lists {shorten(list(wrong))}, expected names of {SUFFIX} files in the same folder; {CONVERT}"
        )
    return shards


def _is_shard_name(name: str) -> bool:
    return name.endswith(SUFFIX) and not any(character in name for character in "/\\:\0")


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards, tensors = read_index(index), {}
    names = sorted(set(shards.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(
            f"{index} lists {len(names)} files, of which {len(missing)} are missing: {shorten(missing)}; download them"
            f" into {index.parent}"
        )
    for name in names:
        weights, _ = read_weights(index.parent / name)
        if absent := [key for key, shard in shards.items() if shard == name and key not in weights]:
            raise ValueError(
                f"{index.parent / name} lacks {len(absent)} weights that {index.name} lists in it: {shorten(absent)};"
                " download both files again"
            )
        tensors |= {key: weight for key, weight in weights.items() if shards.get(key, name) == name}
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark."""
    content = path.read_bytes()
    if content.startswith(LFS):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; download the file (git lfs pull)")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({str(error)[:200]}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {json.dumps(value)[:40]}; download it again")
    return value


def describe_missing(folder: Path, stem: str) -> str:
    """Name of the missing weight file, and the contents of ``folder``."""
    found = "the folder does not exist"
    if folder.is_dir():
        found = f"the folder contains: {', '.join(sorted(file.name for file in folder.iterdir())) or 'nothing'}"
    return f"{folder.name}/{stem}{SUFFIX} (or .fp16{SUFFIX}; {found})"


def remedies(folder: Path, stem: str, widget: str, options: Mapping[Path, str]) -> list[str]:
    """Parts of an error message about files in ``folder`` that are not read as they are.

    widget   the input of the node that can choose another file
    options  the names of files in that input
    """
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".")) if folder.is_dir() else []
    found = [
        f"{folder.name}/{file.name} is a link to a file that does not exist, download it again"
        for file in files
        if not file.exists()
    ]
    if names := [options[file] for file in files if file in options]:
        found.append(f"{shorten(names)} is loaded only if it is chosen: choose it as {widget}")
    pickles = [file.name for file in files if file.suffix in PICKLES and PLAIN_NAME.fullmatch(file.name)]
    if weights := [name for name in pickles if name.startswith((stem, "pytorch_model"))]:
        found.append(
            f"{folder.name}/{shorten(weights)} can contain code and is not opened: convert it to {SUFFIX} with this command in"
            f" the folder {folder}: {conversion(weights, stem + SUFFIX)}"
        )
    return found


def conversion(files: list[str], target: str) -> str:
    """A shell command that writes the tensors in ``files`` to the safetensors file ``target``. It runs no code in them."""
    return (
        'python -c "import torch, safetensors.torch as s; s.save_file({k: v.clone() for f in '
        f"{files} for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}}, '{target}')\""
    )
