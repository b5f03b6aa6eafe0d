"""Checks before a run that ComfyUI can compute a correct gradient with the models and conditionings of the run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import comfy.model_base
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher

from ...host.attachments import attached
from ...host.gradient_check import Comparison
from ...host.patch_names import patches_on
from .comfy_inputs import Conds

# model classes that compute the rotary embedding with a fused kernel without gradient, even in training
NO_DERIVATIVE = ("CosmosPredict2", "Anima", "JoyImage", "ErnieImage")
# quantisation formats whose matrix product has no derivative in ComfyUI
NO_DERIVATIVE_WEIGHTS = {"convrot_w4a4", "asym_w4a8_int8"}


def check_differentiable(models: Sequence[ModelPatcher], conds: Conds) -> None:
    """Raise a ValueError with the reason if the gradient would be missing or wrong.

    ``models``: the models of the guider, the sampled one first; ``conds``: its conditionings.
    """
    attachments = attached(models[0])
    for patcher in (*models, *(further for attachment in attachments for further in attachment.models)):
        if (obstacle := _obstacle(patcher)) is not None:
            raise ValueError(f"{obstacle}; use mode search, which needs no gradient")
    for attachment in attachments:
        # gradient checkpointing recomputes the steps in another order
        if attachment.depends_on_history:
            raise ValueError(f"{attachment.depends_on_history} for optimising, or use mode search")
    _check_conditionings(conds.values())
    for pair in (pair for attachment in attachments for pair in attachment.conditionings):
        _check_conditionings(
            conds.get(name, []) if own is None else comfy.sampler_helpers.convert_cond(own)
            for name, own in zip(("positive", "negative"), pair, strict=True)
        )


def _check_conditionings(conditionings: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    entries = [entry for conditioning in conditionings for entry in conditioning]
    for options in entries:
        for kind, name in (("control", "a ControlNet"), ("gligen", "GLIGEN")):
            if kind in options:
                raise ValueError(
                    f"a conditioning carries {name}, through which no gradient flows; remove it, or use mode search"
                )
    groups = {options.get("hooks") for options in entries}
    scheduled = any(len(h.hook_keyframe.keyframes) > 1 for group in groups if group for h in group.hooks)
    # ComfyUI overwrites the weights of one hook group with the weights of the next; autograd cannot detect this
    if len(groups) > 1 or scheduled:
        raise ValueError(
            "the conditionings' hooks change the weights within a run, and the gradient would use the last weights only;"
            " apply the LoRA to the MODEL, set the same hooks without keyframes on all conditionings, or use mode search"
        )


def _obstacle(patcher: ModelPatcher) -> str | None:
    inner, name = patcher.model, type(patcher.model).__name__
    kinds = tuple(getattr(comfy.model_base, k) for k in NO_DERIVATIVE if hasattr(comfy.model_base, k))
    if isinstance(inner, kinds):
        return f"{name} computes its rotary embedding with a kernel that has no gradient"
    for layer in inner.modules():
        kind = getattr(layer, "quant_format", None)
        if kind in NO_DERIVATIVE_WEIGHTS and not getattr(layer, "_full_precision_mm", False):
            return f"the layers of {name} are quantised as {kind}, which has no gradient; use another checkpoint of it"
    if patcher.get_additional_models_with_key("multigpu"):
        return "no gradient flows through a model that is distributed over several GPUs; remove the MultiGPU node"
    if "easycache" in patcher.model_options.get("transformer_options", {}):
        return "EasyCache or LazyCache reuses predictions of earlier steps, so the gradient would be wrong; remove its node"
    return None


def comparison(models: Sequence[ModelPatcher]) -> Comparison:
    """Comparison of the gradient of the guider's ``models`` with finite differences, and the likely causes if it is wrong."""
    patchers = [*models, *(further for attachment in attached(models[0]) for further in attachment.models)]

    def causes() -> str:
        names = list(dict.fromkeys(name for patcher in patchers for name in patches_on(patcher)))
        if not names:
            kinds = " or ".join(dict.fromkeys(type(patcher.model).__name__ for patcher in patchers))
            return f"an operation of {kinds} has no derivative in this version of ComfyUI; use mode search"
        return f"probably {' or '.join(names)} has no derivative; remove it from the MODEL, or use mode search"

    dtypes = [getattr(patcher.model, "manual_cast_dtype", None) or patcher.model_dtype() for patcher in patchers]
    return Comparison(dtypes, causes)
