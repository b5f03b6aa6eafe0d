"""Sampling from a seed: bit equality with KSampler, batching, and counted forward passes."""

import comfy.model_management
import comfy.samplers
import nodes as host_nodes
import pytest
import torch

from chorus.demo import modules
from chorus.host.sampling_progress import SamplingProgress
from chorus.techniques.seed_select.comfy_batching import DETERMINISTIC
from chorus.tests.support.gradients import seed_sampler
from chorus.tests.support.lifecycle import interrupt_at
from chorus.tests.support.seeds import WORDS, content, limit_free_memory, with_control
from chorus.tests.support.tiers import covering, quick
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    flux,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    lora,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@in_inference_mode
def generated(model, seed, samples=None, **settings):
    """Final latent of SeedSelect's sampler for ``seed``."""
    run = seed_sampler(model, samples, **settings)
    return run.generate(run.noise_of(seed), seeds=[seed])


@pytest.fixture(scope="module")
def model():
    return unet(0)


@covering(
    sampler=["euler", "dpmpp_2m", "uni_pc", "ddim", "euler_ancestral", "dpmpp_2m_sde", "lcm"],
    scheduler=["normal", "karras", "beta"],
)
def test_seed_equals_ksampler_bit_for_bit(model, sampler, scheduler):
    expected = ksample(model, *WORDS, latent(), sampler=sampler, scheduler=scheduler, seed=7)
    assert torch.equal(generated(model, 7, sampler_name=sampler, scheduler=scheduler), expected)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m_sde"])
def test_image_to_image_and_inpainting_equal_ksampler(model, sampler, mask):
    expected = ksample(model, *WORDS, content(mask), sampler=sampler, denoise=0.6, seed=7)
    found = generated(model, 7, content(mask), sampler_name=sampler, denoise=0.6)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_fewer_steps_start_at_the_same_sigma_when_denoise_is_below_1(model, steps):
    other, seen = model.clone(), []

    def record_sigma(apply, args):
        seen.append(float(args["timestep"].max()))
        return apply(args["input"], args["timestep"], **args["c"])

    other.set_model_unet_function_wrapper(record_sigma)
    run = seed_sampler(other, content(), steps=8, denoise=0.55)
    full, few = run.sigmas(), run.sigmas(steps)
    run.generate(run.noise_of(1), steps)
    assert seen == few[:-1].tolist()
    assert len(few) == steps + 1 and few[0] == full[0] and few[-1] == 0
    assert set(few.tolist()) <= set(full.tolist())


def test_fewer_steps_use_the_beta_schedule(model):
    run = seed_sampler(model, steps=6, scheduler="karras")
    expected = ksample(model, *WORDS, latent(), scheduler="beta", steps=3, seed=7)
    assert torch.equal(run.generate(run.noise_of(7), 3), expected)
    assert torch.equal(run.sigmas(3), seed_sampler(model, steps=3, scheduler="beta").sigmas())
    assert torch.equal(run.sigmas(6), run.sigmas())


def test_largest_seed_and_batch_index_equal_ksampler(model):
    with_index = {**latent(), "batch_index": [3]}
    for samples in (latent(), with_index):
        expected = ksample(model, *WORDS, samples, seed=2**64 - 1)
        assert torch.equal(generated(model, 2**64 - 1, samples), expected)


@pytest.mark.parametrize(
    "make", [lambda: unet(2, "v"), lambda: unet(3, "flow"), lambda: flux(4)], ids="v flow flux".split()
)
def test_every_parametrisation_equals_ksampler(make):
    other = make()
    channels = other.get_model_object("latent_format").latent_channels
    samples = latent(channels=channels)
    assert torch.equal(generated(other, 3, samples), ksample(other, *WORDS, samples, seed=3))


def test_empty_latent_gets_the_models_channels():
    """EmptyLatentImage makes four channels for any model."""
    other = flux(4)
    empty = host_nodes.EmptyLatentImage().generate(128, 128, 1)[0]
    assert torch.equal(generated(other, 3, empty), ksample(other, *WORDS, empty, seed=3))


def test_patched_and_blended_models_equal_ksampler(model):
    """The counter must not change the batching of the base with an expert that shares its module."""
    words = conditioning(30), conditioning(31)
    for other in (lora(model, 1), blend(model, model, *words)[0], blend(lora(model, 1), unet(1), *words)[0]):
        assert torch.equal(generated(other, 4), ksample(other, *WORDS, latent(), seed=4))


def test_demo_checkpoint_equals_ksampler():
    with torch.inference_mode():
        model, clip, _ = modules.load_checkpoint("general")
        words = [host_nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a cat", "")]
        empty = host_nodes.EmptyLatentImage().generate(64, 64, 1)[0]
    settings = dict(sampler="dpmpp_2m", scheduler="karras", steps=4)
    expected = ksample(model, *words, empty, seed=9, cfg=4.0, **settings)
    run = seed_sampler(model, empty, words, steps=4, cfg=4.0, sampler_name="dpmpp_2m", scheduler="karras")
    assert torch.equal(run.generate(run.noise_of(9)), expected)


@pytest.mark.parametrize("sampler", quick(["euler", "dpmpp_2m", "heun", "uni_pc"], sorted(DETERMINISTIC)))
def test_deterministic_samplers_generate_noises_in_one_batch(model, sampler):
    run = seed_sampler(model, sampler_name=sampler, steps=4)
    noise = torch.cat([run.noise_of(k) for k in range(3)])
    with forwards(model) as batches:
        together = run.generate(noise, seeds=[0, 1, 2])
    assert set(batches) == {2 * 3}
    rows = run.counter.rows
    separate = torch.cat([run.generate(noise[k : k + 1], seeds=[100 + k]) for k in range(3)])
    assert (together - separate).norm() < 2e-5 * separate.norm()
    assert rows == run.counter.rows - rows


def test_batch_size_limited_by_memory(model, monkeypatch):
    free = 1.001 * model.memory_required([2 * 2, 4, 16, 16])
    limit_free_memory(free, monkeypatch)
    run = seed_sampler(model, cfg=1.0)
    with forwards(model) as batches:
        run.generate(torch.cat([run.noise_of(k) for k in range(5)]), steps=1)
    assert batches == [2, 2, 1]


def test_every_comfyui_sampler_is_classified():
    stochastic = {
        s for s in comfy.samplers.SAMPLER_NAMES if any(k in s for k in ("ancestral", "sde", "seeds_", "sa_solver"))
    }
    assert set(comfy.samplers.SAMPLER_NAMES) == DETERMINISTIC | stochastic | {"ddpm", "lcm", "dpm_adaptive"}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpm_adaptive"])
def test_other_samplers_generate_noises_one_by_one(model, sampler):
    run = seed_sampler(model, sampler_name=sampler, steps=2)
    noise = torch.cat([run.noise_of(k) for k in range(2)])
    together = run.generate(noise, seeds=[5, 6])
    for k in range(2):
        assert torch.equal(together[k : k + 1], run.generate(noise[k : k + 1], seeds=[5 + k]))


def test_stochastic_sampler_uses_the_seed_of_the_noise_or_else_of_the_run(model):
    run = seed_sampler(model, sampler_name="euler_ancestral", seed=8)
    noise = torch.cat([run.noise_of(k) for k in (3, 4)])
    found = run.generate(torch.cat([noise, noise[:1] * 0.5]))
    for k in range(2):
        assert torch.equal(found[k : k + 1], ksample(model, *WORDS, latent(), sampler="euler_ancestral", seed=3 + k))
    assert torch.equal(found[2:], run.generate(noise[:1] * 0.5, seeds=[8]))
    assert not torch.equal(found[2:], run.generate(noise[:1] * 0.5, seeds=[9]))


def test_to_model_applies_the_scale_factor_of_the_model(model):
    run, x = seed_sampler(model), content()["samples"]
    assert torch.equal(run.to_model(x), x * model.get_model_object("latent_format").scale_factor)
    assert torch.allclose(model.model.process_latent_out(run.to_model(x)), x)


def test_inputs_that_differ_by_row_prevent_batching(model):
    """In a batch, ComfyUI would assign one of two control hints to each noise."""
    pair = torch.cat([WORDS[0][0][0], WORDS[1][0][0]])
    cropping = blend(model, unet(1), crop_margin=1)[0]
    cases = [(model, with_control(WORDS)), (model, ([[pair, {}]], WORDS[1])), (cropping, WORDS)]
    for other, words in cases:
        run = seed_sampler(other, words=words, steps=2)
        noise = torch.cat([run.noise_of(k) for k in range(2)])
        together = run.generate(noise)
        assert torch.equal(together[1:], ksample(other, *words, latent(), steps=2, seed=1))


def test_several_region_masks_are_rejected_for_one_image(model):
    masks = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(3))
    run = seed_sampler(blend(model, unet(1), region=masks)[0], steps=2)
    with pytest.raises(ValueError, match="expected 1 mask as the region of 'expert 1', got 2 masks"):
        run.generate(torch.cat([run.noise_of(k) for k in range(2)]))


def test_counter_counts_rows_of_forward_passes(model):
    run = seed_sampler(model)
    run.generate(run.noise_of(0))
    assert run.counter.rows == 3 * 2  # with guidance, each step has two rows
    run.generate(torch.cat([run.noise_of(k) for k in range(4)]), steps=2)
    assert run.counter.rows == 6 + 4 * 2 * 2
    plain = seed_sampler(model, cfg=1.0, sampler_name="heun")
    plain.generate(plain.noise_of(0))
    assert plain.counter.rows == 2 + 2 + 1


def test_rows_of_experts_are_counted(model):
    words = conditioning(30), conditioning(31)
    for expert in (unet(1), lora(model, 1), model):
        run = seed_sampler(blend(model, expert, *words)[0])
        run.generate(run.noise_of(0))
        assert run.counter.rows == 2 * 3 * 2


def test_progress_counts_steps_and_interrupted_run_leaves_the_model_unchanged(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "comfy.utils.PROGRESS_BAR_HOOK", lambda done, total, preview, node_id=None: seen.append((done, total))
    )
    run = seed_sampler(model)
    run.generate(run.noise_of(0))
    assert seen[0] == (1, 3)
    assert seen[-1] == (3, 3)
    seen.clear()
    progress = SamplingProgress(model, total=8)
    run.callback = progress.callback
    run.generate(run.noise_of(0))
    progress.show(torch.rand(16, 16, 3), steps=5)
    assert seen[-1] == (8, 8)

    before = run.generate(run.noise_of(0))
    stopped = seed_sampler(interrupt_at(model, 2))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stopped.generate(stopped.noise_of(0))
    assert not model.model.diffusion_model._forward_pre_hooks
    assert torch.equal(run.generate(run.noise_of(0)), before)


def test_noise_and_latent_are_not_inference_tensors(model):
    with torch.inference_mode():
        run = seed_sampler(model)
        noise = run.noise_of(0)
        found = run.generate(noise)
    assert not noise.is_inference()
    assert not found.is_inference()


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ({"samples": torch.zeros(2, 4, 16, 16)}, {}, "2 latents.*batch_size to 1"),
        ({"samples": torch.zeros(1, 4, 3, 16, 16)}, {}, "1x4x3x16x16; connect an empty latent of this"),
        ({**latent(), "noise_mask": torch.ones(2, 16, 16)}, {}, "expected one noise mask in latent_image, got 2"),
        (latent(), {"denoise": 0.0}, "denoise 0 generate nothing"),
        (latent(), {"steps": 0}, "0 steps"),
    ],
    ids="batch video masks denoise steps".split(),
)
def test_invalid_inputs_rejected(model, samples, settings, message):
    with pytest.raises(ValueError, match=message):
        seed_sampler(model, samples, **settings)


def test_nested_latents_and_image_to_image_models_rejected(model):
    nested = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 2, 16, 16), torch.zeros(1, 8, 5)])
    with pytest.raises(ValueError, match="got the size 1x4x2x16x16 of a nested latent"):
        seed_sampler(model, {"samples": nested})
    with pytest.raises(ValueError, match="BaseModel is an image-to-image model"):
        seed_sampler(unet(0, "img_to_img"))


def test_noise_of_another_size_and_missing_seeds_rejected(model):
    run = seed_sampler(model)
    with pytest.raises(ValueError, match="1x4x8x8 does not fit the latent 1x4x16x16"):
        run.generate(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="expected 2 seeds, one for each noise, got 1"):
        run.generate(torch.zeros(2, 4, 16, 16), seeds=[1])
