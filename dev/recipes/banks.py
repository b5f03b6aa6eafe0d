"""Banks: latents and tokens of canvases, encoded once and cached in the state folder."""

import hashlib

import torch

from ...demo.text import token_rows
from . import autoencoder, state
from .scenes import Scenes

CHUNK = 256


def digest(module):
    """Short hash of a module's weights."""
    made = hashlib.sha256()
    for value in module.state_dict().values():
        made.update(value.detach().cpu().float().numpy().tobytes())
    return made.hexdigest()[:10]


def bank(name, model, count, report=print, kind="latents", encode=autoencoder.encode, **scenes):
    """{'latents': fp16 [N, 8, h, w], 'tokens': int64 [N, 20]} of the first ``count`` canvases of ``Scenes(**scenes)``.

    ``model``: the first argument of ``encode(model, pixels)``; the default ``encode`` needs the frozen autoencoder.
    ``kind``: the key of the encoded values, instead of 'latents'. The file also contains the settings and the model's
    hash; when they change, the bank is computed again.
    """
    key = f"{digest(model)} {count} {sorted(scenes.items())}"
    found = state.load(f"bank-{name}", report)
    if found is not None and found["key"] == key:
        return found
    chosen, values, captions = Scenes(**scenes), [], []
    for start in range(0, count, CHUNK):
        pixels, texts, _ = chosen.batch(start, min(CHUNK, count - start))
        values.append(encode(model, pixels))
        captions += texts
        if start % (40 * CHUNK) == 0:
            report(f"bank {name}: {start} of {count} canvases encoded")
    found = {"key": key, kind: torch.cat(values), "tokens": token_rows(captions)}
    state.save(f"bank-{name}", found, keep_previous=False)
    return found
