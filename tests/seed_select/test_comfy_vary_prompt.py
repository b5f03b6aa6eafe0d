"""VaryPrompt and SeedSelect's prompt_variation, through ComfyUI's samplers."""

import json
import math
import re
from collections import namedtuple

import comfy.samplers
import nodes as host_nodes
import pytest
import torch

from chorus.demo import modules
from chorus.demo.comfy_latent import ChorusEmojiLatent
from chorus.nodes.seed_select import SeedSelect
from chorus.nodes.vary_prompt import VaryPrompt
from chorus.techniques.seed_select.prompt_variation import MARGIN, vary_prompt
from chorus.tests.support.gradients import seed_sampler
from chorus.tests.support.seeds import WORDS, with_control
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    defaults,
    flux,
    in_inference_mode,
    ksample,
    latent,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = dict(steps=4, cfg=3.0, candidates=3, first_steps=4, seed=5, prompt_variation=0.8)
Result = namedtuple("Result", "noise seed samples grid preview report")


@in_inference_mode
def vary(words, seed=7, strength=0.8, end_percent=0.3):
    return VaryPrompt.execute(words, seed, strength, end_percent).args[0]


def recorded(model):
    """(a clone of ``model``, the list of its calls). A call is its sigma and the first numbers of its prompts' tokens."""
    other, calls = model.clone(), []

    def record(apply, args):
        context = args["c"].get("c_crossattn")
        calls.append((float(args["timestep"].max()), None if context is None else context[:, 0, 0].tolist()))
        return apply(args["input"], args["timestep"], **args["c"])

    other.set_model_unet_function_wrapper(record)
    return other, calls


@pytest.fixture(scope="module")
def model():
    return unet(0)


@pytest.fixture(scope="module")
def wired():
    with torch.inference_mode():
        vae, vision = modules.make_vae(modules.load_autoencoder()), modules.load_vision()
    references = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(4))
    return dict(vae=vae, clip_vision=vision, references=references)


@pytest.fixture(scope="module")
def demo_sized():
    """A model with the latent space of the demo checkpoints."""
    return unet(0, latent_format=ChorusEmojiLatent)


@pytest.fixture
def select(demo_sized, wired):
    @in_inference_mode
    def select(**inputs):
        given = dict(model=demo_sized, positive=WORDS[0], negative=WORDS[1], latent_image=latent(1, 8, 8))
        return Result(*SeedSelect.execute(**{**defaults(SeedSelect), **given, **wired, **SETTINGS, **inputs}).args)

    return select


# windows, in the sampler


@pytest.mark.parametrize(
    "make, scheduler, steps, at_border",
    [
        (unet, "normal", 11, True),
        (lambda: unet(2, "v"), "normal", 11, True),
        (lambda: unet(3, "flow"), "simple", 10, True),
        (flux, "simple", 10, True),
        (unet, "karras", 10, False),
    ],
    ids="eps v flow flux karras".split(),
)
def test_each_step_uses_one_entry_which_is_varied_before_end_percent(make, scheduler, steps, at_border):
    """``at_border``: a step is exactly at 30 % of the sampling, apart from rounding. It uses the unchanged entry."""
    base = make()
    other, calls = recorded(base)
    channels = base.get_model_object("latent_format").latent_channels
    varied = vary(WORDS[0])
    ksample(other, varied, WORDS[1], latent(1, 8, 8, channels), steps=steps, scheduler=scheduler)
    border = float(base.get_model_object("model_sampling").percent_to_sigma(0.3))
    values = [float(entry[0][0, 0, 0]) for entry in varied]
    negative = float(WORDS[1][0][0][0, 0, 0])
    assert len(calls) == steps
    assert any(sigma == pytest.approx(border, rel=1e-5) for sigma, _ in calls) == at_border
    for sigma, prompts in calls:
        assert len(prompts) == 2
        (used,) = (v for v in prompts if v != negative)
        assert used == values[0 if sigma > border * (1 + 1e-5) else 1]


def test_every_sigma_has_one_entry(model):
    """Also beside the border, in steps of single float32 numbers, where rounding could leave a gap."""
    sampling = model.get_model_object("model_sampling")
    conds = [{**entry[1], "model_conds": {}, "uuid": None} for entry in vary(WORDS[0])]
    holder = type("Model", (), {"model_sampling": sampling})
    comfy.samplers.calculate_start_end_timesteps(holder, conds)
    x = torch.zeros(1, 4, 8, 8)

    def used(sigma):
        return [comfy.samplers.get_area_and_mult(c, x, sigma[None]) is not None for c in conds]

    border = torch.tensor(sampling.percent_to_sigma(0.3 - MARGIN))
    exact = torch.tensor(sampling.percent_to_sigma(0.3))
    assert exact < border and used(exact) == used(torch.nextafter(exact, border)) == [False, True]
    assert used(torch.nextafter(border, torch.tensor(math.inf))) == [True, False]
    assert used(torch.nextafter(border, torch.tensor(0.0))) == [False, True]
    assert used(border) == [True, True]  # a single number, without a step of a usual schedule; ComfyUI takes the mean
    assert used(sampling.sigmas[-1]) == [True, False] and used(sampling.sigmas[0]) == [False, True]


def test_neutral_values_return_the_same_conditioning(model):
    for neutral in (dict(strength=0.0), dict(end_percent=0.0)):
        assert vary(WORDS[0], **neutral) is WORDS[0]


def test_end_percent_1_equals_a_prompt_with_noise_in_every_step(model):
    noisy = [[vary_prompt(WORDS[0], 7, 0.8, 1.0)[0][0], WORDS[0][0][1]]]
    assert len(vary(WORDS[0], end_percent=1.0)) == 1
    expected = ksample(model, noisy, WORDS[1])
    assert torch.equal(ksample(model, vary(WORDS[0], end_percent=1.0), WORDS[1]), expected)


def test_variation_equals_a_run_whose_prompt_is_switched(model):
    """Two runs of KSamplerAdvanced: with the noisy prompt until the first step at or after 30 %, then with the plain one."""
    noisy, run = vary(WORDS[0], end_percent=1.0), host_nodes.KSamplerAdvanced()
    with torch.inference_mode():
        common = (model,), (7, 10, 5.0, "euler", "normal")
        first = run.sample(*common[0], "enable", *common[1], noisy, WORDS[1], latent(), 0, 3, "enable")[0]
        second = run.sample(*common[0], "disable", *common[1], WORDS[0], WORDS[1], first, 3, 10, "disable")[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 10)
    border = model.get_model_object("model_sampling").percent_to_sigma(0.3)
    assert sigmas[2] > border > sigmas[3] or sigmas[3] == pytest.approx(border, rel=1e-3)
    found = ksample(model, vary(WORDS[0]), WORDS[1], steps=10, seed=7)
    assert (found - second["samples"]).norm() < 1e-3 * found.norm()
    assert (found - ksample(model, *WORDS, steps=10, seed=7)).norm() > 0.02 * found.norm()


def test_pooled_embedding_is_varied_for_models_that_use_it():
    """Flux reads the pooled embedding: with the tokens unchanged, the result still differs."""
    base = flux(4)
    varied = vary(WORDS[0], end_percent=1.0)
    only_pooled = [[WORDS[0][0][0], varied[0][1]]]
    plain, pooled = (ksample(base, w, WORDS[1], latent(channels=16)) for w in (WORDS[0], only_pooled))
    assert (pooled - plain).norm() > 1e-3 * plain.norm()


def test_areas_masks_windows_and_controls_are_kept(model):
    masked = host_nodes.ConditioningSetMask().append(WORDS[0], torch.ones(1, 16, 16), "default", 1.0)[0]
    with_area = host_nodes.ConditioningSetArea().append(conditioning(12), 64, 128, 0, 0, 1.0)[0]
    timed = host_nodes.ConditioningSetTimestepRange().set_range(conditioning(13), 0.1, 0.9)[0]
    controlled, negative = with_control(WORDS)
    for words, other in ((masked, WORDS[1]), (masked + with_area + timed, WORDS[1]), (controlled, negative)):
        varied = vary(words)
        assert len(varied) == 2 * len(words)
        for position, (_, options) in enumerate(words):
            for entry in varied[2 * position : 2 * position + 2]:
                kept = {k: v for k, v in entry[1].items() if k not in ("pooled_output", "start_percent", "end_percent")}
                assert set(kept) == set(options) - {"pooled_output", "start_percent", "end_percent"}
                assert all(kept[k] is options[k] for k in kept)
        assert torch.isfinite(ksample(model, varied, other)).all()


def test_bad_inputs_rejected():
    for inputs, message in (
        (dict(strength=math.nan), "expected a number for strength, got NaN"),
        (dict(strength=-1.0), "expected a strength of at least 0, got -1.0"),
        (dict(end_percent=2.0), "expected an end_percent from 0 to 1, got 2.0"),
        (dict(seed=-1), "expected a seed from 0 to"),
        (dict(words=[]), "expected a prompt for conditioning, got an empty list"),
        (dict(words=5), "expected CONDITIONING for conditioning, got 5"),
        (dict(words=[[None, {}]]), "got none, to which no noise can be added"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            vary(**{"words": WORDS[0], **inputs})


# SeedSelect


def vary_prompt_in(report):
    """(seed, strength, end_percent) of Vary Prompt, read from the report."""
    found = re.search(r"Vary Prompt with seed (\d+), strength (\S+), end_percent (\S+), then", report)
    return int(found[1]), float(found[2]), float(found[3])


@pytest.mark.parametrize("sampler", ["euler", pytest.param("dpmpp_2m_sde", marks=pytest.mark.slow)])
def test_vary_prompt_and_ksampler_repeat_the_winner_bit_for_bit(demo_sized, select, sampler):
    found = select(sampler_name=sampler)
    seed, strength, end = vary_prompt_in(found.report)
    assert (seed, strength, end) == (found.seed, 0.8, 0.3)
    repeated = [
        ksample(
            demo_sized,
            vary(WORDS[0], s, strength, end),
            WORDS[1],
            latent(1, 8, 8),
            steps=4,
            cfg=3.0,
            seed=s,
            sampler=sampler,
        )
        for s in (5, 6, 7)
    ]
    assert torch.equal(found.samples["samples"], repeated[seed - 5])
    assert not torch.equal(
        found.samples["samples"],
        ksample(demo_sized, *WORDS, latent(1, 8, 8), steps=4, cfg=3.0, seed=seed, sampler=sampler),
    )
    details = json.loads(found.noise.details["vary_prompt"])
    assert details == {"seed": seed, "strength": 0.8, "end_percent": 0.3}
    assert json.loads(found.noise.details["settings"])["prompt_variation"] == 0.8
    assert f"KSampler with seed {seed}" in found.report


@pytest.mark.slow
def test_search_scores_the_varied_candidates(demo_sized, select):
    """The ranking equals that of plain searches of one candidate each."""
    found = select(candidates=3)
    scores = {seed: float(re.search(rf"seed {seed}: (\S+) with", found.report)[1]) for seed in (5, 6, 7)}
    for seed, score in scores.items():
        alone = select(candidates=1, seed=seed)
        assert float(alone.noise.details["score"]) == pytest.approx(score, abs=1e-3)
    assert found.seed == min(scores, key=scores.get)


def test_prompt_variation_0_equals_a_run_without_it(select, demo_sized):
    off = select(prompt_variation=0.0)
    assert torch.equal(
        off.samples["samples"], ksample(demo_sized, *WORDS, latent(1, 8, 8), steps=4, cfg=3.0, seed=off.seed)
    )
    assert "Vary Prompt" not in off.report and "vary_prompt" not in off.noise.details
    run = seed_sampler(demo_sized)
    assert run.varied(3) is run.inputs


def test_candidates_with_different_prompts_run_one_by_one(model):
    run = seed_sampler(model)
    assert run.batch_size(4) == 4
    run.prompt_variation = 0.5
    assert run.batch_size(4) == 1
    with torch.inference_mode():
        noises = torch.cat([run.noise_of(s) for s in (1, 2)])
        both = run.generate(noises, seeds=[1, 2])
    for row, seed in zip(both.split(1), (1, 2)):
        assert torch.equal(row, ksample(model, vary(WORDS[0], seed, 0.5), WORDS[1], seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["inversion", "centroid"])
def test_inverted_candidates_have_different_variations(demo_sized, select, start):
    found = select(start=start, candidates=2)
    seed, *rest = vary_prompt_in(found.report)
    assert seed in (5, 6) and seed == found.seed == found.noise.seed
    other = select(start=start, candidates=2, pick=2)
    assert {seed, other.seed} == {5, 6}
    run = seed_sampler(
        demo_sized, words=(vary(WORDS[0], seed, *rest), WORDS[1]), steps=4, cfg=3.0, samples=latent(1, 8, 8)
    )
    with torch.inference_mode():
        assert torch.equal(run.generate(found.noise.noise, seeds=[0]), found.samples["samples"])


@pytest.mark.slow
def test_optimisation_uses_the_variation_of_each_candidate(demo_sized, select):
    """The best of two optimised noises, generated with its own varied prompt, equals the samples."""
    found = select(mode="search+optimize", optimized=2, iterations=1)
    seed, strength, end = vary_prompt_in(found.report)
    assert seed == found.seed
    words = vary(WORDS[0], seed, strength, end), WORDS[1]
    run = seed_sampler(demo_sized, words=words, steps=4, cfg=3.0, samples=latent(1, 8, 8))
    with torch.inference_mode():
        assert torch.equal(run.generate(found.noise.noise, seeds=[seed]), found.samples["samples"])
    starts = re.findall(r"optimised seed (\d+): score (\S+) to (\S+) in", found.report)
    ranks = dict(re.findall(r"^\d+\. seed (\d+): (\S+) with", found.report, re.MULTILINE))
    assert len(starts) == 2
    for label, before, after in starts:
        alone = select(mode="optimize", iterations=1, seed=int(label))
        ((_, same, result),) = re.findall(r"optimised seed (\d+): score (\S+) to (\S+) in", alone.report)
        assert (before, after) == (same, result)
        assert label in ranks


@pytest.mark.slow
def test_images_on_a_path_share_the_variation_of_the_best(demo_sized, select):
    found = select(count=3)
    seed, strength, end = vary_prompt_in(found.report)
    assert "all images have this variation of the prompt" in found.report
    words = vary(WORDS[0], seed, strength, end), WORDS[1]
    run = seed_sampler(demo_sized, words=words, steps=4, cfg=3.0, samples=latent(1, 8, 8))
    with torch.inference_mode():
        for noise, samples in zip(found.noise.noise.split(1), found.samples["samples"].split(1)):
            assert torch.equal(run.generate(noise, seeds=[seed]), samples)


def test_negative_prompt_and_prompts_of_experts_are_not_varied(demo_sized, select):
    expert_words = conditioning(30), conditioning(31)
    mixed = blend(demo_sized, unet(1, latent_format=ChorusEmojiLatent), *expert_words)[0]
    found = select(model=mixed, candidates=1)
    expected = ksample(mixed, vary(WORDS[0], 5), WORDS[1], latent(1, 8, 8), steps=4, cfg=3.0, seed=5)
    assert torch.equal(found.samples["samples"], expected)


def test_prompt_that_cannot_be_varied_is_refused_before_the_run(select):
    with pytest.raises(ValueError, match=r"got none, .*prompt_variation 0"):
        select(positive=[[None, {}]])
    for value, message in ((math.nan, "expected a number for prompt_variation, got NaN"), (-1.0, "got -1.0")):
        with pytest.raises(ValueError, match=message):
            select(prompt_variation=value)
