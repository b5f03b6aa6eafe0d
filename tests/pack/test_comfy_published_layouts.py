"""Models of published sizes, without memory: LoRAs of the usual trainers, blends and heads accept them.

tests/dev/test_comfy_memory.py compares the layouts with those that ComfyUI detects; tests/masked_tokens/ has aMUSEd's.
"""

import comfy.model_base
import comfy.sd
import pytest
import torch

from chorus.dev.tools import memory
from chorus.host.patcher_differences import same_module
from chorus.techniques.saliency_blend.comfy_hook import blend_chain
from chorus.tests.support.heads import apply_head, head_for
from chorus.tests.support.tiny_models import blend

RANK = 4
KOHYA, PEFT, DIFFUSERS = ("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")
# model, trainer, names of the two matrices, layer -> the weight that it changes, without "diffusion_model."
LORAS = [
    (
        "SD 1.5",
        "kohya-ss",
        KOHYA,
        {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": "middle_block.1.transformer_blocks.0.ff.net.2",
        },
    ),
    (
        "SD 1.5",
        "diffusers",
        PEFT,
        {
            "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_v": "output_blocks.3.1.transformer_blocks.0.attn2.to_v"
        },
    ),
    (
        "SDXL",
        "kohya-ss",
        KOHYA,
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": "middle_block.1.transformer_blocks.9.ff.net.0.proj",
        },
    ),
    (
        "SDXL",
        "diffusers",
        PEFT,
        {
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_k": "input_blocks.4.1.transformer_blocks.0.attn1.to_k"
        },
    ),
    (
        "Flux.1 dev",
        "kohya-ss",
        KOHYA,
        {
            "lora_unet_double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn.qkv",
            "lora_unet_single_blocks_37_linear1": "single_blocks.37.linear1",
        },
    ),
    (
        "Flux.1 dev",
        "diffusers, ai-toolkit",
        PEFT,
        {
            "transformer.transformer_blocks.3.attn.to_out.0": "double_blocks.3.img_attn.proj",
            "transformer.single_transformer_blocks.5.norm.linear": "single_blocks.5.modulation.lin",
        },
    ),
    (
        "Z-Image",
        "ai-toolkit",
        PEFT,
        {
            "diffusion_model.layers.7.attention.out": "layers.7.attention.out",
            "diffusion_model.layers.7.feed_forward.w2": "layers.7.feed_forward.w2",
        },
    ),
    (
        "Qwen-Image",
        "diffusers, ai-toolkit",
        PEFT,
        {
            "transformer.transformer_blocks.11.attn.to_q": "transformer_blocks.11.attn.to_q",
            "transformer.transformer_blocks.11.img_mlp.net.2": "transformer_blocks.11.img_mlp.net.2",
        },
    ),
]
NAMES = list(dict.fromkeys(name for name, *_ in LORAS))


def published(name):
    """The MODEL without weights. Its noise levels are real, because nodes read them."""
    patcher = memory.built(name, "16 bit")
    model = patcher.model
    model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)
    return patcher


def lora_file(model, names, layers):
    """A LoRA file for these layers, in the layout of a trainer."""
    weights = model.model.state_dict()
    found = {}
    for layer, target in layers.items():
        out, width = weights[f"diffusion_model.{target}.weight"].shape[:2]
        found[f"{layer}.{names[0]}.weight"] = torch.zeros(RANK, width)
        found[f"{layer}.{names[1]}.weight"] = torch.zeros(out, RANK)
        found[f"{layer}.alpha"] = torch.tensor(float(RANK))
    return found


@pytest.mark.parametrize(
    "name, trainer, names, layers", LORAS, ids=[f"{name}, {trainer}" for name, trainer, *_ in LORAS]
)
def test_lora_of_a_trainer_makes_an_expert_of_the_same_checkpoint(name, trainer, names, layers):
    base = published(name)
    expert, _ = comfy.sd.load_lora_for_models(base, None, lora_file(base, names, layers), 1.0, 0.0)
    changed = {key if isinstance(key, str) else key[0] for key in expert.patches}
    assert changed == {f"diffusion_model.{target}.weight" for target in layers.values()}
    (attached,) = blend_chain(blend(base, expert)[0]).experts
    assert attached.patcher.model is base.model  # the weights are not loaded a second time
    assert not same_module(attached.patcher, base)


@pytest.mark.parametrize("name", NAMES)
def test_head_fits_the_published_model(name):
    model = published(name)
    head = head_for(model)
    patched = apply_head(model, head)
    assert patched.attachments and head.config.channels == model.model.latent_format.latent_channels


@pytest.mark.parametrize("name", NAMES)
def test_head_of_another_latent_space_rejected(name):
    other = "SDXL" if name != "SDXL" else "SD 1.5"
    with pytest.raises(ValueError, match="the head was trained on"):
        apply_head(published(name), head_for(published(other)))
