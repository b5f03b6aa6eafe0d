"""What has no gradient in the host, or would get a wrong one: refused before anything runs."""

from collections.abc import Iterable

import comfy.model_base
from comfy.ldm.modules import attention

from ..saliency_blend.comfy_hook import blend_chain

NO_DERIVATIVE = ("CosmosPredict2", "Anima", "JoyImage")  # their rotary embedding is a fused kernel in training too
NO_DERIVATIVE_ATTENTION = {"attention_sage": "--use-sage-attention", "attention_flash": "--use-flash-attention"}


def check_differentiable(model, positive: list, negative: list) -> None:
    """Refuse, with the reason, what has no gradient or would get a wrong one."""
    conditionings = positive, negative
    chain = blend_chain(model)
    for patcher in (model, *(e.patcher for e in chain.experts)):
        if (obstacle := _obstacle(patcher)) is not None:
            raise ValueError(f"{obstacle}; use mode search, which needs no gradient")
    for expert, (settings, *_) in zip(chain.experts, chain.settings, strict=True):
        _check_without_history(expert.label, settings)
    _check_conditionings(conditionings)
    for expert in chain.experts:
        wired = zip((expert.positive, expert.negative), conditionings, strict=True)
        _check_conditionings([theirs if own is None else own for own, theirs in wired])


def _check_conditionings(conditionings: Iterable[list]) -> None:
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


def _obstacle(patcher) -> str | None:
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


def _check_without_history(label: str, settings) -> None:
    """A blend's expert whose answer depends on earlier steps cannot be computed again out of their order."""
    for name, neutral in (("refresh", 1), ("skip_below", 0), ("crop", 0)):
        value = getattr(settings, name, neutral)
        if value != neutral:
            raise ValueError(
                f"{name} {value:g} of the expert '{label}' answers from earlier steps, and its gradient would be wrong;"
                f" set it to {neutral} for optimising, or use mode search"
            )
