"""A face refiner in ComfyUI: the value of a FACE_REFINER socket, and the code that runs its network."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .networks.layers import ImageGenerator

log = logging.getLogger("comfyui-chorus")

# estimated number of full-size feature maps in memory at once, with those of norms, skip connections and the workspace
# of a GPU
LAYERS = 8
SMALL = 1024 * 1024  # pixels; images of up to this size are refined whatever the estimate of the free memory
SEEDS = 2**64
# CPU instructions for bfloat16 products, with the names that torch.cpu.get_capabilities returns
BFLOAT16 = ("avx512_bf16", "amx_bf16")


@dataclasses.dataclass(frozen=True, eq=False)
class FaceRefinerModel:
    """A generator that ComfyUI loads and moves between devices."""

    name: str
    patcher: ModelPatcher  # holds a networks.layers.ImageGenerator
    dtype: torch.dtype  # the layers compute in this dtype
    size: int  # side of the training images
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)  # metadata of its file

    @property
    def multiple(self) -> int:
        return self.patcher.model.multiple

    @property
    def min_side(self) -> int:
        return self.patcher.model.min_side

    def __str__(self) -> str:
        return f"{self.name} ({self.patcher.model.config})"


def wrap(name: str, network: ImageGenerator, details: Mapping[str, str] | None = None) -> FaceRefinerModel:
    """A refiner managed by ComfyUI. ``network``: on the CPU, built with ComfyUI's casting operations."""
    device = comfy.model_management.get_torch_device()
    details = dict(details or {})
    dtype = compute_dtype(device)
    return FaceRefinerModel(
        name=name,
        # not CoreModelPatcher: it may stream weights to a GPU from their file, which works only for ComfyUI's models
        patcher=ModelPatcher(
            network.to(memory_format=torch.channels_last),  # ty: ignore[no-matching-overload]  # torch's types lack it
            load_device=device,
            offload_device=comfy.model_management.unet_offload_device(),
        ),
        dtype=dtype,
        size=_size(details.get("size", ""), network.size),
        details=details,
    )


def _size(text: str, default: int) -> int:
    """The side of the training images from a file's metadata, or ``default`` if it is invalid."""
    valid = text.isdecimal() and len(text) <= 5 and int(text) > 0
    return int(text) if valid else default


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which the layers of a refiner compute on ``device``.

    On a GPU: float16 if the device computes fast in float16, which has three more bits of precision than bfloat16.
    On a CPU: bfloat16 if the CPU has instructions for bfloat16 products; ComfyUI does not check for them.
    ``--force-fp32`` applies to CPUs too.
    """
    if comfy.model_management.is_device_cpu(device):
        return torch.bfloat16 if has_bfloat16_products() and not comfy.model_management.FORCE_FP32 else torch.float32
    if comfy.model_management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32


def has_bfloat16_products() -> bool:
    """Whether the CPU has instructions for bfloat16 products that oneDNN uses; oneDNN computes torch's convolutions.

    On CPUs that have AVX-512 without these instructions, oneDNN emulates the products. ARM CPUs are not included, since
    their speed was not measured.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # missing in older torch
    if get_capabilities is None or not torch.backends.mkldnn.is_available():
        return False
    return any(get_capabilities().get(name, False) for name in BFLOAT16)


class RefinerRun:
    """Runs a refiner on images [N, 3, H, W] in 0..1, in chunks that fit in memory. An image is never split into tiles.

    With a ``seed`` the network computes as in training: with dropout, and with norms that use the statistics of each
    image. Each image uses ``seed`` plus its offset, so that the result does not depend on the chunks.
    """

    def __init__(self, model: FaceRefinerModel, seed: int | None = None) -> None:
        self.model, self.seed = model, seed

    @torch.inference_mode()
    def __call__(self, images: Tensor, offsets: Sequence[int] = ()) -> Tensor:
        """The refined images in float32, on the device of ``images``. ``offsets``: of the seed, by default 0 to N - 1.

        Errors (ValueError): an image that is too large for the memory.
        """
        patcher, device, dtype = self.model.patcher, self.model.patcher.load_device, self.model.dtype
        offsets = offsets or range(len(images))
        memory = self._memory(images, dtype, LAYERS)
        comfy.model_management.load_models_gpu([patcher], memory_required=memory)
        size = int(patcher.get_free_memory(device) / memory)
        if size == 0 and images.shape[-2] * images.shape[-1] > SMALL:
            device, dtype = self._on_cpu(images)
        bar = comfy.utils.ProgressBar(len(images))
        refined = []
        for first in range(0, len(images), max(1, size)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            rows = slice(first, first + max(1, size))
            out = patcher.model.refine(images[rows].to(device), self._generators(offsets[rows]), dtype)
            refined.append(out.to(images.device).contiguous())
            bar.update(len(out))
        return torch.cat(refined)

    def _on_cpu(self, images: Tensor) -> tuple[torch.device, torch.dtype]:
        """The CPU and its dtype, for images that do not fit in the memory of a GPU; a ValueError if its memory is short."""
        cpu = torch.device("cpu")
        dtype = compute_dtype(cpu)
        memory, free = (
            self._memory(images, dtype, self.model.patcher.model.maps),
            comfy.model_management.get_free_memory(cpu),
        )
        height, width = images.shape[-2:]
        if memory > free:
            raise ValueError(
                f"an image of {width} x {height} pixels needs about {memory / 2**30:.1f} GiB of memory for"
                f" {self.model.name}, and {free / 2**30:.1f} GiB are free; resize the image, or connect bboxes or a mask to"
                " refine only its faces"
            )
        if self.model.patcher.load_device != cpu:
            log.info(
                "FaceRefiner: an image of %d x %d pixels does not fit in the GPU's memory; it is refined on the CPU",
                width,
                height,
            )
        return cpu, dtype

    def _generators(self, offsets: Sequence[int]) -> list[torch.Generator] | None:
        if self.seed is None:
            return None
        return [torch.Generator().manual_seed((self.seed + offset) % SEEDS) for offset in offsets]

    def _memory(self, images: Tensor, dtype: torch.dtype, maps: int) -> int:
        """Estimated memory for one image, in bytes. ``maps``: full-size feature maps in memory at once."""
        height, width = images.shape[-2:]
        return maps * self.model.patcher.model.width * dtype.itemsize * height * width
