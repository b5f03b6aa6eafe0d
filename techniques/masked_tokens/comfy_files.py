"""Loading masked token models from folders below models/masked_token, in the layout of the published aMUSEd.

    amused-256/transformer/   config.json  diffusion_pytorch_model.safetensors
    amused-256/vqvae/         config.json  diffusion_pytorch_model.safetensors
    amused-256/text_encoder/  config.json  model.safetensors

Half-precision files, ``*.fp16.safetensors``, are read if there is no other file. The weights of a part may also be
split into shards, see comfy_weight_files.py.
"""

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
from ...host.model_folders import places, register_folder
from ...host.operations import casting_operations
from ...kernels.linear import linear
from .comfy_model import MaskedTokenModel, wrap
from .comfy_text import CLIP_L, load_clip, openai_clip_l, text_config
from .comfy_weight_files import describe_missing, find_weights, read_json, read_state_dict, remedies, whole
from .networks.uvit import load_uvit
from .networks.vq import load_vq

MODELS = "masked_token"
# the parts of a model and their file names
TRANSFORMER, VQ, TEXT = "transformer", "vqvae", "text_encoder"
STEMS = {TRANSFORMER: "diffusion_pytorch_model", VQ: "diffusion_pytorch_model", TEXT: "model"}
WIDGETS = {TRANSFORMER: "transformer_file", VQ: "vq_file", TEXT: "text_encoder_file"}  # of LoadMaskedTokenModel
FROM_FOLDER = "from the folder"  # the option to load the file of the model folder
PUBLISHED = "huggingface.co/amused/amused-256 or huggingface.co/amused/amused-512"


N = TypeVar("N", bound=nn.Module)
LoadNetwork = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None, Operations], N]


def register() -> None:
    """Register models/masked_token as a model folder in ComfyUI, in addition to those of extra_model_paths.yaml."""
    register_folder(MODELS, {".safetensors"})


register()


def model_folders() -> dict[str, Path]:
    """Every folder that holds a transformer, by its path below models/masked_token. Hidden folders are left out."""
    folders = {}
    for root in folder_paths.get_folder_paths(MODELS):
        for file in map(Path, folder_paths.recursive_search(root, [".git"])[0]):
            if is_hidden(file):
                continue
            if file.parent.name == TRANSFORMER and (file.suffix == ".safetensors" or file.name == "config.json"):
                folder = file.parents[1]
                folders.setdefault(folder.as_posix(), Path(root) / folder)
    return dict(sorted(folders.items()))


def is_hidden(file: Path) -> bool:
    """Whether a relative path has a hidden folder, such as .ipynb_checkpoints, or is a hidden file."""
    return any(name.startswith(".") for name in file.parts)


def weight_files() -> dict[str, Path]:
    """Every safetensors file, by its path below models/masked_token."""
    return _files(MODELS)


def text_files() -> dict[str, Path]:
    """``weight_files`` and the files in models/text_encoders."""
    return _files(MODELS) | {f"text_encoders/{name}": path for name, path in _files("text_encoders").items()}


def _files(kind: str) -> dict[str, Path]:
    names = [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]
    names = [name for name in names if not is_hidden(Path(name))]
    # the path is None for a broken link or a folder
    paths = {Path(name).as_posix(): folder_paths.get_full_path(kind, name) for name in names}
    return {name: Path(path) for name, path in paths.items() if path is not None}


def pick(name: str, paths: Mapping[str, Path]) -> Path:
    """The path of the folder or file ``name``. If ``paths`` has no such name, a ValueError lists the names in it."""
    if name not in paths:
        raise ValueError(
            f"there is no {name!r}; available: {', '.join(paths) or 'none'}; choose one of these, or download a model from"
            f" {PUBLISHED} into {places(MODELS)}"
        )
    return paths[name]


def replacements(transformer: str, vq: str, text: str) -> dict[str, Path]:
    """Replacement files by part, for the names that are not FROM_FOLDER."""
    chosen = ((TRANSFORMER, transformer, weight_files), (VQ, vq, weight_files), (TEXT, text, text_files))
    return {part: whole(pick(name, files())) for part, name, files in chosen if name != FROM_FOLDER}


@torch.inference_mode(False)  # autograd cannot use inference tensors, and training needs these weights
def read_model(
    folder: Path, files: Mapping[str, Path], name: str | None = None
) -> tuple[MaskedTokenModel, comfy.sd.CLIP]:
    """The model and the text encoder of a folder.

    ``files`` replace the weights of parts; the configs still come from the folder. ``name``: the model's name; by
    default that of the folder.
    """
    paths = locate(folder, (TRANSFORMER, VQ, TEXT), files)
    clip, width = read_clip(folder, paths[TEXT])
    model = read_networks(folder, CLIP_L, name=name, files=paths)
    config = model.transformer.model.config
    if (config.encoder_hidden_size, config.cond_embed_dim) != (width, width):
        raise ValueError(
            f"{paths[TRANSFORMER]} expects text of width {config.encoder_hidden_size} and {config.cond_embed_dim} (pooled),"
            f" but {paths[TEXT]} has width {width}; use files of the same model"
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
    """The transformer and the VQ-GAN of a folder; ``text`` is the kind of text encoder that they were trained with."""
    paths = locate(folder, (TRANSFORMER, VQ), files or {})
    operations = casting_operations(linear)
    transformer = _read_network(folder, TRANSFORMER, paths[TRANSFORMER], load_uvit, operations)
    vq = _read_network(folder, VQ, paths[VQ], load_vq, operations)
    codes, vocabulary = transformer.config.codebook_size, transformer.config.vocab_size
    if codes != vq.config.num_vq_embeddings:
        raise ValueError(
            f"{paths[TRANSFORMER]} has {codes} codes, but {paths[VQ]} has {vq.config.num_vq_embeddings};"
            " use files of the same model"
        )
    if vocabulary <= codes:
        raise ValueError(
            f"{paths[TRANSFORMER]} has {vocabulary} ids for {codes} codes and none for the mask token;"
            " use a masked token model"
        )
    return wrap(name or folder.name, transformer, vq, text, cfg)


def _read_network(folder: Path, part: str, path: Path, load: LoadNetwork[N], operations: Operations) -> N:
    state_dict = read_state_dict(path)
    with errors_naming(path, config_path(folder, part)):
        cast(state_dict, transformer_dtype(state_dict) if part == TRANSFORMER else torch.float32)
        return load(state_dict, read_config(folder, part), operations)


def read_clip(folder: Path, path: Path) -> tuple[comfy.sd.CLIP, int]:
    """The text encoder and its width.

    A replacement file is read as OpenAI's CLIP-L if ``folder`` has no config.json for it.
    """
    config = read_config(folder, TEXT)
    if config is None:
        if path.parent == folder / TEXT:
            raise ValueError(
                f"{config_path(folder, TEXT)} is missing; download it, because it names the activation function"
            )
        config = openai_clip_l()
    config = text_config(config)
    with errors_naming(path, config_path(folder, TEXT)):
        return load_clip(read_state_dict(path), config), config["hidden_size"]


def locate(folder: Path, parts: tuple[str, ...], files: Mapping[str, Path]) -> dict[str, Path]:
    """The weight file of every part; a ValueError lists all missing files."""
    paths = {part: files.get(part) or find_weights(folder / part, STEMS[part]) for part in parts}
    missing = [part for part, path in paths.items() if path is None]
    if missing:
        listed = ", ".join(describe_missing(folder / part, STEMS[part]) for part in missing)
        found = _remedies(folder, missing)
        last = f"{'otherwise ' if found else ''}download the missing files from {PUBLISHED}"
        raise ValueError(f"the model folder {folder} lacks {'; '.join([listed, *found, last])}")
    return {part: path for part, path in paths.items() if path is not None}


def _remedies(folder: Path, missing: list[str]) -> list[str]:
    """Parts of an error message about the files that are in the folder in place of the ``missing`` parts."""
    options = {path: name for name, path in weight_files().items()}
    found = []
    for part in missing:
        found += remedies(folder / part, STEMS[part], WIDGETS[part], options)
    transformer = find_weights(folder / TRANSFORMER, STEMS[TRANSFORMER])
    if transformer is not None and not any((folder / part).exists() for part in (VQ, TEXT)):
        file = next((name for path, name in options.items() if path.parent == transformer.parent), transformer.name)
        found.append(
            "the folder has only a transformer, as a checkpoint of a training has: choose a complete model as model_folder,"
            f" and {file} as {WIDGETS[TRANSFORMER]}"
        )
    return found


def transformer_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype in which ComfyUI stores these weights."""
    return comfy.model_management.unet_dtype(
        device=comfy.model_management.get_torch_device(),
        model_params=comfy.utils.calculate_parameters(state_dict),
        weight_dtype=comfy.utils.weight_dtype(state_dict),
    )


def cast(state_dict: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Cast the weights in place, one by one, so that two copies of all weights are never in memory."""
    for name, weight in state_dict.items():
        if weight.is_floating_point():
            try:
                state_dict[name] = weight.to(dtype)
            except NotImplementedError as error:  # 4-bit dtypes
                raise ValueError(
                    f"{name[:100]} is {weight.dtype}, which torch cannot convert to {dtype}; use weights of a wider dtype"
                ) from error


def config_path(folder: Path, part: str) -> Path:
    return folder / part / "config.json"


def read_config(folder: Path, part: str) -> dict[str, Any] | None:
    """The config.json of a part, or None if the file is missing."""
    path = config_path(folder, part)
    return read_json(path) if path.is_file() else None


@contextmanager
def errors_naming(path: Path, config: Path) -> Iterator[None]:
    """Prefix a ValueError about weights with their file and the config used to read them."""
    try:
        yield
    except ValueError as error:
        source = f" (config {config})" if config.is_file() else ""
        raise ValueError(f"{path}{source}: {error}") from error
