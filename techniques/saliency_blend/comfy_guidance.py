"""The guidance functions of an expert, which act on its predictions as without a blend.

Nodes such as RescaleCFG, Perturbed-Attention Guidance and CFG Override change how a model's conditional prediction c and
unconditional prediction u become its guided x0. For an expert with such functions, ComfyUI's CFGGuider computes this x0
with the expert's options. The blend then uses c' = u + (x0 - u) / cfg in place of c; cfg is the sampler's scale. The
sampler then computes u + cfg (c' - u), which is x0. Saliency is measured on c and u.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.samplers import CFGGuider
from torch import Tensor

from ...host.patch_names import GUIDANCE, functions_in, name_of
from .extrapolation import Pair

SERVED = "chorus_raw_predictions"


class ExpertGuider(CFGGuider):
    """ComfyUI's guider for one expert.

    It holds the expert's options and runs the expert's OUTER_SAMPLE and SAMPLER_SAMPLE wrappers. The sampler belongs
    to the base. A wrapper on an expert can prepare and clean up, as those of EasyCache and LazyCache do. It cannot
    replace the sampler's noise, latent or result: ``within`` refuses a wrapper that does so (ValueError).
    """

    def __init__(self, model_patcher: ModelPatcher, label: str) -> None:
        super().__init__(model_patcher)
        self.label = label
        self.model_options = comfy.model_patcher.create_model_options_clone(model_patcher.model_options)

    def check_noise(self) -> None:
        """Refuse context windows that change the noise (ValueError)."""
        if getattr(self.model_options.get("context_handler"), "freenoise", False):
            raise ValueError(
                f"the context windows on the expert '{self.label}' change the noise (freenoise), and the noise belongs to"
                " the base; switch freenoise off"
            )

    def within(self, kind: str, inner: Callable[[], Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """``inner()``, called inside the expert's wrappers of ``kind``, which receive ``args`` and ``kwargs``."""
        # ComfyUI merges both lists later, when it prepares the model for the run
        wrappers = [
            *get_all_wrappers(kind, self.model_options, is_model_options=True),
            *self.model_patcher.get_all_wrappers(kind),
        ]
        if not wrappers:
            return inner()
        if kind == WrappersMP.SAMPLER_SAMPLE:
            # args are (guider, sigmas, extra_args, ...); the wrappers must read the expert's options
            args = (*args[:2], {**args[2], "model_options": self.model_options}, *args[3:])
        names = " and ".join(name_of(w) for w in wrappers)
        remedy = f"the sampler of a blend belongs to its base; put {names} on the base model"
        results: list[Tensor] = []

        def sample(*given: Any, **named: Any) -> Tensor:
            unchanged = len(given) == len(args) and all(a is b for a, b in zip(given, args, strict=True))
            if not unchanged or named.keys() != kwargs.keys() or any(named[k] is not kwargs[k] for k in kwargs):
                raise ValueError(f"{names} on the expert '{self.label}' changes the input of the sampler; {remedy}")
            results.append(inner())
            return results[-1]

        output = WrapperExecutor.new_class_executor(sample, self, wrappers).execute(*args, **kwargs)
        if len(results) != 1 or output is not results[0]:
            raise ValueError(f"{names} on the expert '{self.label}' changes the result of the sampler; {remedy}")
        return output


def guidance_functions(options: dict[str, Any]) -> list[Any]:
    """The functions of ``options`` (a MODEL's model_options) that change how predictions become the guided x0."""
    found = functions_in([options.get(key) for key in GUIDANCE])
    return [*found, *get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True)]


def leaves_out_negative(cfg: float | None, options: dict[str, Any]) -> bool:
    """Whether ComfyUI evaluates only the positive conditioning of a model with these ``options`` at scale ``cfg``."""
    return cfg is not None and math.isclose(cfg, 1.0) and not options.get("disable_cfg1_optimization", False)


class _Served:
    """CALC_COND_BATCH wrapper that returns known predictions instead of computing them again.

    It does so only for calls with the input ``x``, with the dictionary ``options`` (set after construction), and with
    one of the lists of conditionings in ``calls``. In these lists, None marks a conditioning that is not evaluated.
    Its prediction is 0.
    """

    def __init__(self, x: Tensor, calls: list[tuple[list[list[dict] | None], list[Tensor]]]) -> None:
        self.x, self.calls = x, calls
        # compared by identity: a function that changes patches passes a copy, for which the known results do not hold
        self.options: dict[str, Any] = {}

    def __call__(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[list[dict] | None],
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> list[Tensor]:
        if x is self.x and options is self.options:
            for known, found in self.calls:
                if len(conds) == len(known) and all(a is b for a, b in zip(conds, known, strict=True)):
                    return list(found)
        return executor(model, conds, x, sigma, options)


def guided(
    guider: ExpertGuider,
    x: Tensor,
    sigma: Tensor,
    pair: Pair,
    cfg: float,
    *,
    joint: bool,
    separate: bool,
    seed: int | None,
) -> Pair:
    """(c', u') [B, C, *S] such that u' + cfg (c' - u') is the expert's guided x0 at its own ``x`` and ``sigma``.

    ``pair``: the expert's (conditional, unconditional) prediction before guidance. ``joint``: whether ``pair``
    equals an evaluation of both conditionings in one batch. ``separate``: whether ``pair[0]`` equals an evaluation
    without the negative. If the rows of a batch are independent, both flags are true. ``cfg``: the scale that
    the sampler applies to the result; ``guider.cfg`` is the expert's own scale. Guidance functions such as
    PAG and SAG evaluate the model again.
    """
    cond, uncond = guider.conds["positive"], guider.conds["negative"]
    used = pair[1]

    def capture(args: dict[str, Any]) -> list[Tensor]:
        nonlocal used
        if args["conds"][1] is not None:
            used = args["conds_out"][1]
        return args["conds_out"]

    served = _Served(x, [([cond, uncond], list(pair))] if joint else [])
    if separate:
        served.calls.append(([cond, None], [pair[0], torch.zeros_like(pair[0])]))
    options = guider.model_options
    transformer = options.get("transformer_options", {})
    wrappers = transformer.get("wrappers", {})
    first = {SERVED: [served], **wrappers.get(WrappersMP.CALC_COND_BATCH, {})}
    served.options = {
        **options,
        "sampler_pre_cfg_function": [*options.get("sampler_pre_cfg_function", []), capture],
        "transformer_options": {**transformer, "wrappers": {**wrappers, WrappersMP.CALC_COND_BATCH: first}},
    }
    x0 = guider.outer_predict_noise(x, sigma, served.options, seed)
    return used + (x0 - used) / cfg, used
