"""The training images: canvases of 128 x 128 pixels with one or two emoji, from a seeded generator.

A canvas depends only on (seed, index). Emoji have few sizes, and their positions are multiples of 8 pixels, the size of
a latent position, so that small networks can generate them.
"""

from dataclasses import dataclass

import numpy as np

from ...demo.concepts import COLORS, TONES, load_concepts, load_frequency, phrase
from .lists import RELATIONS, load_held_out, zipf
from .sprites import Sprites

SIZE = 128
CELL = 8  # pixels per latent position, in each direction
SIZES_ALONE, SIZES_PAIR = (88, 104), (56, 64)
SMALL = 64  # pixels of a side of the small canvases, which show one emoji of a size in SIZES_PAIR
PLAIN, WHITE = 0.85, 0.25  # shares of canvases with a plain background and with a white background


@dataclass(frozen=True)
class Item:
    concept: int
    tone: str
    size: int
    place: tuple  # position (x, y) in 0..1, as a share of the free space
    drawn: bool = True  # False: the concept is named in the caption, but not shown


@dataclass(frozen=True)
class Scene:
    items: tuple
    relation: str
    colors: tuple  # of the background: one name if it is plain, two names for a gradient from top to bottom


class Scenes:
    """A seeded generator of scenes: scene(index) -> Scene, caption(scene) -> str, draw(scene) -> uint8 [S, S, 3].

    Args:
        domain: use only concepts of this domain.
        names: use only these concepts.
        balanced: all concepts are equally frequent, instead of the long tail of ``frequency.json``.
        unseen: use the sizes and backgrounds that are excluded from training, and all pairs of concepts.
        alone: share of canvases with a single concept.
        size: 128, or 64 for small canvases of one concept.
        tones: whether concepts with skin tones may have one.
        bystanders: share of the pairs in which a concept of another domain is named but not drawn. So an expert
            learns to leave the regions of other domains empty.
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
        """The description of canvas ``index``."""
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
        """The caption of a scene, such as 'a cat', 'a dark baby left of a tree on blue' or 'an owl on orange fading to
        pink'.

        A plain white background is not named.
        """
        text = self.phrase(scene.items[0])
        if len(scene.items) > 1:
            text += f" {scene.relation} {self.phrase(scene.items[1])}"
        if scene.colors != ("white",):
            text += " on " + " fading to ".join(scene.colors)
        return text

    def draw(self, scene):
        """The canvas of a scene, uint8 [S, S, 3]."""
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


def first_of_each(scenes, concepts, each):
    """For each of ``concepts``, the first ``each`` scenes whose first item is that concept: a list of lists."""
    found, index = {concept: [] for concept in concepts}, 0
    while min(map(len, found.values())) < each:
        scene = scenes.scene(index)
        shown = found.get(scene.items[0].concept, [])
        if len(shown) < each:
            shown.append(scene)
        index += 1
    return list(found.values())


def background(colors, size):
    first = np.array(COLORS[colors[0]], dtype=np.float32)
    if len(colors) == 1:
        return np.broadcast_to(first.astype(np.uint8), (size, size, 3)).copy()
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = first * (1 - ramp) + np.array(COLORS[colors[1]], dtype=np.float32) * ramp
    return np.broadcast_to(rows.round(), (size, size, 3)).astype(np.uint8).copy()


def corner(scene, n, size):
    """(x, y) of the upper left pixel of item n, which is on the latent's grid and in the item's half of the canvas."""
    item = scene.items[n]
    x0, y0, x1, y1 = region_of(scene.relation, n, size)
    return tuple(
        start + CELL * min(int(share * ((room - item.size) // CELL + 1)), (room - item.size) // CELL)
        for start, room, share in ((x0, x1 - x0, item.place[0]), (y0, y1 - y0, item.place[1]))
    )


def region_of(relation, n, size):
    """The region (x0, y0, x1, y1) of item n: half of the canvas, or the whole canvas if there is no relation."""
    half = size // 2
    if not relation:
        return 0, 0, size, size
    first = (n == 0) == (relation in ("left of", "above"))
    if relation in ("left of", "right of"):
        return (0, 0, half, size) if first else (half, 0, size, size)
    return (0, 0, size, half) if first else (0, half, size, size)


def paste(canvas, sprite, x, y):
    """Composite a premultiplied sprite onto ``canvas``, in place."""
    h, w = sprite.shape[:2]
    room = canvas[y : y + h, x : x + w]
    alpha = sprite[..., 3:].astype(np.uint16)
    room[:] = np.minimum(sprite[..., :3] + (room * (255 - alpha) + 127) // 255, 255).astype(np.uint8)
