"""The text encoder of the 64-pixel checkpoints: that of demo/emoji, with the vocabulary of the 64-pixel captions."""

import json
from functools import partial

from .concepts import DATA
from .emoji import comfy_text, text

# identifies this text encoder: a masked token model works only with the text encoder that it was trained with
KIND = "chorus-demo"
WIDTH, LENGTH = text.WIDTH, text.LENGTH
VOCABULARY = text.Vocabulary(json.loads((DATA / "vocabulary.json").read_text()))
token_rows = VOCABULARY.token_rows
Tokenizer = partial(comfy_text.Tokenizer, VOCABULARY)


class TextModel(text.TextModel):
    """The text model of demo/emoji with this vocabulary."""

    vocabulary = VOCABULARY


make_clip = partial(comfy_text.make_clip, kind=KIND, text_model=TextModel)
