"""The text encoder as a ComfyUI CLIP."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import torch
from comfy.cli_args import args
from torch import Tensor

from ..techniques.masked_tokens.comfy_text import MarkedText
from .concepts import PAD, START, UNKNOWN
from .text import LENGTH, VOCABULARY, TextModel, words_of

# identifies this text encoder: a masked token model works only with the text encoder that it was trained with
KIND = "chorus-demo"
# lists of (token id, weight), optionally with the word id
Chunks: TypeAlias = list[list[tuple[int, float]]] | list[list[tuple[int, float, int]]]


class Tokenizer:
    """Splits a prompt into chunks of 20 tokens, with weights as in (word:1.3); a long prompt becomes several chunks."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
        pass  # ComfyUI passes both arguments; the vocabulary is fixed

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: object) -> dict[str, Chunks]:
        tokens, unknown = [], []
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        for n, (part, weight) in enumerate(parts):
            for word in words_of(comfy.sd1_clip.unescape_important(part)):
                if word not in VOCABULARY:
                    unknown.append(word)
                tokens.append((VOCABULARY.number(word), weight, n + 1))
        if unknown:
            logging.warning(
                "ChorusDemoCheckpoint has a vocabulary of %d words; unknown words in this prompt: %s",
                len(VOCABULARY) - 3,
                ", ".join(unknown),
            )
        room = LENGTH - 1
        chunks = [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]
        rows = [[(START, 1.0, 0), *c, *[(PAD, 1.0, 0)] * (room - len(c))] for c in chunks]
        if not return_word_ids:
            rows = [[t[:2] for t in row] for row in rows]
        return {"chorus": rows}

    def untokenize(self, token_weight_pair: Iterable[tuple[int, float]]) -> list[tuple[tuple[int, float], str]]:
        return [(pair, VOCABULARY.words[pair[0]]) for pair in token_weight_pair]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return " ".join(VOCABULARY.words[i] for i in token_ids if i > UNKNOWN or not skip_special_tokens)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class ClipModel(MarkedText, comfy.sd1_clip.SD1ClipModel):
    """ComfyUI's wrapper of a single text model, here the demo's. Its input is {"chorus": chunks of tokens}."""

    kind = KIND

    def __init__(self, **options: Any) -> None:
        super().__init__(clip_name="chorus", clip_model=HostModel, name="chorus", **options)


class HostModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            max_length=LENGTH,
            textmodel_json_config={},  # the sizes are constants of the text model
            special_tokens={"start": START, "pad": PAD},
            model_class=TextModel,
            layer_norm_hidden_state=False,
            **options,
        )


class Target:
    """The ``target`` argument of comfy.sd.CLIP: the classes of the encoder and the tokenizer."""

    clip, tokenizer = ClipModel, Tokenizer
    params: Mapping[str, Any] = {}


def encoder_dtype() -> torch.dtype:
    """Dtype of the weights of text and image encoders: float32, or that of ComfyUI's start option."""
    chosen = any(given for name, given in vars(args).items() if name.endswith("_text_enc"))
    return comfy.model_management.text_encoder_dtype() if chosen else torch.float32


def make_clip(state_dict: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """A ComfyUI CLIP from the text encoder's state dict. It marks the conditionings that it creates with ``KIND``."""
    clip = comfy.sd.CLIP(Target(), model_options={"dtype": encoder_dtype()})
    clip.cond_stage_model.chorus.transformer.load_state_dict(state_dict, strict=True)
    return clip
