"""Files saved at commit d6a205e, before the first release, are offered by their loaders and read exactly."""

import json
import shutil

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chorus.demo.modules import load_face_pairs, shipped_seeds
from chorus.dev.tools.setup import ROOT
from chorus.techniques.cas_dm.network import to_file as head_to_file
from chorus.techniques.masked_tokens.lora import to_file as lora_to_file
from chorus.techniques.seed_select.comfy_files import read_seed
from chorus.tests.robustness.savers import savers

SAVED = ROOT / "tests" / "fixtures" / "files_d6a205e"


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder with the old files. Its folder loras/ is also registered as a LoRA folder of ComfyUI."""
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    paths = {**folder_paths.folder_names_and_paths, "loras": ([str(tmp_path / "loras")], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.filename_list_cache.clear()


CONTENT = {
    "SaveSeed": lambda loaded: {"noise": loaded.noise},
    "SaveCasDMHead": lambda loaded: head_to_file(loaded)[0],
    "SaveFaceRefiner": lambda loaded: loaded.patcher.model.state_dict(),
    "SaveMaskedTokenLora": lambda loaded: lora_to_file(loaded[0])[0],
    "SaveMaskedTokens": lambda loaded: {"ids": loaded.ids},
}


@pytest.mark.parametrize("node", CONTENT)
def test_old_tensor_files_are_read(output, node):
    saver = savers(large=False)[node]
    (name,) = (name for name in saver.offered() if node in name)
    (file,) = output.rglob(f"{node}_*")
    expected, found = load_file(file), CONTENT[node](saver.load(name))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()} != {}
    assert all(torch.equal(found[k].cpu(), v) for k, v in expected.items())


def test_old_training_pairs_are_read(output):
    saver = savers(large=False)["SaveTrainingPairs"]
    (name,) = (name for name in saver.offered() if "SaveTrainingPairs" in name)
    source, target, prompts, *_ = saver.load(name)
    folder = output / "SaveTrainingPairs"
    assert list(prompts) == [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    for side, images in (("source", source), ("target", target)):
        expected = np.asarray(Image.open(folder / side / "00001.png"), dtype=np.float32) / 255
        assert np.allclose(images[0].squeeze(0).numpy(), expected)


def test_shipped_files_are_read():
    assert shipped_seeds()
    for name, file in shipped_seeds().items():
        assert torch.isfinite(read_seed(file, name).noise).all()
    assert len(load_face_pairs()[2]) == 96
