"""Prompts for masked token models: CLIP-L compared with transformers, the mark in conditionings, and errors."""

import comfy.model_management
import nodes as host_nodes
import pytest
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from transformers import CLIPTokenizer

from chorus.demo import modules
from chorus.techniques.masked_tokens.comfy_text import MARK, ClipL, load_clip, openai_clip_l, read_text
from chorus.tests.support import masked_token_folder as folder
from chorus.tests.support.tiny_models import conditioning, ksample, unet

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["", "a cat", "a photo of a red fox in the snow, 4k", "été: ∑ 猫 🦊 O'Neil don't", "(unbalanced"]
LONG = " ".join(f"word{i} and" for i in range(60))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return folder.text_encoder(folder.TEXT)


@pytest.fixture(scope="module")
def clip(model):
    return load_clip(dict(model.state_dict()), folder.TEXT)


def encode(clip, prompt):
    with torch.inference_mode():
        return host_nodes.CLIPTextEncode().encode(clip, prompt)[0]


def by_transformers(model, ids):
    with torch.inference_mode():
        out = model(input_ids=torch.tensor(ids), output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def ids_of(prompt):
    """Token ids as in diffusers' pipeline: truncated to 77, padded with the end token."""
    tokenizer = CLIPTokenizer.from_pretrained(SD1Tokenizer().clip_l.tokenizer.name_or_path)
    ids = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
    return [ids + [49407] * (77 - len(ids))]


def close(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_conditioning_matches_transformers(clip, model, prompt):
    ((states, extras),) = encode(clip, prompt)
    expected, pooled = by_transformers(model, ids_of(prompt))
    assert states.shape == (1, 77, folder.WIDTH)
    close(states, expected)
    close(extras["pooled_output"], pooled)


def test_states_differ_from_comfyui_clip(clip, model):
    # ComfyUI's CLIP for SD1 outputs the last layer with the final norm
    ((states, _),) = encode(clip, "a cat")
    with torch.inference_mode():
        last = model(input_ids=torch.tensor(ids_of("a cat"))).last_hidden_state
    assert (states - last).abs().max() > 0.5


def test_activation_read_from_config(model):
    config = folder.TEXT | {"hidden_act": "gelu"}
    other = folder.text_encoder(config)
    other.load_state_dict(model.state_dict())
    ((states, _),) = encode(load_clip(dict(model.state_dict()), config), "a cat")
    close(states, by_transformers(other, ids_of("a cat"))[0])


def test_long_prompt_split_into_chunks(clip, model):
    ((states, extras),) = encode(clip, LONG)
    (tokens,) = clip.tokenize(LONG).values()
    assert len(tokens) > 2
    expected, pooled = by_transformers(model, [[token for token, _ in chunk] for chunk in tokens])
    close(states, expected.flatten(0, 1)[None])
    close(extras["pooled_output"], pooled[:1])


def test_word_weights_scale_from_empty_prompt(clip):
    (plain,), (weighted,), (empty,) = (encode(clip, p)[0][:1] for p in ("a red fox", "a (red:1.5) fox", ""))
    expected = plain.clone()
    expected[:, 2] = empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2])
    close(weighted, expected)


def test_textual_inversion_embedding_used(model, tmp_path):
    clip = load_clip(dict(model.state_dict()), folder.TEXT)
    fox = model.get_input_embeddings().weight[clip.tokenize("fox")["l"][0][1][0]].detach().clone()
    torch.save({"fox": fox[None]}, tmp_path / "style.pt")
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    (written,), (plain,) = (encode(clip, p)[0][:1] for p in ("a red embedding:style", "a red fox"))
    assert torch.equal(written, plain)


def test_openai_clip_l_config_from_comfyui():
    config = openai_clip_l()
    assert {key: config[key] for key in ("hidden_size", "num_hidden_layers", "hidden_act")} == {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "hidden_act": "quick_gelu",
    }


def test_unused_weights_ignored(model):
    weights = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    load_clip(weights | {"logit_scale": torch.tensor(4.6)}, folder.TEXT)


def test_reload_gives_same_bits(clip):
    ((before, _),) = encode(clip, "a cat")
    comfy.model_management.unload_all_models()
    ((after, _),) = encode(clip, "a cat")
    assert torch.equal(before, after)


def without(*keys):
    return {key: value for key, value in folder.TEXT.items() if key not in keys}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (without("hidden_act", "num_attention_heads"), "the config lacks num_attention_heads, hidden_act"),
        (folder.TEXT | {"hidden_act": "relu"}, "hidden_act is 'relu', not one of quick_gelu, gelu"),
        (folder.TEXT | {"vocab_size": 1000}, "vocab_size is 1000, not 49408"),
        (folder.TEXT | {"projection_dim": 512}, "projection_dim is 512, not 32"),
        (folder.TEXT | {"max_position_embeddings": 64}, "max_position_embeddings is 64, not 77"),
        (folder.TEXT | {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, not 1e-05"),
        (folder.TEXT | {"num_hidden_layers": 2}, "num_hidden_layers is 2, not 3 or more"),
        (folder.TEXT | {"intermediate_size": 65}, r"expected \(65, 32\), got \(64, 32\)"),
    ],
)
def test_unsupported_config_rejected(model, config, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_clip(dict(model.state_dict()), config)


def test_conditioning_carries_mark(clip):
    ((_, extras),) = encode(clip, "a (red:1.2) cat")
    assert extras[MARK] == "clip-l"
    assert set(extras) == {MARK, "pooled_output"}


def test_extra_outputs_of_text_model_kept():
    class WithAttentionMasks(SDClipModel):
        def __init__(self, **_):
            super().__init__(textmodel_json_config=dict(folder.TEXT), return_attention_masks=True)

    class Marked(ClipL):
        def __init__(self):
            SD1ClipModel.__init__(self, clip_model=WithAttentionMasks)

    with torch.inference_mode():
        extras = Marked().encode_token_weights({"l": [[(49406, 1.0), (49407, 1.0), *[(49407, 1.0)] * 75]]})[2]
    assert extras["attention_mask"].shape == (1, 77)
    assert extras[MARK] == "clip-l"


@torch.inference_mode()
def test_demo_mark_does_not_change_ksampler():
    model, clip, _ = modules.load_checkpoint("general")
    marked, negative = encode(clip, "a cat"), encode(clip, "")
    assert marked[0][1][MARK] == "chorus-demo"
    bare = [[states, {"pooled_output": extras["pooled_output"]}] for states, extras in marked]
    latent = host_nodes.EmptyLatentImage().generate(64, 64, 1)[0]
    samples = [
        host_nodes.KSampler().sample(model, 1, 2, 4.0, "euler", "normal", positive, negative, latent)[0]["samples"]
        for positive in (marked, bare)
    ]
    assert torch.equal(*samples)


@torch.inference_mode()
def test_mark_does_not_change_comfyui_models():
    model, plain = unet(), conditioning(1)
    marked = [[states, {**extras, MARK: "clip-l"}] for states, extras in plain]
    assert torch.equal(ksample(model, plain, conditioning(2)), ksample(model, marked, conditioning(2)))


# ---- reading ----


def test_one_row_per_prompt(clip):
    first, second = encode(clip, "a cat"), encode(clip, "a dog")
    batch = [[torch.cat([first[0][0], second[0][0]]), {**first[0][1]}]]
    both = torch.cat([first[0][1]["pooled_output"], second[0][1]["pooled_output"]])
    batch[0][1]["pooled_output"] = both
    rows = read_text([*first, *batch], "clip-l", "positive")
    assert [(s.shape, p.shape) for s, p in rows] == [((1, 77, folder.WIDTH), (1, folder.WIDTH))] * 3
    for (states, pooled), (expected, extras) in zip(rows, (*first, *first, *second)):
        assert torch.equal(states, expected)
        assert torch.equal(pooled, extras["pooled_output"])


def test_single_pooled_output_used_for_batch(clip):
    ((states, extras),) = encode(clip, "a cat")
    rows = read_text([[states.expand(3, -1, -1), extras]], "clip-l", "positive")
    assert [pooled.shape for _, pooled in rows] == [(1, folder.WIDTH)] * 3


def test_output_of_comfyui_conditioning_nodes_accepted(clip):
    cat, dog = encode(clip, "a cat"), encode(clip, "a dog")
    with torch.inference_mode():
        zero = host_nodes.ConditioningZeroOut().zero_out(cat)[0]
        average = host_nodes.ConditioningAverage().addWeighted(cat, dog, 0.5)[0]
        longer = host_nodes.ConditioningConcat().concat(cat, dog)[0]
        two = host_nodes.ConditioningCombine().combine(cat, dog)[0]
    assert not any(t.any() for t in read_text(zero, "clip-l", "negative")[0])
    assert read_text(average, "clip-l", "positive")[0][0].shape == (1, 77, folder.WIDTH)
    assert read_text(longer, "clip-l", "positive")[0][0].shape == (1, 154, folder.WIDTH)
    assert len(read_text(two, "clip-l", "positive")) == 2


def test_other_text_encoder_rejected(clip):
    with pytest.raises(ValueError, match="negative: this conditioning comes from another text encoder; encode"):
        read_text(conditioning(0), "clip-l", "negative")
    with pytest.raises(
        ValueError, match=r"another text encoder \('clip-l', the model expects 'chorus-demo'\); encode the"
    ):
        read_text(encode(clip, ""), "chorus-demo", "positive")


@torch.inference_mode()
def test_unsupported_conditioning_options_rejected(clip):
    cat = encode(clip, "a cat")
    area = host_nodes.ConditioningSetArea().append(cat, 64, 64, 0, 0, 1.0)[0]
    mask = host_nodes.ConditioningSetMask().append(cat, torch.ones(1, 8, 8), "default", 1.0)[0]
    times = host_nodes.ConditioningSetTimestepRange().set_range(cat, 0.0, 0.5)[0]
    for made, keys in (
        (area, "area, set_area_to_bounds, strength"),
        (mask, "mask, mask_strength, set_area_to_bounds"),
        (times, "end_percent, start_percent"),
        ([[cat[0][0], {**cat[0][1], "control": object(), "hooks": None}]], "control"),
    ):
        with pytest.raises(ValueError, match=f"positive: masked token models do not support {keys}; remove the nodes"):
            read_text(made, "clip-l", "positive")


def test_missing_pooled_output_rejected(clip):
    ((states, extras),) = encode(clip, "a cat")
    for pooled, complaint in (
        (None, "no pooled output"),
        (extras["pooled_output"].expand(2, -1), "has 3 prompts but 2 pooled outputs"),
    ):
        with pytest.raises(ValueError, match=complaint):
            read_text([[states.expand(3, -1, -1), {**extras, "pooled_output": pooled}]], "clip-l", "positive")


def test_empty_conditioning_rejected():
    with pytest.raises(ValueError, match="positive: this conditioning has no prompt"):
        read_text([], "clip-l", "positive")
