"""MaskedTokenSampler and the nodes around it, on a tiny random model."""

import comfy.model_management
import numpy
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args

from chorus.demo import modules
from chorus.nodes.masked_token_editing import MaskedTokenDecode, MaskedTokenEdit, MaskedTokenEncode
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.techniques.masked_tokens.comfy_run import code_colors, decode_tokens, encode_images
from chorus.techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw_uniforms
from chorus.techniques.masked_tokens.paste import paste
from chorus.techniques.masked_tokens.tokens import Tokens, mask_to_tokens
from chorus.tests.support.tiny_masked_tokens import (
    CODES,
    MASK,
    SIDE,
    WIDTH,
    progress_hook,
    prompt,
    random_image,
    recorded_ids,
    run,
    tiny_model,
    tokens,
)

SIZE = dict(width=24, height=32)

pytestmark = pytest.mark.usefixtures("one_thread", "exact")


@pytest.fixture
def sample(tiny):
    """The sampler on the tiny model: (image, Tokens)."""

    def sample(**inputs):
        inputs = {"positive": prompt(1), "negative": prompt(2), "steps": 5, **SIZE, **inputs}
        return run(MaskedTokenSampler, model=tiny.model, **inputs)[:2]

    return sample


def box(height=32, width=24, top=6, left=5, bottom=19, right=14, value=1.0):
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = value
    return mask


def reference(plain, positive, negative, cfg, size, seed, *, ids=None, mask=None, pinned=None, score=6.0, **settings):
    """The ids of one sample, computed by the plain networks with one forward pass per prompt."""
    settings = MaskedTokenSettings(CODES, MASK, **{"steps": 5, **settings})
    width, height = size
    micro = torch.tensor([[width, height, 0.0, 0.0, score]])

    def logits(text, ids):
        (states, extras), *_ = text
        return plain.uvit(ids, plain.uvit.condition(states, extras["pooled_output"], micro))

    def guide(ids, step):
        c, u = logits(positive, ids), logits(negative, ids)
        return c if cfg == 1.0 else u + cfg * (c - u)

    if ids is None:
        ids = torch.full((1, height // SIDE, width // SIDE), MASK)
    uniforms = draw_uniforms(seed, *ids.shape, settings.steps)
    return decode(ids, guide, settings, uniforms, mask=mask, pinned=pinned)


def pixels(plain, ids):
    return plain.vq.decode(ids).clamp(0, 1).movedim(1, -1)


def encoded(plain, image):
    return plain.vq.encode(image.movedim(-1, 1))


def close(image, expected):
    assert image.dtype == torch.float32 and image.device.type == "cpu"
    assert torch.allclose(image, expected, atol=1e-4), (image - expected).abs().max()


# text to image


@pytest.mark.parametrize("cfg", [1.0, 4.5])
@pytest.mark.parametrize("choice", [{}, {"order": "halton"}, {"schedule": "linear"}, {"temperature": 0.0}])
def test_text_to_image_matches_reference(tiny, sample, cfg, choice):
    image, made = sample(seed=11, cfg=cfg, **choice)
    expected = reference(tiny.plain, prompt(1), prompt(2), cfg, (24, 32), 11, **choice)
    assert torch.equal(made.ids, expected)
    assert len(made.ids.unique()) > 5
    close(image, pixels(tiny.plain, expected))


def test_cfg_zero_is_model_default_and_score_is_used(tiny, sample):
    _, own = sample(seed=3, cfg=0.0)
    assert torch.equal(own.ids, reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3))
    _, scored = sample(seed=3, aesthetic_score=1.0)
    assert torch.equal(scored.ids, reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3, score=1.0))
    assert not torch.equal(scored.ids, own.ids)


def test_sampling_is_deterministic_and_keeps_weights(tiny, sample):
    weights = {k: v.clone() for k, v in tiny.model.transformer.model.state_dict().items()}
    (image, made), (again, remade) = sample(seed=4), sample(seed=4)
    assert torch.equal(image, again) and torch.equal(made.ids, remade.ids)
    assert all(torch.equal(v, weights[k]) for k, v in tiny.model.transformer.model.state_dict().items())
    assert not torch.equal(sample(seed=5)[1].ids, made.ids)


def test_guidance_uses_doubled_batch_and_scale_1_single_batch(tiny, sample):
    with recorded_ids(tiny.model) as calls:
        sample(cfg=4.0, batch_size=3)
    assert [len(ids) for ids in calls] == [6] * 5
    with recorded_ids(tiny.model) as calls:
        sample(cfg=1.0, batch_size=3, negative=None)
    assert [len(ids) for ids in calls] == [3] * 5


@pytest.mark.parametrize("ramp", ["rising", "falling"])
def test_cfg_ramp_sets_scale_per_step(tiny, sample, ramp):
    scales = iter([1 + 3 * k / 5 for k in (range(1, 6) if ramp == "rising" else range(5, 0, -1))])
    plain, micro = tiny.plain, torch.tensor([[24, 32, 0, 0, 6.0]])
    conds = [plain.uvit.condition(p[0][0], p[0][1]["pooled_output"], micro) for p in (prompt(1), prompt(2))]

    def guide(ids, step):
        c, u = (plain.uvit(ids, cond) for cond in conds)
        return u + next(scales) * (c - u)

    settings = MaskedTokenSettings(CODES, MASK, steps=5)
    expected = decode(torch.full((1, 8, 6), MASK), guide, settings, draw_uniforms(7, 1, 8, 6, 5))
    assert torch.equal(sample(seed=7, cfg=4.0, cfg_ramp=ramp)[1].ids, expected)


# batches


def test_batch_sample_i_uses_seed_plus_i(sample):
    image, made = sample(seed=20, batch_size=3)
    singles = [sample(seed=20 + i) for i in range(3)]
    assert torch.equal(made.ids, torch.cat([t.ids for _, t in singles]))
    close(image, torch.cat([i for i, _ in singles]))


def test_prompts_of_different_lengths_match_separate_runs(sample):
    both = prompt(1, length=4) + prompt(3, length=6)
    _, made = sample(seed=2, positive=both, batch_size=2)
    expected = [sample(seed=2 + 2 * i, positive=[both[i]], batch_size=2)[1].ids for i in range(2)]
    assert torch.equal(made.ids, torch.cat(expected))
    # one conditioning with batch size 2 also counts as two prompts
    rows = prompt(8, rows=2)
    single = [
        [[rows[0][0][i : i + 1], {**rows[0][1], "pooled_output": rows[0][1]["pooled_output"][i : i + 1]}]]
        for i in (0, 1)
    ]
    expected = [sample(seed=2 + i, positive=single[i])[1].ids for i in range(2)]
    assert torch.equal(sample(seed=2, positive=rows)[1].ids, torch.cat(expected))


def test_inputs_paired_with_prompts_by_index(sample):
    positive, negative = prompt(1) + prompt(3), prompt(2) + prompt(4, length=5)
    images, masks = random_image(batch=2), torch.cat([box(), box(left=12, right=24)])
    pins = tokens(batch=2).with_ids(torch.where(torch.rand(2, 8, 6) < 0.8, MASK, tokens(batch=2).ids))
    image, made = sample(
        seed=9, positive=positive, negative=negative, image=images, mask=masks, tokens=pins, denoise=0.8
    )
    for i in range(2):
        one = slice(i, i + 1)
        single, alone = sample(
            seed=9 + i,
            positive=[positive[i]],
            negative=[negative[i]],
            image=images[one],
            mask=masks[one],
            tokens=pins.with_ids(pins.ids[one]),
            denoise=0.8,
        )
        assert torch.equal(made.ids[one], alone.ids)
        close(image[one], single)


def test_single_input_used_for_whole_batch(sample):
    images = random_image(batch=2)
    assert len(sample(image=images, denoise=0.6)[0]) == 2
    image, made = sample(seed=4, positive=prompt(1) + prompt(3), image=images[:1], denoise=0.6)
    alone = sample(seed=5, positive=prompt(3), image=images[:1], denoise=0.6)
    assert torch.equal(made.ids[1:], alone[1].ids)
    close(image[1:], alone[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(positive=prompt(1, rows=2), image=random_image(batch=3)), "2 prompts, 1 negative prompts, 3 images"),
        (dict(negative=prompt(1, rows=2), tokens=tokens(batch=3)), "2 negative prompts, 3 token grids"),
        (dict(image=random_image(batch=2), mask=torch.ones(3, 32, 24)), "2 images, 3 masks"),
    ],
)
def test_mismatched_batch_sizes_rejected(sample, inputs, message):
    with pytest.raises(ValueError, match=f"{message} cannot be batched"):
        sample(**inputs)


# image to image, in- and outpainting


def test_image_to_image_matches_reference(tiny, sample):
    source = random_image()
    image, made = sample(seed=6, image=source, denoise=0.6, width=512)
    ids = encoded(tiny.plain, source)
    expected = reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 6, ids=ids, denoise=0.6)
    assert torch.equal(made.ids, expected)
    assert not torch.equal(expected, ids)
    close(image, pixels(tiny.plain, expected))


def test_denoise_1_with_image_equals_text_to_image(sample):
    plain = sample(seed=8)
    assert all(map(same, sample(seed=8, image=random_image(), width=64, height=64), plain))
    everywhere = sample(seed=8, image=random_image(), mask=torch.ones(1, 32, 24))
    assert all(map(same, everywhere, plain))


def same(a, b):
    if isinstance(a, Tokens):
        a, b = a.ids, b.ids
    return a == b if isinstance(a, str) else torch.equal(a, b)


@pytest.mark.parametrize("feather", [0, 3])
def test_inpainting_keeps_outside_bit_for_bit(tiny, sample, feather):
    source, mask = random_image(batch=2), box()
    image, made = sample(seed=1, image=source, mask=mask, feather=feather, batch_size=2)
    assert len(image) == 4
    expected = source.repeat_interleave(2, 0)
    outside = (mask == 0)[0]
    assert torch.equal(image[:, outside], expected[:, outside])
    assert (image[:, ~outside] != expected[:, ~outside]).any(-1).all()
    touched = mask_to_tokens(mask, SIDE)
    before = encoded(tiny.plain, source).repeat_interleave(2, 0)
    assert torch.equal(made.ids[:, ~touched[0]], before[:, ~touched[0]])
    ids = [
        reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 1 + i, ids=before[i : i + 1], mask=touched)
        for i in range(4)
    ]
    assert torch.equal(made.ids, torch.cat(ids))
    close(image, paste(expected, pixels(tiny.plain, made.ids), mask, feather))


@pytest.mark.parametrize("mask", [torch.zeros(1, 32, 24), box(value=0.49)])
def test_empty_mask_returns_image_without_forward_pass(tiny, sample, mask):
    source = random_image()
    with recorded_ids(tiny.model) as calls:
        image, made = sample(image=source, mask=mask)
    assert torch.equal(image, source) and not calls
    assert torch.equal(made.ids, encoded(tiny.plain, source))
    assert image.data_ptr() != source.data_ptr()  # an in-place edit of one does not change the other


def test_denoise_0_returns_image_without_negative(tiny, sample):
    source = random_image()
    with recorded_ids(tiny.model) as calls:
        image, _ = sample(image=source, denoise=0.0, negative=None)
    assert torch.equal(image, source) and not calls


def test_empty_mask_in_batch_returns_its_image(sample):
    source, masks = random_image(batch=2), torch.cat([box(), torch.zeros(1, 32, 24)])
    image, _ = sample(image=source, mask=masks)
    assert torch.equal(image[1], source[1]) and not torch.equal(image[0], source[0])


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_images_accepted(sample, channels):
    source = random_image(channels=channels)
    plain = source[..., :3] if channels == 4 else source.repeat(1, 1, 1, 3)
    assert all(map(same, sample(image=source, denoise=0.6), sample(image=plain, denoise=0.6)))
    assert torch.equal(sample(image=source, mask=torch.zeros(32, 24))[0], plain)


# tokens


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("wired", [{}, {"image": random_image(), "denoise": 0.7}])
def test_pinned_tokens_kept_for_every_seed(sample, seed, wired):
    pins = tokens()
    pins = pins.with_ids(pins.ids.masked_fill(mask_to_tokens(box(), SIDE), MASK))
    _, made = sample(seed=seed, temperature=50.0, tokens=pins, **wired)
    known = ~pins.unknown
    assert torch.equal(made.ids[known], pins.ids[known])
    assert not made.unknown.any()


def test_tokens_input_generates_only_unknown_tokens(tiny, sample):
    pins = tokens(8, 6)
    pins = pins.with_ids(pins.ids.masked_fill(mask_to_tokens(box(), SIDE), MASK))
    image, made = sample(seed=3, tokens=pins, width=64, height=64)
    expected = reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3, ids=pins.ids, pinned=pins.ids)
    assert torch.equal(made.ids, expected)
    close(image, pixels(tiny.plain, expected))


def test_known_tokens_decoded_without_forward_pass(tiny, sample):
    with recorded_ids(tiny.model) as calls:
        image, made = sample(tokens=tokens())
    assert not calls and torch.equal(made.ids, tokens().ids)
    assert torch.equal(image, run(MaskedTokenDecode, model=tiny.model, tokens=tokens())[0])


def test_tokens_regenerated_under_mask(tiny, sample):
    draft, touched = tokens(), mask_to_tokens(box(), SIDE)
    image, made = sample(seed=3, tokens=draft, mask=box())
    expected = reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3, ids=draft.ids, mask=touched)
    assert torch.equal(made.ids, expected)
    assert torch.equal(made.ids[~touched], draft.ids[~touched])
    assert not torch.equal(made.ids[touched], draft.ids[touched])
    close(image, pixels(tiny.plain, expected))


def test_tokens_with_image_pinned_under_mask_only(tiny, sample):
    source, pins, touched = random_image(), tokens(), mask_to_tokens(box(), SIDE)
    half = pins.ids.clone()
    half[:, :, 3:] = MASK
    image, made = sample(image=source, mask=box(), tokens=pins.with_ids(half))
    pinned = touched & (half != MASK)
    assert pinned.any() and (touched & ~pinned).any()
    assert torch.equal(made.ids[pinned], half[pinned])
    assert torch.equal(made.ids[~touched], encoded(tiny.plain, source)[~touched])
    outside = (box() == 0)[0]
    assert torch.equal(image[:, outside], source[:, outside])
    # all pinned: decoded without a forward pass
    with recorded_ids(tiny.model) as calls:
        image, made = sample(image=source, tokens=pins, denoise=0.0)
    assert not calls
    close(image, pixels(tiny.plain, pins.ids))


# errors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            dict(negative=None),
            "cfg 3 needs a negative prompt; connect an empty CLIP Text Encode to 'negative'.*cfg to 1",
        ),
        (dict(negative=None, cfg=1.5), "cfg 1.5 needs a negative prompt"),
        (dict(width=26), "width and height of 26x32 pixels cannot be.*multiples of 4, here 24x32"),
        (dict(width=2), "multiples of 4, here 4x32"),
        (dict(image=random_image(30, 24)), "the image of 24x30 pixels.*multiples of 4, here 24x32"),
        (
            dict(image=random_image(), mask=torch.full((1, 64, 64), 0.2)),
            "a mask of 64x64 does not fit an image of 24x32",
        ),
        (dict(tokens=tokens(), mask=torch.zeros(1, 8, 6)), "a mask of 6x8 does not fit an image of 24x32"),
        (dict(mask=box()), "expected an image or tokens with the mask, got neither"),
        (dict(image=random_image(), tokens=tokens(8, 8)), "tokens for 32x32 pixels do not fit the image of 24x32"),
        (dict(tokens=Tokens(tokens().ids, CODES, MASK, 16)), "the tokens are from another model.*16 pixels"),
        (dict(tokens=Tokens(tokens().ids, CODES, MASK + 1, SIDE)), "the tokens are from another model.*mask id 65"),
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(denoise=0.1), "denoise 0.1 of 5 steps is less than one step"),
        (dict(denoise=0.0), "denoise 0 cannot generate the 48 unknown tokens"),
        (dict(temperature=-1.0), "temperature -1"),
        (dict(order="best"), "order 'best'"),
        (dict(cfg_ramp="up"), "ramp 'up'"),
        (dict(image=random_image(channels=2)), "with 1, 3 or 4 channels, got 1x32x24x2"),
        (
            dict(positive=[[torch.zeros(1, 7, WIDTH), {"pooled_output": torch.zeros(1, 16)}]]),
            "positive: .*another text",
        ),
        (dict(negative=[[torch.zeros(1, 7, WIDTH), {}]]), "negative: .*another text"),
        (dict(positive=[]), "expected a prompt for positive, got an empty list; connect a text encoder"),
    ],
)
def test_invalid_inputs_rejected_with_remedy(tiny, sample, inputs, message):
    with recorded_ids(tiny.model) as calls, pytest.raises(ValueError, match=message):
        sample(**inputs)
    assert not calls


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("wired", ["image", "tokens"])
def test_empty_mask_of_load_image_counts_as_not_connected(tiny, wired, masks):
    inputs = dict(model=tiny.model, positive=prompt(1), negative=prompt(2), seed=3, steps=4, denoise=0.5)
    inputs[wired] = random_image() if wired == "image" else tokens()
    expected = run(MaskedTokenSampler, **inputs)
    found = run(MaskedTokenSampler, **inputs, mask=torch.zeros(masks, 64, 64))
    assert all(map(same, found[:2], expected[:2]))
    assert "empty 64x64 mask that Load Image returns" in found[2] and "64x64" not in expected[2]


@pytest.mark.parametrize(
    ("inputs", "note"),
    [
        (dict(tokens=tokens()), "tokens: all of them are known, so that no token is generated; make some unknown with"),
        (dict(tokens=tokens(), image=random_image()), "or disconnect the tokens"),
        (dict(image=random_image(), mask=torch.full((1, 32, 24), 0.4)), "mask: below 0.5 everywhere, so that no token"),
        (dict(tokens=tokens(), mask=torch.zeros(1, 32, 24)), "mask: below 0.5 everywhere, so that no token"),
    ],
    ids=["tokens", "tokens and image", "image and empty mask", "tokens and empty mask"],
)
def test_report_says_why_no_token_is_generated(tiny, inputs, note):
    with recorded_ids(tiny.model) as calls:
        report = run(MaskedTokenSampler, model=tiny.model, positive=prompt(1), negative=prompt(2), seed=3, **inputs)[2]
    assert not calls and note in report


def test_empty_mask_of_load_image_edits_nothing(tiny):
    edited, report = run(MaskedTokenEdit, tokens=tokens(batch=2), mask=torch.zeros(1, 64, 64), source=tokens(seed=9))
    assert torch.equal(edited.ids, tokens(batch=2).ids)
    assert "empty 64x64 mask that Load Image returns" in report and "image 2: 0 of 48 tokens under the mask" in report


def test_report_lists_the_seed_of_each_image(tiny):
    inputs = dict(model=tiny.model, positive=prompt(1), negative=prompt(2), steps=2, **SIZE)
    report = run(MaskedTokenSampler, **inputs, seed=2**64 - 1, batch_size=2)[2]
    size = "tiny: 24 x 32 pixels\ntiny was trained at 64 x 64 pixels"
    assert report == f"{size}\nimage 1: seed {2**64 - 1}\nimage 2: seed 0"
    trained = run(MaskedTokenSampler, **inputs | {"width": 64, "height": 64}, seed=5)[2]
    assert trained == "tiny: 64 x 64 pixels\nimage 1: seed 5"


def test_text_of_other_width_rejected(sample):
    text = [[torch.zeros(1, 7, 32), {"pooled_output": torch.zeros(1, 16), "masked_token_text": "clip-l"}]]
    with pytest.raises(
        ValueError, match=r"positive: text of width 32 \(pooled 16\) does not fit tiny, which expects 24"
    ):
        sample(positive=text)


# progress, previews, interrupts


@pytest.fixture
def preview_method(monkeypatch):
    return lambda method: monkeypatch.setattr(args, "preview_method", method)


def events(sample, **inputs):
    seen = []
    with progress_hook(lambda *event: seen.append(event)):
        result = sample(**inputs)
    return seen, result


def test_preview_method_none_makes_no_previews(tiny, sample, preview_method, monkeypatch):
    preview_method(LatentPreviewMethod.NoPreviews)
    decodes = []
    handle = tiny.model.vq.model.decoder.register_forward_hook(lambda *a: decodes.append(0))
    seen, _ = events(sample)
    handle.remove()
    assert len(decodes) == 1
    assert all(preview is None for _, _, preview in seen)
    assert seen[-1][:2] == (5, 5)


@pytest.mark.parametrize("method", [LatentPreviewMethod.Auto, LatentPreviewMethod.Latent2RGB])
def test_code_color_previews_show_known_tokens(sample, preview_method, method):
    model = tiny_model(seed=3).model
    decodes = []
    model.vq.model.decoder.register_forward_hook(lambda module, inputs, out: decodes.append(out.shape))
    plain = run(MaskedTokenSampler, model=model, **prompts(), seed=2)
    assert len(decodes) == 1
    preview_method(method)
    seen, shown = events(run, node=MaskedTokenSampler, model=model, **prompts(), seed=2)
    assert all(map(same, shown, plain))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5]
    images = [preview[1] for _, _, preview in seen]
    assert {p.size for p in images} == {(8 * 6, 8 * 8)}
    assert all(preview[0] == "JPEG" and preview[2] == args.preview_size for _, _, preview in seen)
    greys = [grey_tokens(p) for p in images]
    # the masked counts of the cosine schedule for 48 tokens
    assert greys == [45, 38, 28, 14, 0]
    assert len(decodes) == 3  # the sheets of code colours and the result
    events(run, node=MaskedTokenSampler, model=model, **prompts(), seed=3)
    assert len(decodes) == 4  # the sheets are decoded once


def prompts():
    return {"positive": prompt(1), "negative": prompt(2), "steps": 5, **SIZE}


def grey_tokens(image):
    x = torch.from_numpy(numpy.array(image))
    tokens = x.unfold(0, 8, 8).unfold(1, 8, 8).flatten(3)  # [h, w, 3, 64]
    return sum(set(map(int, token.flatten().unique())) == {115, 140} for row in tokens for token in row)


def test_taesd_previews_show_decoded_prediction(tiny, sample, preview_method):
    preview_method(LatentPreviewMethod.TAESD)
    seen, (image, _) = events(sample, seed=2)
    assert {preview[1].size for _, _, preview in seen} == {(24, 32)}
    last = torch.from_numpy(numpy.array(seen[-1][2][1])) / 255
    assert torch.allclose(last, image[0], atol=0.51 / 255)


@pytest.mark.parametrize("step", range(1, 6))
def test_interrupt_ends_run_without_side_effects(tiny, sample, step):
    before = sample(seed=4, image=random_image(), mask=box(), batch_size=2)

    def interrupt(module, inputs, output):
        if len(calls) == step:
            comfy.model_management.interrupt_current_processing()

    with recorded_ids(tiny.model) as calls:
        handle = tiny.model.transformer.model.register_forward_hook(interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(seed=4, image=random_image(), mask=box(), batch_size=2)
        handle.remove()
    assert len(calls) == step
    assert all(map(same, sample(seed=4, image=random_image(), mask=box(), batch_size=2), before))


# memory


def test_vq_runs_in_chunks_if_memory_is_low(tiny, sample, monkeypatch):
    rows = []
    handles = [
        part.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        for part in (tiny.model.vq.model.encoder, tiny.model.vq.model.decoder)
    ]
    whole = sample(image=random_image(batch=3), denoise=0.6)
    assert rows == [3, 3]
    monkeypatch.setattr(tiny.model.vq, "get_free_memory", lambda device: 1000)
    chunked = sample(image=random_image(batch=3), denoise=0.6)
    [handle.remove() for handle in handles]
    assert rows[2:] == [1] * 6
    assert torch.equal(whole[1].ids, chunked[1].ids)
    close(chunked[0], whole[0])


def test_requested_memory_scales_with_batch(tiny, sample, monkeypatch):
    requests = []
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **kwargs):
        requests.append((models[0], memory_required))
        return load(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)

    def transformer(**inputs):
        requests.clear()
        sample(**inputs)
        [memory] = [memory for model, memory in requests if model is tiny.model.transformer]
        return memory

    one = transformer(cfg=1.0)
    assert one > 48 * CODES * 4 * 2
    assert transformer(cfg=1.0, batch_size=3) == 3 * one
    assert one < transformer(cfg=2.0) < 2 * one


# encode, decode, edit


def test_encode_and_decode_match_vq(tiny):
    source = random_image(batch=2)
    [made] = run(MaskedTokenEncode, model=tiny.model, image=source)
    assert torch.equal(made.ids, encoded(tiny.plain, source))
    assert (made.codebook, made.mask_id, made.downscale) == (CODES, MASK, SIDE)
    [image] = run(MaskedTokenDecode, model=tiny.model, tokens=made)
    close(image, pixels(tiny.plain, made.ids))
    assert image.is_contiguous()


def test_encode_rejects_sides_not_divisible_by_token(tiny):
    with pytest.raises(ValueError, match=r"the image of 25x32 pixels.*multiples of 4, here 24x32"):
        run(MaskedTokenEncode, model=tiny.model, image=random_image(32, 25))


def test_decode_rejects_unknown_and_incompatible_tokens(tiny):
    unknown = tokens().with_ids(tokens().ids.index_fill(2, torch.tensor([0]), MASK))
    with pytest.raises(ValueError, match=r"8 of 48 tokens are unknown.*Masked Token Sampler"):
        run(MaskedTokenDecode, model=tiny.model, tokens=unknown)
    with pytest.raises(ValueError, match="from another model"):
        run(MaskedTokenDecode, model=tiny.model, tokens=Tokens(tokens().ids, CODES, MASK, 8))


def test_edit_clears_or_replaces_tokens(tiny):
    touched = mask_to_tokens(box(), SIDE)
    cleared, _ = run(MaskedTokenEdit, tokens=tokens(), mask=box())
    assert torch.equal(cleared.unknown, touched)
    assert torch.equal(cleared.ids[~touched], tokens().ids[~touched])
    replaced, report = run(MaskedTokenEdit, tokens=tokens(), mask=box()[0], source=tokens(seed=9))
    assert torch.equal(replaced.ids, torch.where(touched, tokens(seed=9).ids, tokens().ids))
    assert report == f"image 1: {int(touched.sum())} of 48 tokens under the mask"
    unchanged, _ = run(MaskedTokenEdit, tokens=tokens(), mask=torch.zeros(1, 32, 24))
    assert torch.equal(unchanged.ids, tokens().ids)


@pytest.mark.slow
def test_demo_code_colors_close_to_decoded_colors():
    model, _ = modules.load_masked_tokens()
    side = model.downscale
    # plain backgrounds with a box of another colour
    g = torch.Generator().manual_seed(0)
    grounds, boxes = torch.rand(2, 60, 3, 1, 1, generator=g)
    images = grounds.expand(60, 3, 64, 64).clone()
    images[:, :, 16:44, 20:52] = boxes
    with torch.inference_mode():
        ids = encode_images(model, images.movedim(1, -1))
        shown = code_colors(model)[ids]
        decoded = decode_tokens(model, ids).unflatten(2, (-1, side)).unflatten(1, (-1, side)).mean((2, 4))
    correlation = torch.corrcoef(torch.stack([shown.flatten(), decoded.flatten()]))[0, 1]
    assert correlation > 0.8
    assert (shown - decoded).abs().mean() < 0.6 * (decoded - decoded.mean((0, 1, 2))).abs().mean()
