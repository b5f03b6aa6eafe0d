"""What has no gradient in the host, or would get a wrong one: refused before anything runs."""

from collections.abc import Iterable

import comfy.model_base
from comfy.ldm.modules import attention
from comfy.model_patcher import ModelPatcher

from ...host.attachments import Conditioning, attached

NO_DERIVATIVE = ("CosmosPredict2", "Anima", "JoyImage")  # their rotary embedding is a fused kernel in training too
NO_DERIVATIVE_ATTENTION = {"attention_sage": "--use-sage-attention", "attention_flash": "--use-flash-attention"}


def check_differentiable(model: ModelPatcher, positive: Conditioning, negative: Conditioning) -> None:
    """Refuse, with the reason, what has no gradient or would get a wrong one."""
    conditionings, attachments = (positive, negative), attached(model)
    for patcher in (model, *(further for attachment in attachments for further in attachment.models)):
        if (obstacle := _obstacle(patcher)) is not None:
            raise ValueError(f"{obstacle}; use mode search, which needs no gradient")
    for attachment in attachments:
        # it cannot be computed again out of the order of the steps
        if attachment.depends_on_history:
            raise ValueError(f"{attachment.depends_on_history} for optimising, or use mode search")
    _check_conditionings(conditionings)
    for wired in (pair for attachment in attachments for pair in attachment.conditionings):
        _check_conditionings([theirs if own is None else own for own, theirs in zip(wired, conditionings, strict=True)])


def _check_conditionings(conditionings: Iterable[Conditioning]) -> None:
    entries = [options for conditioning in conditionings for _, options in conditioning]
    for options in entries:
        for kind, name in (("control", "a ControlNet"), ("gligen", "GLIGEN")):
            if kind in options:
                raise ValueError(
                    f"a conditioning carries {name}, which passes no gradient on; remove it or use mode search"
                )
    groups = {options.get("hooks") for options in entries}
    scheduled = any(len(h.hook_keyframe.keyframes) > 1 for group in groups if group for h in group.hooks)
    # the host writes hooked weights over one another, behind the back of autograd
    if len(groups) > 1 or scheduled:
        raise ValueError(
            "the conditionings' hooks change the weights within a run, and the gradient would be of the last ones only;"
            " put the LoRA on the MODEL, the same hooks without keyframes on all conditionings, or use mode search"
        )


def _obstacle(patcher: ModelPatcher) -> str | None:
    inner, name = patcher.model, type(patcher.model).__name__
    kinds = tuple(getattr(comfy.model_base, k) for k in NO_DERIVATIVE if hasattr(comfy.model_base, k))
    if isinstance(inner, kinds):
        return f"{name} computes its rotary embedding with a kernel that has no gradient"
    if patcher.get_additional_models_with_key("multigpu"):
        return "a model spread over several GPUs passes no gradient on; remove the MultiGPU node"
    if "easycache" in patcher.model_options.get("transformer_options", {}):
        return "EasyCache or LazyCache answers from earlier steps and its gradient would be wrong; remove it"
    used = getattr(attention.optimized_attention, "__name__", "")
    if used in NO_DERIVATIVE_ATTENTION:
        return f"the attention kernel has no gradient; start ComfyUI without {NO_DERIVATIVE_ATTENTION[used]}"
    return None
