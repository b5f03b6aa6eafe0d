"""The text encoder behind the host's CLIP socket."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor

from ...techniques.masked_tokens.comfy_text import MarkedText
from .concepts import PAD, START, UNKNOWN
from .text import HEADS, INDEX, LAYERS, LENGTH, VOCABULARY, WIDTH, TextModel, words_of

KIND = "chorus-emoji"  # of text, for a masked token model
# (token, weight), or with the word's number
Chunks: TypeAlias = list[list[tuple[int, float]]] | list[list[tuple[int, float, int]]]
CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": len(VOCABULARY),
    "length": LENGTH,
}


class Tokenizer:
    """Words to chunks of 20 tokens, with weights as in (word:1.3); a longer prompt becomes several chunks."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: object) -> dict[str, Chunks]:
        tokens, unknown = [], []
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        for n, (part, weight) in enumerate(parts):
            for word in words_of(comfy.sd1_clip.unescape_important(part)):
                if word not in INDEX:
                    unknown.append(word)
                tokens.append((INDEX.get(word, UNKNOWN), weight, n + 1))
        if unknown:
            logging.warning(
                "ChorusDemoCheckpoint knows %d words; unknown here: %s", len(VOCABULARY) - 3, ", ".join(unknown)
            )
        room = LENGTH - 1
        chunks = [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]
        rows = [[(START, 1.0, 0), *c, *[(PAD, 1.0, 0)] * (room - len(c))] for c in chunks]
        if not return_word_ids:
            rows = [[t[:2] for t in row] for row in rows]
        return {"chorus": rows}

    def untokenize(self, token_weight_pair: Iterable[tuple[int, float]]) -> list[tuple[tuple[int, float], str]]:
        return [(pair, VOCABULARY[pair[0]]) for pair in token_weight_pair]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return " ".join(VOCABULARY[i] for i in token_ids if i > UNKNOWN or not skip_special_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class ClipModel(MarkedText, comfy.sd1_clip.SD1ClipModel):
    """The host's wrapper of one text model, with ours in it; tokens come as {"chorus": chunks}."""

    kind = KIND

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        model_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            clip_name="chorus",
            clip_model=HostModel,
            name="chorus",
        )


class HostModel(comfy.sd1_clip.SDClipModel):
    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        model_options: Mapping[str, Any] | None = None,
        **_: object,
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            max_length=LENGTH,
            textmodel_json_config=dict(CONFIG),
            special_tokens={"start": START, "pad": PAD},
            model_class=TextModel,
            layer_norm_hidden_state=False,
        )


class Target:
    clip, tokenizer, params = ClipModel, Tokenizer, {}


def make_clip(state_dict: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """The host's CLIP object from the text encoder's state dict."""
    clip = comfy.sd.CLIP(Target, model_options={"dtype": torch.float32})
    clip.cond_stage_model.chorus.transformer.load_state_dict(state_dict, strict=True)
    return clip
