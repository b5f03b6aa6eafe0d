"""MaskedTokenSampler and the nodes around it, on a tiny random model."""

import comfy.model_management
import numpy
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args

from chorus.demo import modules
from chorus.nodes.masked_token_editing import MaskedTokenDecode, MaskedTokenEdit, MaskedTokenEncode
from chorus.nodes.masked_tokens import MaskedTokenSampler
from chorus.techniques.masked_tokens.comfy_run import code_colors, decode_tokens, encode_pictures
from chorus.techniques.masked_tokens.decode import MaskedTokenSettings, decode, draw
from chorus.techniques.masked_tokens.paste import paste
from chorus.techniques.masked_tokens.tokens import Tokens, cells
from chorus.tests.support.tiny_masked_tokens import (
    CODES,
    MASK,
    SIDE,
    WIDTH,
    counted,
    hooked,
    picture,
    prompt,
    run,
    tiny_model,
    tokens,
)

SIZE = dict(width=24, height=32)

pytestmark = pytest.mark.usefixtures("one_thread", "exact")


@pytest.fixture
def exact():
    """A GPU rounds convolutions to TF32, enough to draw other ids than the plain networks on the CPU."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture
def sample(tiny):
    """The sampler on the tiny model: (image, Tokens)."""

    def sample(**inputs):
        inputs = {"positive": prompt(1), "negative": prompt(2), "steps": 5, **SIZE, **inputs}
        return run(MaskedTokenSampler, model=tiny.model, **inputs)

    return sample


def box(height=32, width=24, top=6, left=5, bottom=19, right=14, value=1.0):
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = value
    return mask


def reference(plain, positive, negative, cfg, size, seed, *, ids=None, mask=None, pinned=None, score=6.0, **settings):
    """The ids of one sample, by the plain networks, one prompt at a time."""
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
    draws = draw(seed, *ids.shape, settings.steps)
    return decode(ids, guide, settings, draws, mask=mask, pinned=pinned)


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
def test_text_to_image_is_the_loop_over_the_plain_networks(tiny, sample, cfg, choice):
    image, made = sample(seed=11, cfg=cfg, **choice)
    expected = reference(tiny.plain, prompt(1), prompt(2), cfg, (24, 32), 11, **choice)
    assert torch.equal(made.ids, expected)
    assert len(made.ids.unique()) > 5
    close(image, pixels(tiny.plain, expected))


def test_cfg_zero_is_the_models_own_and_score_and_size_are_read(tiny, sample):
    _, own = sample(seed=3, cfg=0.0)
    assert torch.equal(own.ids, reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3))
    _, scored = sample(seed=3, aesthetic_score=1.0)
    assert torch.equal(scored.ids, reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3, score=1.0))
    assert not torch.equal(scored.ids, own.ids)


def test_the_same_run_twice_gives_the_same_bits_and_changes_no_weight(tiny, sample):
    weights = {k: v.clone() for k, v in tiny.model.transformer.model.state_dict().items()}
    (image, made), (again, remade) = sample(seed=4), sample(seed=4)
    assert torch.equal(image, again) and torch.equal(made.ids, remade.ids)
    assert all(torch.equal(v, weights[k]) for k, v in tiny.model.transformer.model.state_dict().items())
    assert not torch.equal(sample(seed=5)[1].ids, made.ids)


def test_guidance_runs_in_one_doubled_batch_and_scale_1_without_the_negative(tiny, sample):
    with counted(tiny.model) as calls:
        sample(cfg=4.0, batch_size=3)
    assert [len(ids) for ids in calls] == [6] * 5
    with counted(tiny.model) as calls:
        sample(cfg=1.0, batch_size=3, negative=None)
    assert [len(ids) for ids in calls] == [3] * 5


@pytest.mark.parametrize("ramp", ["rising", "falling"])
def test_cfg_ramp(tiny, sample, ramp):
    scales = iter([1 + 3 * k / 5 for k in (range(1, 6) if ramp == "rising" else range(5, 0, -1))])
    plain, micro = tiny.plain, torch.tensor([[24, 32, 0, 0, 6.0]])
    conds = [plain.uvit.condition(p[0][0], p[0][1]["pooled_output"], micro) for p in (prompt(1), prompt(2))]

    def guide(ids, step):
        c, u = (plain.uvit(ids, cond) for cond in conds)
        return u + next(scales) * (c - u)

    settings = MaskedTokenSettings(CODES, MASK, steps=5)
    expected = decode(torch.full((1, 8, 6), MASK), guide, settings, draw(7, 1, 8, 6, 5))
    assert torch.equal(sample(seed=7, cfg=4.0, cfg_ramp=ramp)[1].ids, expected)


# batches


def test_sample_i_of_a_batch_is_the_run_of_seed_plus_i(sample):
    image, made = sample(seed=20, batch_size=3)
    singles = [sample(seed=20 + i) for i in range(3)]
    assert torch.equal(made.ids, torch.cat([t.ids for _, t in singles]))
    close(image, torch.cat([i for i, _ in singles]))


def test_prompts_of_two_lengths_in_one_batch_are_two_runs(sample):
    both = prompt(1, length=4) + prompt(3, length=6)
    _, made = sample(seed=2, positive=both, batch_size=2)
    expected = [sample(seed=2 + 2 * i, positive=[both[i]], batch_size=2)[1].ids for i in range(2)]
    assert torch.equal(made.ids, torch.cat(expected))
    # one conditioning of two rows is two prompts as well
    rows = prompt(8, rows=2)
    single = [
        [[rows[0][0][i : i + 1], {**rows[0][1], "pooled_output": rows[0][1]["pooled_output"][i : i + 1]}]]
        for i in (0, 1)
    ]
    expected = [sample(seed=2 + i, positive=single[i])[1].ids for i in range(2)]
    assert torch.equal(sample(seed=2, positive=rows)[1].ids, torch.cat(expected))


def test_negatives_images_masks_and_tokens_go_with_their_prompts(sample):
    positive, negative = prompt(1) + prompt(3), prompt(2) + prompt(4, length=5)
    images, masks = picture(batch=2), torch.cat([box(), box(left=12, right=24)])
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


def test_one_prompt_for_two_images_and_two_prompts_for_one_image(sample):
    images = picture(batch=2)
    assert len(sample(image=images, denoise=0.6)[0]) == 2
    image, made = sample(seed=4, positive=prompt(1) + prompt(3), image=images[:1], denoise=0.6)
    alone = sample(seed=5, positive=prompt(3), image=images[:1], denoise=0.6)
    assert torch.equal(made.ids[1:], alone[1].ids)
    close(image[1:], alone[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(positive=prompt(1, rows=2), image=picture(batch=3)), "2 prompts, 1 negative prompts, 3 images"),
        (dict(negative=prompt(1, rows=2), tokens=tokens(batch=3)), "2 negative prompts, 3 token grids"),
        (dict(image=picture(batch=2), mask=torch.ones(3, 32, 24)), "2 images, 3 masks"),
    ],
)
def test_numbers_that_make_no_batch(sample, inputs, message):
    with pytest.raises(ValueError, match=f"{message} make no batch"):
        sample(**inputs)


# image to image, in- and outpainting


def test_image_to_image_is_the_loop_from_the_images_tokens(tiny, sample):
    source = picture()
    image, made = sample(seed=6, image=source, denoise=0.6, width=512)
    ids = encoded(tiny.plain, source)
    expected = reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 6, ids=ids, denoise=0.6)
    assert torch.equal(made.ids, expected)
    assert not torch.equal(expected, ids)
    close(image, pixels(tiny.plain, expected))


def test_denoise_1_of_an_image_is_text_to_image_of_its_size(sample):
    plain = sample(seed=8)
    assert all(map(same, sample(seed=8, image=picture(), width=64, height=64), plain))
    everywhere = sample(seed=8, image=picture(), mask=torch.ones(1, 32, 24))
    assert all(map(same, everywhere, plain))


def same(a, b):
    if isinstance(a, Tokens):
        a, b = a.ids, b.ids
    return torch.equal(a, b)


@pytest.mark.parametrize("feather", [0, 3])
def test_inpainting_keeps_what_lies_outside_bit_for_bit(tiny, sample, feather):
    source, mask = picture(batch=2), box()
    image, made = sample(seed=1, image=source, mask=mask, feather=feather, batch_size=2)
    assert len(image) == 4
    expected = source.repeat_interleave(2, 0)
    outside = (mask == 0)[0]
    assert torch.equal(image[:, outside], expected[:, outside])
    assert (image[:, ~outside] != expected[:, ~outside]).any(-1).all()
    touched = cells(mask, SIDE)
    before = encoded(tiny.plain, source).repeat_interleave(2, 0)
    assert torch.equal(made.ids[:, ~touched[0]], before[:, ~touched[0]])
    ids = [
        reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 1 + i, ids=before[i : i + 1], mask=touched)
        for i in range(4)
    ]
    assert torch.equal(made.ids, torch.cat(ids))
    close(image, paste(expected, pixels(tiny.plain, made.ids), mask, feather))


@pytest.mark.parametrize("mask", [torch.zeros(1, 32, 24), box(value=0.49)])
def test_a_mask_that_touches_no_token_gives_the_image_back_without_a_forward_pass(tiny, sample, mask):
    source = picture()
    with counted(tiny.model) as calls:
        image, made = sample(image=source, mask=mask)
    assert torch.equal(image, source) and not calls
    assert torch.equal(made.ids, encoded(tiny.plain, source))
    assert image.data_ptr() != source.data_ptr()  # what edits one in place leaves the other


def test_denoise_0_gives_the_image_back_and_needs_no_negative(tiny, sample):
    source = picture()
    with counted(tiny.model) as calls:
        image, _ = sample(image=source, denoise=0.0, negative=None)
    assert torch.equal(image, source) and not calls


def test_an_empty_mask_beside_a_full_one_gives_that_image_back(sample):
    source, masks = picture(batch=2), torch.cat([box(), torch.zeros(1, 32, 24)])
    image, _ = sample(image=source, mask=masks)
    assert torch.equal(image[1], source[1]) and not torch.equal(image[0], source[0])


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_images_and_alpha(sample, channels):
    source = picture(channels=channels)
    plain = source[..., :3] if channels == 4 else source.repeat(1, 1, 1, 3)
    assert all(map(same, sample(image=source, denoise=0.6), sample(image=plain, denoise=0.6)))
    assert torch.equal(sample(image=source, mask=torch.zeros(32, 24))[0], plain)


# tokens


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("wired", [{}, {"image": picture(), "denoise": 0.7}])
def test_pinned_tokens_hold_whatever_the_seed(sample, seed, wired):
    pins = tokens()
    pins = pins.with_ids(pins.ids.masked_fill(cells(box(), SIDE), MASK))
    _, made = sample(seed=seed, temperature=50.0, tokens=pins, **wired)
    known = ~pins.unknown
    assert torch.equal(made.ids[known], pins.ids[known])
    assert not made.unknown.any()


def test_tokens_alone_have_their_size_and_only_unknown_ones_are_painted(tiny, sample):
    pins = tokens(8, 6)
    pins = pins.with_ids(pins.ids.masked_fill(cells(box(), SIDE), MASK))
    image, made = sample(seed=3, tokens=pins, width=64, height=64)
    expected = reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3, ids=pins.ids, pinned=pins.ids)
    assert torch.equal(made.ids, expected)
    close(image, pixels(tiny.plain, expected))


def test_known_tokens_are_decoded_without_a_forward_pass(tiny, sample):
    with counted(tiny.model) as calls:
        image, made = sample(tokens=tokens())
    assert not calls and torch.equal(made.ids, tokens().ids)
    assert torch.equal(image, run(MaskedTokenDecode, model=tiny.model, tokens=tokens())[0])


def test_tokens_with_a_mask_are_painted_anew_under_it(tiny, sample):
    draft, touched = tokens(), cells(box(), SIDE)
    image, made = sample(seed=3, tokens=draft, mask=box())
    expected = reference(tiny.plain, prompt(1), prompt(2), 3.0, (24, 32), 3, ids=draft.ids, mask=touched)
    assert torch.equal(made.ids, expected)
    assert torch.equal(made.ids[~touched], draft.ids[~touched])
    assert not torch.equal(made.ids[touched], draft.ids[touched])
    close(image, pixels(tiny.plain, expected))


def test_with_an_image_tokens_hold_under_the_mask_only(tiny, sample):
    source, pins, touched = picture(), tokens(), cells(box(), SIDE)
    half = pins.ids.clone()
    half[:, :, 3:] = MASK
    image, made = sample(image=source, mask=box(), tokens=pins.with_ids(half))
    held = touched & (half != MASK)
    assert held.any() and (touched & ~held).any()
    assert torch.equal(made.ids[held], half[held])
    assert torch.equal(made.ids[~touched], encoded(tiny.plain, source)[~touched])
    outside = (box() == 0)[0]
    assert torch.equal(image[:, outside], source[:, outside])
    # all pinned, nothing to sample: yet the picture shows them
    with counted(tiny.model) as calls:
        image, made = sample(image=source, tokens=pins, denoise=0.0)
    assert not calls
    close(image, pixels(tiny.plain, pins.ids))


# errors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(negative=None), "guidance of 3 leads away.*wire an empty CLIP Text Encode into 'negative'.*cfg to 1"),
        (dict(negative=None, cfg=1.5), "guidance of 1.5 leads away"),
        (dict(width=26), "width and height of 26x32 pixels cannot be.*multiples of 4, here 24x32"),
        (dict(width=2), "multiples of 4, here 4x32"),
        (dict(image=picture(30, 24)), "the picture of 24x30 pixels.*multiples of 4, here 24x32"),
        (dict(image=picture(), mask=torch.zeros(1, 64, 64)), "a mask of 64x64 does not fit a picture of 24x32"),
        (dict(tokens=tokens(), mask=torch.zeros(1, 8, 6)), "a mask of 6x8 does not fit a picture of 24x32"),
        (dict(mask=box()), "a mask is wired, but nothing that could stay"),
        (dict(image=picture(), tokens=tokens(8, 8)), "tokens of a 32x32 picture do not fit the image of 24x32"),
        (dict(tokens=Tokens(tokens().ids, CODES, MASK, 16)), "the tokens are of another model.*16 pixels"),
        (dict(tokens=Tokens(tokens().ids, CODES, MASK + 1, SIDE)), "the tokens are of another model.*mask id 65"),
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(denoise=0.1), "denoise 0.1 of 5 steps is less than one step"),
        (dict(denoise=0.0), "denoise 0 leaves 48 unknown tokens"),
        (dict(temperature=-1.0), "temperature -1"),
        (dict(order="best"), "order 'best'"),
        (dict(cfg_ramp="up"), "ramp 'up'"),
        (dict(image=picture(channels=2)), "1x32x24x2 is not.*1, 3 or 4 channels"),
        (
            dict(positive=[[torch.zeros(1, 7, WIDTH), {"pooled_output": torch.zeros(1, 16)}]]),
            "positive: .*another text",
        ),
        (dict(negative=[[torch.zeros(1, 7, WIDTH), {}]]), "negative: .*another text"),
        (dict(positive=[]), "positive holds no prompt; wire a text encoder"),
    ],
)
def test_errors_name_the_value_and_the_remedy(tiny, sample, inputs, message):
    with counted(tiny.model) as calls, pytest.raises(ValueError, match=message):
        sample(**inputs)
    assert not calls


def test_text_of_another_width(sample):
    text = [[torch.zeros(1, 7, 32), {"pooled_output": torch.zeros(1, 16), "masked_token_text": "clip-l"}]]
    with pytest.raises(ValueError, match=r"positive: text of width 32 \(pooled 16\) does not fit tiny, which reads 24"):
        sample(positive=text)


# progress, previews, interrupts


@pytest.fixture
def preview_method(monkeypatch):
    return lambda method: monkeypatch.setattr(args, "preview_method", method)


def events(sample, **inputs):
    seen = []
    with hooked(lambda *event: seen.append(event)):
        result = sample(**inputs)
    return seen, result


def test_no_preview_where_the_host_wants_none(tiny, sample, preview_method, monkeypatch):
    preview_method(LatentPreviewMethod.NoPreviews)
    decodes = []
    handle = tiny.model.vq.model.decoder.register_forward_hook(lambda *a: decodes.append(0))
    seen, _ = events(sample)
    handle.remove()
    assert len(decodes) == 1
    assert all(preview is None for _, _, preview in seen)
    assert seen[-1][:2] == (5, 5)


@pytest.mark.parametrize("method", [LatentPreviewMethod.Auto, LatentPreviewMethod.Latent2RGB])
def test_quick_previews_show_what_is_known(sample, preview_method, method):
    model = tiny_model(seed=3).model
    decodes = []
    model.vq.model.decoder.register_forward_hook(lambda module, inputs, out: decodes.append(out.shape))
    plain = run(MaskedTokenSampler, model=model, **prompts(), seed=2)
    assert len(decodes) == 1
    preview_method(method)
    seen, shown = events(run, node=MaskedTokenSampler, model=model, **prompts(), seed=2)
    assert all(map(same, shown, plain))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5]
    pictures = [preview[1] for _, _, preview in seen]
    assert {p.size for p in pictures} == {(8 * 6, 8 * 8)}
    assert all(preview[0] == "JPEG" and preview[2] == args.preview_size for _, _, preview in seen)
    greys = [grey_tokens(p) for p in pictures]
    # of 48 tokens, as the cosine has it
    assert greys == [45, 38, 28, 14, 0]
    assert len(decodes) == 3  # the sheets of codes and the result
    events(run, node=MaskedTokenSampler, model=model, **prompts(), seed=3)
    assert len(decodes) == 4  # the sheets were made once


def prompts():
    return {"positive": prompt(1), "negative": prompt(2), "steps": 5, **SIZE}


def grey_tokens(image):
    x = torch.from_numpy(numpy.array(image))
    tokens = x.unfold(0, 8, 8).unfold(1, 8, 8).flatten(3)  # [h, w, 3, 64]
    return sum(set(map(int, token.flatten().unique())) == {115, 140} for row in tokens for token in row)


def test_previews_of_the_vq_show_the_prediction(tiny, sample, preview_method):
    preview_method(LatentPreviewMethod.TAESD)
    seen, (image, _) = events(sample, seed=2)
    assert {preview[1].size for _, _, preview in seen} == {(24, 32)}
    last = torch.from_numpy(numpy.array(seen[-1][2][1])) / 255
    assert torch.allclose(last, image[0], atol=0.51 / 255)


@pytest.mark.parametrize("step", range(1, 6))
def test_an_interrupt_ends_the_run_and_leaves_nothing(tiny, sample, step):
    before = sample(seed=4, image=picture(), mask=box(), batch_size=2)

    def interrupt(module, inputs, output):
        if len(calls) == step:
            comfy.model_management.interrupt_current_processing()

    with counted(tiny.model) as calls:
        handle = tiny.model.transformer.model.register_forward_hook(interrupt)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(seed=4, image=picture(), mask=box(), batch_size=2)
        handle.remove()
    assert len(calls) == step
    assert all(map(same, sample(seed=4, image=picture(), mask=box(), batch_size=2), before))


# memory


def test_the_vq_runs_in_chunks_where_memory_is_short(tiny, sample, monkeypatch):
    rows = []
    handles = [
        part.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
        for part in (tiny.model.vq.model.encoder, tiny.model.vq.model.decoder)
    ]
    whole = sample(image=picture(batch=3), denoise=0.6)
    assert rows == [3, 3]
    monkeypatch.setattr(tiny.model.vq, "get_free_memory", lambda device: 1000)
    chunked = sample(image=picture(batch=3), denoise=0.6)
    [handle.remove() for handle in handles]
    assert rows[2:] == [1] * 6
    assert torch.equal(whole[1].ids, chunked[1].ids)
    close(chunked[0], whole[0])


def test_the_host_is_asked_for_memory_that_grows_with_the_work(tiny, sample, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **kwargs):
        asked.append((models[0], memory_required))
        return load(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)

    def transformer(**inputs):
        asked.clear()
        sample(**inputs)
        [memory] = [memory for model, memory in asked if model is tiny.model.transformer]
        return memory

    one = transformer(cfg=1.0)
    assert one > 48 * CODES * 4 * 2
    assert transformer(cfg=1.0, batch_size=3) == 3 * one
    assert one < transformer(cfg=2.0) < 2 * one


# encode, decode, edit


def test_encode_and_decode_are_the_vqs(tiny):
    source = picture(batch=2)
    [made] = run(MaskedTokenEncode, model=tiny.model, image=source)
    assert torch.equal(made.ids, encoded(tiny.plain, source))
    assert (made.codebook, made.mask_id, made.downscale) == (CODES, MASK, SIDE)
    [image] = run(MaskedTokenDecode, model=tiny.model, tokens=made)
    close(image, pixels(tiny.plain, made.ids))
    assert image.is_contiguous()


def test_encode_refuses_sides_that_are_no_multiple(tiny):
    with pytest.raises(ValueError, match=r"the image of 25x32 pixels.*multiples of 4, here 24x32"):
        run(MaskedTokenEncode, model=tiny.model, image=picture(32, 25))


def test_decode_refuses_unknown_tokens_and_those_of_another_model(tiny):
    unknown = tokens().with_ids(tokens().ids.index_fill(2, torch.tensor([0]), MASK))
    with pytest.raises(ValueError, match=r"8 of 48 tokens are unknown.*Masked Token Sampler"):
        run(MaskedTokenDecode, model=tiny.model, tokens=unknown)
    with pytest.raises(ValueError, match="of another model"):
        run(MaskedTokenDecode, model=tiny.model, tokens=Tokens(tokens().ids, CODES, MASK, 8))


def test_edit_forgets_and_takes_over(tiny):
    touched = cells(box(), SIDE)
    [forgotten] = run(MaskedTokenEdit, tokens=tokens(), mask=box())
    assert torch.equal(forgotten.unknown, touched)
    assert torch.equal(forgotten.ids[~touched], tokens().ids[~touched])
    [taken] = run(MaskedTokenEdit, tokens=tokens(), mask=box()[0], source=tokens(seed=9))
    assert torch.equal(taken.ids, torch.where(touched, tokens(seed=9).ids, tokens().ids))
    [nothing] = run(MaskedTokenEdit, tokens=tokens(), mask=torch.zeros(1, 32, 24))
    assert torch.equal(nothing.ids, tokens().ids)


def test_quick_colors_of_the_demos_codes_are_near_those_of_its_pictures():
    model, _ = modules.load_masked_tokens()
    side = model.downscale
    # plain grounds with a box of another colour
    g = torch.Generator().manual_seed(0)
    grounds, boxes = torch.rand(2, 60, 3, 1, 1, generator=g)
    pictures = grounds.expand(60, 3, 64, 64).clone()
    pictures[:, :, 16:44, 20:52] = boxes
    with torch.inference_mode():
        ids = encode_pictures(model, pictures.movedim(1, -1))
        shown = code_colors(model)[ids]
        seen = decode_tokens(model, ids).unflatten(2, (-1, side)).unflatten(1, (-1, side)).mean((2, 4))
    correlation = torch.corrcoef(torch.stack([shown.flatten(), seen.flatten()]))[0, 1]
    assert correlation > 0.8
    assert (shown - seen).abs().mean() < 0.6 * (seen - seen.mean((0, 1, 2))).abs().mean()
