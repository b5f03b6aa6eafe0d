"""Prompts for masked token models: a text encoder behind the host's CLIP socket, and reading what it made of a prompt.

aMUSEd (arXiv 2401.01808) conditions on CLIP-L's states before its last layer, without its final norm, and on its
projected sentence embedding. Nothing in their shapes tells them from what Stable Diffusion's CLIP-L gives, so that
every conditioning from here carries a mark.
"""

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

from ...common.weights import check
from ...host.attachments import Conditioning

MARK = "masked_token_text"  # the conditioning's key; its value is the kind of text encoder
CLIP_L = "clip-l"
LAYER = -2
OBEYED = {MARK, "pooled_output"}
REMEDY = "encode the prompt with the 'clip' output of Load Masked Token Model (CLIP Text Encode)"
# what the host's CLIP-L is, whatever a config says
FIXED = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
# saved by some tools beside the weights
MOST = 2**16  # of any size in a config.json
NO_WEIGHTS = ("text_model.embeddings.position_ids", "logit_scale")


class MarkedText:
    """For a text model of the host, in front of its class: every conditioning carries its ``kind``."""

    kind: str

    def encode_token_weights(self, token_weight_pairs: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        encode = super().encode_token_weights  # ty: ignore[missing-attribute]  # of the class behind it
        states, pooled, *extra = encode(token_weight_pairs)
        return states, pooled, {**(extra[0] if extra else {}), MARK: self.kind}


class _HiddenClipL(comfy.sd1_clip.SDClipModel):
    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            textmodel_json_config=dict(config),
            layer="hidden",
            layer_idx=LAYER,
            layer_norm_hidden_state=False,
            return_projected_pooled=True,
        )


class ClipL(MarkedText, comfy.sd1_clip.SD1ClipModel):
    kind = CLIP_L

    def __init__(
        self,
        config: Mapping[str, Any],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_model=_HiddenClipL, config=config
        )


class _Target:
    """What the host's CLIP asks of a kind of text encoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.clip, self.tokenizer, self.params = ClipL, comfy.sd1_clip.SD1Tokenizer, {"config": config}


def openai_clip_l() -> dict[str, Any]:
    """The config with which the host reads a CLIP-L that comes without one."""
    return json.loads((Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json").read_text(encoding="utf-8"))


def load_clip(state_dict: dict[str, Tensor], config: Mapping[str, Any]) -> comfy.sd.CLIP:
    """A CLIP from what transformers saves of a CLIPTextModelWithProjection: its weights and its config.json.

    A ValueError where the weights do not fit the config.
    """
    config = clip_config(config)
    for name in NO_WEIGHTS:
        state_dict.pop(name, None)
    if config["num_hidden_layers"] > len(state_dict):
        # before they are made, which takes time
        raise ValueError(
            f"the config asks for {config['num_hidden_layers']} layers, the file has {len(state_dict)} weights"
        )
    plain = comfy.clip_model.CLIPTextModel(config, torch.float32, torch.device("meta"), torch.nn)
    check(state_dict, {name: weight.shape for name, weight in plain.state_dict().items()})
    return comfy.sd.CLIP(
        _Target(config),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=sum(weight.numel() for weight in state_dict.values()),
        state_dict=[state_dict],
    )


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the host's CLIP-L asks for, of a config.json; a ValueError where that cannot be obeyed."""
    asked = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    if missing := [key for key in asked if key not in config]:
        raise ValueError(f"the config lacks {', '.join(missing)}; take the config.json that came with the text encoder")
    *sizes, act = asked
    wrong = [
        f"{key} is {config[key]!r:.80}, not a whole number of 1 to {MOST}"
        for key in sizes
        if type(config[key]) is not int or not 1 <= config[key] <= MOST
    ]
    if config[act] not in list(comfy.clip_model.ACTIVATIONS):
        wrong.append(f"hidden_act is {config[act]!r:.80}, not one of {', '.join(comfy.clip_model.ACTIVATIONS)}")
    if not wrong:
        fixed = {**FIXED, "projection_dim": config["hidden_size"]}
        wrong = [
            f"{key} is {config[key]!r:.80}, not {value!r}"
            for key, value in fixed.items()
            if config.get(key, value) != value
        ]
        if config["num_hidden_layers"] <= -LAYER:
            wrong.append(f"num_hidden_layers is {config['num_hidden_layers']}, not {1 - LAYER} or more")
        if config["hidden_size"] % config["num_attention_heads"]:
            wrong.append(f"hidden_size is {config['hidden_size']}, no multiple of num_attention_heads")
    if wrong:
        raise ValueError(f"the host's CLIP-L cannot be as the config asks: {'; '.join(wrong)}")
    return {**FIXED, "eos_token_id": 49407, **{key: config[key] for key in asked}}


def read_text(conditioning: Conditioning, kind: str, socket: str) -> list[tuple[Tensor, Tensor]]:
    """(states [1, L, C], pooled [1, C]) of every prompt in a CONDITIONING, in order.

    A ValueError, which names the ``socket``, where it is not from a text encoder of this ``kind``, or asks for what a
    masked token model cannot obey, such as an area or a timestep range.
    """
    rows = []
    for states, extras in conditioning:
        if wrong := complaints(states, extras, kind):
            raise ValueError(f"{socket}: {'; '.join(wrong)}")
        rows += zip(states.split(1), extras["pooled_output"].expand(len(states), -1).split(1))
    if not rows:
        raise ValueError(f"{socket}: this conditioning holds no prompt; {REMEDY}")
    return rows


def complaints(states: Tensor, extras: Mapping[str, Any], kind: str) -> list[str]:
    found, pooled = [], extras.get("pooled_output")
    if extra := sorted(key for key, value in extras.items() if key not in OBEYED and value is not None):
        found.append(f"a masked token model cannot obey {', '.join(extra)}; take out the nodes that set them")
    if (mark := extras.get(MARK)) != kind:
        other = f" ({mark!r}, the model knows {kind!r})" if mark else ""
        found.append(f"this conditioning comes from another text encoder{other}; {REMEDY}")
    elif pooled is None:
        found.append(f"this conditioning has no pooled output; {REMEDY}")
    elif len(pooled) not in (1, len(states)):
        found.append(f"this conditioning holds {len(states)} prompts and {len(pooled)} pooled outputs; {REMEDY}")
    return found
