"""MaskedTokenVideo on a tiny random model, recomputed frame by frame from the plain networks."""

import itertools

import comfy.model_management
import pytest
import torch

from chorus.nodes.masked_token_video import MaskedTokenVideo
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw_uniforms
from chorus.techniques.masked_tokens.video import followed, moved, offsets
from chorus.tests.support.tiny_masked_tokens import (
    CODES,
    MASK,
    SIDE,
    progress_hook,
    prompt,
    random_image,
    run,
)

SIZE = dict(width=24, height=32)
CFG, STEPS = 3.0, 5

pytestmark = pytest.mark.usefixtures("one_thread", "exact")


@pytest.fixture
def video(tiny):
    """The node on the tiny model: (images, Tokens, report)."""

    def video(**inputs):
        inputs = {"positive": prompt(1), "negative": prompt(2), "steps": STEPS, **SIZE, **inputs}
        return run(MaskedTokenVideo, model=tiny.model, **inputs)

    return video


@pytest.fixture
def sample(tiny):
    def sample(**inputs):
        inputs = {"positive": prompt(1), "negative": prompt(2), "steps": STEPS, **SIZE, **inputs}
        return run(MaskedTokenSampler, model=tiny.model, **inputs)[:2]

    return sample


def pixels(plain, ids):
    return plain.vq.decode(ids).clamp(0, 1).movedim(1, -1)


def moving_images(frames=4, dx=SIDE, seed=5):
    """Random images [T, 32, 24, 3] of a patch that moves to the right over a plain background."""
    images = torch.full((frames, 32, 24, 3), 0.5)
    patch = torch.rand(12, 8, 3, generator=torch.Generator().manual_seed(seed))
    for t, image in enumerate(images):
        image[8:20, dx * t : dx * t + 8] = patch
    return images


class Recomputed:
    """The frames by the plain networks: one forward pass per prompt, references as a longer context."""

    def __init__(self, plain, cfg, references):
        micro = torch.tensor([[24.0, 32.0, 0.0, 0.0, 6.0]])
        self.plain, self.cfg, self.count = plain, cfg, references
        self.texts = []
        for seed in (1, 2):
            (states, extras), *_ = prompt(seed)
            self.texts.append(plain.uvit.condition(states, extras["pooled_output"], micro))
        self.frames = []

    def logits(self, ids, step):
        shown = (self.frames[:1] + self.frames[1:][-1:])[: self.count]
        found = []
        for text in self.texts:
            layers = [self.plain.uvit.keys_values(f[None], text) for f in shown]
            joined = [
                type(parts[0])(*(torch.cat(x, 2) for x in zip(*parts))) for parts in zip(*layers)
            ] or None  # fmt: skip
            found.append(self.plain.uvit(ids, text, joined))
        c, u = found
        return c if self.cfg == 1.0 else u + self.cfg * (c - u)

    def frame(self, ids, seed, denoise=1.0, **given):
        settings = MaskedTokenSettings(CODES, MASK, STEPS, denoise)
        uniforms = draw_uniforms(seed, 1, *ids.shape, STEPS)
        given = {name: value[None] for name, value in given.items() if value is not None}
        self.frames.append(decode(ids[None], self.logits, settings, uniforms, **given)[0])


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("cfg", [1.0, CFG])
@pytest.mark.parametrize("masked", [False, True])
def test_generated_video_is_recomputed(tiny, video, references, cfg, masked):
    mask = torch.zeros(1, 32, 24)
    mask[:, 9:17, 2:9] = 1.0
    inputs = dict(frames=4, dx=6.0, dy=-3.0, cfg=cfg, seed=9, boundary=1, reference_frames=references)
    images, tokens, report = video(**inputs, mask=mask if masked else None)
    moving = None
    if masked:
        moving = torch.zeros(8, 6, dtype=torch.bool)
        moving[2:5, 0:3] = True
    expected = Recomputed(tiny.plain, cfg, references)
    start = torch.full((8, 6), MASK)
    expected.frame(start, 9, pinned=start)
    counts = [48]
    for t, offset in enumerate(offsets(4, 6.0, -3.0, SIDE), start=1):
        start, moving = moved(expected.frames[-1], offset, MASK, 1, moving)
        counts.append(int((start == MASK).sum()))
        expected.frame(start, 9 + t, pinned=start)
    assert torch.equal(tokens.ids, torch.stack(expected.frames))
    assert torch.allclose(images, pixels(tiny.plain, tokens.ids), atol=1e-4)
    assert images.shape == (4, 32, 24, 3) and images.dtype == torch.float32
    for t, count in enumerate(counts):
        assert f"frame {t + 1}: seed {9 + t}, {count} of 48 tokens generated" in report
    assert 0 < counts[1] < 48


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_edited_video_is_recomputed(tiny, video, references, strength, masked):
    given = moving_images()
    mask = torch.zeros(4, 32, 24)
    mask[:, 4:28] = 1.0
    images, tokens, _ = video(
        images=given, strength=strength, seed=3, reference_frames=references, boundary=0, mask=mask if masked else None
    )
    source = tiny.plain.vq.encode(given.movedim(-1, 1))
    codes = tiny.plain.vq.quantize.embedding.weight
    free = torch.zeros(8, 6, dtype=torch.bool) if masked else torch.ones(8, 6, dtype=torch.bool)
    free[1:7] = True
    expected = Recomputed(tiny.plain, CFG, references)
    followers = 0
    for t in range(4):
        pinned = torch.full((8, 6), MASK)
        if t:
            pinned = followed(expected.frames[-1], source[t - 1], source[t], codes, MASK).masked_fill(~free, MASK)
            followers += int((pinned != MASK).sum())
        expected.frame(source[t], 3, strength, mask=free, pinned=pinned)
    assert torch.equal(tokens.ids, torch.stack(expected.frames))
    assert followers > 20 and not torch.equal(tokens.ids, source)
    shown = pixels(tiny.plain, tokens.ids)
    if masked:
        assert torch.equal(images[:, :4], given[:, :4]) and torch.equal(images[:, 28:], given[:, 28:])
        assert torch.allclose(images[:, 14:18], shown[:, 14:18], atol=1e-4)  # further than the feather from the edge
    else:
        assert torch.allclose(images, shown, atol=1e-4)


def test_first_frames_are_those_of_the_sampler(video, sample):
    image, tokens = sample(seed=4)
    frames, ids, _ = video(seed=4, frames=3)
    assert torch.equal(ids.ids[:1], tokens.ids) and torch.allclose(frames[:1], image, atol=1e-6)
    given = moving_images()
    image, tokens = sample(seed=4, image=given[:1], denoise=0.6)
    frames, ids, _ = video(seed=4, images=given, strength=0.6)
    assert torch.equal(ids.ids[:1], tokens.ids) and torch.allclose(frames[:1], image, atol=1e-6)


def test_without_motion_all_frames_are_the_first(video):
    images, tokens, _ = video(frames=3, dx=0.0, dy=0.0)
    assert torch.equal(images, images[:1].expand_as(images)) and torch.equal(tokens.ids[2], tokens.ids[0])


@pytest.mark.parametrize("frames", [1, 3])
def test_given_frame_without_motion_is_returned_unchanged(video, frames):
    given = random_image()
    images, _, _ = video(images=given, frames=frames, dx=0.0, dy=0.0)
    assert torch.equal(images, given.expand(frames, -1, -1, -1))


def test_given_frame_moves(tiny, video):
    given = random_image()
    images, tokens, _ = video(images=given, frames=2, dx=8.0, boundary=0)
    source = tiny.plain.vq.encode(given.movedim(-1, 1))[0]
    assert torch.equal(tokens.ids[0], source) and torch.equal(tokens.ids[1][:, 2:], source[:, :-2])
    assert torch.allclose(images, pixels(tiny.plain, tokens.ids), atol=1e-4)


@pytest.mark.parametrize("inputs", [{"strength": 0.0}, {"mask": torch.zeros(1, 32, 24)}], ids=["strength", "mask"])
def test_edit_of_nothing_returns_the_same_pixels(video, inputs):
    given = random_image(batch=3)
    images, _, _ = video(images=given, **inputs)
    assert torch.equal(images, given)


@pytest.mark.parametrize("frames", [1, 3])
def test_empty_mask_of_load_image_is_not_connected(video, frames):
    given, empty = random_image(batch=frames), torch.zeros(1, 64, 64)
    images, tokens, report = video(images=given, mask=empty)
    assert "mask: counts as not connected" in report
    expected = video(images=given)
    assert torch.equal(images, expected[0]) and torch.equal(tokens.ids, expected[1].ids)


def test_still_video_stays_still(video):
    images, tokens, report = video(images=random_image().expand(4, -1, -1, -1), seed=2)
    assert torch.equal(images, images[:1].expand_as(images))
    assert torch.equal(tokens.ids, tokens.ids[:1].expand_as(tokens.ids))
    assert "frame 1: 48 of 48 tokens may change" in report and "frame 4: 0 of 48 tokens may change" in report


def test_keys_of_two_frames_are_kept_however_long_the_video(tiny, video):
    """The self-attention reads the tokens of at most three frames."""
    lengths = []
    layer = tiny.model.transformer.model.transformer_layers[0]
    handle = layer.attn1.register_forward_pre_hook(lambda module, args: lengths.append(args[1].key.shape[2] // 48))
    try:
        video(frames=9, reference_frames=2)
    finally:
        handle.remove()
    assert set(lengths) == {1, 2, 3}


def test_interrupt_keeps_finished_frames(tiny, video):
    calls = []

    def interrupt(module, inputs, output):
        calls.append(None)
        if len(calls) == 12:
            comfy.model_management.interrupt_current_processing()

    whole, ids, _ = video(frames=6, seed=5)
    handle = tiny.model.transformer.model.register_forward_hook(interrupt)
    try:
        images, tokens, report = video(frames=6, seed=5)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    count = len(images)
    assert 1 <= count < 6 and report.startswith(f"interrupted: {count} of 6 frames are finished")
    assert torch.equal(images, whole[:count]) and torch.equal(tokens.ids, ids.ids[:count])
    assert f"frame {count}:" in report and f"frame {count + 1}:" not in report


def test_interrupt_while_decoding_keeps_all_frames(tiny, video):
    def interrupt(*_):
        handle.remove()
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    whole, ids, _ = video(frames=3, seed=5)
    handle = tiny.model.vq.model.decoder.register_forward_pre_hook(interrupt)
    images, tokens, report = video(frames=3, seed=5)
    assert report.startswith("interrupted: 3 of 3 frames are finished")
    assert torch.equal(images, whole) and torch.equal(tokens.ids, ids.ids)


def test_interrupt_before_the_first_frame(video):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        video(frames=3)


def test_progress_counts_frames(video):
    shown = []
    with progress_hook(lambda value, total, preview: shown.append((value, total))):
        video(frames=3, dx=SIDE)
    values = [value for value, total in shown if total == 3 * STEPS]
    assert values == sorted(values) and values[-1] == 3 * STEPS
    assert len(values) == len(shown)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"positive": prompt(1, rows=1) * 2}, "positive: expected one prompt for the whole video, got 2"),
        ({"images": random_image(30, 24)}, "the images of 24x30 pixels cannot be divided.*use multiples of 4"),
        (
            {"mask": torch.ones(2, 32, 24)},
            "expected 1 mask, got 2 masks; connect the masks of this batch, or a single mask",
        ),
        (
            {"images": random_image(batch=3), "mask": torch.ones(2, 32, 24)},
            r"expected 1 mask for all 3 images, or 3 masks \(one per image\), got 2 masks; connect",
        ),
        ({"mask": torch.ones(1, 30, 24)}, "a mask of 24x30 does not fit an image of 24x32 pixels; resize it"),
        ({"images": random_image(batch=2), "strength": 0.1}, "strength 0.1 of 5 steps is less than one step; use"),
        ({"negative": None}, "cfg 3 needs a negative prompt"),
    ],
)
def test_invalid_inputs(video, inputs, message):
    with pytest.raises(ValueError, match=message):
        video(**inputs)


def test_report_explains_the_first_frame_and_a_motion_below_a_token(video):
    report = video(frames=1)[2].splitlines()
    assert report[0].endswith(": 1 frame of 24 x 32 pixels") and report[1].endswith("was trained at 64 x 64 pixels")
    report = video(images=random_image(), frames=4, dx=SIDE, dy=0.0)[2]
    assert "1 image: it is the first frame, which dx and dy move; strength is not used" in report
    assert "move nothing" not in report
    for dx, still in ((0.25, 3), (SIDE / 2, 1)):
        images, _, report = video(frames=4, dx=dx, dy=0.0)
        assert f"dx {dx:g} and dy 0 move nothing in {still} of 3 steps from frame to frame" in report
        assert sum(torch.equal(a, b) for a, b in itertools.pairwise(images)) == still
    assert "move nothing" not in video(frames=4, dx=0.0, dy=0.0)[2]
    assert "1 image" not in video(images=random_image(batch=2))[2]
