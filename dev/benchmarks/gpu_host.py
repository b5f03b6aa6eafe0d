"""The sections of ``bench gpu`` that need ComfyUI: cost of the blend, and memory of SeedSelect."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial

import torch

from .. import headless

headless.start()

import comfy.model_management  # noqa: E402
import comfy.utils  # noqa: E402
import comfyui_version  # noqa: E402

from . import fusion_cost, seed_case, seed_select  # noqa: E402
from .fusion_case import KINDS, Setting, check_memory, prepare  # noqa: E402
from .sections import Section, Skipped  # noqa: E402
from .stopwatch import median  # noqa: E402

PART = "host"
VERSIONS = {"comfyui": comfyui_version.__version__}
SIDES = {"sd15": 64, "sdxl": 128}  # of the latent; 512 and 1024 pixels
STEPS, ROUNDS = 10, 6  # six rounds: one of each order
EXPECTED = {"sd15": 40, "sdxl": 80}  # seconds, with the creation of both models


def sections(device: torch.device, smoke: bool) -> list[Section]:
    def setting(name: str, dtype: str, **further) -> Setting:
        return Setting(name, SIDES[name], STEPS, dtype, 1, **further)

    blends = [setting("sd15", "fp16"), setting("sdxl", "fp16"), setting("sd15", "bf16"), setting("sdxl", "bf16")]
    cheaper = [setting("sd15", "fp16", cfg=1.0), setting("sd15", "fp16", refresh=3)]
    search = seed_case.Setting("sd15", 512, STEPS, 4, 1, STEPS, STEPS)
    rounds = ROUNDS
    if smoke:
        small = {"size": 8, "steps": 4, "dtype": "fp32", "batch": 1}
        blends = [Setting("sd15", channels=32, **small), Setting("sdxl", channels=64, **small)]
        cheaper = [Setting("sd15", channels=32, cfg=1.0, **small), Setting("sd15", channels=32, refresh=3, **small)]
        search, rounds = seed_case.Setting("demo", 64, 2, 2, 1, 2, 2), 1
    first, *others = [
        _section("overhead of the blend", "overhead", s, partial(overhead, s, rounds, device)) for s in blends
    ]
    cost = [_section("cost of the blend", "cost", s, partial(relative_cost, s, rounds, device)) for s in cheaper]
    memory = Section(
        f"memory of SeedSelect, {search.pixels} x {search.pixels}", PART, "memory", 90, partial(seed_memory, search)
    )
    return [first, *cost, memory, *others]


def _section(title: str, kind: str, setting: Setting, run) -> Section:
    name = f"{title}, {setting.name} {setting.dtype}"
    name += f", cfg {setting.cfg:g}" if setting.cfg == 1.0 else ""
    name += f", refresh {setting.refresh}" if setting.refresh > 1 else ""
    return Section(name, PART, kind, EXPECTED[setting.name], run)


@contextmanager
def models_that_fit(setting: Setting, device: torch.device) -> Iterator[None]:
    """Raise Skipped if the models do not fit in memory; unload them at the end."""
    comfy.utils.PROGRESS_BAR_ENABLED = False
    try:
        check_memory(setting, device.type)
    except SystemExit as error:
        raise Skipped(str(error)) from None
    try:
        with torch.inference_mode():
            yield
    finally:
        comfy.model_management.unload_all_models()


def overhead(setting: Setting, rounds: int, device: torch.device) -> dict:
    """See fusion_cost.py."""
    with models_that_fit(setting, device):
        return fusion_cost.measure(setting, argparse.Namespace(no_memory=True, rounds=rounds), device)


def relative_cost(setting: Setting, rounds: int, device: torch.device) -> dict:
    """Time of the blend relative to the base alone, and the rows that the networks predict in one run."""
    with models_that_fit(setting, device):
        found = fusion_cost.rounds(prepare(setting), rounds, device)
    return {
        "setting": asdict(setting),
        "title": setting.title,
        "seconds": {kind: median([row[kind].seconds for row in found]) for kind in KINDS},
        "rows": {kind: sum(found[0][kind].batches) for kind in KINDS},
        "relative_to_base": median([row["fusion"].seconds / row["base"].seconds for row in found]),
    }


def seed_memory(setting: seed_case.Setting) -> dict:
    """Peak memory of plain sampling and of SeedSelect's gradient, each in a new process; see seed_select.py."""
    return {"setting": asdict(setting), **seed_select.memory(setting, [seed_case.PLAIN, seed_case.OPTIMIZE])}
