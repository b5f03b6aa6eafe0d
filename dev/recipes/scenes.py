"""The training pictures: canvases of 128 pixels with one or two emoji, made by a seeded generator.

Canvas ``index`` of a data set is the same for everyone: all its choices come from (seed, index). Every emoji stands at a
multiple of 8 pixels, one cell of the latent space, and in few sizes, so that a small network can learn it.
"""

from dataclasses import dataclass

import numpy as np

from ...demo.emoji.concepts import COLORS, TONES, load_concepts, load_frequency, phrase
from .lists import RELATIONS, load_held_out, zipf
from .sprites import Sprites

SIZE = 128
CELL = 8  # pixels of a latent cell
SIZES_ALONE, SIZES_PAIR = (88, 104), (56, 64)
SMALL = 64  # side of the small canvases of one concept, with the sizes of the pairs
PLAIN, WHITE = 0.85, 0.25  # shares of plain backgrounds, and of white ones


@dataclass(frozen=True)
class Item:
    concept: int
    tone: str
    size: int
    place: tuple  # (x, y) as shares of the free room, in 0..1
    drawn: bool = True


@dataclass(frozen=True)
class Scene:
    items: tuple
    relation: str
    colors: tuple  # one name: plain; two names: a gradient from top to bottom


class Scenes:
    """scene(index) -> Scene, caption(scene) -> str, draw(scene) -> uint8 [S, S, 3].

    ``domain``: concepts of that domain only; ``names``: these only; ``balanced``: all equally often instead of the long
    tail of ``frequency.json``; ``unseen``: sizes, backgrounds and pairs of the held-out lists; ``alone``: share of canvases
    with a single concept; ``size``: 128, or 64 for small canvases of one concept; ``bystanders``: share of the pairs of a
    domain in which one concept of another domain is named and its place stays empty, so that a specialist learns to leave
    to others what it does not know.
    """

    def __init__(
        self,
        style,
        *,
        seed=1,
        domain=None,
        names=None,
        balanced=False,
        unseen=False,
        alone=0.45,
        size=SIZE,
        tones=True,
        bystanders=0.0,
    ):
        self.concepts, held = load_concepts(), load_held_out()
        self.style, self.seed, self.unseen, self.size, self.tones = style, seed, unseen, size, tones
        self.bystanders = bystanders
        self.alone = 1.0 if size == SMALL else alone
        allowed = {c.name for c in self.concepts} if names is None else set(names)
        self.members = np.array(
            [i for i, c in enumerate(self.concepts) if domain in (None, c.domain) and c.name in allowed]
        )
        self.drawn = set(self.members.tolist())
        self.others = np.array([i for i, c in enumerate(self.concepts) if domain not in (None, c.domain)])
        ranks = load_frequency()["rank"]
        p = zipf([ranks[self.concepts[i].name] for i in self.members])
        self.cdf = np.cumsum(np.full(len(p), 1 / len(p)) if balanced else p)
        self.held_pairs = {tuple(pair) for pair in held["pairs"]}
        self.sizes = (SIZES_PAIR if size == SMALL else SIZES_ALONE, SIZES_PAIR)
        self.plain = [c for c in COLORS if c not in held["colors"]]
        held_gradients = {frozenset(g) for g in held["gradients"]}
        self.gradients = [
            (a, b) for a in self.plain for b in self.plain if a != b and frozenset((a, b)) not in held_gradients
        ]
        if unseen:
            alone_size, pair_size = held["sizes"]
            self.sizes = ((pair_size if size == SMALL else alone_size,), (pair_size,))
            self.plain, self.gradients = held["colors"], [tuple(g) for g in held["gradients"]]
        self._sprites = None

    def scene(self, index):
        """All choices of canvas ``index``."""
        rng = np.random.default_rng([self.seed, index])
        u = rng.random(16)
        pick = lambda k, options: options[int(u[k] * len(options))]  # noqa: E731
        pair = bool(u[0] >= self.alone)
        if u[1] >= PLAIN:
            colors = pick(2, self.gradients)
        elif u[1] < WHITE and not self.unseen:
            colors = ("white",)
        else:
            colors = (pick(2, self.plain),)
        concepts = [self._concept(u[3])]
        if pair:
            concepts.append(self._concept(u[4]))
            while concepts[0] == concepts[1] or (not self.unseen and self._held_out(*concepts)):
                concepts[1] = self._concept(rng.random())
            if rng.random() < self.bystanders:
                concepts[1] = int(rng.choice(self.others))
                concepts = concepts if rng.random() < 0.5 else concepts[::-1]
        items = tuple(
            Item(
                c,
                self._tone(c, u[5 + n]),
                pick(7 + n, self.sizes[pair]),
                (u[9 + 2 * n], u[10 + 2 * n]),
                drawn=c in self.drawn,
            )
            for n, c in enumerate(concepts)
        )
        return Scene(items, pick(13, RELATIONS) if pair else "", colors)

    def _concept(self, u):
        return int(self.members[min(np.searchsorted(self.cdf, u), len(self.members) - 1)])

    def _held_out(self, a, b):
        return tuple(sorted((self.concepts[a].name, self.concepts[b].name))) in self.held_pairs

    def _tone(self, concept, u):
        return TONES[int(u / 0.2) - 2] if self.tones and self.concepts[concept].tones and u >= 0.4 else ""

    def phrase(self, item):
        return phrase(f"{item.tone} {self.concepts[item.concept].name}".strip())

    def caption(self, scene):
        """'a cat', 'a dark baby left of a tree on blue', 'an owl on orange fading to white'; white is not named."""
        text = self.phrase(scene.items[0])
        if len(scene.items) > 1:
            text += f" {scene.relation} {self.phrase(scene.items[1])}"
        if scene.colors != ("white",):
            text += " on " + " fading to ".join(scene.colors)
        return text

    def draw(self, scene):
        """uint8 [S, S, 3]"""
        if self._sprites is None:
            self._sprites = Sprites(self.style)
        canvas = background(scene.colors, self.size)
        for n, item in enumerate(scene.items):
            if not item.drawn:
                continue
            x, y = corner(scene, n, self.size)
            paste(canvas, self._sprites.get(item.concept, item.tone, item.size), x, y)
        return canvas

    def batch(self, start, count):
        """(uint8 [count, S, S, 3], captions, scenes) of the canvases from ``start`` on."""
        scenes = [self.scene(index) for index in range(start, start + count)]
        return np.stack([self.draw(s) for s in scenes]), [self.caption(s) for s in scenes], scenes


def single(concept, *, tone="", size=88, colors=("white",)):
    """The plain scene of one concept in the middle."""
    return Scene((Item(concept, tone, size, (0.5, 0.5)),), "", colors)


def background(colors, size):
    first = np.array(COLORS[colors[0]], dtype=np.float32)
    if len(colors) == 1:
        return np.broadcast_to(first.astype(np.uint8), (size, size, 3)).copy()
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = first * (1 - ramp) + np.array(COLORS[colors[1]], dtype=np.float32) * ramp
    return np.broadcast_to(rows.round(), (size, size, 3)).astype(np.uint8).copy()


def corner(scene, n, size):
    """(x, y) of the upper left pixel of item n: on the grid of latent cells, within its half of the canvas where it fits."""
    item, half = scene.items[n], size // 2
    x0, y0, x1, y1 = 0, 0, size, size
    if scene.relation:
        first = (n == 0) == (scene.relation in ("left of", "above"))
        if scene.relation in ("left of", "right of"):
            x0, x1 = (0, half) if first else (half, size)
        else:
            y0, y1 = (0, half) if first else (half, size)
    return tuple(
        start + CELL * min(int(share * ((room - item.size) // CELL + 1)), (room - item.size) // CELL)
        for start, room, share in ((x0, x1 - x0, item.place[0]), (y0, y1 - y0, item.place[1]))
    )


def paste(canvas, sprite, x, y):
    """Alpha compositing of a premultiplied sprite, in place."""
    h, w = sprite.shape[:2]
    room = canvas[y : y + h, x : x + w]
    alpha = sprite[..., 3:].astype(np.uint16)
    room[:] = np.minimum(sprite[..., :3] + (room * (255 - alpha) + 127) // 255, 255).astype(np.uint8)
