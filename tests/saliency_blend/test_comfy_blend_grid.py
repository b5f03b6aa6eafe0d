"""BlendGrid with tiny random models and the demo's VAE."""

import comfy.model_management
import pytest
import torch
from comfy_api.latest import io

from chorus.demo import modules
from chorus.nodes.blend_grid import BlendGrid, varied_setting, widget_limits
from chorus.nodes.saliency_noise_blend import SaliencyNoiseBlend
from chorus.techniques.saliency_blend.comfy_grid_images import CONTINUES, GridImages, SamplingInputs
from chorus.techniques.saliency_blend.comfy_hook import blend_chain
from chorus.techniques.saliency_blend.varied_settings import NAMES
from chorus.tests.families.tiny_vae import tiny_vae
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
FIXED = {"region_mode", "refresh", "skip_below", "crop_margin"}  # how a region acts, and how work is saved
SAMPLING = dict(steps=4, cfg=3.0, seed=5, sampler_name="euler", scheduler="normal")


@pytest.fixture(scope="module")
def models():
    return unet(0, latent_format=Scaled), unet(1, latent_format=Scaled)


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return modules.make_vae(modules.load_autoencoder())


def empty():
    return latent(height=8, width=8, channels=8)


def blended(models, **inputs):
    return blend(*models, *EXPERT_WORDS, **inputs)[0]


@pytest.fixture
def grid(models, vae):
    @in_inference_mode
    def grid(model=None, **inputs):
        wired = dict(positive=WORDS[0], negative=WORDS[1], latent_image=empty(), vae=vae)
        model = blended(models) if model is None else model
        return BlendGrid.execute(**{**defaults(BlendGrid), **wired, **SAMPLING, "model": model, **inputs}).args

    return grid


@in_inference_mode
def images(model, vae, *varied, latent_image=None, **sampling):
    inputs = dict(
        positive=WORDS[0], negative=WORDS[1], latent_image=latent_image or empty(), **{**SAMPLING, **sampling}
    )
    settings = [varied_setting("rows", text, model) for text in varied]
    return GridImages(model, settings, SamplingInputs(**inputs), vae)


def plain(model, seed=5, latent_image=None, sampler_name="euler", **sampling):
    given = {**SAMPLING, **sampling, "seed": seed}
    given.pop("sampler_name")
    return ksample(model, *WORDS, latent_image or empty(), sampler=sampler_name, **given)


def test_limits_are_those_of_the_widgets_of_the_blend_node():
    assert set(widget_limits()) == set(NAMES)
    assert (widget_limits()["bias"].low, widget_limits()["bias"].high) == (-5.0, 5.0)
    assert widget_limits()["saliency"].options == ("own", "shared")
    assert widget_limits()["mask_refresh"].whole


def test_every_setting_of_the_blend_can_vary_or_is_excluded_here():
    kinds = io.Int.Input, io.Float.Input, io.Combo.Input
    settings = [w.id for w in SaliencyNoiseBlend.define_schema().inputs if isinstance(w, kinds)]
    assert sorted(settings) == sorted([*NAMES, *FIXED]), (
        "add the setting to JOINT_FIELDS or EXPERT_FIELDS of varied_settings.py, or to FIXED here"
    )


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_images_are_those_of_ksampler_with_these_settings(models, vae, sampler):
    varied = "bias = 0.5", "mask_refresh = 4", "saliency = shared"
    run = images(blended(models), vae, *varied, sampler_name=sampler)
    with torch.inference_mode():
        found = run.latent((0.5, 4, "shared"))
    model = blended(models, bias=0.5, mask_refresh=4, saliency="shared")
    assert torch.equal(found, plain(model, sampler_name=sampler))
    assert not torch.equal(found, plain(blended(models), sampler_name=sampler))


@pytest.mark.parametrize("sampler", CONTINUES)
def test_steps_before_the_experts_are_sampled_once(models, vae, sampler):
    steps = 8
    run = images(blended(models), vae, "start_percent = 0 | 1", "bias = -1 | 1", sampler_name=sampler, steps=steps)
    expected, found, spent = [], [], []
    for point in ((0.6, 0.0), (0.6, 1.0), (0.3, 0.0), (0.8, 0.5), (0.8, 0.9)):
        model = blended(models, start_percent=point[0], bias=point[1])
        expected.append(plain(model, sampler_name=sampler, steps=steps))
        before = run.evaluated_steps
        with torch.inference_mode():
            found.append(run.latent(point))
        spent.append(run.evaluated_steps - before)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=2e-3 * float(b.abs().max()))
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    assert spent[0] == steps
    assert spent[1] == spent[3] < steps  # both continue where the first began
    assert spent[4] < spent[3]  # continues where the fourth began


def test_no_step_is_shared_if_a_continued_run_would_differ(models, vae):
    start = 0.6
    model = blended(models, start_percent=start)
    masked = {**empty(), "noise_mask": (torch.arange(8) < 4).float().expand(1, 1, 8, 8).clone()}
    with torch.inference_mode():
        for base, given, sampler in (
            (model, None, "dpmpp_2m"),
            (model, masked, "euler"),
            (model, masked, "ddim"),
            (with_easycache(model), None, "euler"),
        ):
            run = images(base, vae, "start_percent = 0 | 1", latent_image=given, sampler_name=sampler, steps=8)
            for _ in range(2):
                found = run.latent((start,))
                assert torch.equal(found, plain(base, latent_image=given, sampler_name=sampler, steps=8))
            assert run.evaluated_steps == 16


def test_weights_of_an_expert_on_the_same_module_are_copied_once(models, vae, monkeypatch):
    from chorus.techniques.saliency_blend import comfy_experts

    copied = []
    copy = comfy_experts._copy_with_module
    monkeypatch.setattr(comfy_experts, "_copy_with_module", lambda patcher: copied.append(1) or copy(patcher))
    model = blended((models[0], lora(models[0], 3)))
    run = images(model, vae, "bias = 0.5 | -0.5", steps=2)
    with torch.inference_mode():
        run.latent((0.5,))
        run.latent((-0.5,))
    ksample(run.blended((0.5,)), *WORDS, empty(), steps=1)
    assert len(copied) == 1


def test_settings_of_a_chain_vary_by_label_and_the_chain_of_the_model_stays(models, vae):
    first = blend(*models, *EXPERT_WORDS, label="animals")[0]
    chain = blend(first, models[1], label="food", bias=0.25)[0]
    run = images(chain, vae, "bias of food = -1 | 1", "blur = 2")
    with torch.inference_mode():
        found = run.latent((-1.0, 2))
    assert torch.equal(found, plain(blend(first, models[1], label="food", bias=-1.0, blur=2)[0]))
    assert [expert.settings.bias for expert in blend_chain(chain).experts] == [0.0, 0.25]


def test_grid_shows_the_images_of_ksampler_row_by_row(models, vae, grid):
    sheet, report = grid(rows="bias = -1 | 1", columns="mask_refresh = 1 | 2 | 4")
    assert report == "6 of 6 images from seed 5"
    width, height = 192 + 8, (sheet.shape[1] - 8) // 2
    for row, bias in enumerate((-1.0, 1.0)):
        for column, every in enumerate((1, 2, 4)):
            with torch.inference_mode():
                image = vae.decode(plain(blended(models, bias=bias, mask_refresh=every)))[0]
            left, top = 8 + column * width, 8 + row * height
            found = sheet[0, top : top + 192, left : left + 192][1::3, 1::3]  # 64 pixels times 3
            assert torch.allclose(found, image.clamp(0, 1), atol=1 / 255)


def test_a_grid_leaves_the_trace_and_the_models_alone(models, grid):
    model, trace = blend(*models, *EXPERT_WORDS)
    before, record = plain(model), trace.record
    assert record.labels == ("base", "expert 1")
    grid(model, rows="bias = -1 | 1", columns="")
    assert trace.record is record
    assert torch.equal(plain(model), before)


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


def test_a_model_without_a_blend_is_refused(models, grid):
    with pytest.raises(ValueError, match=r"the model is no blend.*connect the output of SaliencyNoiseBlend"):
        grid(models[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(rows="", columns=""), "rows and columns are empty"),
        (dict(rows="bias of expert 1 = 0 | 1", columns="bias = 1 | 2"), "rows and columns both set bias"),
        (dict(rows="blur = 2 | 4", columns="blur = 1 | 2"), "rows and columns both set blur"),
        (dict(rows="bias = 0 | 1\nblur = 1 | 2"), "rows names 2 settings; keep one of them"),
        (dict(rows="bias = 0 | 1", columns="bias of expert 1 = 1 | 2"), "rows and columns both set bias of expert 1"),
        (
            dict(rows="bias = -1 to 1"),
            "the range -1 to 1 of bias has no step; write for example: bias = -1 to 1 by 0.5",
        ),
        (dict(rows="bias = -3 to 3 by 0.1", columns="blur = 1 to 5 by 1"), "305 images are more than 256; use fewer"),
        (dict(rows="strength = 0 | 1"), "the setting 'strength' cannot vary; use one of expert_strength"),
        (
            dict(latent_image=latent(2, 8, 8, 8)),
            "expected one latent in latent_image, got 2 latents; set batch_size to 1",
        ),
        (dict(latent_image={"samples": torch.zeros(1, 8, 64)}), "expected an image latent"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused_with_the_remedy(grid, inputs, message):
    with pytest.raises(ValueError, match=message):
        grid(**inputs)


def test_report_says_why_an_expert_has_no_effect(models, grid, caplog):
    report = grid(rows="end_percent = 0.01 | 1", columns="start_percent = 0.005 | 0.2")[1].splitlines()
    start, never = "end_percent = 0.01, start_percent = ", "'expert 1' takes part in no step: no step of the run"
    assert report[0].startswith(f"{start}0.005: {never}") or report[0].startswith(f"{start}0.2: {never}")
    assert all("end_percent = 1" not in line for line in report)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == report[:2]
    same = grid(blend(models[0], models[0])[0], columns="")[1].splitlines()
    assert same[0].startswith("base and 'expert 1' predicted the same in all steps")
    assert same[1] == "3 of 3 images from seed 5"
    assert grid(columns="")[1] == "3 of 3 images from seed 5"


def test_vae_with_other_channels_is_refused_before_sampling(models, grid):
    model = blended(models)
    other = tiny_vae(Scaled.latent_channels * 2)
    with (
        forwards(model) as rows,
        pytest.raises(
            ValueError,
            match=r"decodes latents of 16 channels, the model samples 1x8x8x8 .* connect the VAE of this model",
        ),
    ):
        grid(model, vae=other)
    assert not rows
