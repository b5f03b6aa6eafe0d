"""NaN and infinity from any network or input: an error that says whose they are, where they began and what helps, and no
black or plain picture instead. What is left as it was, is told of."""

import contextlib

import pytest
import torch

from chorus.common import finite
from chorus.tests.robustness.long_nodes import CASES, NODE, OTHER_WORDS, WORDS, folders, small  # noqa: F401 (fixtures)
from chorus.tests.robustness.remains import Remains, same_bits
from chorus.tests.support import tiny_masked_tokens as tiny
from chorus.tests.support.heads import head_for, put
from chorus.tests.support.tiny_models import blend, ksample, latent, unet

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
NAN, INF = float("nan"), float("inf")
WIDER = r".*wider dtype \(ComfyUI's --bf16-unet or --fp32-unet, --force-upcast-attention\)"
STEPS = list(enumerate(["14.61", "1.616", "0.02917"]))  # sigmas of three steps


@pytest.fixture(params=["on the CPU", "on a GPU"])
def reading(request, monkeypatch):
    """Where reading a number would wait for the device, it is read later."""
    if request.param == "on a GPU":
        monkeypatch.setattr(finite, "is_on_cpu", lambda numbers: False)


@contextlib.contextmanager
def spoiled(module, value=NAN, since: int = 0, where=..., until: int = 10**6):
    """``value`` in what ``module`` gives, at the places ``where``, from its call number ``since`` on."""
    calls = []

    def spoil(module, inputs, output):
        calls.append(1)
        if since < len(calls) <= until:
            output = output.clone()
            output[where] = value
        return output

    handle = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def network(model):
    return model.model.diffusion_model


def sampled(model, samples=None, **sampling):
    return ksample(model, *WORDS, samples or latent(1, 8, 8), **{"steps": 3, **sampling})


def left_half() -> torch.Tensor:
    return (torch.arange(8) < 4).float().expand(1, 8, 8).clone()


def refused(model, message: str, *wired, spoil, **sampling) -> None:
    """Sampling fails with ``message``; after it all is as before, and so are the next run's bits."""
    expected = sampled(model, **sampling)
    remains = Remains(model, *wired)
    with spoil, pytest.raises(ValueError, match=message):
        sampled(model, **sampling)
    remains.check(message, draws=True)
    assert torch.equal(sampled(model, **sampling), expected)


# the blend


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(
    ("which", "step", "value"),
    [
        ("base", 0, NAN),
        ("base", 2, INF),
        ("painter", 0, -INF),
        ("painter", 1, NAN),
        ("painter", 2, NAN),
        ("other", 1, INF),
    ],
)
def test_whose_prediction_it_was_and_when(which, step, value, record_property):
    sigma = STEPS[step][1]
    models = {"base": unet(0), "painter": unet(1), "other": unet(2)}
    chained, _ = blend(models["base"], models["painter"], *OTHER_WORDS, label="painter")
    blended, _ = blend(chained, models["other"], *OTHER_WORDS, label="other")
    message = rf"prediction of '{which}' is not finite \(NaN or infinite\) at sigma {sigma}{WIDER}"
    spoil = spoiled(network(models[which]), value, since=step)
    refused(blended, message, *models.values(), spoil=spoil)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("inputs", [{}, {"region_mode": "force"}, {"crop_margin": 1}, {"refresh": 2}], ids=str)
def test_where_an_expert_does_not_paint_it_is_refused_too(inputs, record_property):
    """It has lost its saliency, and the next step would spread it."""
    base, painter = unet(0), unet(1)
    blended, _ = blend(base, painter, *OTHER_WORDS, label="painter", region=left_half(), **inputs)
    spoil = spoiled(network(painter), where=(slice(None), 0, 3, 7))  # on the right
    with spoil, pytest.raises(ValueError, match=r"prediction of 'painter' is not finite .* at sigma 14\.61"):
        sampled(blended)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("window", "since", "sigma"), [((0.6, 1.0), 0, "14.61"), ((0.0, 0.3), 2, "0.02917")])
def test_the_base_alone(window, since, sigma, record_property):
    """Before an expert begins, and after all have ended, when nothing but the finished latent can tell."""
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS, start_percent=window[0], end_percent=window[1])
    message = rf"'base', which acts alone at sigma {sigma}, .* is not finite{WIDER}.*remove the patches"
    refused(blended, message, base, expert, spoil=spoiled(network(base), since=since))
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("call", "sigma"), STEPS)
def test_a_patch_after_the_blend_is_not_the_experts_fault(call, sigma, record_property):
    calls = []

    def patch(args):
        calls.append(1)
        return args["denoised"] * NAN if len(calls) == call + 1 else args["denoised"]

    blended, _ = blend(unet(0), unet(1), *OTHER_WORDS)
    blended.set_model_sampler_post_cfg_function(patch)
    with pytest.raises(ValueError, match=rf"made of the blend at sigma {sigma} is not finite .*remove the patches"):
        sampled(blended)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("reading")
def test_a_latent_that_is_none_to_begin_with(record_property):
    blended, _ = blend(unet(0), unet(1), *OTHER_WORDS)
    with pytest.raises(ValueError, match=r"latent that the sampling begins with is not finite .* another latent_image"):
        sampled(blended, {"samples": torch.full((1, 4, 8, 8), NAN)}, denoise=0.5)
    record_property("NaN cases", 1)


# heads


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("step", "sigma"), STEPS)
@pytest.mark.parametrize("chained", [1, 2])
def test_a_head_that_gives_none(chained, step, sigma, record_property):
    model = unet(0)
    worn = put(model, head_for(model))
    for _ in range(chained - 1):
        worn = put(worn, head_for(model))
    patcher = worn.get_additional_models_with_key(f"chorus_cas_dm_{chained - 1}")[0]

    def spoil(module, inputs, output):
        calls.append(1)
        return tuple(x * NAN for x in output) if len(calls) == step + 1 else output

    expected, calls = sampled(worn), []
    handle = patcher.model.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=rf"what Cas-DM head {chained} made of .* not finite .* at sigma {sigma};"):
        sampled(worn)
    handle.remove()
    assert torch.equal(sampled(worn), expected)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("step", "sigma"), STEPS)
def test_a_model_that_gives_a_head_none(step, sigma, record_property):
    model = unet(0)
    worn = put(model, head_for(model))
    message = rf"the model predicts is not finite .* at sigma {sigma}, before Cas-DM head 1 has seen it{WIDER}"
    refused(worn, message, model, spoil=spoiled(network(model), since=step))
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("reading")
def test_an_expert_under_a_head_is_named(record_property):
    base, painter = unet(0), unet(1)
    blended, _ = blend(base, painter, *OTHER_WORDS, label="painter")
    with spoiled(network(painter), since=1), pytest.raises(ValueError, match=r"'painter' is not finite .*sigma 1\.616"):
        sampled(put(blended, head_for(base)))
    record_property("NaN cases", 1)


# seeds, tokens, faces, trainings


def node_refused(name: str, message: str, spoil) -> None:
    """``spoil(case)`` is open while the node fails; then it gives what it gave."""
    with torch.inference_mode():
        case = CASES[name]()
        expected, remains = case.run(), Remains(*case.wired)
        with spoil(case), pytest.raises(ValueError, match=message):
            case.run()
        remains.check(message, case.draws)
        assert same_bits(case.run(), expected)


def model_of(case):
    return spoiled(network(case.wired[0]))


def uvit_of(case):
    return spoiled(case.wired[0].transformer.model, since=2)


def decoder_of(case):
    return spoiled(case.wired[0].vq.model.decoder, since=1)


@contextlib.contextmanager
def encoder_of(case):
    """Whatever layer an encoder's embedding comes from."""
    model = case.wired[-1].model
    with spoiled(model.visual_projection):
        yield


NODES = {
    "model": ("SeedSelect search", "the score of seed 5 is nan with 1 step", model_of),
    "model, with gradients": ("SeedSelect optimize", r"not finite|is nan", model_of),
    "encoder": ("SeedSelect search", r"embedding of the 1 references has the norm nan", encoder_of),
    "logits": ("MaskedTokenSampler", r"the logits at step 2 are not finite .* wider dtype", uvit_of),
    "pictures of tokens": ("MaskedTokenDecode", r"pictures of the tokens .* not finite .* wider dtype", decoder_of),
    "features": ("FaceRealismScore", r"features hold numbers that are NaN or infinite.*wider dtype", encoder_of),
    "model in training": ("TrainCasDMHead", r"model's own prediction is NaN or infinite at sigma", model_of),
}


@pytest.mark.parametrize("case", NODES)
def test_a_network_that_gives_none(case, record_property):
    node_refused(*NODES[case])
    record_property("NaN cases", 1)


@pytest.mark.parametrize("value", [NAN, INF])
def test_pictures_that_hold_none_have_no_tokens(value, record_property):
    model, image = tiny.tiny_model().model, tiny.picture(batch=2)
    image[1, 3, 4, 0] = value
    message = "the image 2x32x24x3 holds numbers that are NaN or infinite, which have no token; make it anew"
    with pytest.raises(ValueError, match=message):
        tiny.run(NODE["MaskedTokenEncode"], image=image, model=model)
    with pytest.raises(ValueError, match=message):
        tiny.run(NODE["MaskedTokenSampler"], model=model, positive=tiny.prompt(1), seed=1, cfg=1.0, image=image)
    record_property("NaN cases", 2)


def test_faces_that_cannot_be_refined_are_left_and_told_of(record_property):
    case = CASES["FaceRefiner"]()
    with torch.inference_mode():
        image, _, _, report = case.run()
        with spoiled(case.wired[0].model, since=1, until=2):
            found, _, _, told = case.run()
    lines = told.splitlines()
    assert [
        n for n, line in enumerate(lines) if "the refiner gave NaN or infinity, refused: left as it is" in line
    ] == [2]
    assert found.isfinite().all() and torch.equal(found[1], image[1])
    # the other lines are those of a whole run
    assert [line for n, line in enumerate(lines) if n != 2] == [
        line for n, line in enumerate(report.splitlines()) if n != 2
    ]
    record_property("NaN cases", 1)


def test_a_face_of_none_is_not_the_refiners_fault(record_property):
    case = CASES["FaceRefiner"]()
    given = case.run.__closure__
    cells = {type(c.cell_contents): c.cell_contents for c in given}
    inputs = dict(cells[dict])
    inputs["image"] = inputs["image"].clone()
    inputs["image"][0, 15, 15, 0] = NAN
    with torch.inference_mode():
        _, mask, _, report = NODE["FaceRefiner"].execute(**inputs).args
    assert report.count("the picture itself holds NaN or infinity, refused: left as it is") == 1
    assert report.count("refused") == 1 and mask[1].any()
    record_property("NaN cases", 1)
