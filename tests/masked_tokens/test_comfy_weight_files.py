"""Model folders as people have them: shards, variants, byte order marks, checkpoints of trainings, links, pickles."""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import folder_paths
import nodes as host_nodes
import pytest
import safetensors.torch
import torch
from comfy.sd1_clip import SD1Tokenizer
from transformers import CLIPConfig, CLIPModel

from chorus.nodes.masked_token_model import DEMO, LoadMaskedTokenModel
from chorus.techniques.masked_tokens import comfy_files as files
from chorus.techniques.masked_tokens import comfy_text, comfy_weight_files
from chorus.tests.support import masked_token_folder as written
from chorus.tests.support.tiers import quick
from chorus.tests.support.tiny_models import defaults

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a cat"
T, V, X = written.WEIGHTS
FILES = {part: Path(part) / name for part, name in written.WEIGHTS.items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    torch.manual_seed(0)
    return written.write(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture(scope="module")
def expected(original):
    return {part: safetensors.torch.load_file(original / file) for part, file in FILES.items()}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder, the only one registered as models/masked_token."""
    paths = {"masked_token": tmp_path / "models", "text_encoders": tmp_path / "te"}
    for kind, path in paths.items():
        path.mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "models"


@pytest.fixture
def folder(models, original):
    return Path(shutil.copytree(original, models / "tiny"))


def load(**inputs):
    """The node's outputs, in inference mode as in ComfyUI."""
    with torch.inference_mode():
        return LoadMaskedTokenModel.execute(**{**defaults(LoadMaskedTokenModel), **inputs}).args


def options(id):
    return next(i for i in LoadMaskedTokenModel.define_schema().inputs if i.id == id).options


def same(weights, expected):
    return weights.keys() == expected.keys() and all(torch.equal(weights[key].cpu(), expected[key]) for key in expected)


@pytest.fixture(scope="module")
def states(expected):
    """States and pooled output of a prompt by transformers, from the weights ``expected`` of the text encoder."""
    reference = written.text_encoder(written.TEXT)
    reference.load_state_dict(expected[X])
    ids = torch.tensor([[token for token, _ in SD1Tokenizer().tokenize_with_weights(PROMPT)["l"][0]]])
    with torch.inference_mode():
        out = reference(ids, output_hidden_states=True)
    return out.hidden_states[-2], out.text_embeds


def check_equal(model, clip, expected, states):
    """The networks have the weights ``expected``, and the text encoder computes ``states``."""
    assert same(model.transformer.model.state_dict(), expected[T])
    assert same(model.vq.model.state_dict(), expected[V])
    with torch.inference_mode():
        ((found, extras),) = host_nodes.CLIPTextEncode().encode(clip, PROMPT)[0]
    for value, reference in zip((found, extras["pooled_output"]), states):
        assert (value.cpu() - reference).abs().max() <= 2e-6 * reference.abs().max()


# ---- layouts that load ----


def shard(path: Path, *, index: str = ".safetensors.index.json", marker: str = "{stem}-{i:05}-of-00003.safetensors"):
    """Replace the file ``path`` by three shards with an index."""
    weights, stem = safetensors.torch.load_file(path), path.name.split(".")[0]
    names = sorted(weights)
    path.unlink()
    shards = {}
    for i in range(3):
        file = marker.format(stem=stem, i=i + 1)
        safetensors.torch.save_file({name: weights[name] for name in names[i::3]}, path.parent / file)
        shards |= dict.fromkeys(names[i::3], file)
    (path.parent / f"{stem}{index}").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shards}))


def each_file(change):
    """A layout that applies ``change`` to the file of every part."""
    return lambda folder: [change(folder / file) for file in FILES.values()]


def renamed_keys(rename):
    def change(path):
        weights = safetensors.torch.load_file(path)
        safetensors.torch.save_file({rename(key): weight for key, weight in weights.items()}, path)

    return each_file(change)


def encoded(encoding):
    """A layout with all config.json in ``encoding``."""

    def change(path):
        config = path.with_name("config.json")
        config.write_bytes(config.read_text().encode(encoding))

    return each_file(change)


def whole_clip(folder):
    """The text encoder's folder as transformers saves a CLIPModel, which also has an image encoder."""
    torch.manual_seed(1)
    text = {key: value for key, value in written.TEXT.items() if key != "projection_dim"}
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8)
    config = CLIPConfig(
        text_config=text,
        vision_config=vision | {"patch_size": 8},
        projection_dim=written.WIDTH,
    )
    model = CLIPModel(config)
    text_weights = safetensors.torch.load_file(folder / FILES[X])
    missing, unexpected = model.load_state_dict(text_weights, strict=False)
    assert not unexpected and missing
    shutil.rmtree(folder / X)
    model.save_pretrained(folder / X)
    assert "vision_model.post_layernorm.weight" in safetensors.torch.load_file(folder / FILES[X])


def hub_cache(folder):
    """The cache of huggingface_hub: files are links to blobs."""
    blobs = folder.parent / "models--amused--amused-256" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / f"{file.parent.name}{file.name}".replace(".", "")
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(folder)


LAYOUTS = {
    "shards": each_file(shard),
    "shards of a precision": each_file(
        lambda path: shard(path, index=".safetensors.index.fp16.json", marker="{stem}.fp16-{i:05}-of-00003.safetensors")
    ),
    "bf16 in the name": each_file(lambda path: path.rename(path.with_suffix(".bf16.safetensors"))),
    "byte order mark": encoded("utf-8-sig"),
    "UTF-16": encoded("utf-16"),
    "whole CLIP": whole_clip,
    "DataParallel": renamed_keys("module.{}".format),
    "torch.compile": renamed_keys("module._orig_mod.{}".format),
    "torch.compile of blocks": renamed_keys(lambda key: re.sub(r"(\.\d+\.)", r"\1_orig_mod.", key)),
    "cache of huggingface_hub": hub_cache,
}


@pytest.mark.parametrize(
    "layout", quick(["shards of a precision", "UTF-16", "whole CLIP", "cache of huggingface_hub"], LAYOUTS)
)
def test_layout_loads_like_the_published_one(folder, expected, states, layout):
    LAYOUTS[layout](folder)
    [name] = options("model_folder")[1:]
    check_equal(*load(model_folder=name), expected, states)


def test_any_shard_as_replacement_loads_all_shards(folder, models, expected):
    torch.manual_seed(1)
    other = written.write(models / "other")
    shard(other / FILES[T])
    shutil.move(other / T, models / "checkpoint")
    replacements = [option for option in options("transformer_file") if option.startswith("checkpoint/")]
    assert len(replacements) == 3
    weights = {}
    for file in (models / "checkpoint").glob("*.safetensors"):
        weights |= safetensors.torch.load_file(file)
    index = models / "checkpoint" / "diffusion_pytorch_model.safetensors.index.json"
    for replacement in replacements:
        assert files.replacements(replacement, files.FROM_FOLDER, files.FROM_FOLDER) == {T: index}
    model, _ = load(model_folder="tiny", transformer_file=replacements[1])
    assert same(model.transformer.model.state_dict(), weights) and not same(weights, expected[T])
    index.unlink()
    with pytest.raises(
        ValueError, match=r"-00001-of-00003\.safetensors is one of 3 files.*index\.json that lists them"
    ):
        load(model_folder="tiny", transformer_file=replacements[0])


def test_names_that_differ_only_in_wrappers_are_not_merged():
    weights = {"module.a": torch.zeros(1), "a": torch.ones(1)}
    assert comfy_weight_files.unwrapped(dict(weights)) == weights


def test_missing_entries_of_a_whole_clip_are_those_of_transformers():
    config = CLIPConfig(projection_dim=7, text_config={"hidden_size": 32}).text_config
    found = comfy_text.text_config({"projection_dim": 7, "text_config": {"hidden_size": 32}})
    assert found["projection_dim"] == 7
    assert {key: getattr(config, key) for key in comfy_text.TRANSFORMERS_DEFAULTS} == {
        key: found[key] for key in comfy_text.TRANSFORMERS_DEFAULTS
    }


# ---- errors ----

SECOND = "diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def edit_index(folder, **changes):
    path = folder / T / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_weight(folder):
    path = folder / T / SECOND
    weights = safetensors.torch.load_file(path)
    weights.pop(sorted(weights)[0])
    safetensors.torch.save_file(weights, path)


INVALID_SHARDS = {
    "missing": (lambda f: (f / T / SECOND).unlink(), f"lists 3 files, of which 1 are missing: {SECOND}; download"),
    "truncated": (
        lambda f: os.truncate(f / T / SECOND, 5000),
        f"transformer/{SECOND} cannot be read: it is damaged or incomplete",
    ),
    "pointer": (lambda f: (f / T / SECOND).write_bytes(LFS), f"transformer/{SECOND} cannot be read: it is a Git LFS"),
    "pickle": (lambda f: torch.save({}, f / T / SECOND), f"transformer/{SECOND} cannot be read: it is a pickle"),
    "weight": (drop_weight, f"transformer/{SECOND} lacks 1 weights that {INDEX} lists in it: "),
    "index pointer": (lambda f: (f / T / INDEX).write_bytes(LFS), f"transformer/{INDEX} is a Git LFS pointer"),
    "index": (lambda f: (f / T / INDEX).write_text("{"), f"transformer/{INDEX} is not valid JSON"),
    "index list": (lambda f: (f / T / INDEX).write_text("[]"), f"transformer/{INDEX}: expected an object"),
    "no map": (lambda f: edit_index(f, weight_map=[]), f"transformer/{INDEX} has no weight_map"),
    "outside": (
        lambda f: edit_index(f, weight_map={"a": "../vqvae/diffusion_pytorch_model.safetensors"}),
        f"transformer/{INDEX} lists ../vqvae/diffusion_pytorch_model.safetensors, expected names of .safetensors files",
    ),
    "bin": (lambda f: edit_index(f, weight_map={"a": "x.bin"}), f"transformer/{INDEX} lists x.bin, expected names of"),
}


@pytest.mark.parametrize("case", INVALID_SHARDS)
def test_invalid_shard_named(folder, case):
    shard(folder / FILES[T])
    change, message = INVALID_SHARDS[case]
    change(folder)
    # only the transformer, since the other parts take longer to load
    with pytest.raises(ValueError, match=re.escape(message)):
        comfy_weight_files.read_state_dict(comfy_weight_files.find_weights(folder / T, "diffusion_pytorch_model"))


def test_config_that_is_a_git_lfs_pointer_named(folder):
    (folder / V / "config.json").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"vqvae/config\.json is a Git LFS pointer, not the file itself"):
        load(model_folder="tiny")


def test_hidden_folders_and_files_not_offered(folder):
    before = {id: options(id) for id in ("model_folder", "transformer_file", "vq_file", "text_encoder_file")}
    for hidden in (".ipynb_checkpoints", "a/.cache/b"):
        shutil.copytree(folder / T, folder.parent / hidden / T)
    # macOS adds such files to folders on disks of other systems
    (folder / "transformer" / "._diffusion_pytorch_model.safetensors").write_bytes(b"x")
    (folder.parent / ".hidden.safetensors").write_bytes(b"x")
    assert {id: options(id) for id in before} == before


def test_checkpoint_of_a_training_explained_and_usable(folder, models, expected, states):
    shutil.copytree(folder / T, models / "run" / "checkpoint-500" / T)
    weights = {key: weight + 1 for key, weight in expected[T].items()}
    file = f"run/checkpoint-500/{FILES[T]}"
    safetensors.torch.save_file(weights, models / file)
    with pytest.raises(ValueError) as error:
        load(model_folder="run/checkpoint-500")
    message = str(error.value)
    for part in (V, X):
        assert f"{part}/{written.WEIGHTS[part]} (or .fp16.safetensors; the folder does not exist)" in message
    assert f"choose a complete model as model_folder, and {file} as transformer_file" in message
    model, clip = load(model_folder="tiny", transformer_file=file)
    check_equal(model, clip, {**expected, T: weights}, states)


def test_other_variants_named_and_usable(folder, expected, states):
    for file in FILES.values():
        (folder / file).rename((folder / file).with_suffix(".non_ema.safetensors"))
    with pytest.raises(ValueError, match=r"the model folder .* lacks") as error:
        load(model_folder="tiny")
    chosen = {}
    widgets = {T: "transformer_file", V: "vq_file", X: "text_encoder_file"}
    for part, file in FILES.items():
        chosen[widgets[part]] = (Path("tiny") / file).with_suffix(".non_ema.safetensors").as_posix()
        message = f"{chosen[widgets[part]]} is loaded only if it is chosen: choose it as {widgets[part]}"
        assert re.search(message, str(error.value))
    check_equal(*load(model_folder="tiny", **chosen), expected, states)


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_refused_with_the_command_that_converts_them(folder, monkeypatch, expected, states, shards):
    for part, file in FILES.items():
        (folder / file).unlink()
        stem = "pytorch_model" if part == X else "diffusion_pytorch_model"
        names = [f"{stem}.bin"] if shards == 1 else [f"{stem}-0000{i + 1}-of-00002.bin" for i in range(2)]
        keys = sorted(expected[part])
        for i, name in enumerate(names):
            torch.save({key: expected[part][key] for key in keys[i::shards]}, folder / part / name)
    with pytest.raises(ValueError, match=r"the model folder .* lacks") as error:
        load(model_folder="tiny")
    message = str(error.value)
    assert message.count("can contain code and is not opened: convert it") == 3
    commands = re.findall(r'this command in the folder (\S+): python -c "([^"]*)"', message)
    assert [place for place, _ in commands] == [str(folder / part) for part in FILES]
    for place, code in commands:
        monkeypatch.chdir(place)
        Path("command.py").write_text(code)
        runpy.run_path("command.py")
    check_equal(*load(model_folder="tiny"), expected, states)


def test_file_name_with_shell_characters_not_in_the_command(folder):
    (folder / FILES[T]).rename(folder / T / "diffusion_pytorch_model$(touch x).bin")
    with pytest.raises(ValueError, match=r"the model folder .* lacks") as error:
        load(model_folder="tiny")
    assert "python -c" not in str(error.value)


def test_broken_link_named(folder):
    hub_cache(folder)
    [name] = options("model_folder")[1:]
    (folder.parent / "models--amused--amused-256/blobs/vqvaediffusion_pytorch_modelsafetensors").unlink()
    with pytest.raises(
        ValueError, match=r"vqvae/diffusion_pytorch_model\.safetensors is a link to a file that does not"
    ):
        load(model_folder=name)


def test_models_in_the_root_are_named_after_the_kind_of_model(models, original, tmp_path):
    """models/masked_token can be any folder by extra_model_paths.yaml; its name does not belong into saved files."""
    shutil.copytree(original, models, dirs_exist_ok=True)
    assert options("model_folder") == [DEMO, "."]
    assert load(model_folder=".")[0].name == "masked_token"
