"""Checks whether several noises can be sampled in one batch without influencing each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...host.attachments import attached
from ...host.batches import relates_rows

Conds = Mapping[str, Sequence[Mapping[str, Any]]]  # conditionings by name, as ComfyUI's guiders hold them

# Samplers that add no noise during the run and make no decision that depends on the whole batch. dpm_adaptive is
# excluded, since its step size depends on all samples of a batch.
DETERMINISTIC = frozenset(
    "euler euler_cfg_pp heun heunpp2 exp_heun_2_x0 dpm_2 lms dpm_fast dpmpp_2m dpmpp_2m_cfg_pp ipndm ipndm_v deis"
    " res_multistep res_multistep_cfg_pp gradient_estimation gradient_estimation_cfg_pp ddim uni_pc uni_pc_bh2".split()
)

# Model calls per step, for samplers with more than one call. Most of these samplers need one call fewer in the last
# step. dpm_adaptive is missing, since its number of calls per step is not fixed.
CALLS_PER_STEP = dict.fromkeys(
    "heun dpm_2 dpm_2_ancestral dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu exp_heun_2_x0"
    " exp_heun_2_x0_sde seeds_2 sa_solver_pece".split(),
    2,
) | dict.fromkeys(("heunpp2", "seeds_3"), 3)


def adds_no_noise(sampler: str | None, noise_mask: Any) -> bool:
    """Whether the final latent depends only on the initial noise, and not on the seed. ``sampler``: None if unknown."""
    if sampler == "ddim" and noise_mask is not None:
        return False  # ddim fills the unmasked area with noise from the seed
    return sampler in DETERMINISTIC


def rows_that_fit(model: ModelPatcher, size: Sequence[int], count: int) -> int:
    """How many of ``count`` rows of a latent of ``size``, without the batch axis, fit in memory in one batch."""
    free = comfy.model_management.get_free_memory(model.load_device)
    # guidance doubles the rows
    return next((n for n in range(count, 1, -1) if model.memory_required([2 * n, *size]) < free), 1)


def rows_are_independent(model: ModelPatcher, conds: Conds) -> bool:
    """Whether ``model``, its attachments and the conditionings ``conds`` treat the rows of a batch independently."""
    if relates_rows(model):
        return False
    if "easycache" in model.model_options.get("transformer_options", {}):
        return False  # EasyCache decides by a mean over the batch whether to skip a step
    if not all(attachment.rows_are_independent for attachment in attached(model)):
        return False
    further = [cond for attachment in attached(model) for pair in attachment.conditionings for cond in pair]
    entries = [comfy.sampler_helpers.convert_cond(cond) for cond in further if cond is not None]
    return all(_is_for_every_row(entry) for cond in (*conds.values(), *entries) for entry in cond)


def _is_for_every_row(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a conditioning is the same for every row of a batch and adds no random noise."""
    control = entry.get("control")
    while control is not None:
        hint = getattr(control, "cond_hint_original", None)
        if hint is not None and len(hint) != 1:
            return False
        control = control.previous_controlnet
    return "unclip_conditioning" not in entry and _is_single(entry)


def _is_single(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim < 2 or len(value) == 1
    if isinstance(value, Mapping):
        return all(_is_single(v) for v in value.values())
    return not isinstance(value, (list, tuple)) or all(_is_single(v) for v in value)
