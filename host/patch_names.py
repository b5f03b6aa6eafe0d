"""Names of the patches on a MODEL, for messages to users."""

from collections.abc import Iterator
from typing import Any

from comfy.model_patcher import ModelPatcher

OVERRIDE = "optimized_attention_override"
PACK = __name__.split(".")[0]
GUIDANCE = (  # keys of model_options whose functions change how predictions become the guided x0
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
)


def name_of(function: Any) -> str:
    """Name of a patch for messages: the node or class that made it, where Python knows it."""
    qualified = getattr(function, "__qualname__", type(function).__qualname__)
    return qualified.split(".<locals>")[0].removesuffix(".execute").removesuffix(".patch")


def patches_on(patcher: ModelPatcher) -> list[str]:
    """Names of the changes that nodes outside this pack have made to the computations of a MODEL, in a fixed order.

    Overrides, patches, wrappers and functions have the name of the node that made them. Replaced objects have the name
    of their class or function. Quantised weights are listed, too. LoRAs are not, since they change only the values of
    weights.
    """
    transformer = patcher.model_options.get("transformer_options", {})
    groups = (
        ("attention override", [transformer.get(OVERRIDE)]),
        ("patch", functions_in([transformer.get("patches"), transformer.get("patches_replace")])),
        ("wrapper", functions_in([transformer.get("wrappers"), patcher.wrappers])),
        ("function", functions_in([patcher.model_options.get(key) for key in ("model_function_wrapper", *GUIDANCE)])),
        ("replacement", [v for v in patcher.object_patches.values() if callable(v)]),
    )
    names = [f"{kind} {name_of(f)}" for kind, functions in groups for f in functions if f is not None and _foreign(f)]
    tensors = [t for p in patcher.model.parameters() for t in (p, p.data)]
    return list(
        dict.fromkeys([*names, *("quantised weights" for t in tensors if type(t).__name__ == "QuantizedTensor")])
    )


def functions_in(nested: Any) -> Iterator[Any]:
    """The functions in nested dictionaries and lists; None is left out."""
    if isinstance(nested, (dict, list, tuple)):
        for value in nested.values() if isinstance(nested, dict) else nested:
            yield from functions_in(value)
    elif nested is not None:
        yield nested


def _foreign(function: Any) -> bool:
    module = getattr(function, "__module__", type(function).__module__) or ""
    return module.split(".")[0] != PACK
