"""Files of masked token models: listing, loading and error messages."""

import json
import pickle
import shutil
from pathlib import Path

import comfy.model_management
import folder_paths
import nodes as host_nodes
import pytest
import safetensors.torch
import torch
import yaml
from comfy.cli_args import args
from utils.extra_config import load_extra_path_config

from chorus.demo import weights
from chorus.demo.modules import MASKED_TOKENS_CFG
from chorus.dev.tools.client import WorkflowError
from chorus.nodes.masked_token_model import DEMO, LoadMaskedTokenModel
from chorus.techniques.masked_tokens import comfy_files as files
from chorus.techniques.masked_tokens.comfy_model import loaded
from chorus.techniques.masked_tokens.comfy_text import read_text
from chorus.tests.support import masked_token_folder as written
from chorus.tests.support.tiers import quick
from chorus.tests.support.tiny_models import defaults

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    return written.write(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder, the only one registered as models/masked_token."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "masked_token", ([str(tmp_path / "models")], {".safetensors"})
    )
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path / "te")], {".safetensors"})
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "models").mkdir()
    (tmp_path / "te").mkdir()
    return tmp_path / "models"


@pytest.fixture
def folder(models, original):
    return Path(shutil.copytree(original, models / "tiny"))


def read(folder, **replacements):
    return files.read_model(folder, replacements)


def load(**inputs):
    """The node's outputs, in inference mode as in ComfyUI."""
    with torch.inference_mode():
        return LoadMaskedTokenModel.execute(**{**defaults(LoadMaskedTokenModel), **inputs}).args


def options(id):
    return next(i for i in LoadMaskedTokenModel.define_schema().inputs if i.id == id).options


def weights_of(path):
    return safetensors.torch.load_file(path)


def some_inputs(config, batch=2, length=7):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.vocab_size, (batch, 4, 6), generator=generator)
    text = torch.randn(batch, length, config.encoder_hidden_size, generator=generator)
    pooled = torch.randn(batch, config.cond_embed_dim, generator=generator)
    micro = torch.rand(batch, 5, generator=generator) * torch.tensor([512, 512, 100, 100, 10.0])
    return tokens, (text, pooled, micro)


def logits(model):
    tokens, (text, *rest) = some_inputs(model.transformer.model.config)
    with loaded(model.transformer, 2**20) as uvit:
        device = comfy.model_management.get_torch_device()
        condition = uvit.condition(text.to(device, model.dtype), *(x.to(device) for x in rest))
        return uvit(tokens.to(device), condition).float().cpu()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- listing ----


def test_model_folder_registered():
    paths, extensions = folder_paths.folder_names_and_paths["masked_token"]
    assert str(Path(folder_paths.models_dir) / "masked_token") in paths
    assert extensions == {".safetensors"}


def test_extra_model_paths_added(original, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    config = {"mine": {"base_path": str(original.parent.parent), "masked_token": original.parent.name}}
    (tmp_path / "extra.yaml").write_text(yaml.safe_dump(config))
    load_extra_path_config(str(tmp_path / "extra.yaml"))
    files.register()
    files.register()
    paths = folder_paths.get_folder_paths("masked_token")
    assert paths == [str(original.parent), str(Path(folder_paths.models_dir) / "masked_token")]
    assert files.model_folders() == {"tiny": original}


def test_folders_with_transformer_listed(models):
    for path in (
        "a/transformer/config.json",
        "b/deeper/transformer/diffusion_pytorch_model.fp16.safetensors",
        "no/vqvae/config.json",
        "no/transformer/readme.md",
        ".git/transformer/config.json",
        "transformer/config.json",  # makes models/masked_token itself a model folder
        "single.safetensors",
    ):
        (models / path).parent.mkdir(parents=True, exist_ok=True)
        (models / path).touch()
    folders = {".": models, "a": models / "a", "b/deeper": models / "b" / "deeper"}
    assert files.model_folders() == folders
    assert options("model_folder") == [DEMO, *folders]
    inside = "b/deeper/transformer/diffusion_pytorch_model.fp16.safetensors"
    assert options("transformer_file") == [files.FROM_FOLDER, inside, "single.safetensors"]


def test_symlinked_folders_listed(models, original):
    (models / "linked").symlink_to(original, target_is_directory=True)
    assert list(files.model_folders()) == ["linked"]
    assert read(files.model_folders()["linked"])


def test_demo_listed_without_model_folder(models):
    models.rmdir()
    assert options("model_folder") == [DEMO]
    assert options("text_encoder_file") == [files.FROM_FOLDER]


def test_unknown_name_rejected_with_available_names(folder):
    with pytest.raises(
        ValueError, match=r"there is no '\.\./tiny'; available: tiny; .* download a model from hugg.* into .*models$"
    ):
        load(model_folder="../tiny")


# ---- loading ----


@pytest.mark.parametrize("halving", [False, True])
def test_logits_match_diffusers(models, halving):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference")
    config = written.TRANSFORMER | {"downsample": halving, "upsample": halving}
    theirs = diffusers.UVit2DModel(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()
    theirs.load_state_dict(written.transformer_weights(config))
    folder = written.write(models / "theirs")
    theirs.save_pretrained(folder / "transformer")  # in the published format
    model, _ = load(model_folder="theirs")
    tokens, (text, pooled, micro) = some_inputs(model.transformer.model.config)
    with torch.inference_mode():
        expected = theirs(tokens, text, pooled, micro)
    assert relative(logits(model), expected) < 5e-6


def test_decoded_images_match_diffusers(folder):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference")
    config = {**written.VQ, "mid_block_add_attention": False, "lookup_from_codebook": True, "force_upcast": True}
    del config["_class_name"]
    for side, block in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        config[f"{side}_block_types"] = (block,) * len(written.VQ["block_out_channels"])
    theirs = diffusers.VQModel(**config).eval()
    theirs.load_state_dict(written.vq_weights(written.VQ))
    theirs.save_pretrained(folder / "vqvae")
    model, _ = load(model_folder="tiny")
    ids = torch.randint(model.codebook, (2, 3, 5))
    with loaded(model.vq, 2**20) as vq, torch.inference_mode():
        device = next(vq.parameters()).device
        image = vq.decode(ids.to(device)).cpu()
        expected = theirs.decode(ids, force_not_quantize=True, shape=(2, 3, 5, 6)).sample
    assert relative(image, expected) < 5e-6


def test_loaded_model_has_published_properties(folder):
    model, clip = load(model_folder="tiny")
    assert (model.name, model.text, model.cfg) == ("tiny", "clip-l", 4.0)
    assert (model.codebook, model.mask_id, model.downscale) == (37, 39, 4)
    assert model.dtype == torch.float32 or comfy.model_management.get_torch_device() != CPU
    assert {w.dtype for w in model.vq.model.parameters()} == {torch.float32}
    with torch.inference_mode():
        positive = host_nodes.CLIPTextEncode().encode(clip, "a cat")[0]
    ((states, pooled),) = read_text(positive, model.text, "positive")
    assert (states.shape, pooled.shape) == ((1, 77, written.WIDTH), (1, written.WIDTH))


def test_default_cfg_depends_on_size(models):
    written.write(models / "large", downsample=True, upsample=True, sample_size=32)
    assert load(model_folder="large")[0].cfg == 10.0


def test_weights_are_not_inference_tensors(folder):
    model, _ = load(model_folder="tiny")
    assert not any(w.is_inference() for p in (model.transformer, model.vq) for w in p.model.parameters())


@pytest.mark.slow
def test_half_precision_file_is_fallback(folder):
    full = logits(read(folder)[0])
    for part, name in written.WEIGHTS.items():
        path = folder / part / name
        half = {key: w.half() for key, w in weights_of(path).items()}
        safetensors.torch.save_file(half, path.with_suffix(".fp16.safetensors"))
        if part == "transformer":
            doubled = {key: 2 * w for key, w in weights_of(path).items()}
            safetensors.torch.save_file(doubled, path)
    assert not torch.equal(logits(read(folder)[0]), full)  # the float32 file is preferred
    for part, name in written.WEIGHTS.items():
        (folder / part / name).unlink()
    model, _ = read(folder)
    # the weights are exact in float16, and the VQ-GAN computes in float32
    assert relative(logits(model), full) < (1e-6 if model.dtype == torch.float32 else 1e-2)
    assert {w.dtype for w in model.vq.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("option", quick(["fp8_e4m3fn_unet"], ["fp16_unet", "bf16_unet", "fp8_e4m3fn_unet"]))
def test_weight_dtype_follows_comfyui_option(folder, monkeypatch, option):
    exact = logits(read(folder)[0])
    monkeypatch.setattr(args, option, True)
    model, _ = read(folder)
    stored = next(model.transformer.model.parameters()).dtype
    assert stored == {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[option.split("_")[0]]
    assert model.transformer.model_size() < 0.51 * 4 * sum(w.numel() for w in model.transformer.model.parameters())
    if comfy.model_management.get_torch_device() == CPU:
        assert model.dtype == torch.float32
    # the file's weights are exact in float16
    bound = {"fp16_unet": 1e-6 if model.dtype == torch.float32 else 2e-2, "bf16_unet": 0.1, "fp8_e4m3fn_unet": 0.8}
    assert relative(logits(model), exact) < bound[option]


def test_half_weights_in_float32_match_diffusers(folder, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference")
    monkeypatch.setattr(args, "fp16_unet", True)
    model, _ = read(folder)
    if model.dtype != torch.float32:
        pytest.skip("this device computes in half precision")
    theirs = diffusers.UVit2DModel.from_pretrained(folder / "transformer").eval()
    tokens, (text, pooled, micro) = some_inputs(model.transformer.model.config)
    with torch.inference_mode():
        assert relative(logits(model), theirs(tokens, text, pooled, micro)) < 5e-6


def test_reload_gives_same_bits(folder):
    model, _ = load(model_folder="tiny")
    before = logits(model)
    comfy.model_management.unload_all_models()
    assert torch.equal(logits(model), before)


def patched(model):
    """A clone of the model with a random patch on every matrix."""
    clone = model.transformer.clone()
    generator = torch.Generator().manual_seed(4)
    # channelwise_norm is not part of a layer, so a partially loaded model does not patch it
    changes = {
        key: ("diff", (0.3 * torch.randn(w.shape, generator=generator) * w[0].numel() ** -0.5,))
        for key, w in model.transformer.model.state_dict().items()
        if w.ndim > 1 and "channelwise_norm" not in key
    }
    assert len(clone.add_patches(changes)) == len(changes)
    return model.with_transformer(clone)


@pytest.mark.parametrize("share", quick([0.3], [0.0, 0.3, 0.7]))
def test_partially_loaded_model_gives_same_logits(folder, share):
    plain, _ = load(model_folder="tiny")
    model = patched(plain)
    before, whole = logits(plain), logits(model)
    assert relative(whole, before) > 1e-2
    comfy.model_management.unload_all_models()
    tokens, (text, *rest) = some_inputs(plain.transformer.model.config)
    patcher, budget = model.transformer, int(share * plain.transformer.model_size()) + 1
    with torch.inference_mode():
        patcher.patch_model(CPU, lowvram_model_memory=budget)
        assert patcher.model.model_lowvram
        assert patcher.lowvram_patch_counter() > 0
        uvit = patcher.model
        condition = uvit.condition(text.to(model.dtype), *rest)
        part = uvit(tokens, condition).float()
        patcher.unpatch_model(CPU)
    assert relative(part, whole) < 1e-6
    assert torch.equal(logits(plain), before)


# ---- replacement files ----


@pytest.mark.slow
def test_transformer_file_replaces_part(folder, models):
    before = load(model_folder="tiny")[0]
    torch.manual_seed(1)
    other = written.transformer_weights(written.TRANSFORMER)
    safetensors.torch.save_file(other, models / "finetuned.safetensors")
    after = load(model_folder="tiny", transformer_file="finetuned.safetensors")[0]
    assert relative(logits(after), logits(before)) > 1e-2
    shutil.copy(models / "finetuned.safetensors", folder / "transformer" / written.WEIGHTS["transformer"])
    assert torch.equal(logits(load(model_folder="tiny")[0]), logits(after))


def test_vq_and_text_encoder_files_replace_parts(folder, models, tmp_path):
    shutil.move(folder / "vqvae" / written.WEIGHTS["vqvae"], models / "vq.safetensors")
    shutil.move(folder / "text_encoder" / written.WEIGHTS["text_encoder"], tmp_path / "te" / "clip_l.safetensors")
    assert options("text_encoder_file")[-1] == "text_encoders/clip_l.safetensors"
    assert "text_encoders/clip_l.safetensors" not in options("vq_file")
    assert load(model_folder="tiny", vq_file="vq.safetensors", text_encoder_file="text_encoders/clip_l.safetensors")


def test_text_encoder_without_config_read_as_openai_clip_l(folder, tmp_path):
    shutil.move(folder / "text_encoder" / written.WEIGHTS["text_encoder"], tmp_path / "te" / "clip_l.safetensors")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ValueError, match=r"te/clip_l.safetensors: .*expected \(49408, 768\), got \(49408, 32\)"):
        load(model_folder="tiny", text_encoder_file="text_encoders/clip_l.safetensors")


def test_demo_rejects_replacement_files(folder):
    with pytest.raises(
        ValueError, match=r"chorus-demo cannot load other weights, got .*tiny/vqvae/.*; set the file inputs to"
    ):
        load(vq_file="tiny/vqvae/diffusion_pytorch_model.safetensors")


# ---- the model that comes with the pack ----


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's files with random transformer and VQ-GAN weights, to test only loading."""
    for name in ("text.safetensors",):
        shutil.copy(weights.path("text"), tmp_path / name)
    config = written.TRANSFORMER | {"encoder_hidden_size": 96, "cond_embed_dim": 96}
    written.write_part(tmp_path / "masked_token", "transformer", written.transformer_weights(config), config)
    written.write_part(tmp_path / "masked_token", "vqvae", written.vq_weights(written.VQ), written.VQ)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return tmp_path


def test_demo_loads_without_model_folder(models, demo):
    model, clip = load()
    assert (model.name, model.text, model.cfg) == (DEMO, "chorus-demo", MASKED_TOKENS_CFG)
    with torch.inference_mode():
        positive = host_nodes.CLIPTextEncode().encode(clip, "a cat on blue")[0]
    ((states, pooled),) = read_text(positive, model.text, "positive")
    config = model.transformer.model.config
    assert (states.shape[-1], pooled.shape[-1]) == (config.encoder_hidden_size, config.cond_embed_dim)
    assert logits(model).isfinite().all()


def test_missing_demo_weights_named(demo):
    shutil.rmtree(demo / "masked_token" / "vqvae")
    with pytest.raises(
        FileNotFoundError, match=r"masked_token/vqvae is missing; install .* `python run.py train-demo`"
    ):
        load()


# ---- errors ----


def test_missing_parts_listed(folder):
    shutil.rmtree(folder / "vqvae")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load(model_folder="tiny")
    message = str(error.value)
    assert f"the model folder {folder} lacks " in message
    assert "vqvae/diffusion_pytorch_model.safetensors (or .fp16.safetensors; the folder does not exist)" in message
    assert (
        "text_encoder/model.safetensors (or .fp16.safetensors; the folder contains: config.json, pytorch_model.bin)"
        in message
    )
    assert "huggingface.co/amused/amused-256" in message
    assert "transformer/" not in message.replace(str(folder), "")


@pytest.mark.parametrize("part", written.WEIGHTS)
def test_truncated_file_named(folder, part):
    path = folder / part / written.WEIGHTS[part]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=f"{part}/{path.name} cannot be read: it is damaged or incomplete; download it"
    ):
        load(model_folder="tiny")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("torch", "it is a pickle with the wrong extension; convert it to .safetensors; other formats are not read"),
        ("pickle", "it is a pickle with the wrong extension"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>sign in</html>", "it is a web page, not the file; download the file itself"),
        (b"", "it is empty; download it again"),
    ],
)
def test_invalid_safetensors_rejected_with_reason(folder, content, reason):
    path = folder / "transformer" / written.WEIGHTS["transformer"]
    if content == "torch":
        torch.save({"a": torch.zeros(3)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": 1}) if content == "pickle" else content)
    with pytest.raises(ValueError, match=f"transformer/{path.name} cannot be read: {reason}"):
        load(model_folder="tiny")


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pth"])
def test_pickle_files_never_opened(folder, tmp_path, suffix):
    class TouchFile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(TouchFile()))
    with pytest.raises(ValueError, match=f"model{suffix} is not a .safetensors file; convert it"):
        read(folder, transformer=path)
    assert not (tmp_path / "ran").exists()


def change(path, edit):
    tensors = weights_of(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "transformer_layers.1.ff.net.2.weight"),
        ("vqvae", "decoder.conv_out.bias"),
        ("text_encoder", "text_model.final_layer_norm.weight"),
    ],
)
def test_mismatched_weights_named_with_file(folder, part, name):
    path = folder / part / written.WEIGHTS[part]
    content = path.read_bytes()
    for edit, complaint in (
        (lambda t: t.pop(name), f"1 missing: {name}"),
        (lambda t: t.update(surplus=torch.zeros(2)), "1 unexpected: surplus"),
        (lambda t: t.update({name: torch.zeros(5, 4, 3)}), rf"1 wrong: {name}: expected .* got \(5, 4, 3\)"),
        (lambda t: t.update({name: t[name] * torch.nan}), f"1 wrong: {name}: expected finite numbers, got NaN"),
    ):
        path.write_bytes(content)
        change(path, edit)
        with pytest.raises(ValueError, match=rf"{part}/{path.name} \(config .*{part}/config.json\): .*{complaint}"):
            load(model_folder="tiny")


@pytest.mark.parametrize("part", written.WEIGHTS)
@pytest.mark.parametrize(("text", "reason"), [("{", " is not valid JSON"), ("[1]", r": expected an object, got \[1\]")])
def test_invalid_config_named(folder, part, text, reason):
    (folder / part / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{part}/config.json{reason}.*download it again"):
        load(model_folder="tiny")


@pytest.mark.parametrize(
    ("part", "setting", "complaint"),
    [
        ("transformer", {"hidden_size": 1024}, "hidden_size is 1024, not 48"),
        ("vqvae", {"latent_channels": 64}, "latent_channels is 64, not 6"),
        ("text_encoder", {"hidden_size": 768, "projection_dim": 768}, r"expected \(768,\), got \(32,\)"),
    ],
)
def test_config_of_other_model_named(folder, part, setting, complaint):
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=rf"\(config .*{part}/config.json\): .*{complaint}"):
        load(model_folder="tiny")


def test_only_text_encoder_requires_config(folder):
    config = written.TRANSFORMER | {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "block_out_channels": 64,
        "block_num_heads": 1,
    }
    written.write_part(folder, "transformer", written.transformer_weights(config), config)
    before = logits(load(model_folder="tiny")[0])
    (folder / "transformer" / "config.json").unlink()
    assert torch.equal(logits(load(model_folder="tiny")[0]), before)
    (folder / "text_encoder" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"text_encoder/config\.json is missing; download it, because it names the activation function"
    ):
        load(model_folder="tiny")


def test_mixed_model_parts_rejected(folder):
    config = written.VQ | {"num_vq_embeddings": 50}
    written.write_part(folder, "vqvae", written.vq_weights(config), config)
    with pytest.raises(
        ValueError, match=r"transformer/.* has 37 codes, but .*vqvae/.* has 50; use files of the same model"
    ):
        load(model_folder="tiny")
    written.write_part(folder, "vqvae", written.vq_weights(written.VQ), written.VQ)
    config = written.TRANSFORMER | {"encoder_hidden_size": 20}
    written.write_part(folder, "transformer", written.transformer_weights(config), config)
    with pytest.raises(
        ValueError, match=r"expects text of width 20 and 32 \(pooled\), but .*text_encoder/.* has width 32"
    ):
        load(model_folder="tiny")


def test_transformer_without_mask_id_rejected(folder):
    config = written.TRANSFORMER | {"vocab_size": 37}
    written.write_part(folder, "transformer", written.transformer_weights(config), config)
    with pytest.raises(ValueError, match="has 37 ids for 37 codes and none for the mask token"):
        load(model_folder="tiny")


# ---- in a real server ----


def test_running_server_lists_and_loads_new_folder(server, client, original):
    def prompt(text):
        return {
            "load": {"class_type": "LoadMaskedTokenModel", "inputs": {**defaults(LoadMaskedTokenModel), **text}},
            "encode": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "a (red:1.2) fox"}},
            "model": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
            "text": {"class_type": "PreviewAny", "inputs": {"source": ["encode", 0]}},
        }

    def listed():
        inputs = client.get_json("/object_info/LoadMaskedTokenModel")["LoadMaskedTokenModel"]["input"]["required"]
        return inputs["model_folder"][1]["options"]

    assert listed() == [DEMO]
    with pytest.raises(WorkflowError, match="tiny"):
        client.run(prompt({"model_folder": "tiny"}))
    folder = server.base / "models" / "masked_token" / "tiny"
    shutil.copytree(original, folder)
    try:
        assert listed() == [DEMO, "tiny"]
        client.run(prompt({"model_folder": "tiny"}))
        shutil.rmtree(folder / "vqvae")
        with pytest.raises(WorkflowError, match=r"the model folder .*tiny lacks vqvae/diffusion"):
            client.run(
                prompt(
                    {"model_folder": "tiny", "transformer_file": f"tiny/transformer/{written.WEIGHTS['transformer']}"}
                )
            )
    finally:
        shutil.rmtree(folder)
    assert listed() == [DEMO]
