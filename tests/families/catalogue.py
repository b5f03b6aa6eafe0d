"""The small models: one or more of each class in ComfyUI's ``supported_models.models``.

If a class is missing here, a test fails and names it. NOT_BUILT lists classes without a small model, with the reason.
"""

import comfy.ldm.ace.model
import comfy.ldm.anima.model
import comfy.ldm.audio.embedders
import comfy.ldm.wan.model
import comfy.nested_tensor
import comfy.supported_models
import torch

from chorus.tests.families.family import Family, audio, image, random, text, video

NOT_BUILT = {
    "RT_DETR_v4": "a detector, not a generative model",
    "SAM3": "a segmentation model, not a generative model",
    "SAM31": "a segmentation model, not a generative model",
    "DepthAnything3": "a depth estimator, not a generative model",
}
FAMILIES: dict[str, Family] = {}


def add(name, config, prompt, latent, **options):
    FAMILIES[name] = Family(name=name, config=config, prompt=prompt, latent=latent, **options)


def concat(*shape):
    """Function of a seed that returns a random tensor for the conditioning, such as an image. It ignores the seed."""
    return lambda seed: random(77, *shape)


def zeros(*shape):
    return torch.zeros(*shape)


ADAPTER, AUDIO_PROJECTION = comfy.ldm.anima.model.LLMAdapter, comfy.ldm.wan.model.AudioProjModel
LYRICS = comfy.ldm.ace.model.LyricEncoder
MASK = torch.ones(1, 6, dtype=torch.long)  # attention mask of a prompt of 6 tokens

# ---- UNets ----------------------------------------------------------------------------------------------------------
UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1, 1],
    channel_mult=(1, 2),
    transformer_depth=[0, 1],
    transformer_depth_middle=1,
    transformer_depth_output=[0, 0, 1, 1],
    context_dim=64,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    num_heads=4,
    num_head_channels=-1,
    legacy=False,
)
LINEAR = dict(use_linear_in_transformer=True)
XL = dict(**LINEAR, adm_in_channels=1536 + 64, num_classes="sequential")


def unet(name, prompt, latent=None, config=None, **options):
    add(name, {**UNET, **(config or {})}, prompt, latent or image(4), **options)


unet("SD15", text(64))
unet("SD15 inpaint", text(64), config=dict(in_channels=9))
unet("SD15_instructpix2pix", text(64, concat_latent_image=concat(1, 4, 8, 8)), config=dict(in_channels=8))
unet("SD20", text(64), config=LINEAR)
unet("SD20 v-prediction", text(64), config=LINEAR, prediction="V_PREDICTION")
for letter, width in (("L", 1536), ("H", 2048)):
    unet(f"SD21Unclip{letter}", text(64), config=dict(LINEAR, adm_in_channels=width, num_classes="sequential"))
unet("SDXL", text(64, pooled=64), config=XL)
SDXL_FILES = {
    "v-prediction": lambda: {"v_pred": zeros(0)},
    "v-prediction, zero SNR": lambda: {"v_pred": zeros(0), "ztsnr": zeros(0)},
    "EDM v-prediction": lambda: {"edm_vpred.sigma_max": torch.tensor(120.0)},
    "EDM": lambda: {"edm_mean": zeros(1), "edm_std": torch.ones(1)},
}
for variant, files in SDXL_FILES.items():
    unet(f"SDXL {variant}", text(64, pooled=64), config=XL, files=files)
unet("SDXL inpaint", text(64, pooled=64), config=dict(XL, in_channels=9))
unet(
    "SDXL_instructpix2pix",
    text(64, pooled=64, concat_latent_image=concat(1, 4, 8, 8)),
    config=dict(XL, in_channels=8),
    files=SDXL_FILES["EDM v-prediction"],
)
unet("SDXLRefiner", text(64, pooled=64), config=dict(XL, adm_in_channels=1280 + 64))
for name in ("SSD1B", "KOALA_700M", "KOALA_1B", "Segmind_Vega"):
    unet(name, text(64, pooled=64), config=XL)
unet("LotusD", text(64), config=dict(LINEAR, adm_in_channels=4, num_classes="sequential"))
unet(
    "SD_X4Upscaler",
    text(64, concat_image=concat(1, 3, 8, 8)),
    config=dict(
        in_channels=7,
        use_linear_in_transformer=True,
        channel_mult=(1, 1, 2, 2),
        num_res_blocks=[1] * 4,
        transformer_depth=[0, 1, 1, 1],
        transformer_depth_output=[0, 0, 1, 1, 1, 1, 1, 1],
        num_classes=1000,
    ),
)
unet(
    "Stable_Zero123",
    text(64, tokens=1, concat_latent_image=concat(1, 4, 8, 8)),
    config=dict(in_channels=8, context_dim=768),
    files=lambda: {"cc_projection.weight": random(5, 768, 64) / 8, "cc_projection.bias": zeros(768)},
)
VIDEO_UNET = dict(
    LINEAR,
    in_channels=8,
    num_classes="sequential",
    use_temporal_resblock=True,
    use_temporal_attention=True,
    merge_strategy="learned_with_images",
    merge_factor=0.0,
    video_kernel_size=[3, 1, 1],
    extra_ff_mix_layer=True,
    disable_temporal_crossattention=False,
    max_ddpm_temb_period=10000,
)
for name, width in (("SVD_img2vid", 768), ("SV3D_u", 256), ("SV3D_p", 1280)):
    unet(
        name,
        text(64, tokens=1, concat_latent_image=concat(1, 4, 8, 8)),
        image(4, batch=3),
        config=dict(VIDEO_UNET, adm_in_channels=width),
    )

# ---- image transformers ---------------------------------------------------------------------------------------------
add(
    "SD3",
    dict(
        in_channels=16,
        patch_size=2,
        out_channels=16,
        depth=2,
        input_size=None,
        adm_in_channels=32,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": 64, "out_features": 128},
        },
        num_patches=64 * 64,
        pos_embed_max_size=64,
        pos_embed_scaling_factor=None,
        qk_norm="rms",
        x_block_self_attn_layers=[0],
    ),
    text(64, pooled=32),
    image(16),
)
add(
    "AuraFlow",
    dict(max_seq=32 * 32, cond_seq_dim=64, n_double_layers=1, n_layers=2, dim=64, n_heads=4, global_conddim=64),
    text(64),
    image(4),
)
PIXART = dict(
    num_heads=4,
    patch_size=2,
    hidden_size=96,
    in_channels=4,
    depth=2,
    model_max_length=8,
    input_size=32,
    pe_interpolation=1,
    caption_channels=64,
)
add(
    "PixArtAlpha",
    dict(PIXART, image_model="pixart_alpha", micro_condition=True),
    text(64, width=512, height=512),
    image(4, 34, 34),  # smaller images divide by zero in ComfyUI
)
add("PixArtSigma", dict(PIXART, image_model="pixart_sigma", micro_condition=False), text(64), image(4, 34, 34))
for name, model in (("HunyuanDiT", "hydit"), ("HunyuanDiT1", "hydit1")):
    add(
        name,
        dict(
            image_model=model,
            depth=2,
            hidden_size=64,
            num_heads=4,
            text_states_dim=64,
            text_states_dim_t5=48,
            text_len=6,
            text_len_t5=5,
            size_cond=model == "hydit1",
            use_style_cond=model == "hydit1",
        ),
        text(
            64,
            conditioning_mt5xl=lambda seed: random(seed + 5, 1, 5, 48),
            attention_mask=MASK,
            attention_mask_mt5xl=torch.ones(1, 5),
        ),
        image(4),
    )
FLUX = dict(
    image_model="flux",
    in_channels=16,
    out_channels=16,
    patch_size=2,
    vec_in_dim=32,
    context_in_dim=64,
    hidden_size=128,
    mlp_ratio=1.0,
    num_heads=1,
    depth=1,
    depth_single_blocks=1,
    axes_dim=[16, 56, 56],
    theta=10000,
    qkv_bias=True,
    guidance_embed=True,
    txt_ids_dims=[],
)
add("Flux", FLUX, text(64, pooled=32, guidance=3.5), image(16))
add(
    "Flux Kontext",
    FLUX,
    text(64, pooled=32, guidance=2.5, reference_latents=lambda seed: [random(77, 1, 16, 8, 8)]),
    image(16),
)
add("FluxSchnell", dict(FLUX, guidance_embed=False), text(64, pooled=32), image(16))
add(
    "FluxInpaint",
    dict(FLUX, in_channels=96),
    text(
        64,
        pooled=32,
        guidance=30.0,
        concat_latent_image=concat(1, 16, 8, 8),
        concat_mask=lambda seed: (random(78, 1, 1, 64, 64) > 0).float(),
    ),
    image(16),
)
add("LongCatImage", dict(FLUX, guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]), text(64), image(16))
FLUX2 = dict(
    FLUX,
    image_model="flux2",
    in_channels=128,
    out_channels=128,
    patch_size=1,
    vec_in_dim=None,
    axes_dim=[32, 32, 32, 32],
    theta=2000,
    qkv_bias=False,
    txt_ids_dims=[3],
    global_modulation=True,
    mlp_silu_act=True,
    ops_bias=False,
    default_ref_method="index",
    ref_index_scale=10.0,
)
add("Flux2", FLUX2, text(64, guidance=4.0), image(128))
add(
    "Flux2 reference image",
    FLUX2,
    text(64, guidance=4.0, reference_latents=lambda seed: [random(77, 1, 128, 8, 8)]),
    image(128),
)
CHROMA = dict(
    FLUX,
    image_model="chroma",
    in_channels=64,
    out_channels=64,
    vec_in_dim=None,
    in_dim=64,
    out_dim=128,
    hidden_dim=64,
    n_layers=1,
)
del CHROMA["guidance_embed"]
add("Chroma", CHROMA, text(64), image(16))
add(
    "ChromaRadiance",
    dict(
        CHROMA,
        image_model="chroma_radiance",
        in_channels=3,
        out_channels=3,
        patch_size=16,
        nerf_hidden_size=16,
        nerf_mlp_ratio=1,
        nerf_depth=1,
        nerf_max_freqs=4,
        nerf_tile_size=512,
        nerf_final_head_type="conv",
        nerf_embedder_dtype=torch.float32,
        use_x0=False,
        use_sequential_txt_ids=False,
    ),
    text(64),
    image(3, 32, 32),
)
add(
    "HiDream",
    dict(
        image_model="hidream",
        attention_head_dim=32,
        axes_dims_rope=[16, 8, 8],
        caption_channels=[64, 48],
        max_resolution=[128, 128],
        in_channels=16,
        llama_layers=[0, 1],
        num_attention_heads=2,
        num_routed_experts=4,
        num_activated_experts=2,
        num_layers=1,
        num_single_layers=1,
        out_channels=16,
        patch_size=2,
        text_emb_dim=32,
    ),
    text(64, pooled=32, conditioning_llama3=lambda seed: random(seed + 5, 1, 2, 6, 48)),
    image(16),
)
add(
    "HiDreamO1",
    dict(
        image_model="hidream_o1",
        text_config_overrides=dict(
            vocab_size=151936 // 16,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            rope_dims=[6, 5, 5],
        ),
        vision_config_overrides=dict(
            hidden_size=32, num_heads=2, intermediate_size=32, depth=1, num_position_embeddings=16
        ),
    ),
    text(64, text_input_ids=lambda seed: torch.randint(1, 9000, (1, 6), generator=torch.Generator().manual_seed(seed))),
    image(3, 64, 64),
)
LUMINA = dict(
    image_model="lumina2",
    patch_size=2,
    in_channels=16,
    dim=96,
    cap_feat_dim=64,
    n_layers=1,
    n_refiner_layers=1,
    qk_norm=True,
    n_heads=2,
    n_kv_heads=2,
    axes_dims=[16, 16, 16],
    axes_lens=[300, 512, 512],
    rope_theta=10000.0,
    ffn_dim_multiplier=1.0,
)
add("Lumina2", LUMINA, text(64, attention_mask=MASK), image(16))
Z_IMAGE = dict(LUMINA, dim=256, axes_dims=[32, 48, 48], z_image_modulation=True, time_scale=1000.0, rope_theta=256.0)
add("ZImage", dict(Z_IMAGE, pad_tokens_multiple=32), text(64, attention_mask=MASK), image(16))
add(
    "ZImagePixelSpace",
    dict(
        Z_IMAGE,
        image_model="zimage_pixel",
        patch_size=16,
        in_channels=3,
        decoder_hidden_size=32,
        decoder_num_res_blocks=1,
        decoder_max_freqs=2,
        decoder_in_channels=768,
    ),
    text(64, attention_mask=MASK),
    image(3, 32, 32),
)
QWEN = dict(
    image_model="qwen_image",
    patch_size=2,
    in_channels=64,
    out_channels=16,
    num_layers=1,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=64,
    pooled_projection_dim=32,
    axes_dims_rope=(8, 12, 12),
)
add("QwenImage", QWEN, text(64), image(16))
add(
    "QwenImage edit",
    QWEN,
    text(64, reference_latents=lambda seed: [random(77, 1, 16, 1, 8, 8)]),
    image(16),
)
add(
    "MageFlow",
    dict(
        image_model="mage_flow",
        in_channels=128,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    ),
    text(64),
    image(128),
)
add(
    "Omnigen2",
    dict(
        image_model="omnigen2",
        axes_dim_rope=[8, 12, 12],
        axes_lens=[1024, 1664, 1664],
        ffn_dim_multiplier=None,
        hidden_size=64,
        in_channels=16,
        multiple_of=16,
        norm_eps=1e-5,
        num_attention_heads=2,
        num_kv_heads=1,
        num_layers=1,
        num_refiner_layers=1,
        out_channels=None,
        patch_size=2,
        text_feat_dim=64,
        timestep_scale=1000.0,
    ),
    text(64, attention_mask=MASK),
    image(16),
)
add(
    "Boogu",
    dict(
        image_model="boogu",
        hidden_size=120,
        num_layers=1,
        num_double_stream_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=8,
        instruction_feat_dim=64,
    ),
    text(64, attention_mask=MASK),
    image(16),
)
add(
    "JoyImage",
    dict(image_model="joyimage", hidden_size=128, num_attention_heads=1, text_dim=64, num_layers=1),
    text(64),
    image(16),
)
add(
    "Ideogram4",
    dict(
        image_model="ideogram4",
        in_channels=128,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=128,
        intermediate_size=64,
        adaln_dim=32,
        llm_features_dim=64,
    ),
    text(64),
    image(128),
)
add(
    "Krea2",
    dict(
        image_model="krea2",
        features=128,
        channels=16,
        patch=2,
        layers=1,
        heads=1,
        kvheads=1,
        txtlayers=2,
        txtdim=64,
        txtheads=2,
        txtkvheads=2,
        tdim=32,
        multiplier=1,
    ),
    text(128),
    image(16),
)
add(
    "Lens",
    dict(
        image_model="lens",
        in_channels=128,
        out_channels=32,
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        enc_hidden_dim=64,
        multi_layer_encoder_feature=False,
        selected_layer_index=(0,),
    ),
    text(64),
    image(128),
)
add(
    "ErnieImage",
    dict(
        image_model="ernie_image",
        hidden_size=128,
        num_attention_heads=1,
        num_layers=1,
        ffn_hidden_size=64,
        text_in_dim=64,
    ),
    text(64),
    image(128),
)
PIXEL_DIT = dict(
    num_groups=2,
    hidden_size=64,
    pixel_hidden_size=4,
    pixel_attn_hidden_size=64,
    pixel_num_groups=2,
    patch_depth=1,
    pixel_depth=1,
    txt_embed_dim=64,
    txt_max_length=8,
)
add("PixelDiTT2I", dict(PIXEL_DIT, image_model="pixeldit_t2i"), text(64), image(3, 32, 32))
add(
    "PiD",
    dict(PIXEL_DIT, image_model="pid", lq_hidden_dim=32, lq_num_res_blocks=1),
    text(64, lq_latent=concat(1, 16, 2, 2), degrade_sigma=torch.tensor([0.3])),
    image(3, 32, 32),
)

# ---- cascades -------------------------------------------------------------------------------------------------------
add(
    "Stable_Cascade_C",
    dict(
        stable_cascade_stage="c",
        c_cond=64,
        c_hidden=[64, 64],
        nhead=[4, 4],
        blocks=[[1, 1], [1, 1]],
        c_clip_text=64,
        c_clip_text_pooled=64,
        c_clip_img=768,
    ),
    text(64, pooled=64),
    image(16),
)
add(
    "Stable_Cascade_B",
    dict(
        stable_cascade_stage="b",
        c_cond=64,
        c_hidden=[32, 32, 64, 64],
        nhead=[-1, -1, 4, 4],
        blocks=[[1, 1, 1, 1], [1, 1, 1, 1]],
        block_repeat=[[1, 1, 1, 1], [1, 1, 1, 1]],
        c_clip=64,
    ),
    text(64, pooled=64, stable_cascade_prior=concat(1, 16, 4, 4)),
    image(4, 16, 16),
)

# ---- video ----------------------------------------------------------------------------------------------------------
WAN = dict(
    image_model="wan2.1",
    model_type="t2v",
    dim=128,
    out_dim=16,
    num_heads=1,
    ffn_dim=128,
    num_layers=1,
    patch_size=(1, 2, 2),
    freq_dim=64,
    window_size=(-1, -1),
    qk_norm=True,
    cross_attn_norm=True,
    eps=1e-6,
    in_dim=16,
    text_dim=64,
    text_len=8,
)
FRAME = dict(reference_latents=lambda seed: [random(77, 1, 16, 1, 8, 8)])
add("WAN21_T2V", WAN, text(64), video(16))
add("WAN21_T2V one frame", WAN, text(64), video(16, frames=1))
add("WAN21_CausalAR_T2V", WAN, text(64), video(16))
add(
    "WAN21_I2V",
    dict(WAN, model_type="i2v", in_dim=36),
    text(64, concat_latent_image=concat(1, 16, 2, 8, 8), concat_mask=torch.ones(1, 1, 2, 8, 8)),
    video(16),
)
add(
    "WAN21_FunControl2V",
    dict(WAN, in_dim=48),
    text(64, concat_latent_image=concat(1, 32, 2, 8, 8)),
    video(16),
)
add(
    "WAN21_Vace",
    dict(WAN, model_type="vace", vace_in_dim=96, vace_layers=1),
    text(
        64,
        vace_frames=lambda seed: [random(77, 1, 32, 2, 8, 8)],
        vace_mask=lambda seed: [torch.ones(1, 64, 2, 8, 8)],
        vace_strength=[1.0],
    ),
    video(16),
)
add(
    "WAN21_Camera",
    dict(WAN, model_type="camera", in_dim=32),
    text(64, concat_latent_image=concat(1, 16, 2, 8, 8), camera_conditions=lambda seed: random(79, 1, 24, 2, 64, 64)),
    video(16),
)
add(
    "WAN22_Camera",
    dict(WAN, model_type="camera_2.2", in_dim=36),
    text(64, concat_latent_image=concat(1, 16, 2, 8, 8), camera_conditions=lambda seed: random(79, 1, 24, 2, 64, 64)),
    video(16),
)
add(
    "WAN22_S2V",
    dict(WAN, model_type="s2v", audio_dim=32, num_audio_token=2, audio_inject_layers=[0]),
    text(64, **FRAME),
    video(16),
)
add(
    "WAN21_HuMo",
    dict(WAN, model_type="humo"),
    text(64, **FRAME, audio_embed=lambda seed: random(79, 1, 5, 8, 5, 1280)),
    video(16),
    smaller={
        "comfy.ldm.wan.model.AudioProjModel": lambda **sizes: AUDIO_PROJECTION(**{**sizes, "intermediate_dim": 16})
    },
)
add(
    "WAN22_Animate",
    dict(WAN, model_type="animate", in_dim=36),
    text(64, concat_latent_image=concat(1, 16, 2, 8, 8), pose_video_latent=concat(1, 16, 1, 8, 8)),
    video(16),
    smaller={  # these two parts only encode faces
        f"comfy.ldm.wan.model_animate.{part}": lambda **sizes: torch.nn.Identity()
        for part in ("Generator", "FaceEncoder")
    },
)
add("WAN22_T2V", dict(WAN, out_dim=48, in_dim=48), text(64), video(48))
add("WAN21_FlowRVS", dict(WAN, model_type="flow_rvs"), text(64), video(16))
SCAIL = dict(**FRAME, pose_video_latent=concat(1, 16, 2, 4, 4))
add("WAN21_SCAIL", dict(WAN, model_type="scail", in_dim=20), text(64, **SCAIL), video(16))
add("WAN21_SCAIL2", dict(WAN, model_type="scail2", in_dim=20), text(64, **SCAIL), video(16))
add(
    "WAN22_WanDancer",
    dict(
        WAN,
        model_type="wandancer",
        in_dim=36,
        audio_inject_layers=[0],
        music_dim=64,
        music_heads=2,
        music_latent_dim=64,
    ),
    text(
        64,
        concat_latent_image=concat(1, 16, 2, 8, 8),
        concat_mask=torch.ones(1, 1, 2, 8, 8),
        audio_embed=lambda seed: random(79, 1, 6, 35),
        fps=30,
    ),
    video(16),
)
LTXV = dict(num_layers=1, attention_head_dim=12, num_attention_heads=4, cross_attention_dim=48, caption_channels=64)
add("LTXV", dict(LTXV, image_model="ltxv"), text(64, attention_mask=MASK, frame_rate=25), video(128, 2, 4, 4))


def nested(*shapes):
    return lambda: {"samples": comfy.nested_tensor.NestedTensor([torch.zeros(1, *shape) for shape in shapes])}


add(
    "LTXAV",
    dict(
        LTXV,
        image_model="ltxav",
        audio_attention_head_dim=12,
        audio_num_attention_heads=4,
        audio_cross_attention_dim=48,
        connector_num_attention_heads=2,
        connector_attention_head_dim=32,
        connector_num_layers=1,
    ),
    text(64 * 2, attention_mask=MASK, frame_rate=25),
    nested((128, 2, 4, 4), (8, 5, 16)),
)


def fill_rope(network, seed):
    inverse = network.diffusion_model.rope.inv_freq
    inverse.data.copy_(1.0 / 10000 ** (torch.arange(len(inverse)) / len(inverse)))


add(
    "MiniMaxH3",
    dict(
        image_model="minimax_h3",
        hidden_size=128,
        num_layers=1,
        token_refiner_num_layers=1,
        num_attention_heads=1,
        attention_head_dim=128,
        ffn_hidden_size=64,
        text_dim=64,
        timestep_input_dim=32,
        time_embed_hidden_size=64,
        time_embed_dim=64,
    ),
    text(64),
    nested((24, 2, 4, 4), (32, 2, 5)),
    after=fill_rope,
)
HUNYUAN = dict(
    image_model="hunyuan_video",
    in_channels=16,
    patch_size=[1, 2, 2],
    out_channels=16,
    vec_in_dim=32,
    axes_dim=[16, 56, 56],
    context_in_dim=64,
    hidden_size=128,
    mlp_ratio=1.0,
    num_heads=1,
    depth=1,
    depth_single_blocks=1,
    theta=256,
    qkv_bias=True,
    byt5=False,
    guidance_embed=True,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow=False,
    meanflow_sum=False,
)
PLAIN_HUNYUAN = dict(HUNYUAN, vec_in_dim=None, guidance_embed=False)
add("HunyuanVideo", HUNYUAN, text(64, pooled=32, guidance=6.0), video(16))
add(
    "HunyuanVideoI2V",
    dict(HUNYUAN, in_channels=33),
    text(
        64,
        pooled=32,
        guidance=6.0,
        concat_latent_image=concat(1, 16, 2, 8, 8),
        concat_mask=torch.ones(1, 1, 2, 8, 8),
    ),
    video(16),
)
add(
    "HunyuanVideoSkyreelsI2V",
    dict(HUNYUAN, in_channels=32),
    text(64, pooled=32, guidance=6.0, concat_latent_image=concat(1, 16, 2, 8, 8)),
    video(16),
)
add("HunyuanVideo15", dict(PLAIN_HUNYUAN, in_channels=65, out_channels=32), text(64, pooled_output=None), video(32))
add(
    "HunyuanVideo15_SR_Distilled",
    dict(PLAIN_HUNYUAN, in_channels=98, out_channels=32),
    text(64, pooled_output=None, concat_latent_image=concat(1, 66, 2, 8, 8)),
    video(32),
)
add(
    "HunyuanImage21",
    dict(PLAIN_HUNYUAN, in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[64, 64]),
    text(64, attention_mask=MASK),
    image(64),
)
add(
    "HunyuanImage21Refiner",
    dict(PLAIN_HUNYUAN, in_channels=128, out_channels=64, patch_size=[1, 1, 1]),
    text(64, attention_mask=MASK, concat_latent_image=concat(1, 32, 1, 8, 8)),
    video(32, frames=1),
)
COSMOS = dict(
    image_model="cosmos",
    max_img_h=240,
    max_img_w=240,
    max_frames=128,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=64,
    block_config="FA-CA-MLP",
    concat_padding_mask=True,
    pos_emb_cls="rope3d",
    pos_emb_learnable=False,
    pos_emb_interpolation="crop",
    block_x_format="THWBD",
    affline_emb_norm=True,
    use_adaln_lora=True,
    adaln_lora_dim=16,
    num_blocks=1,
    num_heads=2,
    extra_per_block_abs_pos_emb=True,
    extra_per_block_abs_pos_emb_type="learnable",
    rope_t_extrapolation_ratio=2.0,
    crossattn_emb_channels=64,
)
add("CosmosT2V", COSMOS, text(64, attention_mask=MASK), video(16))
add("CosmosI2V", dict(COSMOS, in_channels=17), text(64), video(16))
COSMOS2 = dict(
    image_model="cosmos_predict2",
    max_img_h=240,
    max_img_w=240,
    max_frames=128,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=64,
    concat_padding_mask=True,
    crossattn_emb_channels=64,
    pos_emb_cls="rope3d",
    pos_emb_learnable=True,
    pos_emb_interpolation="crop",
    min_fps=1,
    max_fps=30,
    use_adaln_lora=True,
    adaln_lora_dim=16,
    num_blocks=1,
    num_heads=2,
    extra_per_block_abs_pos_emb=False,
    rope_h_extrapolation_ratio=4.0,
    rope_w_extrapolation_ratio=4.0,
    rope_t_extrapolation_ratio=1.0,
    rope_enable_fps_modulation=False,
)
add("CosmosT2IPredict2", COSMOS2, text(64), image(16))
add("CosmosI2VPredict2", dict(COSMOS2, in_channels=17), text(64), video(16))
add(
    "Anima",
    dict(COSMOS2, image_model="anima"),
    text(64),
    image(16),
    smaller={"comfy.ldm.anima.model.LLMAdapter": lambda **options: ADAPTER(64, 64, 64, 1, 2, **options)},
)
add(
    "GenmoMochi",
    dict(
        image_model="mochi_preview",
        depth=2,
        patch_size=2,
        num_heads=2,
        hidden_size_x=48,
        hidden_size_y=24,
        mlp_ratio_x=256.0,
        mlp_ratio_y=256.0,
        learn_sigma=False,
        in_channels=12,
        qk_norm=True,
        qkv_bias=False,
        out_bias=True,
        attn_drop=0.0,
        patch_embed_bias=True,
        posenc_preserve_area=True,
        timestep_mlp_bias=True,
        attend_to_padding=False,
        timestep_scale=1000.0,
        use_t5=True,
        t5_feat_dim=64,
        t5_token_length=6,
        rope_theta=10000.0,
    ),
    text(64, attention_mask=MASK),
    video(12),
)
KANDINSKY = dict(
    image_model="kandinsky5",
    in_text_dim=64,
    in_text_dim2=32,
    time_dim=32,
    model_dim=128,
    ff_dim=64,
    visual_embed_dim=132,
    num_text_blocks=1,
    num_visual_blocks=1,
    axes_dims=(32, 48, 48),
)
add("Kandinsky5", KANDINSKY, text(64, pooled=32, attention_mask=MASK), video(16))
add(
    "Kandinsky5Image",
    dict(KANDINSKY, visual_embed_dim=64, rope_scale_factor=(1.0, 1.0, 1.0)),
    text(64, pooled=32),
    image(16),
)
COG = dict(
    image_model="cogvideox",
    num_attention_heads=2,
    attention_head_dim=64,
    time_embed_dim=32,
    num_layers=1,
    in_channels=16,
    out_channels=16,
    patch_size=2,
    text_embed_dim=64,
    use_learned_positional_embeddings=False,
    use_rotary_positional_embeddings=True,
    max_text_seq_length=6,
)
add("CogVideoX_T2V", COG, text(64), video(16))
add("CogVideoX_I2V", dict(COG, in_channels=32), text(64, concat_latent_image=concat(1, 16, 2, 8, 8)), video(16))
add("CogVideoX_Inpaint", dict(COG, in_channels=48), text(64, concat_latent_image=concat(1, 32, 2, 8, 8)), video(16))


def fill_seedvr(network, seed):
    for index, name in enumerate(("positive_conditioning", "negative_conditioning")):
        buffer = getattr(network.diffusion_model, name)
        buffer.data.copy_(random(seed + index, *buffer.shape))


add(
    "SeedVR2",
    dict(
        image_model="seedvr2",
        norm_eps=1e-5,
        num_layers=2,
        mlp_type="normal",
        vid_dim=64,
        txt_in_dim=64,
        heads=2,
        head_dim=32,
        mm_layers=1,
        expand_ratio=1,
        rope_dim=24,
    ),
    text(64, condition=concat(1, 17, 2, 8, 8)),
    video(16),
    after=fill_seedvr,
)

# ---- audio and three dimensions -------------------------------------------------------------------------------------
add(
    "ACEStep",
    dict(
        audio_model="ace",
        attention_head_dim=32,
        in_channels=8,
        inner_dim=64,
        max_height=16,
        max_position=512,
        max_width=512,
        mlp_ratio=1.0,
        num_attention_heads=2,
        num_layers=1,
        out_channels=8,
        patch_size=[16, 1],
        rope_theta=1000000.0,
        speaker_embedding_dim=512,
        text_embedding_dim=64,
        ssl_encoder_depths=[1, 1],
        ssl_latent_dims=[32, 32],
        ssl_names=["mert", "m-hubert"],
        lyric_encoder_vocab_size=50,
        lyric_hidden_size=128,
    ),
    text(
        64,
        conditioning_lyrics=lambda seed: torch.randint(1, 49, (1, 5), generator=torch.Generator().manual_seed(seed)),
    ),
    audio(8, 16, 12),
    smaller={
        "comfy.ldm.ace.model.LyricEncoder": lambda **sizes: LYRICS(
            **sizes, output_size=128, attention_heads=2, linear_units=64, num_blocks=1
        )
    },
)
add(
    "ACEStep15",
    dict(
        audio_model="ace1.5",
        hidden_size=64,
        intermediate_size=64,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        encoder_hidden_size=64,
        encoder_num_heads=2,
        encoder_intermediate_size=64,
        num_dit_layers=1,
        num_lyric_layers=1,
        num_timbre_layers=1,
        num_tokenizer_layers=1,
        text_hidden_dim=64,
        fsq_dim=64,
    ),
    text(64, conditioning_lyrics=lambda seed: random(seed + 3, 1, 5, 64)),
    audio(64, 25),
)


def seconds(*names, **kinds):
    """``files`` of Stable Audio: the weights of the embeddings of durations, which its config reads from the file."""

    def files():
        found = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=512, **kinds).state_dict()
        return {
            f"conditioner.conditioners.{name}.{key}": random(index, *value.shape, scale=0.05)
            for name in names
            for index, (key, value) in enumerate(found.items())
        }

    return files


STABLE_AUDIO = dict(
    audio_model="dit1.0",
    project_cond_tokens=True,
    embed_dim=64,
    num_heads=1,
    depth=1,
    cond_token_dim=768,
)
add(
    "StableAudio",
    dict(
        STABLE_AUDIO,
        global_cond_dim=1536,
        timestep_features_type="learned",
        io_channels=64,
        input_concat_dim=0,
    ),
    text(768),
    audio(64, 16),
    files=seconds("seconds_start", "seconds_total"),
)
add(
    "StableAudio3",
    dict(
        STABLE_AUDIO,
        global_cond_dim=768,
        global_cond_type="adaLN",
        global_cond_shared_embed=True,
        local_add_cond_dim=257,
        timestep_features_type="expo",
        io_channels=256,
    ),
    text(768),
    audio(256, 16),
    files=seconds("seconds_total", fourier_features_type="expo"),
)
HUNYUAN_3D = dict(
    image_model="hunyuan3d2",
    in_channels=64,
    context_in_dim=64,
    hidden_size=64,
    mlp_ratio=1.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    qkv_bias=True,
    guidance_embed=False,
)
add("Hunyuan3Dv2", HUNYUAN_3D, text(64), lambda: {"samples": torch.zeros(1, 64, 16)})
add("Hunyuan3Dv2mini", HUNYUAN_3D, text(64), lambda: {"samples": torch.zeros(1, 64, 16)})
add(
    "Hunyuan3Dv2_1",
    dict(
        image_model="hunyuan3d2_1",
        in_channels=64,
        hidden_size=64,
        context_dim=64,
        depth=3,
        num_heads=2,
        num_moe_layers=1,
        num_experts=2,
        guidance_cond_proj_dim=32,
    ),
    text(64),
    lambda: {"samples": torch.zeros(1, 64, 16)},
)
add(
    "TripoSplat",
    dict(
        image_model="triposplat",
        q_token_length=16,
        model_channels=96,
        cond_channels=64,
        num_blocks=1,
        num_refiner_blocks=1,
        num_head_channels=48,
    ),
    text(64),
    nested((16, 16), (1, 5)),
)


def host_classes():
    """The names of the classes that this ComfyUI can load."""
    return list(dict.fromkeys(cls.__name__ for cls in comfy.supported_models.models))


def missing():
    """Classes of this ComfyUI that are neither in FAMILIES nor in NOT_BUILT."""
    known = {family.class_name for family in FAMILIES.values()} | NOT_BUILT.keys()
    return [name for name in host_classes() if name not in known]
