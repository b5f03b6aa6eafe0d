"""Masked Token Video against sampling each frame separately, on moving scenes whose motion is known.

generate: the camera moves to the right, so that the contents move to the left by PAN pixels per frame. Every way begins
  with the same frame. "each frame alone" moves the first frame by the whole motion and fills what is unknown.
edit: videos of an emoji that moves to the right over a plain background, edited by the prompt of another concept of the
  same domain. "each frame alone" is Masked Token Sampler with the same seed for every frame.

Metrics:
  background: mean absolute change from one frame to the next, of the pixels in which the emoji is in no frame; in
    *generate*, of all pixels that both frames show, after moving one by the known motion
  subject: the same for the box of the emoji, which moves by the known motion
  identity: the share of frames in which the classifier recognises the prompt's concept
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import headless

headless.start()

import comfy.utils  # noqa: E402

from ...demo import modules  # noqa: E402
from ...demo.concepts import load_concepts, load_frequency, phrase  # noqa: E402
from ...techniques.masked_tokens.comfy_run import decode_tokens, encode_images  # noqa: E402
from ...techniques.masked_tokens.comfy_video import VideoRun, VideoSettings  # noqa: E402
from ...techniques.masked_tokens.decode import MaskedTokenSettings  # noqa: E402
from ...techniques.masked_tokens.video import AGREEMENT, moved  # noqa: E402
from ..recipes.classifier import named  # noqa: E402
from ..recipes.scenes import CELL, SIZE, background, paste  # noqa: E402
from ..recipes.seeds import load_classifier  # noqa: E402
from ..recipes.sprites import Sprites  # noqa: E402
from ..statistics import mean_of_groups, paired_difference  # noqa: E402
from .environment import RESULTS, publish, script_parser  # noqa: E402
from .evaluators import numbers_of  # noqa: E402
from .sampling import encode, save_rows  # noqa: E402

STEPS, EMOJI, TOP = 12, 64, 32
PAN = 4  # pixels per frame
COLOR = "blue"
ALONE = "each frame alone"
GRID = SIZE // CELL
GENERATED = ((0, 0), (0, 1), (0, 2), (1, 1))  # boundary, reference_frames
# boundary, reference_frames, tolerance
EDITED = ((0, 0, AGREEMENT), (0, 1, AGREEMENT), (0, 2, AGREEMENT), (1, 1, AGREEMENT), (0, 0, 0.0))
# of the edited videos: pixels per frame, standard deviation of noise in 8-bit levels
MOTIONS = ((CELL, 0), (CELL, 4), (CELL // 2, 0))


def way_of(boundary: int, references: int, tolerance: float = AGREEMENT) -> str:
    way = f"boundary {boundary}, {references} reference frames"
    return way if tolerance == AGREEMENT else f"{way}, tolerance {tolerance:g}"


class Frames:
    """Runs of the demo model for one prompt."""

    def __init__(self, prompt: str, seed: int, denoise: float = 1.0) -> None:
        self.model, self.clip = modules.load_masked_tokens()
        self.words = encode(self.clip, prompt), encode(self.clip, "")
        self.decoding = MaskedTokenSettings(self.model.codebook, self.model.mask_id, STEPS, denoise)
        self.seed = seed

    def run(self, boundary: int = 1, references: int = 0, tolerance: float = AGREEMENT) -> VideoRun:
        settings = VideoSettings(
            decoding=self.decoding,
            cfg=self.model.cfg,
            seed=self.seed,
            boundary=boundary,
            reference_frames=references,
            tolerance=tolerance,
        )
        return VideoRun(self.model, *self.words, settings, (SIZE, SIZE))

    @property
    def unknown(self) -> Tensor:
        return torch.full((GRID, GRID), self.model.mask_id)


def change(images: Tensor, dx: int, box: Callable[[int], slice] | None = None) -> float:
    """Mean absolute change [0..1] of the contents, which move by ``dx`` pixels per frame; of the columns ``box(t)`` of
    frame t in the emoji's rows, or of all columns that both frames show, with a negative ``dx``."""
    rows = slice(TOP, TOP + EMOJI) if box else slice(None)
    found = []
    for t in range(1, len(images)):
        if box:
            before, now = images[t - 1][rows, box(t - 1)], images[t][rows, box(t)]
        else:
            before, now = images[t - 1][:, -dx:], images[t][:, :dx]
        found.append((now - before).abs().mean())
    return float(torch.stack(found).mean())


def identity(classifier, images: Tensor, name: str) -> float:
    return float((named(classifier, 2 * images.movedim(-1, 1) - 1) == numbers_of([name])).double().mean())


def generated(name: str, seed: int, frames: int, classifier) -> dict[str, Any]:
    """{way: metrics and images} of a generated video."""
    make = Frames(f"{phrase(name)} on {COLOR}", seed)
    first = make.run().generate(make.unknown, 1, 0, 0, None).frames[0]
    found: dict[str, Any] = {}
    for boundary, references in GENERATED:
        start = time.perf_counter()
        ids = make.run(boundary, references).generate(first, frames, -PAN, 0, None).ids
        found[way_of(boundary, references)] = {"ids": ids, "seconds": (time.perf_counter() - start) / frames}
    start = time.perf_counter()
    alone = [first]
    for t in range(1, frames):
        total = -int(np.floor(t * PAN / CELL + 0.5))
        begun, _ = moved(first, (0, total), make.model.mask_id, 0)
        alone.append(make.run().generate(begun, 1, 0, 0, None).frames[0])
    found[ALONE] = {"ids": torch.stack(alone), "seconds": (time.perf_counter() - start) / frames}
    for row in found.values():
        # the motion is rounded to whole tokens: every second frame repeats
        images = row["images"] = decode_tokens(make.model, row.pop("ids"))
        row["background"] = change(images[:: CELL // PAN], -CELL)
        row["identity"] = identity(classifier, images, name)
    return found


def moving_emoji(name: str, frames: int, dx: int, noise: float, sprites: Sprites) -> Tensor:
    """Images [T, 128, 128, 3] in 0..1 of an emoji that moves to the right by ``dx`` pixels per frame.

    ``noise``: standard deviation of the noise of each frame, in 8-bit levels.
    """
    sprite = sprites.get(int(numbers_of([name])), "", EMOJI)
    images = []
    for t in range(frames):
        canvas = background((COLOR,), SIZE)
        paste(canvas, sprite, dx * t, TOP)
        images.append(canvas)
    clean = torch.from_numpy(np.stack(images)).float()
    return (clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255) / 255


def edited(images: Tensor, name: str, seed: int, dx: int, strength: float, classifier) -> dict:
    """{way: metrics and images} of the video ``images`` (see ``moving_emoji``) that is edited to show ``name``."""
    make, frames = Frames(f"{phrase(name)} on {COLOR}", seed, strength), len(images)
    tokens = encode_images(make.model, images)
    found: dict[str, Any] = {}
    for way in EDITED:
        start = time.perf_counter()
        ids = make.run(*way).edit(tokens, None).ids
        found[way_of(*way)] = {"ids": ids, "seconds": (time.perf_counter() - start) / frames}
    start = time.perf_counter()
    alone = torch.stack([make.run().edit(tokens[t : t + 1], None).frames[0] for t in range(frames)])
    found[ALONE] = {"ids": alone, "seconds": (time.perf_counter() - start) / frames}
    still = torch.ones(SIZE, SIZE, dtype=torch.bool)
    still[TOP : TOP + EMOJI, : dx * (frames - 1) + EMOJI] = False
    for row in found.values():
        result = row["images"] = decode_tokens(make.model, row.pop("ids"))
        row["background"] = float((result[1:] - result[:-1]).abs()[:, still].mean())
        row["subject"] = change(result, dx, lambda t: slice(dx * t, dx * t + EMOJI))
        row["identity"] = identity(classifier, result, name)
    return found | {"source": {"images": images}}


def table(videos: Sequence[dict], metrics: Sequence[str]) -> dict[str, Any]:
    """{way: {metric: mean with its interval, and the difference from sampling each frame alone}}, over the videos."""
    groups = np.arange(len(videos))
    rows: dict[str, Any] = {}
    for way in videos[0]:
        if way == "source":
            continue
        rows[way] = {"seconds": float(np.median([v[way]["seconds"] for v in videos]))}
        for metric in metrics:
            values = np.array([v[way][metric] for v in videos])
            rows[way][metric] = mean_of_groups(values, groups)
            if way != ALONE:
                alone = np.array([v[ALONE][metric] for v in videos])
                rows[way][f"{metric}, difference"] = paired_difference(values, alone, groups)
    return rows


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=int, default=12, help="videos of each kind")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--strength", type=float, default=0.8, help="of the edits")
    options = parser.parse_args()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    classifier, sprites, bins = load_classifier().cpu(), Sprites("glossy"), load_frequency()["bin"]
    names = [c.name for c in load_concepts() if bins[c.name] != "rare"]
    animals = [c.name for c in load_concepts() if bins[c.name] != "rare" and c.domain == "animal"]
    found: dict[str, Any] = {"settings": {**vars(options), "steps": STEPS, "pan": PAN}}
    with torch.inference_mode():
        videos = [generated(names[n % len(names)], 7000 + n, options.frames, classifier) for n in range(options.videos)]
        found["generate"] = table(videos, ("background", "identity"))
        rows = [v[way]["images"][:: max(1, options.frames // 4)] for v in videos[:3] for way in v]
        for dx, noise in MOTIONS:
            videos = []
            for n in range(options.videos):
                images = moving_emoji(animals[n % len(animals)], options.frames, dx, noise, sprites)
                name = animals[(n + 5) % len(animals)]
                videos.append(edited(images, name, 8000 + n, dx, options.strength, classifier))
            kind = f"edit, {dx} pixels per frame" + (f", noise of {noise} levels" if noise else "")
            found[kind] = table(videos, ("background", "subject", "identity"))
            rows += [v[way]["images"][:: max(1, options.frames // 4)] for v in videos[:2] for way in v]
    save_rows(rows, RESULTS / "masked_token_video.png")
    lines = [
        f"{kind}: {way}: " + ", ".join(f"{k} {np.round(v, 4)}" for k, v in row.items())
        for kind, ways in found.items()
        if kind != "settings"
        for way, row in ways.items()
    ]
    publish("masked_token_video", found, "\n".join(lines))


if __name__ == "__main__":
    main()
