"""The text encoder: a word-level vocabulary and a small transformer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..common.operations import Operations
from .concepts import PAD, START, UNKNOWN, vocabulary

WIDTH, HEADS, LAYERS, LENGTH = 96, 4, 2, 20


class Vocabulary:
    """The vocabulary of a text encoder, in the order of token ids. The first three are PAD, START and UNKNOWN."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self._index = {word: i for i, word in enumerate(words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._index

    def number(self, word: str) -> int:
        """The token id of a word; UNKNOWN if it is not in the vocabulary."""
        return self._index.get(word, UNKNOWN)

    def token_rows(self, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, 20]: start, words, padding. Truncates long captions, so use it only where captions
        fit."""
        rows = torch.full((len(captions), LENGTH), PAD)
        for row, caption in zip(rows, captions):
            ids = [START, *map(self.number, words_of(caption))][:LENGTH]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


VOCABULARY = Vocabulary(vocabulary())
token_rows = VOCABULARY.token_rows


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype | None, device: torch.device | str | None, operations: Operations) -> None:
        super().__init__()
        kw: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm1, self.norm2 = operations.LayerNorm(WIDTH, **kw), operations.LayerNorm(WIDTH, **kw)
        self.qkv, self.out = operations.Linear(WIDTH, 3 * WIDTH, **kw), operations.Linear(WIDTH, WIDTH, **kw)
        self.up, self.down = operations.Linear(WIDTH, 4 * WIDTH, **kw), operations.Linear(4 * WIDTH, WIDTH, **kw)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (qkv h d) -> qkv b h t d", qkv=3, h=HEADS)
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextModel(nn.Module):
    """The text transformer: token ids [B, T] -> four outputs. T is at most 20, and attention is not causal.

    The outputs are the states [B, T, 96], the states of layer ``intermediate_output`` (or None), the projected pooled
    text [B, 96] and the pooled text [B, 96]. ComfyUI's SDClipModel requires these signatures of its text models.
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
        t = min(x.shape[1], LENGTH)  # textual inversions may lengthen a chunk, which is then truncated
        x = x[:, :t] + self.position(torch.arange(t, device=x.device)).to(x.dtype)
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        x = self.norm(x)
        middle = None
        if isinstance(intermediate_output, int):
            middle = self.norm(states[intermediate_output])
        return x, middle, self.project(x[:, 0]), x[:, 0]


def read(model: TextModel, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(states [B, 20, 96], projected pooled text [B, 96]) of captions, on the model's device."""
    tokens = token_rows(captions).to(next(model.parameters()).device)
    states, _, projected, _ = model(tokens)
    return states, projected
