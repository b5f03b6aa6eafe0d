"""TuneBlend and BlendGrid with tiny random models and the demo's VAE and image encoder."""

import json
import re
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from chorus.demo import modules
from chorus.nodes.tune_blend import BlendGrid, TuneBlend, space_of, widget_limits
from chorus.techniques.saliency_blend.comfy_hook import blend_chain
from chorus.techniques.saliency_blend.comfy_image_score import COLORS, ImageScore
from chorus.techniques.saliency_blend.comfy_tuning import CONTINUES, BlendCandidates, SamplingInputs
from chorus.techniques.saliency_blend.tuning_space import NAMES
from chorus.tests.support.gradients import with_easycache
from chorus.tests.support.head_training import Scaled
from chorus.tests.support.lifecycle import interrupt_at
from chorus.tests.support.tiny_models import (
    blend,
    conditioning,
    defaults,
    forwards,
    in_inference_mode,
    ksample,
    latent,
    lora,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")
Interrupted = comfy.model_management.InterruptProcessingException
WORDS, EXPERT_WORDS = [(conditioning(i), conditioning(i + 1)) for i in (10, 30)]
SAMPLING = dict(steps=4, cfg=3.0, seed=5, sampler_name="euler", scheduler="normal")
SETTINGS = "bias = -1 to 1\nstart_percent = 0 to 0.6\nmask_refresh = 1 | 4"
SIDE = 64  # pixels along a side of an image, for a latent of 8x8


@pytest.fixture(scope="module")
def models():
    return unet(0, latent_format=Scaled), unet(1, latent_format=Scaled)


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.make_vae(modules.load_autoencoder())


@pytest.fixture(scope="module")
def vision():
    with torch.inference_mode():
        return modules.load_vision()


def references(count=2):
    coarse = torch.rand(count, 3, 5, 4, generator=torch.Generator().manual_seed(4))
    return F.interpolate(coarse, (50, 40), mode="bilinear").movedim(1, -1).contiguous()


def empty():
    return latent(height=8, width=8, channels=8)


def blended(models, **inputs):
    return blend(*models, *EXPERT_WORDS, **inputs)[0]


@pytest.fixture
def tune(models, vae, vision):
    """Function that executes TuneBlend with small defaults."""

    @in_inference_mode
    def tune(model=None, **inputs):
        wired = dict(positive=WORDS[0], negative=WORDS[1], latent_image=empty(), vae=vae, clip_vision=vision)
        few = dict(settings=SETTINGS, evaluations=8, seeds=2, references=references())
        model = blended(models) if model is None else model
        return TuneBlend.execute(**{**defaults(TuneBlend), **wired, **few, **SAMPLING, "model": model, **inputs}).args

    return tune


@pytest.fixture
def grid(models, vae):
    @in_inference_mode
    def grid(model=None, **inputs):
        wired = dict(positive=WORDS[0], negative=WORDS[1], latent_image=empty(), vae=vae)
        model = blended(models) if model is None else model
        return BlendGrid.execute(**{**defaults(BlendGrid), **wired, **SAMPLING, "model": model, **inputs}).args

    return grid


@in_inference_mode
def candidates(model, vae, settings="bias = -1 to 1", latent_image=None, **sampling):
    inputs = dict(
        positive=WORDS[0], negative=WORDS[1], latent_image=latent_image or empty(), **{**SAMPLING, **sampling}
    )
    return BlendCandidates(model, space_of(settings, model), SamplingInputs(**inputs), vae)


def plain(model, seed=5, latent_image=None, sampler_name="euler", **sampling):
    given = {**SAMPLING, **sampling, "seed": seed}
    given.pop("sampler_name")
    return ksample(model, *WORDS, latent_image or empty(), sampler=sampler_name, **given)


def typed(settings):
    """The widgets of one node from the output ``settings``: "expert 1: bias 0.5, mask_refresh 4"."""
    pairs = (part.split() for part in settings.partition(": ")[2].split(", "))
    kinds = {name: int if limits.whole else float for name, limits in widget_limits().items()}
    return {name: kinds[name](value) for name, value in pairs}


# candidates


def test_limits_are_those_of_the_widgets_of_the_blend_node():
    assert set(widget_limits()) == set(NAMES)
    assert (widget_limits()["bias"].low, widget_limits()["bias"].step) == (-5.0, 0.05)
    assert widget_limits()["saliency"].options == ("own", "shared")
    assert widget_limits()["mask_refresh"].whole


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_images_of_a_candidate_are_those_of_ksampler_with_these_settings(models, vae, sampler):
    settings = "bias = -1 to 1\nmask_refresh = 1 | 4\nsaliency = own | shared"
    run = candidates(blended(models), vae, settings, sampler_name=sampler)
    with torch.inference_mode():
        found = run.latents((0.5, 4, "shared"), 4, range(1))
        second = run.latents((0.5, 4, "shared"), 4, range(1, 2))
        both = run.latents((0.5, 4, "shared"), 4, range(2))
    model = blended(models, bias=0.5, mask_refresh=4, saliency="shared")
    assert torch.equal(found, plain(model, sampler_name=sampler))
    assert torch.equal(second, plain(model, seed=6, sampler_name=sampler))
    assert torch.allclose(both, torch.cat([found, second]), atol=1e-4)
    assert not torch.equal(found, plain(blended(models), sampler_name=sampler))


@pytest.mark.parametrize("sampler", CONTINUES)
def test_steps_before_the_experts_are_sampled_once(models, vae, sampler):
    steps = 8
    run = candidates(blended(models), vae, "start_percent = 0 to 1\nbias = -1 to 1", sampler_name=sampler, steps=steps)
    expected, found, spent = [], [], []
    for point in ((0.6, 0.0), (0.6, 1.0), (0.3, 0.0), (0.8, 0.5), (0.8, 0.9)):
        model = blended(models, start_percent=point[0], bias=point[1])
        expected.append(plain(model, sampler_name=sampler, steps=steps))
        before = run.evaluated_steps
        with torch.inference_mode():
            found.append(run.latents(point, steps, range(1)))
        spent.append(run.evaluated_steps - before)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=2e-3 * float(b.abs().max()))
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    assert spent[0] == steps
    assert spent[1] == spent[3] < steps  # both continue where the first began
    assert spent[4] < spent[3]  # continues where the fourth began


def test_no_step_is_shared_if_a_continued_run_would_differ(models, vae):
    settings, start = "start_percent = 0 to 1", 0.6
    model = blended(models, start_percent=start)
    masked = {**empty(), "noise_mask": (torch.arange(8) < 4).float().expand(1, 1, 8, 8).clone()}
    with torch.inference_mode():
        for base, given, sampler in (
            (model, None, "dpmpp_2m"),
            (model, masked, "euler"),
            (with_easycache(model), None, "euler"),
        ):
            run = candidates(base, vae, settings, given, sampler_name=sampler, steps=8)
            for _ in range(2):
                found = run.latents((start,), 8, range(1))
                assert torch.equal(found, plain(base, latent_image=given, sampler_name=sampler, steps=8))
            assert run.evaluated_steps == 16


def test_ddim_with_an_inpainting_mask_gives_each_seed_its_own_noise(models, vae):
    """ddim fills the unmasked area with noise of the seed, so that several seeds must not share a batch."""
    masked = {"samples": torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))}
    masked["noise_mask"] = (torch.arange(8) < 4).float().expand(1, 1, 8, 8).clone()
    model = blended(models)
    run = candidates(model, vae, latent_image=masked, sampler_name="ddim")
    with torch.inference_mode():
        found = run.latents((0.0,), 4, range(2))
    assert torch.equal(found, torch.cat([plain(model, seed, masked, "ddim") for seed in (5, 6)]))


def test_weights_of_an_expert_on_the_same_module_are_copied_once(models, vae, monkeypatch):
    from chorus.techniques.saliency_blend import comfy_experts

    copied = []
    copy = comfy_experts._copy_with_module
    monkeypatch.setattr(comfy_experts, "_copy_with_module", lambda patcher: copied.append(1) or copy(patcher))
    model = blended((models[0], lora(models[0], 3)))
    run = candidates(model, vae)
    with torch.inference_mode():
        run.latents((0.5,), 2, range(1))
        run.latents((-0.5,), 2, range(1))
    ksample(run.blended((0.5,)), *WORDS, empty(), steps=1)
    assert len(copied) == 1


# scores


@in_inference_mode
def losses(vision, images, references=None, prompts=()):
    """1 - cos, computed with numpy from the outputs of the encoders."""

    def unit(x):
        x = x.double().numpy()
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    f, parts = unit(vision.encode_image(images)["image_embeds"]), []
    if references is not None:
        mean = vision.encode_image(references)["image_embeds"].mean(0, keepdim=True)
        parts.append(1 - f @ unit(mean)[0])
    if prompts:
        parts.append((1 - f @ unit(vision.text_embeds(list(prompts))).T).mean(1))
    return np.mean(parts, 0)


@pytest.mark.parametrize("given", ["references", "prompts", "both"])
def test_score_is_the_mean_distance_from_references_and_prompts(vision, given):
    images = references(3) * 0.5
    wanted = dict(
        references=references(2) if given != "prompts" else None,
        prompts=["a cat in flat style", "a dog"] if given != "references" else [],
    )
    with torch.inference_mode():
        found = ImageScore(vision, **wanted)(images)
    assert found.numpy() == pytest.approx(losses(vision, images, **wanted), abs=1e-5)


def test_score_of_a_video_is_the_mean_over_its_frames(vision):
    with torch.inference_mode():
        score = ImageScore(vision, references(2))
        videos = torch.stack([references(3), references(3).flip(0) * 0.5])
        assert torch.allclose(score(videos), torch.stack([score(video).mean() for video in videos]), atol=1e-6)


# TuneBlend


def test_best_settings_score_best_and_can_be_typed_into_the_node(models, vae, vision, tune):
    with torch.inference_mode():
        wanted = vae.decode(torch.cat([plain(blended(models, bias=1.0), seed) for seed in (5, 6)]))
    model, settings, sheet, surface, report = tune(evaluations=12, references=wanted)
    sampled = {}
    for name, chosen in (("tuned", typed(settings)), ("connected", {})):
        mine = [plain(blended(models, **chosen), seed) for seed in (5, 6)]
        with torch.inference_mode():
            images = vae.decode(torch.cat(mine))
        sampled[name] = float(losses(vision, images, wanted).mean())
    assert torch.equal(plain(model), plain(blended(models, **typed(settings))))
    measured = re.search(r"measured (\S+) and (\S+), better for", report)
    assert [float(x) for x in measured.groups()] == pytest.approx(list(sampled.values()), abs=1e-3)
    assert sampled["tuned"] < sampled["connected"]
    assert sheet.shape[0] == surface.shape[0] == 1
    assert torch.isfinite(sheet).all() and torch.isfinite(surface).all()


def test_evaluations_0_only_scores_and_passes_the_model_on(models, tune):
    model = blended(models)
    found, settings, *_, report = tune(model, evaluations=0)
    assert found is model
    assert settings == "expert 1: bias 0, start_percent 0, mask_refresh 1"
    assert "nothing was tuned" in report
    assert tune(model, evaluations=0, settings="")[0] is model


def test_connected_settings_that_are_the_best_give_the_connected_model(models, tune, monkeypatch):
    monkeypatch.setattr(ImageScore, "__call__", lambda self, images: torch.ones(len(images)))
    model = blended(models)
    found, *_, report = tune(model)
    assert found is model
    assert report.startswith("the connected settings are the best found: expected score 1.0000")


def test_search_leaves_the_trace_alone_and_the_tuned_model_writes_it(models, tune):
    model, trace = blend(*models, *EXPERT_WORDS)
    tuned = tune(model)[0]
    assert trace.record is None
    plain(tuned)
    assert trace.record.labels == ("base", "expert 1")


def test_settings_of_a_chain_move_by_label_and_the_chain_of_the_model_stays(models, tune):
    first = blend(*models, *EXPERT_WORDS, label="animals")[0]
    chain = blend(first, models[1], label="food", bias=0.25)[0]
    tuned, settings, *_ = tune(chain, settings="bias of food = -1 | 1\nblur = 1 | 2")
    before, after = (blend_chain(m) for m in (chain, tuned))
    assert [e.settings.bias for e in before.experts] == [0.0, 0.25]
    assert after.experts[0].settings.bias == 0.0
    assert after.experts[1].settings.bias in (-1.0, 0.25, 1.0)
    assert "food (last node of the chain): blur" in settings


def test_same_inputs_same_result(models, tune):
    model = blended(models)
    first, again = tune(model), tune(model)
    assert first[1] == again[1]
    assert first[4] == again[4]
    assert torch.equal(first[2], again[2])
    assert torch.equal(first[3], again[3])


def test_interrupt_keeps_the_best_so_far(models, tune):
    base = interrupt_at(models[0], 30)
    model, *_, report = tune(blended((base, models[1])), evaluations=40)
    assert report.startswith("interrupted: these are the best settings so far")
    assert not comfy.model_management.processing_interrupted()
    assert torch.isfinite(plain(model)).all()
    with pytest.raises(Interrupted):
        tune(blended((interrupt_at(models[0], 2), models[1])))


def test_nothing_of_a_search_stays_on_the_models(models, tune):
    model = blended(models)
    before = plain(model)
    tune(model)
    assert torch.equal(plain(model), before)


class WithoutText:
    """An image encoder without a text encoder of its own."""

    def __init__(self, vision):
        self._vision = vision

    def __getattr__(self, name):
        if name == "text_embeds":
            raise AttributeError(name)
        return getattr(self._vision, name)


class Text:
    """A CLIP with ``size`` numbers per embedding and the projection ``weight``.

    With ``vision``, it knows the colours of this image encoder, and other texts have random embeddings.
    """

    def __init__(self, size, weight=None, vision=None):
        self.size, self.vision = size, vision
        self.cond_stage_model = torch.nn.Module()
        self.cond_stage_model.text_projection = torch.nn.Linear(size, size, bias=False)
        if weight is not None:
            self.cond_stage_model.text_projection.weight.data.copy_(weight)

    def tokenize(self, text):
        return text

    def encode_from_tokens(self, text, return_pooled):
        if not self.size:
            return None, None
        color = COLORS.get(text.removeprefix("a plain ").removesuffix(" image"))
        if self.vision is not None and color is not None:
            return None, self.vision.encode_image(torch.tensor(color).expand(1, 64, 64, 3))["image_embeds"]
        if self.vision is None:
            return None, torch.ones(1, self.size)  # the same for all texts, so that one of the colours is right
        return None, torch.randn(1, self.size, generator=torch.Generator().manual_seed(len(text)))


def test_text_encoder_of_clip_is_used_if_the_image_encoder_has_none(vision, tune):
    clip = Text(64, vision=vision)
    report = tune(clip_vision=WithoutText(vision), clip=clip, prompt_score="a\nbcd", references=None)[4]
    with_own = tune(prompt_score="a cat", references=None)[4]
    assert report != with_own
    with torch.inference_mode():
        found = ImageScore(WithoutText(vision), None, ["a", "bcd"], clip)._targets[0]
    expected = F.normalize(torch.cat([clip.encode_from_tokens(t, True)[1] for t in ("a", "bcd")]), dim=-1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(references=None), "nothing to compare the images with; connect references, or write"),
        (dict(references=torch.rand(2, 8, 8, 1)), r"expected RGB images \[batch, height, width, 3\] for references"),
        (dict(settings=""), "no setting may move"),
        (dict(settings="strength = 0 to 1"), "the setting 'strength' cannot move; use one of expert_strength"),
        (dict(evaluations=3), "3 evaluations are not enough for two candidates with 2 seeds; use at least 4"),
        (
            dict(latent_image=latent(2, 8, 8, 8)),
            "expected one latent in latent_image, got 2 latents; set batch_size to 1",
        ),
        (dict(latent_image={"samples": torch.zeros(1, 8, 64)}), "expected an image latent"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused_with_the_remedy(tune, inputs, message):
    with pytest.raises(ValueError, match=message):
        tune(**inputs)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (None, "prompt_score needs the text encoder that was trained together with clip_vision; connect it to clip"),
        (Text(32), "the text encoder of clip gives embeddings of 32 numbers, clip_vision of 64"),
        (Text(0), "gives embeddings of none numbers"),
        (Text(64, torch.eye(64)), "the text encoder of clip has no projection"),
        (Text(64, torch.zeros(64, 64)), "the text encoder of clip has no projection"),
        (Text(64, torch.full((64, 64), torch.nan)), "the text encoder of clip has no projection"),
        (Text(64, torch.full((64, 64), 2e-5)), "the text encoder of clip has no projection"),
        (Text(64), "agree on 1 of 8 plain colours, as encoders that were not trained together do"),
    ],
)
def test_text_encoders_that_do_not_belong_to_the_image_encoder_are_refused(vision, tune, clip, message):
    with pytest.raises(ValueError, match=message):
        tune(clip_vision=WithoutText(vision), clip=clip, prompt_score="a cat")


@pytest.mark.parametrize("node", ["tune", "grid"])
def test_a_model_without_a_blend_is_refused(models, node, request):
    with pytest.raises(ValueError, match=r"the model is no blend.*connect the output of SaliencyNoiseBlend"):
        request.getfixturevalue(node)(models[0])


@pytest.mark.slow  # a text encoder of CLIP ViT-L/14's size
def test_text_encoder_of_sd15_is_refused_because_it_has_no_projection(vision):
    config = json.loads((Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json").read_text(encoding="utf-8"))
    network = comfy.clip_model.CLIPTextModel(config, torch.float16, "cpu", comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (0.02 * torch.randn(w.shape, generator=generator)).half() for name, w in network.state_dict().items()
    }
    del weights["text_projection.weight"]  # as in checkpoints of SD 1.5
    clip = comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)

    class Vision(WithoutText):
        def encode_image(self, images):
            return {"image_embeds": torch.ones(len(images), 768)}

    with torch.inference_mode(), pytest.raises(ValueError, match=r"has no projection|plain colours"):
        ImageScore(Vision(vision), prompts=["a cat"], clip=clip)


# BlendGrid


def test_grid_shows_the_images_of_ksampler_row_by_row(models, vae, grid):
    sheet, report = grid(rows="bias = -1 | 1", columns="mask_refresh = 1 | 2 | 4")
    assert report == "6 of 6 images from seed 5"
    width, height = 192 + 8, (sheet.shape[1] - 8) // 2
    for row, bias in enumerate((-1.0, 1.0)):
        for column, every in enumerate((1, 2, 4)):
            with torch.inference_mode():
                image = vae.decode(plain(blended(models, bias=bias, mask_refresh=every)))[0]
            left, top = 8 + column * width, 8 + row * height
            found = sheet[0, top : top + 192, left : left + 192][1::3, 1::3]  # SIDE times 3
            assert torch.allclose(found, image.clamp(0, 1), atol=1 / 255)


def test_grid_with_rows_only_shares_the_steps_before_the_start(models, grid):
    model = blended(models, start_percent=0.6)
    with forwards(models[0]) as calls:
        _, report = grid(model, rows="bias = -1 to 1 by 0.5", columns="")
    assert report.startswith("5 of 5 images from seed 5")
    assert "were sampled once for several images" in report
    assert len(calls) < 5 * 4


def test_interrupted_grid_keeps_the_finished_images(models, grid):
    whole = grid(rows="bias = -1 | 0 | 1 | 2", columns="")[0]
    base = interrupt_at(models[0], 10)
    sheet, report = grid(blended((base, models[1])), rows="bias = -1 | 0 | 1 | 2", columns="")
    assert report == (
        "interrupted: these images are finished; the node runs again only if an input changes\n"
        "2 of 4 images from seed 5"
    )
    assert torch.equal(sheet[0, 8:200, 8:408], whole[0, 8:200, 8:408])
    with pytest.raises(Interrupted):
        grid(blended((interrupt_at(models[0], 1), models[1])))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(rows="", columns=""), "rows and columns are empty"),
        (dict(rows="bias = 0 | 1\nblur = 1 | 2"), "rows names 2 settings; keep one of them"),
        (dict(rows="bias = 0 | 1", columns="bias = 1 | 2"), "rows and columns both name bias"),
        (dict(rows="bias = -1 to 1"), "the range of bias has no values; write for example: bias = -1 to 1 by 0.5"),
        (dict(rows="bias = -3 to 3 by 0.1", columns="blur = 1 to 5 by 1"), "305 images are more than 256; use fewer"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused_with_the_remedy(grid, inputs, message):
    with pytest.raises(ValueError, match=message):
        grid(**inputs)
