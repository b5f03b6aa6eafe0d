"""No file that the pack writes holds a path of the machine, or a name from outside of the model folders.

Everything lies below a folder with a telltale name, which no written byte may contain.
"""

import asyncio
import json
import shutil
from types import SimpleNamespace

import execution
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_execution.graph import DynamicPrompt

from chorus.nodes import NODES
from chorus.nodes.cas_dm import LoadCasDMHead
from chorus.nodes.face_refiner import LoadFaceRefiner, SaveFaceRefiner
from chorus.nodes.masked_token_files import SaveMaskedTokens
from chorus.nodes.masked_token_lora import SaveMaskedTokenLora, TrainMaskedTokenLora
from chorus.nodes.masked_token_model import LoadMaskedTokenModel
from chorus.nodes.training_pairs import SaveTrainingPairs
from chorus.techniques.face_refiner.comfy_files import FILES as REFINERS
from chorus.techniques.seed_select.comfy_files import SeedNoise, model_details
from chorus.tests.support import head_training, masked_token_folder, refiner_training, tiny_masked_tokens
from chorus.tests.support.refiners import refiner
from chorus.tests.support.tiny_models import defaults, unet

pytestmark = pytest.mark.usefixtures("one_thread")

TELLTALE = "telltale-e7c1"
BY_ID = {node.define_schema().node_id: node for node in NODES}
SAVERS = sorted(id for id in BY_ID if id.startswith("Save"))
KINDS = ("masked_token", "face_refiner", "cas_dm", "loras", "text_encoders", "checkpoints")


@pytest.fixture(scope="module")
def masked_token_model(tmp_path_factory):
    torch.manual_seed(0)
    return masked_token_folder.write(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A base folder of ComfyUI with a telltale name. Each kind of model has a folder with a telltale name, too."""
    home = tmp_path / TELLTALE
    for name in ("input", "output", "temp", *(f"models/{TELLTALE}-{kind}" for kind in KINDS)):
        (home / name).mkdir(parents=True)
    for name in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=home / name: str(folder))
    for kind in KINDS:
        known = folder_paths.folder_names_and_paths[kind][1]
        paths = [str(home / "models" / f"{TELLTALE}-{kind}")]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (paths, known))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return home


def model_folder(home, kind):
    return home / "models" / f"{TELLTALE}-{kind}"


def with_hidden(cls, prompt):
    """The node ``cls`` with the prompt as ComfyUI passes it to a saving node, after it has looked for changed files."""
    cache = execution.IsChangedCache("prompt id", DynamicPrompt(prompt), None)
    for id in prompt:
        asyncio.run(cache.get(id))
    assert all("is_changed" in node for node in prompt.values())
    return type("Node", (cls,), {"hidden": SimpleNamespace(prompt=prompt, extra_pnginfo={"workflow": {"nodes": []}})})


def loaders(files):
    """A prompt with every node of the pack that reports changed files, and a file for each."""
    checked = [id for id, node in BY_ID.items() if "fingerprint_inputs" in vars(node)]
    assert set(checked) == set(files)
    return {
        str(number): {"class_type": id, "inputs": {**defaults(BY_ID[id]), **inputs}}
        for number, (id, inputs) in enumerate(files.items())
    }


def texts(home):
    """Everything below the output folder, as one text per file, with the file's name."""
    files = [path for path in (home / "output").rglob("*") if path.is_file()]
    return [f"{path.relative_to(home / 'output')} {path.read_bytes().decode('latin-1')}" for path in files]


@pytest.mark.slow
@torch.inference_mode()
def test_saved_files_hold_no_private_name(home, masked_token_model, monkeypatch):
    monkeypatch.setattr("nodes.NODE_CLASS_MAPPINGS", BY_ID)
    shown, reports = [], []

    # a noise of a model that a node of another pack has loaded from somewhere
    checkpoint = home / "downloads" / f"{TELLTALE}.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    model = unet(0)
    model.cached_patcher_init = (unet, (str(checkpoint), False))
    noise = SeedNoise(torch.randn(1, 4, 4, 4), 1, model_details(model))
    shown += [BY_ID["SaveSeed"].execute(noise=noise, filename_prefix="seeds/x").ui]

    # trained heads and refiners, also those of checkpoints
    result = head_training.train(unet(0), steps=2, checkpoint_every=1, checkpoint_prefix="cas_dm/step")
    BY_ID["SaveCasDMHead"].execute(result.head, "cas_dm/x")
    reports += [result.report]
    result = refiner_training.train(steps=2, checkpoint_every=1, checkpoint_prefix="face_refiner/step")
    reports += [result.report]
    shown += [SaveFaceRefiner.execute(result.refiner, "face_refiner/x").ui]

    # a model in models/masked_token itself
    shutil.copytree(masked_token_model, model_folder(home, "masked_token"), dirs_exist_ok=True)
    tokens_model = LoadMaskedTokenModel.execute(**{**defaults(LoadMaskedTokenModel), "model_folder": "."}).args[0]
    data = {"images": torch.rand(1, 16, 16, 3), "resolution": 16, "rank": 2, "steps": 2}
    width = masked_token_folder.WIDTH
    prompt = [[torch.randn(1, 5, width), {"pooled_output": torch.randn(1, width), "masked_token_text": "clip-l"}]]
    steps = {"checkpoint_every": 1, "checkpoint_prefix": "loras/step"}
    lora, _, report = tiny_masked_tokens.run(TrainMaskedTokenLora, model=tokens_model, positive=prompt, **data, **steps)
    reports += [report]
    SaveMaskedTokenLora.execute(lora, "loras/x")

    # a refiner whose file was saved with a workflow, and images of a prompt with all loading nodes
    save_pairs = dict(source=[torch.rand(1, 4, 4, 3)], target=[torch.rand(1, 4, 4, 3)], folder=["pairs"], prompt=["a"])
    SaveTrainingPairs.execute(**save_pairs)
    weights = {name: weight.contiguous() for name, weight in refiner().patcher.model.state_dict().items()}
    file = model_folder(home, "face_refiner") / "mine.safetensors"
    safetensors.torch.save_file(weights, file, {"workflow": json.dumps({"note": TELLTALE}), "steps": "7"})
    tokens = tiny_masked_tokens.tokens()
    shown += [SaveMaskedTokens.execute(tokens, "tokens/x").ui]
    files = {
        "LoadSeed": {"file": "seeds/x_00001_.seed.safetensors [output]"},
        "LoadCasDMHead": {"file": "cas_dm/x_00001_.cas_dm.safetensors [output]"},
        "LoadFaceRefiner": {"file": "mine.safetensors"},
        "LoadMaskedTokens": {"file": "tokens/x_00001_.tokens.safetensors [output]"},
        "LoadTrainingPairs": {"folder": "pairs [output]"},
    }
    hidden = loaders(files)
    shown += [with_hidden(SaveTrainingPairs, hidden).execute(**save_pairs).ui]
    shown += [with_hidden(SaveMaskedTokens, hidden).execute(tokens, "tokens/x").ui]
    loaded = LoadFaceRefiner.execute("mine.safetensors").args[0]
    assert loaded.details["steps"] == "7"
    shown += [with_hidden(SaveFaceRefiner, hidden).execute(loaded, "face_refiner/loaded").ui]
    monkeypatch.setattr("chorus.host.files.args.disable_metadata", True)
    shown += [with_hidden(SaveFaceRefiner, hidden).execute(loaded, "face_refiner/private").ui]

    written = texts(home)
    for folder in ("seeds", "cas_dm", "face_refiner", "loras", "tokens", "pairs"):
        assert any(text.startswith(folder) for text in written)
    assert any('"is_changed"' in text and "LoadFaceRefiner" in text for text in written)
    assert not [text[:300] for text in [*written, *map(str, shown), *reports] if TELLTALE in text]
    assert LoadCasDMHead.execute(files["LoadCasDMHead"]["file"])


def test_every_saving_node_is_in_the_test_above():
    names = ["SaveCasDMHead", "SaveFaceRefiner", "SaveMaskedTokenLora", "SaveMaskedTokens", "SaveSeed"]
    assert [*names, "SaveTrainingPairs"] == SAVERS
    assert {id for id, node in BY_ID.items() if node.define_schema().is_output_node} >= set(SAVERS)


def test_fingerprint_of_a_refiner_depends_on_path_time_and_size(home):
    folder = model_folder(home, "face_refiner")
    for name in ("a.pth", "b.pth"):
        (folder / name).write_bytes(b"x")
    seen = {REFINERS.fingerprint("a.pth"), REFINERS.fingerprint("b.pth")}
    (folder / "a.pth").write_bytes(b"xy")
    seen.add(REFINERS.fingerprint("a.pth"))
    assert len(seen) == 3 and all(len(value) == 64 for value in seen)
    assert REFINERS.fingerprint("a.pth") in seen
