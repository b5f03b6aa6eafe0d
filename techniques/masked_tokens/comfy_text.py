"""Prompts for masked token models: CLIP-L as a ComfyUI CLIP, and checks of the conditionings that it makes.

aMUSEd (arXiv 2401.01808) uses two outputs of CLIP-L: the hidden states before the last layer, without the final norm,
and the projected sentence embedding. Conditionings of Stable Diffusion's CLIP-L have the same shapes. Therefore every
conditioning of this encoder contains a mark.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import folder_paths
import torch
from torch import Tensor

from ...common.weights import CONFIG_REMEDY, check
from ...host.attachments import Conditioning

MARK = "masked_token_text"  # the conditioning's key; its value is the kind of text encoder
CLIP_L = "clip-l"
LAYER = -2
SUPPORTED_KEYS = {MARK, "pooled_output"}
REMEDY = "encode the prompt with the 'clip' output of Load Masked Token Model (CLIP Text Encode)"
# values that are constants in ComfyUI's CLIP-L; a config must agree with them
FIXED_CONFIG = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
MAX_SIZE = 2**16  # the largest number in a config.json
IGNORED_WEIGHTS = ("text_model.embeddings.position_ids", "logit_scale")  # not used; some tools store them
VISION = ("vision_model.", "visual_projection.")  # weights of the image encoder in a file of the whole CLIP
# the values of transformers' CLIPTextConfig for entries that are not in a text_config
TRANSFORMERS_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
}


class MarkedText:
    """Mixin that adds ``kind`` to every conditioning under the key MARK.

    It must precede the text model of ComfyUI among the base classes.
    """

    kind: str

    def encode_token_weights(self, token_weight_pairs: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        encode = super().encode_token_weights  # ty: ignore[missing-attribute]  # the method of the next base class
        states, pooled, *extra = encode(token_weight_pairs)
        return states, pooled, {**(extra[0] if extra else {}), MARK: self.kind}


class _HiddenClipL(comfy.sd1_clip.SDClipModel):
    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        super().__init__(
            textmodel_json_config=dict(config),
            layer="hidden",
            layer_idx=LAYER,
            layer_norm_hidden_state=False,
            return_projected_pooled=True,
            **options,
        )


class ClipL(MarkedText, comfy.sd1_clip.SD1ClipModel):
    kind = CLIP_L

    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        super().__init__(clip_model=_HiddenClipL, config=config, **options)


class _Target:
    """The ``target`` of comfy.sd.CLIP: classes of the encoder and the tokenizer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.clip, self.tokenizer, self.params = ClipL, comfy.sd1_clip.SD1Tokenizer, {"config": config}


def openai_clip_l() -> dict[str, Any]:
    """ComfyUI's config of OpenAI's CLIP-L, for a weight file without a config.json."""
    return json.loads(
        Path(inspect.getfile(comfy.sd1_clip)).with_name("sd1_clip_config.json").read_text(encoding="utf-8")
    )


def load_clip(state_dict: dict[str, Tensor], config: Mapping[str, Any]) -> comfy.sd.CLIP:
    """A CLIP from the weights and config.json of a transformers CLIPTextModelWithProjection.

    Raises ValueError if the weights do not fit the config.
    """
    config = clip_config(config)
    for name in list(state_dict):
        if name in IGNORED_WEIGHTS or name.startswith(VISION):
            del state_dict[name]
    if config["num_hidden_layers"] > len(state_dict):
        # checked first, because building so many layers takes long
        raise ValueError(
            f"the config has {config['num_hidden_layers']} layers, but the file has only {len(state_dict)} weights;"
            f" {CONFIG_REMEDY}"
        )
    plain = comfy.clip_model.CLIPTextModel(config, torch.float32, torch.device("meta"), torch.nn)
    check(state_dict, {name: weight.shape for name, weight in plain.state_dict().items()})
    return comfy.sd.CLIP(
        _Target(config),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weight.numel() for weight in state_dict.values()),
        state_dict=[state_dict],
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text encoder, from its own config.json or from that of a whole CLIP (transformers' CLIPModel)."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    # the projection is an entry of the whole CLIP
    projection = {key: config[key] for key in ("projection_dim",) if key in config}
    return {**TRANSFORMERS_DEFAULTS, **text, **projection}


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that ComfyUI's CLIP-L needs; a ValueError lists unsupported values."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"the config lacks {', '.join(missing)}; {CONFIG_REMEDY}")
    *sizes, act = needed
    wrong = [
        f"{key} is {config[key]!r:.80}, not a whole number of 1 to {MAX_SIZE}"
        for key in sizes
        if type(config[key]) is not int or not 1 <= config[key] <= MAX_SIZE
    ]
    if config[act] not in list(comfy.clip_model.ACTIVATIONS):
        wrong.append(f"hidden_act is {config[act]!r:.80}, not one of {', '.join(comfy.clip_model.ACTIVATIONS)}")
    if not wrong:
        fixed = {**FIXED_CONFIG, "projection_dim": config["hidden_size"]}
        wrong = [
            f"{key} is {config[key]!r:.80}, not {value!r}"
            for key, value in fixed.items()
            if config.get(key, value) != value
        ]
        if config["num_hidden_layers"] <= -LAYER:
            wrong.append(f"num_hidden_layers is {config['num_hidden_layers']}, not {1 - LAYER} or more")
        if config["hidden_size"] % config["num_attention_heads"]:
            wrong.append(f"hidden_size is {config['hidden_size']}, not a multiple of num_attention_heads")
    if wrong:
        raise ValueError(
            f"ComfyUI's CLIP-L does not support this config: {'; '.join(wrong)}; use a CLIP-L text encoder"
        )
    return {**FIXED_CONFIG, "eos_token_id": 49407, **{key: config[key] for key in needed}}


def read_text(conditioning: Conditioning, kind: str, socket: str) -> list[tuple[Tensor, Tensor]]:
    """(states [1, L, C], pooled [1, C]) of every prompt in a CONDITIONING, in order.

    Raises ValueError, with the name of the ``socket``, if the conditioning comes from another ``kind`` of text encoder.
    Options that masked token models do not support, such as an area or a timestep range, also raise ValueError.
    """
    rows = []
    for states, extras in conditioning:
        if wrong := problems(states, extras, kind):
            raise ValueError(f"{socket}: {'; '.join(wrong)}")
        rows += zip(states.split(1), extras["pooled_output"].expand(len(states), -1).split(1))
    if not rows:
        raise ValueError(f"{socket}: this conditioning has no prompt; {REMEDY}")
    return rows


def problems(states: Tensor, extras: Mapping[str, Any], kind: str) -> list[str]:
    """Reasons, with remedies, why a masked token model cannot use this entry of a CONDITIONING."""
    wrong, pooled = [], extras.get("pooled_output")
    if extra := sorted(key for key, value in extras.items() if key not in SUPPORTED_KEYS and value is not None):
        wrong.append(f"masked token models do not support {', '.join(extra)}; remove the nodes that set them")
    if (mark := extras.get(MARK)) != kind:
        other = f" ({mark!r}, the model expects {kind!r})" if mark else ""
        wrong.append(f"this conditioning comes from another text encoder{other}; {REMEDY}")
    elif pooled is None:
        wrong.append(f"this conditioning has no pooled output; {REMEDY}")
    elif len(pooled) not in (1, len(states)):
        wrong.append(f"this conditioning has {len(states)} prompts but {len(pooled)} pooled outputs; {REMEDY}")
    return wrong
