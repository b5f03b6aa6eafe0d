"""Model files under published names, with small random networks, and what a ComfyUI process needs to load them.

ComfyUI recognises a published file by its sizes, and some sizes are fixed in its code. A file of this module therefore
has an additional tensor, ``MARK``, that names the network; ``install`` makes ComfyUI read it. Everything else is
ComfyUI's own: its loader nodes, its classes, the keys of the files, its tokenizers.

``NODE`` is the code of a custom node that does both in a server; ``server`` starts one.
"""

import dataclasses
import io
from pathlib import Path
from pkgutil import resolve_name

import comfy.clip_vision
import comfy.ldm.wan.vae
import comfy.model_detection
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.taesd.taesd
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_vl
import comfy.text_encoders.t5
import safetensors.torch
import torch

from chorus.dev.tools.setup import ROOT
from chorus.tests.families.catalogue import FAMILIES
from chorus.tests.families.family import fill
from chorus.tests.support.real_comfyui import fresh_server

MARK = "chorus_small_network"  # uint8 [n], the name of the network
NODE = """
import importlib.util, pathlib, sys
root = pathlib.Path({root!r})
spec = importlib.util.spec_from_file_location("chorus", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["chorus"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["chorus"])
from chorus.tests.support import small_files
small_files.install()
small_files.write(pathlib.Path({models!r}), {names!r})
NODE_CLASS_MAPPINGS = {{}}
"""
WIDTH = 64  # of text encoders; that of each of the two text encoders of SDXL is the half
LLAMA = dict(
    hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1
)
T5 = dict(d_model=WIDTH, d_ff=WIDTH, num_layers=2, num_heads=2, d_kv=32)
CLIP = dict(hidden_size=WIDTH // 2, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=2)
VISION = dict(
    num_channels=3,
    hidden_act="gelu_pytorch_tanh",
    hidden_size=32,
    image_size=56,
    intermediate_size=64,
    model_type="siglip_vision_model",
    num_attention_heads=2,
    num_hidden_layers=2,
    patch_size=14,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
)
SMALL_FAMILIES = {
    **{name: FAMILIES[name] for name in ("ZImage", "Chroma", "Anima", "QwenImage", "WAN21_T2V")},
    "SDXL": dataclasses.replace(
        FAMILIES["SDXL"], config={**FAMILIES["SDXL"].config, "adm_in_channels": 1536 + CLIP["hidden_size"]}
    ),
}


def marked(state_dict, name):
    """A copy of ``state_dict`` in float16, with the name of its network."""
    found = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state_dict.items()}
    return found | {MARK: torch.frombuffer(bytearray(name.encode()), dtype=torch.uint8)}


def mark_of(state_dict):
    """The name of a file's network, or None for any other file."""
    found = state_dict.get(MARK)
    return None if found is None else bytes(found.tolist()).decode()


# ---- what ComfyUI reads of a file ----------------------------------------------------------------------------------


def install():
    """Let ComfyUI load the files of this module, and make its text encoders small."""
    config_of, encoder_of = comfy.model_detection.model_config_from_unet, comfy.sd.detect_te_model
    vision_of = comfy.clip_vision.load_clipvision_from_sd

    def model_config_from_unet(state_dict, *args, **kwargs):
        if (name := mark_of(state_dict)) is None:
            return config_of(state_dict, *args, **kwargs)
        family = SMALL_FAMILIES[name]
        config = getattr(comfy.supported_models, family.class_name)(dict(family.config))
        config.unet_config.update(family.config)
        return config

    def detect_te_model(sd):
        name = mark_of(sd)
        return encoder_of(sd) if name is None else comfy.sd.TEModel[name]

    def load_clipvision_from_sd(state_dict, *args, **kwargs):
        if mark_of(state_dict) is None:
            return vision_of(state_dict, *args, **kwargs)
        vision = comfy.clip_vision.ClipVisionModel(dict(VISION))
        vision.load_sd(state_dict)
        return vision

    comfy.model_detection.model_config_from_unet = model_config_from_unet
    comfy.sd.detect_te_model = detect_te_model
    comfy.clip_vision.load_clipvision_from_sd = load_clipvision_from_sd
    _shrink_text_encoders()
    for family in SMALL_FAMILIES.values():
        for path, part in family.smaller.items():
            module, _, attribute = path.rpartition(".")
            setattr(resolve_name(module), attribute, part)


def _shrink_text_encoders():
    create = comfy.sd1_clip.SDClipModel.__init__

    def small(self, *args, **kwargs):
        network = kwargs.get("model_class", comfy.clip_model.CLIPTextModel)
        sizes = T5 if network is comfy.text_encoders.t5.T5 else LLAMA
        sizes = CLIP if network is comfy.clip_model.CLIPTextModel else sizes

        def smaller(config, *rest):
            return network({**config, **sizes}, *rest)

        create(self, *args, **{**kwargs, "model_class": smaller})

    comfy.sd1_clip.SDClipModel.__init__ = small
    vision = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer
    comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer = lambda **options: vision(
        **{**options, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_layers": 1}
    )


# ---- the files -----------------------------------------------------------------------------------------------------


def diffusion_model(name, seed):
    return marked(SMALL_FAMILIES[name].model(seed).model.diffusion_model.state_dict(), name)


def clip_of(name, kind, extra):
    """A CLIP object with random weights."""
    clip = comfy.sd.load_text_encoder_state_dicts(
        [marked(extra, name)], clip_type=comfy.sd.CLIPType[kind], disable_dynamic=True
    )
    fill(clip.cond_stage_model, 1)
    return clip


def text_encoder(name, kind, extra=dict):
    """The file of the text encoder ``name`` (a comfy.sd.TEModel). ``kind``: a comfy.sd.CLIPType that loads it."""
    extra = extra()
    model = clip_of(name, kind, extra).cond_stage_model
    (network,) = (module for module in model.modules() if isinstance(module, comfy.sd1_clip.SDClipModel))
    return marked(network.transformer.state_dict(), name) | extra


def sentence_pieces():
    """A sentencepiece model of few words, which the file of Wan's text encoder contains."""
    import sentencepiece

    words = (
        "a red fox runs through fresh snow in the morning light still image blurry overexposed deformed walking".split()
    )
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 20),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return {"spiece_model": torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)}


def small_vae(channels):
    """A TAESD, which ComfyUI loads as a VAE, for images."""
    vae = comfy.taesd.taesd.TAESD(latent_channels=channels)
    fill(vae, 2)
    vae.vae_scale.data.fill_(1.0)
    vae.vae_shift.data.fill_(0.0)
    return {k: v.contiguous() for k, v in vae.state_dict().items()}


def video_vae():
    """A Wan 2.1 VAE of 8 channels instead of 96."""
    sizes = dict(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0)
    vae = comfy.ldm.wan.vae.WanVAE(**sizes, temperal_downsample=[False, True, True])
    fill(vae, 2)
    return vae.state_dict()


def vision_model():
    vision = comfy.clip_vision.ClipVisionModel(dict(VISION))
    fill(vision.model, 3)
    return marked(vision.get_sd(), "vision")


def checkpoint(path, seed):
    """Write a checkpoint of SDXL with its text encoders and VAE."""
    model = SMALL_FAMILIES["SDXL"].model(seed)
    target = model.model.model_config.clip_target()
    clip = comfy.sd.CLIP(target, tokenizer_data={}, disable_dynamic=True)
    fill(clip.cond_stage_model, seed)
    vae = comfy.sd.VAE(sd=small_vae(4))
    comfy.sd.save_checkpoint(str(path), model, clip, vae, extra_keys={MARK: marked({}, "SDXL")[MARK]})


FILES = {
    "checkpoints/Illustrious-XL-v0.1.safetensors": 1,
    "checkpoints/RealVisXL_V5.0_fp16.safetensors": 2,
    "checkpoints/sd_xl_base_1.0.safetensors": 3,
    "diffusion_models/z_image_bf16.safetensors": lambda: diffusion_model("ZImage", 1),
    "diffusion_models/z_image_turbo_bf16.safetensors": lambda: diffusion_model("ZImage", 2),
    "diffusion_models/Chroma1-HD-fp8mixed.safetensors": lambda: diffusion_model("Chroma", 1),
    "diffusion_models/anima-base-v1.0.safetensors": lambda: diffusion_model("Anima", 1),
    "diffusion_models/qwen_image_2512_fp8_e4m3fn.safetensors": lambda: diffusion_model("QwenImage", 1),
    "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors": lambda: diffusion_model("WAN21_T2V", 1),
    "diffusion_models/wan2.1_t2v_14B_fp8_scaled.safetensors": lambda: diffusion_model("WAN21_T2V", 2),
    "text_encoders/qwen_3_4b.safetensors": lambda: text_encoder("QWEN3_4B", "LUMINA2"),
    "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors": lambda: text_encoder("T5_XXL", "CHROMA"),
    "text_encoders/qwen_3_06b_base.safetensors": lambda: text_encoder("QWEN3_06B", "STABLE_DIFFUSION"),
    "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors": lambda: text_encoder("QWEN25_7B", "QWEN_IMAGE"),
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors": lambda: text_encoder("T5_XXL", "WAN", sentence_pieces),
    "vae/ae.safetensors": lambda: small_vae(16),
    "vae/qwen_image_vae.safetensors": video_vae,
    "vae/wan_2.1_vae.safetensors": video_vae,
    "clip_vision/sigclip_vision_patch14_384.safetensors": vision_model,
}


@torch.no_grad()
def write(folder: Path, names):
    """Write the files ``names`` of ``FILES`` into the folder of models."""
    for name in names:
        path, make = folder / name, FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(make, int):
            checkpoint(path, make)
        else:
            safetensors.torch.save_file(make(), path)


def server(base, names):
    """A context with a new server that has the files ``names`` of ``FILES``, with its folders in ``base``."""
    (base / "custom_nodes").mkdir()
    node = NODE.format(root=str(ROOT), models=str(base / "models"), names=list(names))
    (base / "custom_nodes" / "small_files.py").write_text(node, encoding="utf-8")
    return fresh_server(base)
