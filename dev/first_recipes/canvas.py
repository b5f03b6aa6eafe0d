"""The training pictures: 64x64 canvases with one or two signs, made by a seeded generator.

Canvas number `index` of a data set is the same for everybody: all its choices come from (seed, index).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...demo.signs import Sign, load_bins, load_signs, phrase
from .data_source import pictures
from .lists import COLORS, RELATIONS, TONES, load_heldout, zipf

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


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    relation: str
    colors: tuple[str, ...]  # one name: plain, two names: gradient from the first to the second
    vertical: bool = True


class Canvases:
    """scene(index) -> Scene, caption(scene) -> str, draw(scene) -> uint8 [64, 64, 3].

    domain: draw only signs of that domain; names: only these; balanced: all signs equally often; unseen: scenes from the
    held-out sizes, angles, places and backgrounds only; one: share of canvases with a single sign.
    """

    def __init__(
        self,
        style: str,
        seed: int = 1,
        domain: str | None = None,
        names: Iterable[str] | None = None,
        balanced: bool = False,
        unseen: bool = False,
        one: float = 0.5,
        draw: bool = True,
    ) -> None:
        self.signs, self.held, self.seed, self.unseen, self.one = load_signs(), load_heldout(), seed, unseen, one
        self.style = style
        allowed = {s.name for s in self.signs} if names is None else set(names)
        self.members = np.array(
            [i for i, s in enumerate(self.signs) if domain in (None, s.domain) and s.name in allowed]
        )
        ranks = load_bins()["rank"]
        p = zipf([ranks[self.signs[i].name] for i in self.members])
        self.p = np.full(len(p), 1 / len(p)) if balanced else p
        self.cdf = np.cumsum(self.p)
        self.held_pairs = {(a, b) for a, b in self.held["pairs"]}
        held_places = {(i, j) for i, j in self.held["positions"]}
        grid = [(i, j) for i in range(GRID) for j in range(GRID)]
        self.places = sorted(held_places) if unseen else [p for p in grid if p not in held_places]
        self.sizes = [self.held["sizes_one"], self.held["sizes_two"]] if unseen else [SIZES_ONE, SIZES_TWO]
        self.angles = self.held["angles"] if unseen else [0]
        plain = [c for c in COLORS if c not in self.held["colors"]]
        held_gradients = {frozenset(g) for g in self.held["gradients"]}
        gradients = [(a, b) for a in plain for b in plain if a != b and frozenset((a, b)) not in held_gradients]
        self.plain = self.held["colors"] if unseen else plain
        self.gradients = [tuple(g) for g in self.held["gradients"]] if unseen else gradients
        self.sprites = Sprites(style, self.signs) if draw else None

    def scene(self, index: int) -> Scene:
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
        signs = [self._sign(u[3])]
        if two:
            k = 4
            signs.append(self._sign(u[k]))
            while signs[0] == signs[1] or self._is_held(*signs):
                signs[1] = self._sign(rng.random())
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

    def _sign(self, u: float) -> int:
        return int(self.members[min(np.searchsorted(self.cdf, u), len(self.members) - 1)])

    def _is_held(self, a: int, b: int) -> bool:
        return tuple(sorted((self.signs[a].name, self.signs[b].name))) in self.held_pairs and not self.unseen

    def _tone(self, sign: int, u: float) -> str:
        return TONES[int(u / 0.2) - 2] if self.signs[sign].tones and u >= 0.4 else ""

    def caption(self, scene: Scene) -> str:
        """'a cat', 'a dark baby left of a tree on blue', 'an owl on red fading to white'. White is left unsaid."""
        text = self.phrase(scene.items[0])
        if len(scene.items) > 1:
            text += f" {scene.relation} {self.phrase(scene.items[1])}"
        if scene.colors != ("white",):
            text += " on " + " fading to ".join(scene.colors)
        return text

    def phrase(self, item: Item) -> str:
        return phrase(f"{item.tone} {self.signs[item.sign].name}".strip())

    def draw(self, scene: Scene) -> NDArray[np.uint8]:
        """uint8 [64, 64, 3]"""
        if self.sprites is None:
            raise RuntimeError("these Canvases were made with draw=False; make them with draw=True to draw")
        canvas = _background(scene.colors, scene.vertical)
        order = range(len(scene.items))
        for n in order:
            item = scene.items[n]
            sprite = self.sprites.get(item)
            h, w = sprite.shape[:2]
            x0, y0, x1, y1 = _cell(scene.relation, n)
            x = x0 + round((x1 - x0 - w) * item.place[0] / (GRID - 1))
            y = y0 + round((y1 - y0 - h) * item.place[1] / (GRID - 1))
            _paste(canvas, sprite, min(max(x, 0), SIZE - w), min(max(y, 0), SIZE - h))
        return canvas

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], str, Scene]:
        scene = self.scene(index)
        return self.draw(scene), self.caption(scene), scene

    def batch(self, start: int, count: int) -> tuple[NDArray[np.uint8], list[str], list[Scene]]:
        """(uint8 [count, 64, 64, 3], captions, scenes) of canvases start ... start + count - 1"""
        images, captions, scenes = zip(*(self[i] for i in range(start, start + count)))
        return np.stack(images), list(captions), list(scenes)


class Sprites:
    """Signs as premultiplied RGBA uint8 [s, s, 4], by item; resized once per (sign, tone, size, angle)."""

    def __init__(self, style: str, signs: Sequence[Sign]) -> None:
        self.folder, self.signs, self.cache = pictures(style), signs, {}

    def get(self, item: Item) -> NDArray[np.uint8]:
        key = (item.sign, item.tone, item.size, item.angle, item.flip)
        if key not in self.cache:
            self.cache[key] = self._make(item)
        return self.cache[key]

    def _make(self, item: Item) -> NDArray[np.uint8]:
        sign = self.signs[item.sign]
        image = Image.open(self.folder / (sign.tones[item.tone] if item.tone else sign.image)).convert("RGBa")
        if item.angle:
            image = image.rotate(item.angle, Image.Resampling.BICUBIC)
        sprite = np.asarray(image.resize((item.size, item.size), Image.Resampling.LANCZOS))
        return np.ascontiguousarray(sprite[:, ::-1] if item.flip else sprite)


def single(sign: int, tone: str = "", size: int = 56, colors: tuple[str, ...] = ("white",)) -> Scene:
    """The plain scene of one sign in the middle."""
    return Scene((Item(sign, tone, size, (4, 4), False),), "", colors)


def _background(colors: Sequence[str], vertical: bool) -> NDArray[np.uint8]:
    first = np.array(COLORS[colors[0]], dtype=np.float32)
    if len(colors) == 1:
        return np.broadcast_to(first.astype(np.uint8), (SIZE, SIZE, 3)).copy()
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
    line = first * (1 - ramp) + np.array(COLORS[colors[1]], dtype=np.float32) * ramp
    return np.broadcast_to(line[:, None] if vertical else line[None], (SIZE, SIZE, 3)).astype(np.uint8).copy()


def _cell(relation: str, n: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the room of sign n: its half of the canvas, with a pixel of slack to the edge."""
    half = SIZE // 2
    if not relation:
        return 0, 0, SIZE, SIZE
    first = (n == 0) == (relation in ("left of", "above"))
    if relation in ("left of", "right of"):
        return (0, 0, half, SIZE) if first else (half, 0, SIZE, SIZE)
    return (0, 0, SIZE, half) if first else (0, half, SIZE, SIZE)


def _paste(canvas: NDArray[np.uint8], sprite: NDArray[np.uint8], x: int, y: int) -> None:
    h, w = sprite.shape[:2]
    room = canvas[y : y + h, x : x + w]
    alpha = sprite[..., 3:].astype(np.uint16)
    room[:] = np.minimum(sprite[..., :3] + (room * (255 - alpha) + 127) // 255, 255).astype(np.uint8)
