"""The pairs of checkpoints on which the cost of the blend is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sample
import psutil
import torch

from ...demo.modules import load_checkpoint
from .random_models import SD15_PARAMETERS, SDXL_PARAMETERS, SDXL_POOLED, conditioning, sd15, sdxl
from .saliency_effect import blend

KINDS = ("base", "expert", "fusion")
CFG, SEED = 5.0, 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
GIB = 2**30
PARAMETERS = {"sd15": SD15_PARAMETERS, "sdxl": SDXL_PARAMETERS}
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
# bytes needed in addition to the weights: Python, libraries, activations, and VRAM that ComfyUI leaves free
RESERVE = {"ram": 2 * GIB, "vram": 4 * GIB}


@dataclass(frozen=True)
class Setting:
    """A pair of checkpoints and its sampling settings."""

    name: str
    size: int  # side of the latent
    steps: int
    dtype: str
    batch: int
    cfg: float = CFG
    refresh: int = 1  # widget of the blend
    channels: int | None = None  # of the first layer; None: the published number

    @property
    def title(self) -> str:
        models = "the demo checkpoints general and expert-animals"
        if self.name in NAMES:
            size = f"-sized checkpoints of {PARAMETERS[self.name] / 1e6:.0f} M random parameters"
            models = f"two {NAMES[self.name]}{f' models of {self.channels} channels' if self.channels else size}"
        return (
            f"{models}, {self.dtype}, latent {self.size} x {self.size}, batch {self.batch}, euler, steps:"
            f" {self.steps}, cfg {self.cfg:g}{f', refresh {self.refresh}' if self.refresh > 1 else ''}"
        )

    @property
    def same_batches(self) -> bool:
        """Whether the blend predicts the same batches as base and expert alone: with cfg and at every step."""
        return self.cfg != 1.0 and self.refresh == 1


@dataclass(frozen=True)
class Case:
    """The models and prompts of a setting; ``fusion`` is the blend of base and expert."""

    setting: Setting
    base: Any
    expert: Any
    fusion: Any
    trace: Any
    positive: list
    negative: list

    def runs(self) -> dict[str, Callable]:
        return {kind: partial(self.sample, getattr(self, kind)) for kind in KINDS}

    def sample(self, model) -> torch.Tensor:
        """Sample as the KSampler node does."""
        s = self.setting
        channels = model.get_model_object("latent_format").latent_channels
        latent = torch.zeros(s.batch, channels, s.size, s.size)
        noise = comfy.sample.prepare_noise(latent, SEED)
        prompts = self.positive, self.negative
        return comfy.sample.sample(
            model, noise, s.steps, s.cfg, "euler", "normal", *prompts, latent, disable_pbar=True, seed=SEED
        )

    def networks(self) -> list[torch.nn.Module]:
        return [m.model.diffusion_model for m in (self.base, self.expert)]

    def weights(self) -> int:
        """Bytes of both models' weights."""
        return sum(p.numel() * p.element_size() for n in self.networks() for p in n.parameters())

    def expert_share(self) -> float:
        """The expert's share of the mask in the last run."""
        return float(self.trace.record.mean_shares()[1].mean())


def prepare(setting: Setting) -> Case:
    if setting.name in NAMES:
        make, text = {"sd15": (sd15, {}), "sdxl": (sdxl, {"width": 2048, "pooled": SDXL_POOLED})}[setting.name]
        size = {"channels": setting.channels} if setting.channels else {}
        base, expert = (make(seed, DTYPES[setting.dtype], **size) for seed in (1, 2))
        positive, negative = conditioning(3, **text), conditioning(4, **text)
    else:
        base, clip, _ = load_checkpoint("general")
        expert, _, _ = load_checkpoint("expert-animals")
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a cat left of a tree on blue", "")
        )
    fusion, trace = blend(base, expert, None, None, {"refresh": setting.refresh})
    return Case(setting, base, expert, fusion, trace, positive, negative)


def check_memory(setting: Setting, device: str) -> None:
    if setting.name not in NAMES or setting.channels:
        return
    weights = 2 * PARAMETERS[setting.name] * DTYPES[setting.dtype].itemsize
    free = {"ram": psutil.virtual_memory().available}
    if device == "cuda":
        free["vram"] = torch.cuda.mem_get_info()[0]
    for kind, available in free.items():
        if available < (needed := weights + RESERVE[kind]):
            raise SystemExit(
                f"two {NAMES[setting.name]}-sized models in {setting.dtype} need {needed / GIB:.1f} GiB of {kind.upper()}, but only"
                f" {available / GIB:.1f} GiB are available; free memory, or use --models demo"
            )
