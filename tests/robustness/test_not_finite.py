"""NaN or infinity from any network or input: an error names the model, the step and a remedy.

Without this error the result would be a black or uniform image. FaceRefiner raises no error: it leaves a face with such
values unchanged and names it in its report.
"""

import contextlib

import pytest
import torch

from chorus.common import finite
from chorus.tests.robustness.leak_check import LeakCheck, same_bits
from chorus.tests.robustness.slow_nodes import CASES, NODE, OTHER_WORDS, WORDS, folders, small  # noqa: F401 (fixtures)
from chorus.tests.support import tiny_masked_tokens as tiny
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.tiny_models import blend, ksample, latent, unet

pytestmark = pytest.mark.usefixtures("one_thread", "folders", "small")
NAN, INF = float("nan"), float("inf")
WIDER = r".*wider dtype \(ComfyUI's --bf16-unet or --fp32-unet, --force-upcast-attention\)"
STEPS = list(enumerate(["14.61", "1.616", "0.02917"]))  # sigmas of three steps


@pytest.fixture(params=["on the CPU", "on a GPU"])
def check_time(request, monkeypatch):
    """When values are checked: at once on the CPU, and later on a GPU, to avoid a device sync."""
    if request.param == "on a GPU":
        monkeypatch.setattr(finite, "is_on_cpu", lambda numbers: False)


@contextlib.contextmanager
def corrupted(module, value=NAN, since: int = 0, where=..., until: int = 10**6):
    """Put ``value`` at the positions ``where`` of the outputs of ``module``.

    The first ``since`` calls are not changed, nor those after call number ``until``.
    """
    calls = []

    def corrupt(module, inputs, output):
        calls.append(1)
        if since < len(calls) <= until:
            output = output.clone()
            output[where] = value
        return output

    handle = module.register_forward_hook(corrupt)
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


def check_refused(model, message: str, *wired, corrupt, **sampling) -> None:
    """Assert that sampling fails with ``message``, leaks nothing, and that the next run returns the same bits."""
    expected = sampled(model, **sampling)
    leak_check = LeakCheck(model, *wired)
    with corrupt, pytest.raises(ValueError, match=message):
        sampled(model, **sampling)
    leak_check.check(message, uses_global_rng=True)
    assert torch.equal(sampled(model, **sampling), expected)


# the blend


@pytest.mark.usefixtures("check_time")
@pytest.mark.parametrize(
    ("name", "step", "value"),
    [
        ("base", 0, NAN),
        ("base", 2, INF),
        ("expert", 0, -INF),
        ("expert", 1, NAN),
        ("expert", 2, NAN),
        ("other", 1, INF),
    ],
)
def test_error_names_the_model_and_the_step(name, step, value, record_property):
    sigma = STEPS[step][1]
    models = {"base": unet(0), "expert": unet(1), "other": unet(2)}
    chained, _ = blend(models["base"], models["expert"], *OTHER_WORDS, label="expert")
    blended, _ = blend(chained, models["other"], *OTHER_WORDS, label="other")
    message = rf"prediction of '{name}' is not finite \(NaN or infinite\) at sigma {sigma}{WIDER}"
    corrupt = corrupted(network(models[name]), value, since=step)
    check_refused(blended, message, *models.values(), corrupt=corrupt)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("check_time")
@pytest.mark.parametrize("inputs", [{}, {"region_mode": "force"}, {"crop_margin": 1}, {"refresh": 2}], ids=str)
def test_non_finite_prediction_outside_the_region_rejected(inputs, record_property):
    """Such a prediction invalidates the saliency, and the next step would spread it over the image."""
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS, label="expert", region=left_half(), **inputs)
    corrupt = corrupted(network(expert), where=(slice(None), 0, 3, 7))  # on the right
    with corrupt, pytest.raises(ValueError, match=r"prediction of 'expert' is not finite .* at sigma 14\.61"):
        sampled(blended)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("check_time")
@pytest.mark.parametrize(("window", "since", "sigma"), [((0.6, 1.0), 0, "14.61"), ((0.0, 0.3), 2, "0.02917")])
def test_non_finite_base_outside_the_experts_window_rejected(window, since, sigma, record_property):
    """The base is non-finite before or after the expert's window. After it, only the final latent can be checked."""
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS, start_percent=window[0], end_percent=window[1])
    message = rf"'base' at sigma {sigma}, where no expert takes part, is not finite{WIDER}.*remove the patches"
    check_refused(blended, message, base, expert, corrupt=corrupted(network(base), since=since))
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("check_time")
@pytest.mark.parametrize(("call", "sigma"), STEPS)
def test_non_finite_patch_after_the_blend_is_not_attributed_to_an_expert(call, sigma, record_property):
    calls = []

    def patch(args):
        calls.append(1)
        return args["denoised"] * NAN if len(calls) == call + 1 else args["denoised"]

    blended, _ = blend(unet(0), unet(1), *OTHER_WORDS)
    blended.set_model_sampler_post_cfg_function(patch)
    with pytest.raises(
        ValueError, match=rf"the latent after the blend at sigma {sigma} is not finite .*remove the patches"
    ):
        sampled(blended)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("check_time")
def test_non_finite_initial_latent_rejected(record_property):
    blended, _ = blend(unet(0), unet(1), *OTHER_WORDS)
    with pytest.raises(ValueError, match=r"latent that the sampling begins with is not finite .* another latent_image"):
        sampled(blended, {"samples": torch.full((1, 4, 8, 8), NAN)}, denoise=0.5)
    record_property("NaN cases", 1)


# heads


@pytest.mark.usefixtures("check_time")
@pytest.mark.parametrize(("step", "sigma"), STEPS)
@pytest.mark.parametrize("chained", [1, 2])
def test_non_finite_head_output_names_the_head(chained, step, sigma, record_property):
    model = unet(0)
    with_head = apply_head(model, head_for(model))
    for _ in range(chained - 1):
        with_head = apply_head(with_head, head_for(model))
    patcher = with_head.get_additional_models_with_key(f"chorus_cas_dm_{chained - 1}")[0]

    def corrupt(module, inputs, output):
        calls.append(1)
        return tuple(x * NAN for x in output) if len(calls) == step + 1 else output

    expected, calls = sampled(with_head), []
    handle = patcher.model.register_forward_hook(corrupt)
    with pytest.raises(
        ValueError, match=rf"output of Cas-DM head {chained} is not finite .* at sigma {sigma}, for a finite prediction"
    ):
        sampled(with_head)
    handle.remove()
    assert torch.equal(sampled(with_head), expected)
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("check_time")
@pytest.mark.parametrize(("step", "sigma"), STEPS)
def test_non_finite_prediction_before_a_head_names_the_model(step, sigma, record_property):
    model = unet(0)
    with_head = apply_head(model, head_for(model))
    message = rf"prediction of the model is not finite .* at sigma {sigma}, before Cas-DM head 1{WIDER}"
    check_refused(with_head, message, model, corrupt=corrupted(network(model), since=step))
    record_property("NaN cases", 1)


@pytest.mark.usefixtures("check_time")
def test_non_finite_expert_under_a_head_is_named(record_property):
    base, expert = unet(0), unet(1)
    blended, _ = blend(base, expert, *OTHER_WORDS, label="expert")
    with corrupted(network(expert), since=1), pytest.raises(ValueError, match=r"'expert' is not finite .*sigma 1\.616"):
        sampled(apply_head(blended, head_for(base)))
    record_property("NaN cases", 1)


# seeds, tokens, faces, trainings


def check_node_refused(name: str, message: str, corrupt) -> None:
    """Assert that the node fails with ``message`` in ``corrupt(case)``, and leaks nothing; then it returns the same bits."""
    with torch.inference_mode():
        case = CASES[name]()
        expected, leak_check = case.run(), LeakCheck(*case.wired)
        with corrupt(case), pytest.raises(ValueError, match=message):
            case.run()
        leak_check.check(message, case.uses_global_rng)
        assert same_bits(case.run(), expected)


def model_of(case):
    return corrupted(network(case.wired[0]))


def uvit_of(case):
    return corrupted(case.wired[0].transformer.model, since=2)


def decoder_of(case):
    return corrupted(case.wired[0].vq.model.decoder, since=1)


@contextlib.contextmanager
def encoder_of(case):
    """Corrupt the output of the layer that computes the vision encoder's embedding."""
    model = case.wired[-1].model
    with corrupted(model.visual_projection):
        yield


NODES = {
    "model": ("SeedSelect search", "the score of seed 5 is nan with 1 step", model_of),
    "model, with gradients": ("SeedSelect optimize", r"not finite|is nan", model_of),
    "encoder": ("SeedSelect search", r"embedding of the 1 references has the norm nan", encoder_of),
    "logits": ("MaskedTokenSampler", r"the logits at step 2 are not finite .* wider dtype", uvit_of),
    "pictures of tokens": (
        "MaskedTokenDecode",
        r"the output of the VQ-GAN of .* is not finite .* wider dtype",
        decoder_of,
    ),
    "features": ("FaceRealismScore", r"the features are not finite.*wider dtype", encoder_of),
    "model in training": ("TrainCasDMHead", r"prediction of the model is not finite .* at sigma", model_of),
}


@pytest.mark.parametrize("case", NODES)
def test_non_finite_network_output_names_its_cause(case, record_property):
    check_node_refused(*NODES[case])
    record_property("NaN cases", 1)


@pytest.mark.parametrize("value", [NAN, INF])
def test_encoding_of_a_non_finite_image_rejected(value, record_property):
    model, image = tiny.tiny_model().model, tiny.random_image(batch=2)
    image[1, 3, 4, 0] = value
    message = r"the image 2x32x24x3 is not finite .NaN or infinite., so it cannot be encoded; generate the image again"
    with pytest.raises(ValueError, match=message):
        tiny.run(NODE["MaskedTokenEncode"], image=image, model=model)
    with pytest.raises(ValueError, match=message):
        tiny.run(NODE["MaskedTokenSampler"], model=model, positive=tiny.prompt(1), seed=1, cfg=1.0, image=image)
    record_property("NaN cases", 2)


def test_non_finite_face_is_left_unchanged_and_reported(record_property):
    case = CASES["FaceRefiner"]()
    with torch.inference_mode():
        image, _, _, report = case.run()
        with corrupted(case.wired[0].model, since=1, until=2):
            result, _, _, changed_report = case.run()
    lines = changed_report.splitlines()
    assert [
        n for n, line in enumerate(lines) if "the refiner's output is not finite (NaN or infinite), not refined" in line
    ] == [2]
    assert result.isfinite().all() and torch.equal(result[1], image[1])
    # all other lines are the same as in the run without the non-finite value
    assert [line for n, line in enumerate(lines) if n != 2] == [
        line for n, line in enumerate(report.splitlines()) if n != 2
    ]
    record_property("NaN cases", 1)


def test_non_finite_input_face_is_not_attributed_to_the_refiner(record_property):
    case = CASES["FaceRefiner"]()
    cells = {type(c.cell_contents): c.cell_contents for c in case.run.__closure__}
    inputs = dict(cells[dict])
    inputs["image"] = inputs["image"].clone()
    inputs["image"][0, 15, 15, 0] = NAN
    with torch.inference_mode():
        _, mask, _, report = NODE["FaceRefiner"].execute(**inputs).args
    assert report.count("the input image is not finite (NaN or infinite), not refined") == 1
    assert report.count("not refined") == 1 and mask[1].any()
    record_property("NaN cases", 1)
