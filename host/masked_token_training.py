"""What training on a masked token model asks of the host: its weights as they are patched, room, progress, a LoRA put on."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .masked_token_model import MaskedTokenModel
from .previews import as_preview

InterruptProcessingException = comfy.model_management.InterruptProcessingException


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd inside a node: the host runs them in inference mode, whose tensors cannot be saved for a backward pass."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def training_place(model: MaskedTokenModel) -> tuple[torch.device, torch.dtype]:
    """Where to train, and in which dtype: never float16, whose gradients vanish."""
    device = model.transformer.load_device
    wide = comfy.model_management.is_device_cpu(device) or not comfy.model_management.should_use_bf16(device)
    return device, torch.float32 if wide else torch.bfloat16


def merged_weights(patcher: ModelPatcher, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the weights with the patches of ``patcher`` merged into them, whatever is loaded where."""
    weights = {}
    for key, ((weight, convert), *patches) in patcher.get_key_patches().items():
        weight = convert(weight.to(device, torch.float32, copy=True), inplace=True)
        weights[key] = comfy.lora.calculate_weight(patches, weight, key).to(dtype)
    return weights


def make_room(size: int, device: torch.device) -> None:
    """Have the host take its models off ``device`` until ``size`` bytes are free there."""
    if not comfy.model_management.is_device_cpu(device):
        comfy.model_management.free_memory(size, device)


def release() -> None:
    comfy.model_management.soft_empty_cache()


def add_lora(
    model: MaskedTokenModel, changes: Mapping[str, tuple[Tensor, Tensor, float]], strength: float
) -> MaskedTokenModel:
    """``model`` with the weights of its modules changed by strength · alpha / rank · up @ down, as the host's patches.

    ``changes`` holds down [rank, in], up [out, rank] and alpha for the names of modules.
    """
    tensors, keys = {}, {}
    for name, (down, up, alpha) in changes.items():
        keys[name] = f"{name}.weight"
        tensors |= {
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.weight": up,
            f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64),
        }
    transformer = model.transformer.clone()
    added = transformer.add_patches(comfy.lora.load_lora(tensors, keys), strength)
    if len(added) != len(changes):
        raise RuntimeError(f"the host patched {len(added)} of {len(changes)} modules; this ComfyUI is not supported")
    return model.with_transformer(transformer)


class TrainingProgress:
    """The node's progress bar; every step asks the host whether the user wants to stop."""

    def __init__(self, steps: int):
        self.bar = comfy.utils.ProgressBar(steps)

    def __call__(self, done: int, picture: Tensor | None = None) -> None:
        """``picture`` [H, W, 3] in 0..1 shows on the node."""
        self.bar.update_absolute(done, preview=None if picture is None else as_preview(picture))
        comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def rescue(save: Callable[[str], object]) -> Iterator[None]:
    """What ends the work inside is raised on, after ``save("interrupted" or "failed")`` has put its result on disk.

    ``save`` returns where, for the log and for the error, or None where there is nothing to keep.
    """
    try:
        yield
    except BaseException as error:
        if path := _saved(save, "interrupted" if isinstance(error, InterruptProcessingException) else "failed"):
            logging.warning("TrainMaskedTokenLora: what was learned until here is in %s", path)
            if isinstance(error, ValueError):
                error.args = (f"{error}; what was learned before is in {path}",)
        raise


def _saved(save: Callable[[str], object], reason: str) -> object:
    try:
        return save(reason)
    except Exception:
        # the error that is on its way says more
        logging.exception("TrainMaskedTokenLora: what was learned could not be saved")
        return None
