"""A wire may carry a thing of the right type that is wrong: the node says so, in words of its own, or works."""

import traceback

import pytest
import torch

from chorus.dev.tools.setup import ROOT
from chorus.tests.robustness import wrong_wires as wrong
from chorus.tests.robustness.wrong_wires import boxes, conditionings, images, latents, masks, models, only

NO_PICTURES = ("no picture", "no width", "grey with alpha", "no batch", "a video")
# those that a node must refuse; all others it may refuse in words of its own, or work with
CASES = {
    "blend": (wrong.blend, "expert", models, ("a flow model", "four channels")),
    "blend on": (wrong.blend, "model", models, ("a flow model", "four channels")),
    "blend's prompt": (
        wrong.blend,
        "positive",
        conditionings,
        ("of another width", "without a tensor", "NaN", "no token", "a text", "no entry", "half an entry"),
    ),
    "blend's negative": (wrong.blend, "negative", conditionings, ("of another width", "NaN", "no token", "no entry")),
    "blend's region": (wrong.blend, "region", masks, ("no mask", "no width", "a row of numbers", "a number", "NaN")),
    "blend's latent": (
        wrong.blend,
        "samples",
        lambda: only(latents(), *(name for name in latents() if name != "no samples")),
        ("four channels", "sixteen channels", "a video", "no batch", "none", "no width", "NaN"),
    ),
    "head": (wrong.head, "model", models, ("a flow model", "four channels")),
    "select": (wrong.select, "model", models, ("a flow model", "four channels")),
    "select's prompt": (wrong.select, "positive", conditionings, ("of another width", "NaN", "no token", "no entry")),
    "select's latent": (
        wrong.select,
        "latent_image",
        latents,
        ("four channels", "sixteen channels", "a video", "no batch", "none", "no width", "NaN", "two", "no samples"),
    ),
    "select's references": (
        wrong.select,
        "references",
        images,
        (*NO_PICTURES, "a pixel", "grey", "NaN", "infinite", "bytes"),
    ),
    "train a head": (
        wrong.train_head,
        "samples",
        lambda: only(latents(), "four channels", "a video", "no batch", "none", "no width", "NaN", "no samples"),
        ("four channels", "a video", "no batch", "none", "no width", "NaN", "no samples"),
    ),
    "train a head by": (
        wrong.train_head,
        "positive",
        lambda: only(conditionings(), "of another width", "no token", "no entry"),
        ("of another width", "no token", "no entry"),
    ),
    "tokens' prompt": (
        wrong.tokens,
        "positive",
        conditionings,
        ("of another width", "without pooled output", "without a tensor", "NaN", "no token", "no entry"),
    ),
    "tokens' image": (wrong.tokens, "image", images, (*NO_PICTURES, "a pixel", "a row", "odd sides")),
    "tokens' mask": (
        lambda **wire: wrong.tokens(tokens=wrong.encoded(), **wire),
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "a row of numbers", "a number"),
    ),
    "tokens edited": (
        lambda **wire: wrong.execute("MaskedTokenEdit", tokens=wrong.encoded(), **wire),
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "a row of numbers", "a number"),
    ),
    "encode": (
        lambda **wire: wrong.execute("MaskedTokenEncode", model=wrong.token_model(), **wire),
        "image",
        images,
        (*NO_PICTURES, "a pixel", "a row", "odd sides"),
    ),
    "train a LoRA": (wrong.train_lora, "images", lambda: only(images(), *NO_PICTURES), NO_PICTURES),
    "faces": (wrong.faces, "image", images, (*NO_PICTURES, "grey", "RGBA")),
    "faces' boxes": (
        wrong.faces,
        "bboxes",
        boxes,
        tuple(name for name in boxes() if name not in ("for two pictures", "nothing in it", "all the world")),
    ),
    "faces' mask": (
        wrong.faces,
        "mask",
        masks,
        ("no mask", "no width", "a pixel", "another size", "three", "a row of numbers", "a number"),
    ),
}


def said_on_purpose(error: Exception) -> bool:
    """By the pack itself: torch and Python raise ValueError too."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, ValueError) and last.filename.startswith(str(ROOT)) and last.line.startswith("raise ")


@pytest.mark.parametrize("case", CASES)
def test_what_is_wired_wrong(case, one_thread, record_property):
    run, wire, things, refused = CASES[case]
    tried = things()
    assert set(refused) <= set(tried)
    for what, thing in tried.items():
        try:
            run(**{wire: thing})
        except Exception as error:
            assert said_on_purpose(error), f"{wire} {what}: {type(error).__name__}: {error}"
        else:
            assert what not in refused, f"{wire} {what} was taken"
    record_property("things", len(tried))


def test_an_expert_that_cannot_read_its_prompt_is_named(one_thread):
    with pytest.raises(
        ValueError, match=r"'painter' cannot read what it was given .*; encode its prompts with the CLIP of"
    ):
        wrong.blend(positive=conditionings()["of another width"], label="painter")


def test_want_of_memory_stays_what_it_is(one_thread, monkeypatch):
    """The host knows it, and unloads its models."""

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room for tensors whose shapes cannot be multiplied")

    monkeypatch.setattr(wrong.other().model.diffusion_model, "forward", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        wrong.blend()
