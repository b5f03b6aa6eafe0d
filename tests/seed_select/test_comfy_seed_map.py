"""SeedMap and CombineNoise with a tiny random model and the demo's VAE and image encoder, against plain runs."""

import re
from collections import namedtuple

import comfy.model_management
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
import torch.nn.functional as F
from comfy.nested_tensor import NestedTensor

from chorus.demo import modules
from chorus.host.sampled_latents import LatentLayout
from chorus.nodes.seed_files import SaveSeed
from chorus.nodes.seed_map import CombineNoise, SeedMap
from chorus.nodes.seed_select import SeedSelect
from chorus.techniques.seed_select.comfy_files import SeedNoise
from chorus.techniques.seed_select.comfy_seed_map import patch_numbers
from chorus.techniques.seed_select.noise_patches import Patches, random_halves
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.head_training import Scaled
from chorus.tests.support.lifecycle import interrupt_at
from chorus.tests.support.seeds import SIDE, references, score_of
from chorus.tests.support.tiny_models import conditioning, defaults, in_inference_mode, latent, unet

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = conditioning(10), conditioning(11)
STEPS, CFG = 3, 3.0
FEW = dict(steps=STEPS, cfg=CFG, patches=2, pairs=3, checks=1, seed=30)
Result = namedtuple("Result", "image mask sheet report")


@pytest.fixture(scope="module")
def model():
    return unet(0, latent_format=Scaled)


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.make_vae(modules.load_autoencoder())


@pytest.fixture(scope="module")
def vision():
    with torch.inference_mode():
        return modules.load_vision()


@in_inference_mode
def noise_of(seed):
    """The NOISE of ComfyUI's RandomNoise."""
    return custom.RandomNoise.execute(seed).args[0]


def values_of(noise, batch=1):
    return noise.generate_noise(latent(batch, 8, 8))


@pytest.fixture(scope="module")
def run(model, vae, vision):
    """Function that executes SeedMap with small defaults."""

    @in_inference_mode
    def execute(**inputs):
        wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=latent(height=8, width=8), vae=vae)
        wired |= dict(references=references(), clip_vision=vision, noise=noise_of(5))
        return Result(*SeedMap.execute(**{**defaults(SeedMap), **wired, **FEW, **inputs}).args)

    return execute


@in_inference_mode
def sampled(model, noise, samples=None, sampler="euler"):
    """Samples of SamplerCustomAdvanced."""
    guider = custom.CFGGuider.execute(model, *WORDS, CFG).args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0).args[0]
    chosen = custom.KSamplerSelect.execute(sampler).args[0]
    samples = samples or latent(height=8, width=8)
    return custom.SamplerCustomAdvanced.execute(noise, guider, chosen, sigmas, samples).args[0]["samples"]


def quarter(kept):
    """Mask [1, 8, 8] of which quarters of the latent ``kept`` [4] names."""
    return kept.float().reshape(1, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_map_and_check_equal_those_recomputed_with_plain_runs(model, vae, vision, run):
    found = run()
    halves = random_halves(4, 3, 30)

    def score(kept, seed):
        noise = CombineNoise.execute(noise_of(5), noise_of(seed), quarter(kept), 0.5).args[0]
        return score_of(model, vae, vision, sampled(model, noise))[0]

    rises = torch.zeros(4, dtype=torch.float64)
    for k, half in enumerate(halves):
        difference = score(~half, 30 + k) - score(half, 30 + k)
        rises += torch.where(half, difference, -difference) / 3
    rows = [[float(v) for v in line.split()] for line in found.report.splitlines()[3:5]]
    assert torch.tensor(rows).flatten().tolist() == pytest.approx(rises.tolist(), abs=0.006 * float(rises.abs().max()))

    own = score_of(model, vae, vision, sampled(model, noise_of(5)))[0]
    assert float(re.search(r"found noise: (\S+)", found.report)[1]) == pytest.approx(own, rel=1e-3)
    marked = torch.zeros(4, dtype=torch.bool)
    marked[rises.argsort(descending=True)[:2]] = True
    none = torch.zeros(4, dtype=torch.bool)
    expected = [score(none, 33), score(marked, 33), score(~marked, 33)]
    shown = re.search(
        r"score (\S+), with the marked half of the found noise (\S+), with the other half (\S+)", found.report
    )
    assert [float(v) for v in shown.groups()] == pytest.approx(expected, rel=1e-3)
    assert torch.equal(found.mask >= 0.5, F.interpolate(quarter(marked)[None], (SIDE, SIDE))[0] > 0.5)


def test_outputs_show_the_image_and_the_marked_half(model, vae, run):
    found = run(checks=2)
    with torch.inference_mode():
        picture = vae.decode(sampled(model, noise_of(5)))[0]
    assert found.image.shape == (1, SIDE, SIDE, 3) and found.mask.shape == (1, SIDE, SIDE)
    # the map lies over the image with the same opacity everywhere
    colours = (found.image[0] - 0.45 * picture) / 0.55
    for y in (0, 32):
        for x in (0, 32):
            patch = colours[y : y + 32, x : x + 32].flatten(0, 1)
            assert float((patch - patch[0]).abs().max()) < 1e-4
    assert found.mask.unique().tolist() == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert found.sheet.shape[0] == 1


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_stochastic_samplers_add_the_same_noise_in_all_images(model, vae, vision, run, sampler):
    found = run(sampler_name=sampler, checks=0)
    own = score_of(model, vae, vision, sampled(model, noise_of(5), sampler=sampler))[0]
    assert float(re.search(r"found noise: (\S+)", found.report)[1]) == pytest.approx(own, rel=1e-3)


def test_settings_that_differ_from_those_of_the_search_are_reported(model, vae, vision, run):
    wired = dict(model=model, positive=WORDS[0], negative=WORDS[1], latent_image=latent(height=8, width=8), vae=vae)
    few = dict(steps=STEPS, cfg=CFG, candidates=2, first_steps=1, seed=5)
    with torch.inference_mode():
        noise = SeedSelect.execute(
            **{**defaults(SeedSelect), **wired, **few, "references": references(), "clip_vision": vision}
        ).args[0]
    assert "was found with" not in run(noise=noise).report
    report = run(noise=noise, steps=2, scheduler="simple").report
    assert f"the noise was found with steps {STEPS}, here it is 2" in report
    assert "the noise was found with scheduler normal, here it is simple" in report and "cfg" not in report
    odd = SeedNoise(noise.noise, 5, {"settings": "[1]", "sampling": "{"})
    assert "was found with" not in run(noise=odd).report


def test_connected_sampler_is_named(run, model):
    sampler = custom.KSamplerSelect.execute("heun").args[0]
    assert "sampler connected: sampler_name not used" in run(sampler=sampler, checks=0).report


def test_interrupt_keeps_the_map_so_far(model, run):
    # the found noise, then batches of 4 pairs; interrupted in the second batch
    found = run(pairs=20, checks=2, model=interrupt_at(model, 2 * STEPS + 2))
    assert found.report.startswith("interrupted: this is what was measured so far")
    assert "map of 2 x 2 patches from 4 pairs of images" in found.report and "check in" not in found.report
    assert torch.equal(found.mask, run(pairs=4, checks=0).mask)
    assert not comfy.model_management.processing_interrupted()


def test_interrupt_before_the_first_pairs_stops_the_node(model, run):
    for call in (1, STEPS + 1):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model=interrupt_at(model, call))
        assert not comfy.model_management.processing_interrupted()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(patches=9), "patches 9 is not between 2 and 8, the positions of the latent along its longer side; use 4"),
        (dict(latent_image=latent(2, 8, 8)), "expected one latent in latent_image, got 2"),
        (
            dict(noise=SeedNoise(torch.zeros(1, 8, 4, 8), 1)),
            "expected a latent with batch size 1, 8 channels, height 4",
        ),
        (dict(clip_vision=None), "needs an image encoder; connect clip_vision, or set semantic_weight to 0"),
        (dict(semantic_weight=0.0, appearance_weight=0.0), "both 0, so nothing is scored"),
        (dict(vae=tiny_vae(4)), "decodes latents of 4 channels, the model samples 1x8x8x8 with 8 channels"),
        (dict(references=references() * float("nan")), "reference 1 of 2 is not finite"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_invalid_inputs_are_refused_with_the_remedy(run, inputs, message):
    with pytest.raises(ValueError, match=message):
        run(**inputs)


class Odd:
    """A NOISE of another pack, with the wrong shape."""

    seed = 3

    def generate_noise(self, latent):
        return torch.zeros(1, 5, 8, 8)


def test_noise_of_another_shape_is_refused(run):
    with pytest.raises(ValueError, match="expected a noise of 1x8x8x8 as the latent, got 1x5x8x8"):
        run(noise=Odd())


def test_sound_is_not_part_of_the_patches():
    layout = LatentLayout(((2, 3, 4, 4), (5, 6)))
    numbers = patch_numbers(layout, Patches.of(4, 4, 2))
    picture, sound = layout.unpack(numbers).unbind()
    assert torch.equal(picture, Patches.of(4, 4, 2).numbers().expand(1, 2, 3, 4, 4)) and (sound == -1).all()


# CombineNoise


def combined(mask, threshold=0.5, noise=None, other=None):
    return CombineNoise.execute(noise or noise_of(5), other or noise_of(6), mask, threshold).args[0]


def test_neutral_masks_give_one_of_the_noises_bit_for_bit(model):
    for mask, seed in ((torch.ones(1, 64, 64), 5), (torch.zeros(1, 64, 64), 6)):
        assert torch.equal(values_of(combined(mask)), values_of(noise_of(seed)))
    assert torch.equal(values_of(combined(torch.zeros(1, 3, 3), 0.0)), values_of(noise_of(5)))
    assert torch.equal(sampled(model, combined(torch.ones(1, 8, 8))), sampled(model, noise_of(5)))


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (50, 90)])
def test_noise_is_kept_where_the_mask_reaches_the_threshold(size):
    mask = torch.zeros(1, *size)
    mask[:, :, : size[1] // 2] = 0.7
    found, ours, theirs = values_of(combined(mask, 0.7)), values_of(noise_of(5)), values_of(noise_of(6))
    assert torch.equal(found[..., :4], ours[..., :4]) and torch.equal(found[..., 4:], theirs[..., 4:])
    assert torch.equal(values_of(combined(mask, 0.71)), theirs)


def test_seed_of_the_sampler_is_that_of_the_kept_noise():
    assert combined(torch.ones(1, 8, 8)).seed == 5


def test_saved_noise_of_one_image_serves_a_batch():
    saved = SeedNoise(values_of(noise_of(5)), 5)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    found = values_of(combined(mask, noise=saved), 3)
    others = values_of(noise_of(6), 3)
    assert torch.equal(found[:, :, :4], saved.noise[:, :, :4].expand(3, -1, -1, -1))
    assert torch.equal(found[:, :, 4:], others[:, :, 4:]) and not torch.equal(others[0], others[1])
    both = SeedNoise(values_of(noise_of(5), 2), 5)
    assert torch.equal(values_of(combined(mask, noise=both), 2)[:, :, :4], both.noise[:, :, :4])


def test_video_and_sound():
    samples = {"samples": NestedTensor([torch.zeros(2, 3, 4, 8, 8), torch.zeros(2, 5, 6)])}
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :2] = 1
    ours, theirs = (noise_of(seed).generate_noise(samples).unbind() for seed in (5, 6))
    video, sound = combined(mask).generate_noise(samples).unbind()
    assert torch.equal(video[..., :2], ours[0][..., :2]) and torch.equal(video[..., 2:], theirs[0][..., 2:])
    assert torch.equal(sound, ours[1])
    saved = SeedNoise(NestedTensor([part[:1] for part in ours]), 5)
    video, sound = combined(mask, noise=saved).generate_noise(samples).unbind()
    assert torch.equal(video[1, ..., :2], ours[0][0, ..., :2]) and torch.equal(sound[1], ours[1][0])


def test_invalid_masks_are_refused():
    with pytest.raises(ValueError, match="expected 1 mask for all 3 images, or 3 masks"):
        values_of(combined(torch.ones(2, 8, 8)), 3)
    with pytest.raises(ValueError, match=r"the mask is not finite \(NaN"):
        combined(torch.full((1, 8, 8), float("nan")))


def test_each_image_of_a_batch_may_have_its_mask():
    mask = torch.zeros(2, 8, 8)
    mask[1, :, :4] = 1
    found, ours, theirs = (values_of(n, 2) for n in (combined(mask), noise_of(5), noise_of(6)))
    assert torch.equal(found[0], theirs[0])
    assert torch.equal(found[1, ..., :4], ours[1, ..., :4]) and torch.equal(found[1, ..., 4:], theirs[1, ..., 4:])


def test_noises_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="noise has the size 1x5x8x8, other 1x4x8x8; use noises for the same latent"):
        values_of(combined(torch.ones(1, 8, 8), noise=Odd()))
    with pytest.raises(
        ValueError, match="expected a noise with height and width, got 1x5x6; use an image or video model"
    ):
        combined(torch.ones(1, 8, 8)).generate_noise({"samples": torch.zeros(1, 5, 6)})


def test_combined_noise_cannot_be_saved_as_a_seed():
    with pytest.raises(ValueError, match="expected a noise of Seed Select or Load Seed, got CombinedNoise"):
        SaveSeed.execute(combined(torch.ones(1, 8, 8)), "x")
