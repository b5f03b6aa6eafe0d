"""Masked token models on disk: folders below models/masked_token, laid out as aMUSEd is published for diffusers.

    amused-256/transformer/   config.json  diffusion_pytorch_model.safetensors
    amused-256/vqvae/         config.json  diffusion_pytorch_model.safetensors
    amused-256/text_encoder/  config.json  model.safetensors

Files of half precision, ``*.fp16.safetensors``, are read where there are no others.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ...common.operations import Operations
from ...host.files import diagnosis
from ...host.model_folders import register_folder
from ...host.operations import casting_operations
from ...kernels.linear import linear
from .comfy_model import MaskedTokenModel, wrap
from .comfy_text import CLIP_L, load_clip, openai_clip_l
from .networks.uvit import load_uvit
from .networks.vq import load_vq

MODELS = "masked_token"
# the parts of a model, and what their files are called
TRANSFORMER, VQ, TEXT = "transformer", "vqvae", "text_encoder"
STEMS = {TRANSFORMER: "diffusion_pytorch_model", VQ: "diffusion_pytorch_model", TEXT: "model"}
FROM_FOLDER = "from the folder"  # in place of a file's name
PUBLISHED = "huggingface.co/amused/amused-256 and huggingface.co/amused/amused-512"


N = TypeVar("N", bound=nn.Module)
LoadNetwork = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None, Operations], N]


def register() -> None:
    """Make models/masked_token a model folder of the host, beside those that extra_model_paths.yaml names."""
    register_folder(MODELS, {".safetensors"})


register()


def model_folders() -> dict[str, Path]:
    """Every folder that holds a transformer, by its path below models/masked_token."""
    found = {}
    for root in folder_paths.get_folder_paths(MODELS):
        for file in map(Path, folder_paths.recursive_search(root, [".git"])[0]):
            if file.parent.name == TRANSFORMER and (file.suffix == ".safetensors" or file.name == "config.json"):
                folder = file.parents[1]
                found.setdefault(folder.as_posix(), Path(root) / folder)
    return dict(sorted(found.items()))


def weight_files() -> dict[str, Path]:
    """Every safetensors file, by its path below models/masked_token."""
    return _files(MODELS)


def text_files() -> dict[str, Path]:
    """As ``weight_files``, and what lies in models/text_encoders."""
    return _files(MODELS) | {f"text_encoders/{name}": path for name, path in _files("text_encoders").items()}


def _files(kind: str) -> dict[str, Path]:
    names = [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]
    # None where a link leads nowhere, or it is no file
    found = {Path(name).as_posix(): folder_paths.get_full_path(kind, name) for name in names}
    return {name: Path(path) for name, path in found.items() if path is not None}


def pick(name: str, found: Mapping[str, Path]) -> Path:
    """The path of what a user chose by its name."""
    if name not in found:
        raise ValueError(
            f"{name!r} is not in {' or '.join(folder_paths.get_folder_paths(MODELS))}; there is: {', '.join(found) or 'nothing'}."
            f" Models to download: {PUBLISHED}"
        )
    return found[name]


def replacements(transformer: str, vq: str, text: str) -> dict[str, Path]:
    """The files that a user chose by name, by part; FROM_FOLDER is none."""
    chosen = ((TRANSFORMER, transformer, weight_files), (VQ, vq, weight_files), (TEXT, text, text_files))
    return {part: pick(name, files()) for part, name, files in chosen if name != FROM_FOLDER}


@torch.inference_mode(False)  # training needs weights of which autograd may know
def read_model(folder: Path, files: Mapping[str, Path]) -> tuple[MaskedTokenModel, comfy.sd.CLIP]:
    """A published model. ``files`` are read in place of the folder's own weights, by part; their configs stay."""
    paths = locate(folder, (TRANSFORMER, VQ, TEXT), files)
    clip, width = read_clip(folder, paths[TEXT])
    model = read_networks(folder, CLIP_L, files=paths)
    asked = model.transformer.model.config
    if (asked.encoder_hidden_size, asked.cond_embed_dim) != (width, width):
        raise ValueError(
            f"{paths[TRANSFORMER]} takes text of width {asked.encoder_hidden_size} and {asked.cond_embed_dim} (pooled),"
            f" but {paths[TEXT]} gives {width}: take both from one model"
        )
    return model, clip


@torch.inference_mode(False)
def read_networks(
    folder: Path,
    text: str,
    *,
    name: str | None = None,
    cfg: float | None = None,
    files: Mapping[str, Path] | None = None,
) -> MaskedTokenModel:
    """The transformer and the VQ-GAN of a folder, for text of the kind ``text``."""
    paths = locate(folder, (TRANSFORMER, VQ), files or {})
    operations = casting_operations(linear)
    transformer = _read_network(folder, TRANSFORMER, paths[TRANSFORMER], load_uvit, operations)
    vq = _read_network(folder, VQ, paths[VQ], load_vq, operations)
    codes, vocabulary = transformer.config.codebook_size, transformer.config.vocab_size
    if codes != vq.config.num_vq_embeddings:
        raise ValueError(
            f"{paths[TRANSFORMER]} paints with {codes} tokens, but {paths[VQ]} knows {vq.config.num_vq_embeddings}:"
            " take both from one model"
        )
    if vocabulary <= codes:
        raise ValueError(f"{paths[TRANSFORMER]} has {vocabulary} ids for {codes} tokens, which leaves none for a mask")
    return wrap(name or folder.name, transformer, vq, text, cfg)


def _read_network(folder: Path, part: str, path: Path, load: LoadNetwork[N], operations: Operations) -> N:
    state_dict = read_weights(path)
    with naming(path, config_path(folder, part)):
        cast(state_dict, transformer_dtype(state_dict) if part == TRANSFORMER else torch.float32)
        return load(state_dict, read_config(folder, part), operations)


def read_clip(folder: Path, path: Path) -> tuple[comfy.sd.CLIP, int]:
    """The text encoder and its width. A file from elsewhere, in a folder without a config.json for it, is OpenAI's CLIP-L."""
    config = read_config(folder, TEXT)
    if config is None:
        if path.parent == folder / TEXT:
            raise ValueError(f"{config_path(folder, TEXT)} is missing, which tells the activation: download it too")
        config = openai_clip_l()
    with naming(path, config_path(folder, TEXT)):
        return load_clip(read_weights(path), config), config["hidden_size"]


def locate(folder: Path, parts: tuple[str, ...], files: Mapping[str, Path]) -> dict[str, Path]:
    """The weights of every part; an error lists all that were looked for in vain."""
    paths = {part: files.get(part) or find_weights(folder / part, STEMS[part]) for part in parts}
    found = {part: path for part, path in paths.items() if path is not None}
    if missing := [describe_missing(folder / part, STEMS[part]) for part in paths if part not in found]:
        raise ValueError(
            f"the model folder {folder} is not complete. Missing: {'; '.join(missing)}. The parts are the folders of"
            f" {PUBLISHED}"
        )
    return found


def find_weights(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}.safetensors", f"{stem}.fp16.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def describe_missing(folder: Path, stem: str) -> str:
    there = ", ".join(sorted(file.name for file in folder.iterdir())) if folder.is_dir() else "no such folder"
    return f"{folder.name}/{stem}.safetensors (or .fp16.safetensors; there is: {there or 'nothing'})"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of which the operating system reads each when it is used."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not read: only safetensors, which cannot run code; look for a file of that kind")
    try:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # the host and safetensors raise several kinds
        raise ValueError(f"{path} cannot be read: {diagnosis(path)} ({str(error)[:200]})") from error


def transformer_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    """In what the host wants to keep these weights."""
    return comfy.model_management.unet_dtype(
        device=comfy.model_management.get_torch_device(),
        model_params=comfy.utils.calculate_parameters(state_dict),
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )


def cast(state_dict: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In place and one by one, so that never two copies of all weights are in memory."""
    for name, weight in state_dict.items():
        if weight.is_floating_point():
            try:
                state_dict[name] = weight.to(dtype)
            except NotImplementedError as error:  # for numbers of four bits
                raise ValueError(
                    f"{name[:100]} is {weight.dtype}, of which torch makes no {dtype}; take wider weights"
                ) from error


def config_path(folder: Path, part: str) -> Path:
    return folder / part / "config.json"


def read_config(folder: Path, part: str) -> dict[str, Any] | None:
    """The config.json of a part, or None where there is none."""
    path = config_path(folder, part)
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({str(error)[:200]}): download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {json.dumps(config)[:40]}, not an object: download it again")
    return config


@contextmanager
def naming(path: Path, config: Path) -> Iterator[None]:
    """An error about weights says in which file they are, and which config they were read by."""
    try:
        yield
    except ValueError as error:
        by = f" (read by {config})" if config.is_file() else ""
        raise ValueError(f"{path}{by}: {error}") from error
