"""The training pictures: 64x64 canvases with one or two signs, made by a seeded generator.

Canvas number `index` of a data set is the same for everybody: all its choices come from (seed, index).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...demo.concepts import load_concepts, load_frequency
from ..recipes.lists import zipf
from ..recipes.scenes import Scenes, paste, region_of
from .data_source import pictures
from .lists import COLORS, RELATIONS, load_heldout

SIZE = 64
SIZES_ONE = (40, 42, 44, 48, 50, 52, 56, 58, 60)
SIZES_TWO = (25, 26, 28, 29, 30, 31, 32)
GRID = 9  # a sign's place is (i, j) / 8 of the free room


@dataclass(frozen=True)
class Item:
    sign: int
    tone: str
    size: int
    place: tuple[int, int]
    flip: bool
    angle: int = 0

    @property
    def concept(self):
        return self.sign


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    relation: str
    colors: tuple[str, ...]  # one name: plain, two names: gradient from the first to the second
    vertical: bool = True


class Canvases(Scenes):
    """scene(index) -> Scene, caption(scene) -> str, draw(scene) -> uint8 [64, 64, 3].

    domain: draw only signs of that domain; names: only these; balanced: all signs equally often; unseen: scenes from the
    held-out sizes, angles, places and backgrounds only; one: share of canvases with a single sign.
    """

    def __init__(self, style, seed=1, domain=None, names=None, balanced=False, unseen=False, one=0.5, draw=True):
        self.signs, held = load_concepts(), load_heldout()
        self.concepts, self.tones = self.signs, True
        self.style, self.seed, self.unseen, self.one = style, seed, unseen, one
        allowed = {s.name for s in self.signs} if names is None else set(names)
        self.members = np.array(
            [i for i, s in enumerate(self.signs) if domain in (None, s.domain) and s.name in allowed]
        )
        ranks = load_frequency()["rank"]
        p = zipf([ranks[self.signs[i].name] for i in self.members], offset=4)
        self.cdf = np.cumsum(np.full(len(p), 1 / len(p)) if balanced else p)
        self.held_pairs = {(a, b) for a, b in held["pairs"]}
        held_places = {(i, j) for i, j in held["positions"]}
        grid = [(i, j) for i in range(GRID) for j in range(GRID)]
        self.places = sorted(held_places) if unseen else [p for p in grid if p not in held_places]
        self.sizes = [held["sizes_one"], held["sizes_two"]] if unseen else [SIZES_ONE, SIZES_TWO]
        self.angles = held["angles"] if unseen else [0]
        plain = [c for c in COLORS if c not in held["colors"]]
        held_gradients = {frozenset(g) for g in held["gradients"]}
        gradients = [(a, b) for a in plain for b in plain if a != b and frozenset((a, b)) not in held_gradients]
        self.plain = held["colors"] if unseen else plain
        self.gradients = [tuple(g) for g in held["gradients"]] if unseen else gradients
        self.sprites = Sprites(style, self.signs) if draw else None

    def scene(self, index):
        """All choices of canvas `index`."""
        rng = np.random.default_rng([self.seed, index])
        u = rng.random(32)
        pick = lambda k, options: options[int(u[k] * len(options))]  # noqa: E731
        two = bool(u[0] >= self.one)
        if u[1] < 0.30 and not self.unseen:
            colors = ("white",)
        elif u[1] < 0.75:
            colors = (pick(2, self.plain),)
        else:
            colors = pick(2, self.gradients)
        signs = [self._concept(u[3])]
        if two:
            signs.append(self._concept(u[4]))
            while signs[0] == signs[1] or (not self.unseen and self._held_out(*signs)):
                signs[1] = self._concept(rng.random())
        items = tuple(
            Item(
                sign=s,
                tone=self._tone(s, u[12 + n]),
                size=pick(14 + n, self.sizes[two]),
                place=pick(16 + n, self.places),
                flip=u[18 + n] < 0.5,
                angle=pick(20 + n, self.angles),
            )
            for n, s in enumerate(signs)
        )
        return Scene(items, pick(22, RELATIONS) if two else "", colors, vertical=u[23] < 0.5)

    def draw(self, scene):
        """uint8 [64, 64, 3]"""
        if self.sprites is None:
            raise RuntimeError("these Canvases were made with draw=False; make them with draw=True to draw")
        canvas = _background(scene.colors, scene.vertical)
        for n, item in enumerate(scene.items):
            sprite = self.sprites.get(item)
            h, w = sprite.shape[:2]
            x0, y0, x1, y1 = region_of(scene.relation, n, SIZE)
            x = x0 + round((x1 - x0 - w) * item.place[0] / (GRID - 1))
            y = y0 + round((y1 - y0 - h) * item.place[1] / (GRID - 1))
            paste(canvas, sprite, min(max(x, 0), SIZE - w), min(max(y, 0), SIZE - h))
        return canvas


class Sprites:
    """Signs as premultiplied RGBA uint8 [s, s, 4], by item; resized once per (sign, tone, size, angle)."""

    def __init__(self, style, signs):
        self.folder, self.signs, self.cache = pictures(style), signs, {}

    def get(self, item):
        key = (item.sign, item.tone, item.size, item.angle, item.flip)
        if key not in self.cache:
            self.cache[key] = self._make(item)
        return self.cache[key]

    def _make(self, item):
        sign = self.signs[item.sign]
        image = Image.open(self.folder / (sign.tones[item.tone] if item.tone else sign.image)).convert("RGBa")
        if item.angle:
            image = image.rotate(item.angle, Image.Resampling.BICUBIC)
        sprite = np.asarray(image.resize((item.size, item.size), Image.Resampling.LANCZOS))
        return np.ascontiguousarray(sprite[:, ::-1] if item.flip else sprite)


def _background(colors, vertical):
    first = np.array(COLORS[colors[0]], dtype=np.float32)
    if len(colors) == 1:
        return np.broadcast_to(first.astype(np.uint8), (SIZE, SIZE, 3)).copy()
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
    line = first * (1 - ramp) + np.array(COLORS[colors[1]], dtype=np.float32) * ramp
    return np.broadcast_to(line[:, None] if vertical else line[None], (SIZE, SIZE, 3)).astype(np.uint8).copy()
