"""Invalid values of the right type: the pack raises an error, or the node works."""

import traceback

import pytest
import torch

from chorus.dev.tools.setup import ROOT
from chorus.tests.robustness import invalid_inputs as invalid
from chorus.tests.robustness.invalid_inputs import boxes, conditionings, images, latents, masks, models, subset

INVALID_LATENTS = (
    "four channels",
    "sixteen channels",
    "a video",
    "no batch",
    "no latent",
    "no width",
    "NaN",
    "two",
    "no samples",
)
INVALID_IMAGES = ("no image", "no width", "grey with alpha", "no batch", "a video")
# by case: the function that runs the node, the input, its invalid values, and which of them the node must reject
CASES = {
    "blend": (invalid.blend, "expert", models, ("a flow model", "four channels")),
    "blend on": (invalid.blend, "model", models, ("a flow model", "four channels")),
    "blend's prompt": (
        invalid.blend,
        "positive",
        conditionings,
        ("of another width", "without a tensor", "NaN", "no token", "a text", "no entry", "half an entry"),
    ),
    "blend's negative": (invalid.blend, "negative", conditionings, ("of another width", "NaN", "no token", "no entry")),
    "blend's region": (invalid.blend, "region", masks, ("no mask", "no width", "a row of numbers", "a number", "NaN")),
    "blend's latent": (
        invalid.blend,
        "samples",
        lambda: subset(latents(), *(name for name in latents() if name != "no samples")),
        ("four channels", "sixteen channels", "a video", "no batch", "no latent", "no width", "NaN"),
    ),
    "head": (invalid.head, "model", models, ("a flow model", "four channels")),
    "select": (invalid.select, "model", models, ("a flow model", "four channels")),
    "select's prompt": (invalid.select, "positive", conditionings, ("of another width", "NaN", "no token", "no entry")),
    "select's latent": (
        invalid.select,
        "latent_image",
        latents,
        INVALID_LATENTS,
    ),
    "select's references": (
        invalid.select,
        "references",
        images,
        (*INVALID_IMAGES, "a pixel", "grey", "NaN", "infinite", "bytes"),
    ),
    "map": (invalid.noise_map, "model", models, ("a flow model", "four channels")),
    "map's prompt": (invalid.noise_map, "positive", conditionings, ("of another width", "NaN", "no token", "no entry")),
    "map's latent": (invalid.noise_map, "latent_image", latents, INVALID_LATENTS),
    "map's references": (
        invalid.noise_map,
        "references",
        images,
        (*INVALID_IMAGES, "a pixel", "grey", "NaN", "infinite", "bytes"),
    ),
    "combined noise": (
        invalid.combined,
        "mask",
        masks,
        ("no mask", "no width", "three", "a row of numbers", "a number", "NaN"),
    ),
    "grid": (invalid.grid, "model", models, ("a flow model", "four channels")),
    "grid's prompt": (invalid.grid, "positive", conditionings, ("of another width", "NaN", "no token", "no entry")),
    "grid's latent": (invalid.grid, "latent_image", latents, INVALID_LATENTS),
    "train a head": (
        invalid.train_head,
        "samples",
        lambda: subset(latents(), "four channels", "a video", "no batch", "no latent", "no width", "NaN", "no samples"),
        ("four channels", "a video", "no batch", "no latent", "no width", "NaN", "no samples"),
    ),
    "train a head by": (
        invalid.train_head,
        "positive",
        lambda: subset(conditionings(), "of another width", "no token", "no entry"),
        ("of another width", "no token", "no entry"),
    ),
    "tokens' prompt": (
        invalid.tokens,
        "positive",
        conditionings,
        ("of another width", "without pooled output", "without a tensor", "NaN", "no token", "no entry"),
    ),
    "tokens' image": (invalid.tokens, "image", images, (*INVALID_IMAGES, "a pixel", "a row", "odd sides")),
    "tokens' mask": (
        lambda **inputs: invalid.tokens(tokens=invalid.encoded(), **inputs),
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "a row of numbers", "a number"),
    ),
    "tokens edited": (
        lambda **inputs: invalid.execute("MaskedTokenEdit", tokens=invalid.encoded(), **inputs),
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "a row of numbers", "a number"),
    ),
    "video": (invalid.token_video, "images", images, (*INVALID_IMAGES, "a pixel", "a row", "odd sides")),
    "video's prompt": (
        invalid.token_video,
        "positive",
        conditionings,
        ("of another width", "without pooled output", "without a tensor", "NaN", "no token", "no entry"),
    ),
    "video's mask": (
        invalid.token_video,
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "a row of numbers", "a number"),
    ),
    "encode": (
        lambda **inputs: invalid.execute("MaskedTokenEncode", model=invalid.token_model(), **inputs),
        "image",
        images,
        (*INVALID_IMAGES, "a pixel", "a row", "odd sides"),
    ),
    "train a LoRA": (invalid.train_lora, "images", lambda: subset(images(), *INVALID_IMAGES), INVALID_IMAGES),
    "faces": (invalid.faces, "image", images, (*INVALID_IMAGES, "grey", "RGBA")),
    "faces' boxes": (
        invalid.faces,
        "bboxes",
        boxes,
        tuple(name for name in boxes() if name not in ("for two images", "with null", "outside", "zero width", "huge")),
    ),
    "faces' mask": (
        invalid.faces,
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "three", "a row of numbers", "a number"),
    ),
}


def is_error_of_the_pack(error: Exception) -> bool:
    """Whether a raise statement of the pack raised ``error``; torch and Python raise ValueError too."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, ValueError) and last.filename.startswith(str(ROOT)) and last.line.startswith("raise ")


@pytest.mark.parametrize("case", CASES)
def test_invalid_input_rejected_or_handled(case, one_thread, record_property):
    run, field, make_values, rejected = CASES[case]
    values = make_values()
    assert set(rejected) <= set(values)
    for name, value in values.items():
        try:
            run(**{field: value})
        except Exception as error:
            assert is_error_of_the_pack(error), f"{field} {name}: {type(error).__name__}: {error}"
        else:
            assert name not in rejected, f"{field} {name} was accepted"
    record_property("invalid values", len(values))


def test_error_names_the_expert_with_an_incompatible_prompt(one_thread):
    with pytest.raises(ValueError, match=r"do not fit the layers of 'animals' .*; encode its prompts with the CLIP"):
        invalid.blend(positive=conditionings()["of another width"], label="animals")


def test_out_of_memory_error_is_not_replaced(one_thread, monkeypatch):
    """ComfyUI recognises the error and unloads its models."""

    def run_out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("no room for tensors whose shapes cannot be multiplied")

    monkeypatch.setattr(invalid.other().model.diffusion_model, "forward", run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        invalid.blend()
