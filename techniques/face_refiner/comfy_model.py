"""A face refiner as the host holds it: what its FACE_REFINER socket carries, and its network at work."""

import dataclasses
from collections.abc import Mapping

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .networks.layers import ImageGenerator

LAYERS = 8  # features at full size that are in memory at once, norms and skips included
SEEDS = 2**64
BFLOAT16 = ("avx512_bf16", "amx_bf16")  # processors' products of bfloat16, as torch.cpu.get_capabilities names them


@dataclasses.dataclass(frozen=True, eq=False)
class FaceRefinerModel:
    """A generator, loaded and moved by the host."""

    name: str
    patcher: ModelPatcher  # around networks.generator_layers.ImageGenerator
    dtype: torch.dtype  # what its layers compute in
    size: int  # side of the pictures that it was trained on
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what its file tells of it

    @property
    def multiple(self) -> int:
        return self.patcher.model.multiple

    @property
    def least(self) -> int:
        return self.patcher.model.least

    def __str__(self) -> str:
        return f"{self.name} ({self.patcher.model.config})"


def wrap(name: str, network: ImageGenerator, details: Mapping[str, str] | None = None) -> FaceRefinerModel:
    """The network, on the CPU and built with the host's casting operations, in the host's hands."""
    device = comfy.model_management.get_torch_device()
    details = dict(details or {})
    dtype = compute_dtype(device)
    return FaceRefinerModel(
        name=name,
        # not CoreModelPatcher: what it streams to a GPU layer by layer are the files of the host's own models
        patcher=ModelPatcher(
            network.to(memory_format=torch.channels_last),  # ty: ignore[no-matching-overload]  # torch's types lack it
            load_device=device,
            offload_device=comfy.model_management.unet_offload_device(),
        ),
        dtype=dtype,
        size=_size(details.get("size", ""), network.size),
        details=details,
    )


def _size(told: str, usual: int) -> int:
    """The side of the pictures that a file tells of, where that is one."""
    known = told.isdecimal() and len(told) <= 5 and int(told) > 0
    return int(told) if known else usual


def compute_dtype(device: torch.device) -> torch.dtype:
    """What a refiner's layers compute in on ``device``.

    float16 where the device is fast in it, which has three bits more for a picture than bfloat16. On a CPU bfloat16 where
    the processor multiplies it itself, which the host does not ask for; ``--force-fp32`` holds there too.
    """
    if comfy.model_management.is_device_cpu(device):
        return torch.bfloat16 if multiplies_bfloat16() and not comfy.model_management.FORCE_FP32 else torch.float32
    if comfy.model_management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16 that oneDNN uses, which computes torch's convolutions.

    With AVX-512 alone oneDNN takes bfloat16 too, but emulates its products. ARM's are not counted: not measured.
    """
    tell = getattr(torch.cpu, "get_capabilities", None)  # an older torch cannot tell
    if tell is None or not torch.backends.mkldnn.is_available():
        return False
    return any(tell().get(name, False) for name in BFLOAT16)


class Refining:
    """One run of a refiner: pictures [N, 3, H, W] of 0..1 to pictures, as many at a time as memory allows.

    With a ``seed`` the network computes as in training (dropout, statistics of the picture), picture i of the run from
    seed + i: the same in every run and whatever is computed together.
    """

    def __init__(self, model: FaceRefinerModel, seed: int | None = None) -> None:
        self.model, self.seed, self.done = model, seed, 0

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """On the device of ``pictures``, in float32."""
        patcher = self.model.patcher
        memory = self._memory(pictures)
        comfy.model_management.load_models_gpu([patcher], memory_required=memory)
        size = max(1, int(patcher.get_free_memory(patcher.load_device) / memory))
        bar = comfy.utils.ProgressBar(len(pictures))
        found = []
        for chunk in pictures.split(size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            draws = self._draws(len(chunk))
            out = patcher.model.refine(chunk.to(patcher.load_device), draws, self.model.dtype)
            found.append(out.to(pictures.device).contiguous())
            bar.update(len(chunk))
        return torch.cat(found)

    def _draws(self, count: int) -> list[torch.Generator] | None:
        first, self.done = self.done, self.done + count
        if self.seed is None:
            return None
        return [torch.Generator().manual_seed((self.seed + first + i) % SEEDS) for i in range(count)]

    def _memory(self, pictures: Tensor) -> int:
        """Bytes for one picture."""
        height, width = pictures.shape[-2:]
        return LAYERS * self.model.patcher.model.width * self.model.dtype.itemsize * height * width
