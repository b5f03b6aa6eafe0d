"""SeedSelect with latents of 5 axes (videos, and image models of video families) and with nested latents."""

import comfy.nested_tensor
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import folder_paths
import pytest
import torch
import torch.nn.functional as F

from chorus.demo import modules
from chorus.host.images import encode, evenly_taken_frames
from chorus.host.sampled_latents import LatentLayout
from chorus.nodes.seed_files import LoadSeed, SaveSeed
from chorus.nodes.seed_select import SeedSelect
from chorus.techniques.seed_select.comfy_files import SeedNoise
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.families.tiny_vae import tiny_vae
from chorus.tests.support.gradients import direction_of, finite_difference, gradient, seed_sampler
from chorus.tests.support.tiny_models import defaults, in_inference_mode, ksample

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLING = dict(steps=2, cfg=3.0, scheduler="simple")
NESTED = "LTXAV"
IMAGE_OF_VIDEO_FAMILY, VIDEO = "QwenImage", "WAN21_T2V"


def references(count=2):
    """Smooth random images [count, 40, 50, 3]."""
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(4))
    return F.interpolate(coarse, (40, 50), mode="bilinear").movedim(1, -1).contiguous()


@pytest.fixture(scope="module")
def vision():
    with torch.inference_mode():
        return modules.load_vision()


class Small:
    """The small model of a family with its prompts, an empty latent and a small VAE."""

    def __init__(self, name):
        family = FAMILIES[name]
        self.model, self.words, self.latent = family.model(0), family.prompts(10), family.latent
        first = family.latent()["samples"]
        self.vae = tiny_vae((first.unbind()[0] if first.is_nested else first).shape[1], video=True)

    @in_inference_mode
    def select(self, **inputs):
        wired = dict(model=self.model, positive=self.words[0], negative=self.words[1], latent_image=self.latent())
        wired |= dict(vae=self.vae, references=references())
        few = dict(candidates=3, first_steps=1, survivors=0.5, semantic_weight=0.0, sampler_name="euler", iterations=1)
        return SeedSelect.execute(**{**defaults(SeedSelect), **wired, **few, **SAMPLING, **inputs}).args

    def plain(self, seed):
        return ksample(self.model, *self.words, self.latent(), seed=seed, **SAMPLING)

    @in_inference_mode
    def custom(self, noise):
        """Samples of SamplerCustomAdvanced."""
        guider = custom.CFGGuider.execute(self.model, *self.words, SAMPLING["cfg"]).args[0]
        sigmas = custom.BasicScheduler.execute(self.model, SAMPLING["scheduler"], SAMPLING["steps"], 1.0).args[0]
        sampler = custom.KSamplerSelect.execute("euler").args[0]
        return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, self.latent()).args[0]["samples"]


@pytest.fixture(scope="module", params=[IMAGE_OF_VIDEO_FAMILY, VIDEO, NESTED])
def small(request):
    return Small(request.param)


def equal(a, b):
    parts = [x.unbind() if x.is_nested else [x] for x in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def test_seed_and_noise_repeat_the_samples_bit_for_bit(small):
    noise, seed, samples, grid, preview, report = small.select()
    assert equal(samples["samples"], small.plain(seed))
    assert equal(samples["samples"], small.custom(noise))
    assert f"seed {seed} reproduces the result" in report
    assert torch.isfinite(grid).all() and torch.isfinite(preview).all()


def test_optimized_noise_repeats_the_samples_bit_for_bit(small):
    noise, _, samples, *_ = small.select(mode="search+optimize", learning_rate=0.5)
    assert equal(samples["samples"], small.custom(noise))


@pytest.mark.slow
def test_gradient_equals_finite_differences(small):
    run = seed_sampler(small.model, small.latent(), small.words, **{**SAMPLING, "cfg": 1.2})
    _, found = gradient(run)
    direction = direction_of(found)
    expected = finite_difference(run, direction, step=1e-2)
    assert float((found * direction).sum()) == pytest.approx(expected, abs=5e-3 * float(found.norm()))


@pytest.mark.slow
def test_inversion_equals_the_references_noise_or_is_refused(small, request):
    if small.latent()["samples"].is_nested:
        with pytest.raises(ValueError, match=r"the references have no audio.*use start noise"):
            small.select(start="inversion")
        return
    noise, _, samples, *_ = small.select(start="inversion", candidates=2)
    assert equal(samples["samples"], small.custom(noise))


@in_inference_mode
def score_of(small, latents, vision):
    """Scores by definition: cosine distance of the frames 1, 3, 4 and 6 of 6, or of all frames, and of the latents."""
    video = latents.unbind()[0] if latents.is_nested else latents
    frames = small.vae.decode(video)[0]
    taken = torch.linspace(0, len(frames) - 1, min(4, len(frames))).round().long()
    centroid = F.normalize(vision.encode_image(references())["image_embeds"].mean(0), dim=0)
    embeds = F.normalize(vision.encode_image(frames[taken])["image_embeds"], dim=-1)
    still = references().movedim(-1, 1)
    size = [8 * n for n in video.shape[-2:]]
    still = F.interpolate(still, size, mode="bicubic", antialias=True).clamp(0, 1).movedim(1, -1)
    encoded = torch.cat([small.vae.encode(image[None].repeat(len(frames), 1, 1, 1)) for image in still]).mean(0)
    process = small.model.model.process_latent_in
    appearance = ((process(video)[0] - process(encoded[None])[0]) ** 2).mean()
    return float(10 * (1 - embeds @ centroid).mean() + appearance)


def test_score_equals_its_definition(small, vision):
    found = small.select(semantic_weight=10.0, clip_vision=vision)
    score = float(found[0].details["score"])
    assert score == pytest.approx(score_of(small, found[2]["samples"], vision), rel=1e-5)


def test_search_with_a_batch_equals_single_candidates(small, monkeypatch):
    together = small.select()
    monkeypatch.setattr("chorus.techniques.seed_select.comfy_sampler.rows_are_independent", lambda *a: False)
    alone = small.select()
    assert equal(together[2]["samples"], alone[2]["samples"])


def test_several_images_from_a_path():
    small = Small(NESTED)
    noise, _, samples, *_ = small.select(count=3)
    shapes = [(3, *part.shape[1:]) for part in small.latent()["samples"].unbind()]
    assert [part.shape for part in samples["samples"].unbind()] == shapes
    assert [part.shape for part in noise.noise.unbind()] == shapes


def test_saved_noise_is_loaded_unchanged(small, tmp_path, monkeypatch):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{kind}_directory", lambda kind=kind: str(tmp_path / kind))
    noise, *_ = small.select()
    saved = SaveSeed.execute(noise, "seeds/video").ui["seeds"][0]
    loaded = LoadSeed.execute(f"{saved['subfolder']}/{saved['filename']} [output]").args[0]
    assert equal(loaded.noise, noise.noise) and loaded.seed == noise.seed


def test_noise_of_another_length_rejected():
    noise = SeedNoise(torch.zeros(1, 16, 3, 8, 8), 0)
    with pytest.raises(ValueError, match=r"3 frames, height 8 .* got .* 2 frames.*set length, width and height"):
        noise.generate_noise({"samples": torch.zeros(1, 16, 2, 8, 8)})
    nested = comfy.nested_tensor.NestedTensor([torch.zeros(1, 16, 2, 8, 8), torch.zeros(1, 8, 5)])
    with pytest.raises(ValueError, match="got a nested latent"):
        noise.generate_noise({"samples": nested})
    with pytest.raises(ValueError, match=r"expected a nested latent .* got one latent"):
        SeedNoise(nested, 0).generate_noise({"samples": torch.zeros(1, 16, 2, 8, 8)})


def test_vae_without_the_frames_of_the_latent_rejected(monkeypatch):
    small = Small(VIDEO)
    with pytest.raises(ValueError, match="single images, the latent 1x16x2x8x8 has 2 frames; connect the VAE of"):
        small.select(vae=tiny_vae(16))
    monkeypatch.setattr(small.vae, "upscale_ratio", (lambda frames: 2 * frames + 1, 8, 8))
    with pytest.raises(
        ValueError, match=r"makes latents of 1x16x3x8x8 and the model samples 1x16x2x8x8.*number of frames"
    ):
        small.select()
    monkeypatch.setattr(small.vae, "output_channels", 2)
    with pytest.raises(ValueError, match="decodes audio, not images"):
        small.select()


def test_image_vae_decodes_the_image_model_of_a_video_family():
    small = Small(IMAGE_OF_VIDEO_FAMILY)
    _, seed, samples, *_ = small.select(vae=tiny_vae(16), mode="search+optimize", iterations=0)
    assert equal(samples["samples"], small.plain(seed))


def test_optimisation_through_a_vae_that_adds_noise_is_refused(monkeypatch, vision):
    small = Small(IMAGE_OF_VIDEO_FAMILY)
    decode = small.vae.first_stage_model.decode
    monkeypatch.setattr(small.vae.first_stage_model, "decode", lambda z: decode(z + torch.randn_like(z)))
    with pytest.raises(ValueError, match="the VAE adds random noise; use mode search"):
        small.select(mode="optimize", semantic_weight=10.0, clip_vision=vision)


def test_audio_latent_and_audio_vae_rejected(monkeypatch):
    small = Small("ACEStep")
    small.vae = tiny_vae(8)
    monkeypatch.setattr(small.vae, "output_channels", 2)
    with pytest.raises(ValueError, match="decodes audio, not images; connect the VAE of this model"):
        small.select()
    small = Small("StableAudio")
    with pytest.raises(
        ValueError, match=r"StableAudio.*no VAE decodes images from such a latent; use an image or video"
    ):
        small.select()


@in_inference_mode
def test_masks_of_frames_are_accepted():
    small = Small(VIDEO)
    mask = torch.ones(2, 8, 8)
    mask[1, :, :4] = 0
    content = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    latent = {"samples": content, "noise_mask": mask}
    _, seed, samples, *_ = small.select(latent_image=latent)
    expected = ksample(small.model, *small.words, latent, seed=seed, **SAMPLING)
    assert equal(samples["samples"], expected)
    with pytest.raises(ValueError, match="got 2 noise masks"):
        small.select(latent_image={**latent, "noise_mask": torch.ones(2, 1, 2, 8, 8)})


def test_packed_latents_equal_those_of_the_host():
    nested = comfy.nested_tensor.NestedTensor([torch.rand(2, 3, 2, 4, 5), torch.rand(2, 6, 7)])
    layout = LatentLayout.of(nested)
    packed = layout.pack(nested)
    assert torch.equal(packed, comfy.utils.pack_latents(nested.unbind())[0])
    assert packed.shape == (2, *layout.packed_size)
    assert equal(layout.unpack(packed), nested)
    assert torch.equal(layout.pictures(packed), nested.unbind()[0])


def test_evenly_taken_frames():
    video = torch.arange(7.0).view(1, 7, 1, 1, 1).expand(1, 7, 1, 1, 3)
    assert evenly_taken_frames(video, 4)[0, :, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert evenly_taken_frames(video, 9)[0, :, 0, 0, 0].tolist() == list(range(7))
    assert evenly_taken_frames(video, 1)[0, :, 0, 0, 0].tolist() == [0]


@in_inference_mode
def test_each_reference_is_encoded_as_a_still_video():
    vae, images = tiny_vae(16, video=True), references(3)
    found = encode(vae, images, (1, 16, 3, 8, 8))
    assert found.shape == (3, 16, 3, 8, 8)
    assert torch.equal(found[:, :, 0], found[:, :, 2])
