"""The text encoder: a word-level tokenizer with a small vocabulary, and a small transformer, behind the host's CLIP socket."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import comfy.sd
import comfy.sd1_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.operations import Operations
from ..techniques.masked_tokens.comfy_text import MarkedText

KIND = "chorus-demo"  # of text, for a masked token model
WIDTH, HEADS, LAYERS, LENGTH = 96, 4, 2, 20
PAD, START, UNKNOWN = 0, 1, 2
VOCABULARY = json.loads((Path(__file__).resolve().parent / "data" / "vocabulary.json").read_text())
INDEX = {word: i for i, word in enumerate(VOCABULARY)}
# (token, weight), or with the word's number
Chunks: TypeAlias = list[list[tuple[int, float]]] | list[list[tuple[int, float, int]]]
CONFIG = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": len(VOCABULARY),
    "length": LENGTH,
}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def encode_words(text: str) -> list[int]:
    """Token numbers of the known words; unknown words become <unk>."""
    return [INDEX.get(w, UNKNOWN) for w in words_of(text)]


def token_rows(captions: Sequence[str]) -> Tensor:
    """int64 [B, 20]: start, words, padding. For training: captions of the grammar always fit."""
    rows = torch.full((len(captions), LENGTH), PAD)
    for row, caption in zip(rows, captions):
        ids = [START, *encode_words(caption)][:LENGTH]
        row[: len(ids)] = torch.tensor(ids)
    return rows


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype | None, device: torch.device | str | None, operations: Operations) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm1, self.norm2 = operations.LayerNorm(WIDTH, **kw), operations.LayerNorm(WIDTH, **kw)
        self.qkv, self.out = operations.Linear(WIDTH, 3 * WIDTH, **kw), operations.Linear(WIDTH, WIDTH, **kw)
        self.up, self.down = operations.Linear(WIDTH, 4 * WIDTH, **kw), operations.Linear(4 * WIDTH, WIDTH, **kw)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextModel(nn.Module):
    """tokens [B, 20] -> (states [B, 20, 96], pooled [B, 96]); every word sees every other.

    Takes the arguments with which the host's SDClipModel builds and calls its text models.
    """

    def __init__(
        self,
        config_dict: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Operations = nn,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.num_layers = LAYERS
        self.embed = operations.Embedding(len(VOCABULARY), WIDTH, **kw)
        self.position = operations.Embedding(LENGTH, WIDTH, **kw)
        self.layers = nn.ModuleList(Layer(dtype, device, operations) for _ in range(LAYERS))
        self.norm = operations.LayerNorm(WIDTH, **kw)
        self.project = operations.Linear(WIDTH, WIDTH, **kw)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.embed = embeddings

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        embeds: Tensor | None = None,
        intermediate_output: int | str | list[int] | None = None,
        dtype: torch.dtype | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        x = self.embed(tokens) if embeds is None else embeds
        t = min(x.shape[1], LENGTH)  # a textual inversion may lengthen a chunk: its last tokens go
        x = x[:, :t] + self.position(torch.arange(t, device=x.device)).to(x.dtype)
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        x = self.norm(x)
        middle = (
            None
            if intermediate_output is None or isinstance(intermediate_output, (str, list))
            else self.norm(states[intermediate_output])
        )
        return x, middle, self.project(x[:, 0]), x[:, 0]


class Tokenizer:
    """Words to chunks of 20 tokens; understands (word:1.3). Every longer prompt becomes several chunks."""

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
            clip_model=_HostModel,
            name="chorus",
        )


class _HostModel(comfy.sd1_clip.SDClipModel):
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
    missing, unexpected = clip.cond_stage_model.chorus.transformer.load_state_dict(state_dict, strict=True)
    assert not missing and not unexpected
    return clip
