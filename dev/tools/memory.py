"""Memory of blends of published models: computed with ComfyUI's own estimates and loader, written to docs/memory.md.

python run.py memory            compute the tables and print whether docs/memory.md is up to date (about two minutes)
python run.py memory --write    also write docs/memory.md

The models are built on torch's meta device, which stores no weights, and are loaded onto a simulated card by ComfyUI's
load_models_gpu. Nothing here needs a GPU.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from .. import headless

headless.start()

import comfy.model_management as management  # noqa: E402
import comfy.ops  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from .published_models import MODELS, PAIRS, Size  # noqa: E402
from .setup import ROOT  # noqa: E402

PATH = ROOT / "docs" / "memory.md"
MEASURED = ROOT / "dev" / "benchmarks" / "results" / "blend_memory.json"
COMMAND = "python run.py memory --write"
GIB, MIB = 1 << 30, 1 << 20
META = torch.device("meta")
CARDS = (8, 12, 16, 24, 32)  # GiB
PRECISIONS = ("16 bit", "fp8")
DTYPES = {  # of the weights, and of the computation if it differs
    "16 bit": (torch.bfloat16, None),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
    "fp32": (torch.float32, None),
}
HEAD = f"""# Memory of a blend

**Does it fit my card?** The tables show how much memory the blends of published models need, and what ComfyUI does on cards of
common sizes. The command `{COMMAND}` writes this file. **All numbers are computed**; the column *basis* will name the card
once a row has been measured. One section compares a computed number with a measurement on the CPU.

All sizes are in GiB (2^30 bytes). They are computed as follows:

- *Weights*: each model is built by ComfyUI at its published size, without memory for its weights, and ComfyUI adds up
  their bytes. *16 bit* is fp16 or bf16. *fp8* is a file whose weights are all stored in 8 bits, as *Load Diffusion Model*
  stores them with `weight_dtype` fp8_e4m3fn. Files that keep some layers in 16 bits need more.
- *Computation*: ComfyUI's own estimate for one image or video of the given size, on an Nvidia card. It grows in proportion to the
  number of images in the batch and to their size.
- *Cards*: ComfyUI's own loader loads the models onto a simulated card with so much **free** memory, on Linux. Subtract what
  other programs use: on a card of 12 GiB of which the desktop uses 1 GiB, 11 GiB are free.

During sampling, the base and all experts are loaded together. They compute one after the other, so that their weights add up,
but their computations do not. Text encoder and VAE are not included: they run before and after sampling, and ComfyUI
unloads them if sampling needs their memory. ControlNets and further experts add their weights.

Before each run, the log and the report of **Saliency Blend View** say how much memory the models of this run need, how much
is free, and whether ComfyUI will offload weights.
"""
MODEL_TEXT = """## Models (computed)

- *computation*: the estimate for one row, such as the positive prompt of one image. The positive and the negative prompt are two rows.
- *buffer*: memory for the layers that are copied to the card while others compute, if weights are offloaded.
- *configuration*: the file that states the size of the model.
"""
BLEND_TEXT = """## Blends (computed)

The first model is the base. *Two prompts* means that base and expert are the same checkpoint, which is loaded once.

- *computation*: with the positive and the negative prompt in one batch; for one checkpoint with two prompts, those of the base and of the
  expert. If memory is low, ComfyUI makes smaller batches, which are slower.
- *peak*: weights and computation.
- *least*: what must be free even if ComfyUI offloads all weights: the computation of one row, and the buffer.
- *whole*: all weights stay on the card. *offloaded*: so much of the weights stays in main memory and is copied to the card in every
  step, which is slower. *tight*: ComfyUI's loader leaves less memory free than its estimate for the computation of one row and the
  buffer; if a run is out of memory, reserve more with `--reserve-vram`. *too small*: less than the least.
"""
OPTIONS = """## Start options

- **None**: on Nvidia cards, ComfyUI uses *dynamic VRAM*. It loads each layer when it is first needed and keeps as many as fit, instead of
  deciding before the run. The tables show the decision before the run, which ComfyUI makes with `--disable-dynamic-vram`, on other cards
  and in WSL. The memory that the models need is the same. Both keep what does not fit in main memory, which must be large enough.
- `--lowvram`: has no effect on diffusion models; only the text encoders then run on the CPU.
- `--novram`: all weights stay in main memory; *least* must be free.
- `--highvram`, `--gpu-only`: all weights are loaded. They and at least the computation of one row must fit, or the run is out of memory.
  With `--gpu-only`, text encoder and VAE stay on the card in addition.
- `--reserve-vram N`: N GiB stay free for other programs, in place of the 0.4 GiB that ComfyUI reserves by default and that the tables
  include. On Windows the default is 0.2 to 0.3 GiB higher.

## If it does not fit

- Use weights in fp8, or a smaller model as expert.
- Put the expert on a second card with *Select Model Device*. Each card then needs the memory of its own model only.
- Base and expert may be one checkpoint with different prompts. With different LoRAs its weights are loaded twice.
- `crop_margin` lowers the computation of the expert, but not its weights.
"""
CHECK_TEXT = """## Check on the CPU

A blend of two models of SD 1.5's size with random weights was sampled in a new process, see
[blend_memory.py](../dev/benchmarks/blend_memory.py). The measured memory is the peak of the process minus its memory before the models
were created. It confirms the weights, and that the computations of base and expert do not add up: the peak of the blend is that of
sampling with each model in turn while both are in memory. It does not confirm the estimate of the computation: on the CPU, ComfyUI uses its
sub-quadratic attention, which makes its pieces larger if more memory is free. The tables assume the attention of PyTorch, as on Nvidia cards.
"""
LEFT_OUT = """## Not in the tables

These classes of ComfyUI share a latent space with other families (see [compatibility.md](compatibility.md)). Some are variants of the models
above. The published size of the others has not been established from ComfyUI's code or from a public configuration:
"""


@contextlib.contextmanager
def card(free: float, state: str = "NORMAL_VRAM") -> Iterator[None]:
    """Lets ComfyUI believe that the meta device is an Nvidia card with ``free`` bytes, on Linux.

    ``state``: the name of ComfyUI's VRAMState, which its start options select. ComfyUI's decisions are its own; only
    the facts about the machine are replaced.
    """

    def left(device: Any = None, torch_free_too: bool = False) -> Any:
        loaded = sum(m.loaded_size() for m in management.loaded_models() if m is not None and m.load_device == META)
        return (free - loaded, 0.0) if torch_free_too else free - loaded

    facts = {
        "get_free_memory": left,
        "vram_state": management.VRAMState[state],
        "lowvram_available": True,
        "pytorch_attention_flash_attention": lambda: True,  # decides how much memory a computation needs
        "NUM_STREAMS": 2,  # layers that are copied while another one computes
        "MIN_WEIGHT_MEMORY_RATIO": 0.0,
        "EXTRA_RESERVED_VRAM": 400 * MIB,
    }
    with contextlib.ExitStack() as stack:
        for name, value in facts.items():
            stack.enter_context(patch.object(management, name, value))
        # ComfyUI would allocate real memory for the weights of a layer that it loads
        stack.enter_context(
            patch.object(comfy.ops.disable_weight_init, "_zero_init_parameter", lambda module, name: None)
        )
        try:
            yield
        finally:
            management.free_memory(1e32, META)


@cache
def built(name: str, precision: str, copy: int = 0) -> ModelPatcher:
    """The MODEL ``name`` without weights. Another ``copy`` is another checkpoint of the same family."""
    config = MODELS[name].kind(MODELS[name].config)
    config.set_inference_dtype(*DTYPES[precision])
    return ModelPatcher(config.get_model({}, device=META), load_device=META, offload_device=META)


def latent_shape(model: ModelPatcher, size: Size, rows: int) -> list[int]:
    """The shape [rows, C, H, W] or [rows, C, T, H, W] of the latents of ``size``."""
    space = model.model.latent_format
    side, frames = space.spacial_downscale_ratio, (size.frames - 1) // space.temporal_downscale_ratio + 1
    image = [size.height // side, size.width // side]
    return [rows, space.latent_channels, *([frames] if space.latent_dimensions == 3 else []), *image]


@dataclass(frozen=True)
class Needs:
    """Memory of one model in bytes: its weights, its computation with one row, and a buffer for offloaded layers."""

    parameters: int
    weights: int
    row: float
    buffer: float


@cache
def needs(name: str, precision: str, size: Size) -> Needs:
    """The memory of the model ``name`` alone, on a card that holds no weights."""
    model = built(name, precision)
    with card(0.0, "NO_VRAM"):
        management.load_models_gpu([model])
        buffer = model.model.model_offload_buffer_memory
        row = model.model.memory_required(latent_shape(model, size, 1))
    return Needs(sum(p.numel() for p in model.model.diffusion_model.parameters()), model.model_size(), row, buffer)


@dataclass(frozen=True)
class Blend:
    """Memory of a blend in bytes.

    ``computation``: with all rows that ComfyUI puts into one batch. ``least``: the computation of one row, with buffers
    for offloaded layers. ``offloaded``: by card, the weights that stay in main memory. ``tight``: the cards on which
    the loaded weights leave less than the computation of one row and the buffers.
    """

    weights: int
    computation: float
    least: float
    offloaded: dict[int, float]
    tight: frozenset[int]

    @property
    def peak(self) -> float:
        return self.weights + self.computation


@cache
def blend(base: str, expert: str, one: bool, precision: str) -> Blend:
    """The memory of the blend of ``base`` and ``expert``, which are ``one`` checkpoint with two prompts or two."""
    size = pair_size(base, expert)
    models = [built(base, precision)] if one else [built(base, precision), built(expert, precision, 1)]
    each = [needs(name, precision, size) for name in dict.fromkeys((base, expert))]
    weights = sum(m.model_size() for m in models)
    # the models compute one after the other, each with the positive and negative rows; one checkpoint computes the rows
    # of base and expert in one batch
    rows = 4 if one else 2
    with card(0.0):  # for the attention of an Nvidia card
        computation = max(m.model.memory_required(latent_shape(m, size, rows)) for m in models)
    least = max(n.row + n.buffer for n in each)
    offloaded, tight = {}, set()
    for gib in CARDS:
        with card(gib * GIB):
            shape = latent_shape(models[0], size, 1)
            row = models[0].model.memory_required(shape)
            pair = models[0].model.memory_required([2, *shape[1:]])
            management.load_models_gpu(models, memory_required=pair, minimum_memory_required=row)
            loaded = sum(m.loaded_size() for m in models)
            computing = max(
                m.model.memory_required(latent_shape(m, size, 1)) + m.model.model_offload_buffer_memory for m in models
            )
        offloaded[gib] = weights - loaded
        if loaded + computing > gib * GIB:
            tight.add(gib)
    return Blend(weights, computation, least, offloaded, frozenset(tight))


def pair_size(base: str, expert: str) -> Size:
    """The usual size of the pair: that of both models, or a single image for an image model and a video model."""
    sizes = {MODELS[name].size for name in (base, expert)}
    return sizes.pop() if len(sizes) == 1 else Size()


def gib(size: float) -> str:
    """``size`` bytes in GiB, with one decimal, or two below 1 GiB."""
    return f"{size / GIB:.{2 if size < GIB else 1}f}"


def title(base: str, expert: str, one: bool) -> str:
    return f"{base}, two prompts" if one else f"{base} + {expert}"


def cell(blend: Blend, free: int) -> str:
    """What ComfyUI does on a card with ``free`` GiB."""
    if free * GIB < blend.least:
        return "too small"
    text = f"{gib(blend.offloaded[free])} offloaded" if blend.offloaded[free] else "whole"
    return f"{text}, tight" if free in blend.tight else text


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown. The first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


MODEL_HEAD = ("model", "billion parameters", "16 bit", "fp8", "size", "computation", "buffer", "configuration")
BLEND_HEAD = ("blend", "size", "weights", "computation", "peak", "least", *(f"{g} GiB" for g in CARDS), "basis")


def model_row(name: str) -> list[str]:
    """The row of the model ``name``."""
    model = MODELS[name]
    half, quarter = (needs(name, precision, model.size) for precision in PRECISIONS)
    sizes = [gib(size) for size in (half.weights, quarter.weights)]
    return [
        name,
        f"{half.parameters / 1e9:.2f}",
        *sizes,
        str(model.size),
        gib(half.row),
        gib(half.buffer),
        model.source,
    ]


def blend_row(pair: tuple[str, str, bool], precision: str) -> list[str]:
    """The row of a blend in one precision."""
    found = blend(*pair, precision)
    sizes = [gib(size) for size in (found.weights, found.computation, found.peak, found.least)]
    return [title(*pair), str(pair_size(*pair[:2])), *sizes, *(cell(found, card) for card in CARDS), "computed"]


def check_rows() -> list[list[str]]:
    """The computed memory of a blend of two SD 1.5 models on the CPU, and the measured one."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    setting = measured["setting"]
    model = built("SD 1.5", setting["dtype"])
    side = setting["size"] * model.model.latent_format.spacial_downscale_ratio
    shape = latent_shape(model, Size(side, side), 2 * setting["batch"])
    # a CPU has no attention that ComfyUI counts as economical
    with (
        patch.object(management, "pytorch_attention_flash_attention", lambda: False),
        patch.object(management, "xformers_enabled", lambda: False),
    ):
        computation = model.model.memory_required(shape)
    weights, peak = 2 * model.model_size(), measured["fusion"]["median"]
    return [
        [f"two SD 1.5 models, {setting['dtype']}, {side} x {side}", "computed", "measured"],
        ["weights", gib(weights), gib(measured["weights"])],
        [
            "computation",
            f"{gib(computation)} (ComfyUI's estimate)",
            f"{gib(peak - measured['weights'])} (peak - weights)",
        ],
        ["peak of the blend", gib(weights + computation), gib(peak)],
        ["peak of sampling with each model in turn, both in memory", "", gib(measured["plain"]["median"])],
    ]


def left_out() -> list[str]:
    """The classes of ComfyUI that share a latent space with others and are not in the tables."""
    from chorus.tests.families.catalogue import FAMILIES
    from chorus.tests.families.family_cells import latent_spaces

    shared = {FAMILIES[name].class_name for names in latent_spaces().values() if len(names) > 1 for name in names}
    return sorted(shared - {model.kind.__name__ for model in MODELS.values()})


def page(version: str) -> str:
    """The text of docs/memory.md."""
    blends = [
        f"### Weights in {precision}\n\n" + table([BLEND_HEAD, *(blend_row(pair, precision) for pair in PAIRS)])
        for precision in PRECISIONS
    ]
    environment = json.loads(MEASURED.read_text(encoding="utf-8"))["environment"]
    measured = f"Measured with `{environment['command']}` on {environment['device']}.\n"
    return "\n".join(
        [
            HEAD,
            f"Computed with ComfyUI {version}.\n",
            MODEL_TEXT + "\n" + table([MODEL_HEAD, *map(model_row, MODELS)]),
            BLEND_TEXT,
            *blends,
            OPTIONS,
            CHECK_TEXT + "\n" + measured + "\n" + table(check_rows()),
            LEFT_OUT + ", ".join(left_out()) + ".\n",
        ]
    )


def main(*words: str) -> int:
    """Compute the tables, print the differences from docs/memory.md, and write the file if asked.

    Returns the number of lines that differ.
    """
    import comfyui_version

    new, old = page(comfyui_version.__version__), PATH.read_text(encoding="utf-8") if PATH.is_file() else ""
    changed = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "old", "new", lineterm="", n=0))
    print("\n".join(changed) or f"{PATH.name}: up to date")
    if "--write" in words:
        PATH.write_text(new, encoding="utf-8")
        print(f"wrote {PATH.relative_to(ROOT)}")
    elif changed:
        print(f"after reading the differences, run `{COMMAND}`")
    return len(changed)


if __name__ == "__main__":
    import logging
    import sys

    logging.disable(logging.ERROR)
    wrong = main(*sys.argv[1:])
    sys.exit(0 if "--write" in sys.argv else min(wrong, 1))
