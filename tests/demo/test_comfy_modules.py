"""The demo checkpoints as ComfyUI objects: ComfyUI's nodes accept them like other checkpoints."""

import logging

import comfy.utils
import latent_preview
import nodes as host_nodes
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext

from chorus.demo import modules, text, weights
from chorus.demo.comfy_text import Tokenizer
from chorus.demo.concepts import COLORS, UNKNOWN
from chorus.nodes.demo import ChorusDemoCheckpoint, ChorusDemoReferences, ChorusDemoVision


@pytest.fixture(scope="module", params=[*modules.CHECKPOINTS, *modules.STUDENTS])
def checkpoint(request):
    with torch.inference_mode():
        yield ChorusDemoCheckpoint.execute(request.param).args


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        yield modules.load_checkpoint("general")


def encode(clip, words):
    return host_nodes.CLIPTextEncode().encode(clip, words)[0]


@torch.inference_mode()
def test_ksampler_generates_128_pixels_from_empty_latent_of_128(checkpoint):
    model, clip, vae = checkpoint
    empty = host_nodes.EmptyLatentImage().generate(128, 128, 2)[0]
    positive, negative = encode(clip, "a cat left of a tree on blue"), encode(clip, "")
    samples = host_nodes.KSampler().sample(model, 1, 2, 4.0, "dpmpp_2m", "karras", positive, negative, empty)[0]
    image = host_nodes.VAEDecode().decode(vae, samples)[0]
    assert samples["samples"].shape == (2, 8, 16, 16)
    assert image.shape == (2, 128, 128, 3)
    assert image.isfinite().all()
    assert 0 <= image.min() < image.max() <= 1


@torch.inference_mode()
def test_other_size_than_that_of_the_training_is_logged_once_per_run(checkpoint, caplog):
    model, clip, _ = checkpoint
    positive, negative = encode(clip, "a cat"), encode(clip, "")
    for height, expected in ((128, 0), (64, 1)):
        caplog.clear()
        with CurrentNodeContext(f"{id(model)} {height}", "1"):
            for _ in range(2):
                empty = host_nodes.EmptyLatentImage().generate(128, height, 1)[0]
                host_nodes.KSampler().sample(model, 1, 1, 4.0, "euler", "simple", positive, negative, empty)
        found = [r.getMessage() for r in caplog.records if "trained at" in r.getMessage()]
        assert len(found) == expected
    assert found == ["128 x 64 pixels; the demo checkpoints were trained at 128 x 128; set width and height to 128"]


@torch.inference_mode()
def test_vae_round_trip_and_inpainting(parts):
    vae = parts[2]
    image = torch.zeros(1, 128, 128, 3) + torch.tensor([0.64, 0.8, 0.95])
    image[:, 40:88, 24:96] = torch.tensor([0.98, 0.87, 0.35])
    latent = host_nodes.VAEEncode().encode(vae, image)[0]
    assert latent["samples"].shape == (1, 8, 16, 16)
    assert (host_nodes.VAEDecode().decode(vae, latent)[0] - image).abs().mean() < 0.02
    inpaint = host_nodes.VAEEncodeForInpaint().encode(vae, image, torch.ones(1, 128, 128))[0]
    assert inpaint["samples"].shape == (1, 8, 16, 16)
    assert "noise_mask" in inpaint


@torch.inference_mode()
def test_vae_decodes_in_tiles(parts):
    vae, latent = parts[2], 0.5 * torch.randn(1, 8, 32, 32)
    assert (vae.decode_tiled(latent, 16, 16, 4) - vae.decode(latent)).abs().mean() < 0.03


def test_previews_show_image_colors(parts):
    model, _, vae = parts
    latent_format = model.get_model_object("latent_format")
    assert torch.tensor(latent_format.latent_rgb_factors).shape == (8, 3)
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
    for name in COLORS.keys() - {"black"}:  # the preview is the linear part of the decoder, which lightens dark colours
        color = COLORS[name]
        image = (torch.tensor(color) / 255).expand(1, 128, 128, 3)
        preview = previewer.decode_latent_to_preview(vae.encode(image))
        assert preview.size == (16, 16)
        assert max(abs(found - wanted) for found, wanted in zip(preview.getpixel((8, 8)), color)) < 15, name


@torch.inference_mode()
def test_word_weights_applied_and_unknown_words_logged(parts, caplog):
    clip = parts[1]
    plain, heavy = encode(clip, "a cat on blue")[0], encode(clip, "a (cat:1.5) on blue")[0]
    changed = (plain[0] != heavy[0]).any(-1)[0]
    assert changed.tolist() == [i == 2 for i in range(text.LENGTH)]  # <s> a cat ...
    assert plain[1]["pooled_output"].shape == (1, text.WIDTH)
    with caplog.at_level(logging.WARNING):
        encode(clip, "a zeppelin on blue")
    assert "zeppelin" in caplog.text
    assert "blue" not in caplog.text.split("unknown words")[1]


@torch.inference_mode()
def test_long_prompts_split_into_chunks(parts):
    assert encode(parts[1], "a cat on blue " * 12)[0][0].shape == (1, 3 * text.LENGTH, text.WIDTH)


def test_tokens_match_training_tokens():
    caption = "a dark baby left of an owl on pink fading to white"
    chunks = Tokenizer().tokenize_with_weights(caption)["chorus"]
    assert [[t for t, _ in row] for row in chunks] == text.token_rows([caption]).tolist()
    assert UNKNOWN not in text.token_rows([caption])


def test_deep_copy_reloads_model(parts):
    model = parts[0]
    with torch.inference_mode(False):
        copy = model.clone(force_deepcopy=True)
    assert copy.model is not model.model
    assert not next(copy.model.parameters()).is_inference()
    for a, b in zip(copy.model.state_dict().values(), model.model.state_dict().values()):
        assert torch.equal(a, b)


def test_decoding_is_differentiable(parts):
    with torch.inference_mode(False), torch.enable_grad():
        module = modules.load_autoencoder()
        latent = torch.randn(1, 8, 4, 4, requires_grad=True)
        module.decode(latent).square().sum().backward()
    assert latent.grad.abs().min() > 0


@torch.inference_mode()
def test_clip_vision_encode_output_shapes():
    vision = ChorusDemoVision.execute().args[0]
    output = host_nodes.CLIPVisionEncode().encode(vision, torch.rand(2, 80, 64, 3), "center")[0]
    assert output.image_embeds.shape == (2, 64)
    assert output.last_hidden_state.shape == output.penultimate_hidden_states.shape == (2, 65, 96)
    assert vision.similarity(torch.rand(2, 128, 128, 3), ["a cat", "a dog"]).shape == (2, 2)


@pytest.mark.parametrize("name", modules.CHECKPOINTS)
def test_weight_files_are_small_and_have_metadata(name):
    facts = weights.metadata(name)
    assert int(facts["steps"]) > 0
    assert facts["license"] in ("Apache-2.0", "CC-BY-4.0")
    assert sum(f.stat().st_size for f in weights.FOLDER.rglob("*.safetensors")) <= 40e6
    assert all(v.dtype == torch.float16 for v in comfy.utils.load_torch_file(str(weights.path(name))).values())


def test_unknown_checkpoint_rejected_with_known_names():
    with pytest.raises(ValueError, match=r"'nothing' is unknown; use one of general"):
        modules.load_model("nothing")


def test_references_of_one_or_all_concepts_with_prompts():
    *concepts, everything = modules.reference_names()
    images, prompts = ChorusDemoReferences.execute(everything).args
    assert images.shape == (4 * len(concepts), 128, 128, 3) and len(prompts) == len(images)
    for k in (0, 37, len(concepts) - 1):
        alone, words = ChorusDemoReferences.execute(concepts[k]).args
        assert torch.equal(alone, images[4 * k : 4 * k + 4]) and words == prompts[4 * k : 4 * k + 4]
    owl, words = ChorusDemoReferences.execute("owl").args
    assert words == ["an owl"] * 4 and not torch.equal(owl, alone)
    assert len({image.numpy().tobytes() for image in images}) == len(images)
