"""Small Flux models with quantised weights: in ComfyUI's formats, and in a packed form as in other packs' loaders."""

import copy
import json

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from chorus.tests.support.tiny_models import flux, in_inference_mode

CONVROT = dict(convrot=True, convrot_groupsize=16)
# format of the checkpoint, options of the quantisation, options in the checkpoint
FORMATS = {
    "fp8": ("float8_e4m3fn", {}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "int8": ("int8_tensorwise", dict(is_weight=True, per_channel=True), {}),
    "int8_convrot": ("int8_tensorwise", dict(is_weight=True, per_channel=True, **CONVROT), CONVROT),
    "convrot_w4a4": ("convrot_w4a4", dict(convrot_groupsize=16), dict(convrot_groupsize=16)),
}
if "asym_w4a8_int8" in QUANT_ALGOS:  # since ComfyUI 0.33
    FORMATS["w4a8"] = ("asym_w4a8_int8", dict(convrot_groupsize=16), dict(convrot_groupsize=16))
ON_THE_FLY = "dequantised on the fly"


def _is_quantised(name: str, weight: torch.Tensor) -> bool:
    """Whether checkpoints quantise the weight: matrices of the blocks, but not those of the modulation."""
    return name.endswith(".weight") and weight.ndim == 2 and "blocks" in name and "mod" not in name.split(".")[-3]


def _weights(seed: int) -> dict[str, torch.Tensor]:
    prefix = "diffusion_model."
    whole = flux(seed, mlp_ratio=4.0).model.state_dict()
    return {k.removeprefix(prefix): w.clone() for k, w in whole.items() if k.startswith(prefix)}


@in_inference_mode
def checkpoint(seed: int, name: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint in one of ``FORMATS``, with the keys of its file."""
    kind, options, stored = FORMATS[name]
    out = {}
    for key, weight in _weights(seed).items():
        weight = weight.to(torch.bfloat16)
        if not _is_quantised(key, weight):
            out[key] = weight
            continue
        quantised = QuantizedTensor.from_float(weight, QUANT_ALGOS[kind]["comfy_tensor_layout"], **options)
        out |= quantised.state_dict(key)
        note = json.dumps({"format": kind, **stored})
        out[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
    return out


@in_inference_mode
def load(seed: int, name: str):
    """A MODEL with the weights of ``checkpoint``, or with ``PackedTensor`` weights if ``name`` is ``ON_THE_FLY``."""
    if name != ON_THE_FLY:
        return comfy.sd.load_diffusion_model_state_dict(checkpoint(seed, name), model_options={})
    weights = {k: pack(w) if _is_quantised(k, w) else w for k, w in _weights(seed).items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"custom_operations": OnTheFly})
    return OnTheFlyPatcher.clone(model)


@in_inference_mode
def load_file(seed: int, name: str, path):
    """The MODEL of ``load``, but loaded from a file, so that ComfyUI can load the weights again."""
    comfy.utils.save_torch_file(checkpoint(seed, name), str(path))
    return comfy.sd.load_diffusion_model(str(path))


@in_inference_mode
def lora(model, seed: int, strength: float = 1.0):
    """``model`` with a random LoRA on all quantised weights, loaded by ComfyUI."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not _is_quantised(f"{name}.weight", weight):
            continue
        rows, columns = weight.shape
        weights[f"{name}.lora_up.weight"] = 0.3 * torch.randn(rows, 2, generator=generator)
        weights[f"{name}.lora_down.weight"] = 0.1 * torch.randn(2, columns, generator=generator)
    assert weights
    return comfy.sd.load_lora_for_models(model, None, weights, strength, 0.0)[0]


@in_inference_mode
def dequantise(model):
    """``model`` with plain weights of the same values, in place."""
    for module in model.model.modules():
        if isinstance(weight := getattr(module, "weight", None), QuantizedTensor):
            module.weight = torch.nn.Parameter(weight.dequantize().float(), requires_grad=False)
            module.layout_type = None
    return model


class PackedTensor(torch.Tensor):
    """A weight [out, in] as bytes and one scale per row, with the patches that are applied when it is used."""

    scale: torch.Tensor
    patches: list

    def dequantised(self) -> torch.Tensor:
        data = torch.Tensor.as_subclass(self, torch.Tensor)
        return data.float() * self.scale

    def _like_me(self, data: torch.Tensor) -> "PackedTensor":
        out = data.as_subclass(PackedTensor)
        out.scale, out.patches = self.scale, list(self.patches)
        return out

    def to(self, *args, **kwargs):
        moved = torch.Tensor.as_subclass(self, torch.Tensor).to(
            *[a for a in args if not isinstance(a, torch.dtype)], **{k: v for k, v in kwargs.items() if k != "dtype"}
        )
        return self._like_me(moved)

    def clone(self, *args, **kwargs):
        return self

    def detach(self):
        return self

    def new_empty(self, size, *args, **kwargs):
        return self._like_me(torch.Tensor.as_subclass(self, torch.Tensor).new_empty(size, *args, **kwargs))


def pack(weight: torch.Tensor) -> PackedTensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    out = (weight / scale).round().to(torch.int8).as_subclass(PackedTensor)
    out.scale, out.patches = scale, []
    return out


class OnTheFly(comfy.ops.manual_cast):
    """Operations whose linear layers dequantise their weight, and then patch it, in every call."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            if isinstance(state_dict.get(f"{prefix}weight"), PackedTensor):
                for name in ("weight", "bias"):
                    if (value := state_dict.get(prefix + name)) is not None:
                        setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
                return
            super()._load_from_state_dict(state_dict, prefix, *rest)

        def forward(self, x, *args, **kwargs):
            if not isinstance(self.weight, PackedTensor):
                return super().forward(x, *args, **kwargs)
            weight = self.weight.dequantised()
            for patches, key in self.weight.patches:
                weight = comfy.lora.calculate_weight(patches, weight, key)
            bias = None if self.bias is None else self.bias.to(x)
            return torch.nn.functional.linear(x, weight.to(x), bias)


class OnTheFlyPatcher(comfy.model_patcher.ModelPatcher):
    """Patcher that leaves patches to ``OnTheFly`` instead of changing packed weights."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **kwargs):
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, PackedTensor):
            return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
        if key in self.patches:
            weight.patches = [(copy.copy(self.patches[key]), key)]
        return None

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for weight in self.model.parameters():
                if isinstance(weight, PackedTensor):
                    weight.patches = []
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        return super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        before, self.__class__ = self.__class__, OnTheFlyPatcher  # the first call converts the loader's patcher
        try:
            return comfy.model_patcher.ModelPatcher.clone(self, *args, **kwargs)
        finally:
            self.__class__ = before
