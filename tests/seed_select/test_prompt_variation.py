"""Variation of a prompt: the noise on its embeddings, and the windows of its entries."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.techniques.seed_select.prompt_variation import MARGIN, vary_embeddings, vary_prompt, window

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(seed=0, shape=(1, 6, 64), scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(**options):
    return [[tokens(), options]]


def active(conditioning, percent):
    """The tensors of the entries in use at ``percent`` of the sampling. Both bounds belong to a window, as in ComfyUI."""
    return [tensor for tensor, options in conditioning if window(options)[0] <= percent <= window(options)[1]]


def test_noise_has_the_strength_of_each_tokens_own_spread():
    x = tokens(shape=(1, 3, 20_000)) * torch.tensor([0.1, 1.0, 1000.0])[:, None] + 5.0
    added = vary_embeddings(x, 0.5, torch.Generator().manual_seed(1)) - x
    expected = 0.5 * x.numpy().astype(np.float64).std(axis=-1)
    assert np.allclose(added.double().std(-1).numpy(), expected, rtol=0.02)
    assert (added.double().mean(-1).abs().numpy() < 4 * expected / math.sqrt(20_000)).all()
    assert np.corrcoef(added[0].numpy())[0, 1] == pytest.approx(0.0, abs=0.03)


def test_tokens_of_zeros_stay_zero():
    x = tokens()
    x[:, 4:] = 0.0
    varied = vary_prompt([[x, {"pooled_output": torch.zeros(1, 8)}]], 1, 2.0, 1.0)
    assert not varied[0][0][:, 4:].any()
    assert not varied[0][1]["pooled_output"].any()
    assert (varied[0][0][:, :4] != x[:, :4]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_result_is_the_float64_result_rounded_to_the_dtype(dtype):
    x = tokens().to(dtype)
    found = vary_embeddings(x, 0.7, torch.Generator().manual_seed(1))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = x.double() + 0.7 * x.double().std(-1, correction=0, keepdim=True) * noise
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)


@pytest.mark.parametrize("strength, end_percent", [(0.0, 0.3), (1.0, 0.0), (0.0, 0.0)])
def test_strength_0_and_end_percent_0_return_the_same_object(strength, end_percent):
    words = prompt()
    assert vary_prompt(words, 1, strength, end_percent) is words


def test_seed_repeats_the_noise_and_another_seed_changes_it():
    first, again, other = (vary_prompt(prompt(), seed, 1.0, 0.3)[0][0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    vary_prompt(prompt(), 2**64 - 1, 1.0, 0.3)


def test_noise_differs_from_the_initial_noise_of_the_same_seed():
    varied = vary_embeddings(tokens(), 1.0, torch.Generator().manual_seed(3))
    used = vary_prompt(prompt(), 3, 1.0, 0.3)[0][0]
    assert not torch.equal(varied, used)


def test_entries_and_embeddings_get_different_noise():
    x = tokens(shape=(1, 6, 64))
    varied = vary_prompt([[x, {"pooled_output": x[0]}], [x, {}]], 1, 1.0, 1.0)
    added = [t - x for t in (varied[0][0], varied[0][1]["pooled_output"][None], varied[1][0])]
    for k in range(3):
        assert not torch.equal(added[k], added[k - 1])


def test_every_embedding_of_the_prompt_is_varied_and_nothing_else():
    names = "pooled_output conditioning_llama3 conditioning_byt5small conditioning_mt5xl".split()
    embeddings = {name: tokens(k, (1, 3, 16)) for k, name in enumerate(names)}
    others = {
        "guidance": 3.5,
        "reference_latents": [tokens(9)],
        "attention_mask": torch.ones(1, 6),
        "conditioning_lyrics": tokens(8),
        "mask": torch.ones(1, 4, 4),
        "unclip_conditioning": [{"noise_augmentation": 0.0}],
        "control": object(),
        "hooks": object(),
    }
    words = prompt(**embeddings, **others)
    varied, unchanged = vary_prompt(words, 1, 1.0, 0.3)
    for name in names:
        assert not torch.equal(varied[1][name], embeddings[name])
        assert unchanged[1][name] is embeddings[name]
    for name, value in others.items():
        assert varied[1][name] is value and unchanged[1][name] is value
    assert unchanged[0] is words[0][0]
    assert words[0][1] == {**embeddings, **others}, "the input must not change"


@settings(max_examples=100, deadline=None)
@given(
    windows=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=3),
    clip=st.booleans(),
    end=st.integers(0, 20),
    percent=st.integers(0, 200),
)
def test_entries_are_varied_until_end_percent_and_unchanged_afterwards(windows, clip, end, percent):
    keys = ("clip_start_percent", "clip_end_percent") if clip else ("start_percent", "end_percent")
    words = [[tokens(k), dict(zip(keys, (a / 20, b / 20)))] for k, (a, b) in enumerate(windows)]
    varied = vary_prompt(words, 1, 1.0, end / 20)
    at = percent / 200
    before, after = active(words, at), active(varied, at)
    assert len(after) == len(before)
    for old, new in zip(before, after):
        assert torch.equal(old, new) == (at >= end / 20 and end < 20)


def test_windows_leave_no_gap():
    first, second = vary_prompt(prompt(), 1, 1.0, 0.3)
    assert first[1] == {"end_percent": 0.3 - MARGIN} and second[1] == {"start_percent": 0.3 - MARGIN}
    (whole,) = vary_prompt(prompt(start_percent=0.2), 1, 1.0, 1.0)
    assert whole[1] == {"start_percent": 0.2}
    (late,) = vary_prompt(words := prompt(start_percent=0.5), 1, 1.0, 0.3)
    assert late is words[0]


@pytest.mark.parametrize(
    "entry, got",
    [
        ([None, {}], "none"),
        ([torch.ones(1, 4, dtype=torch.long), {}], "torch.int64 1x4"),
        ([tokens(), {"text_input_ids": torch.ones(1, 6)}], "numbers of tokens"),
    ],
)
def test_prompt_without_embeddings_rejected(entry, got):
    message = f"embeddings of floating-point numbers in prompt 2 of the conditioning, got {got}, .*prompt_variation 0"
    with pytest.raises(ValueError, match=message):
        vary_prompt([*prompt(), entry], 1, 1.0, 0.3)
    words = [entry]
    assert vary_prompt(words, 1, 0.0, 0.3) is words


@pytest.mark.parametrize(
    "values, message",
    [
        ((1, -0.5, 0.3), "strength of at least 0, got -0.5"),
        ((1, math.nan, 0.3), "strength of at least 0, got nan"),
        ((1, math.inf, 0.3), "strength of at least 0, got inf"),
        ((1, 1.0, 1.5), "end_percent from 0 to 1, got 1.5"),
        ((1, 1.0, math.nan), "end_percent from 0 to 1, got nan"),
        ((-1, 1.0, 0.3), "seed from 0 to 18446744073709551615, got -1"),
        ((2**64, 1.0, 0.3), "seed from 0 to 18446744073709551615, got 18446744073709551616"),
    ],
)
def test_values_outside_the_limits_rejected(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vary_prompt(prompt(), *values)
