"""Damaged, inconsistent and unrelated files for every loader, which must not crash, run code or fill memory.

Each file either loads with usable, finite content or raises a ValueError that names the file and a remedy. Hypothesis
generates the same files in every run and simplifies a failing file. worker.py can run single loaders. By default an
eighth of the thousands of cases runs; before a release, all of them run.
"""

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import folder_paths
import pytest
import torch

from chorus.techniques.masked_tokens.comfy_files import model_folders, text_files, weight_files
from chorus.tests.robustness.loader import NODES
from chorus.tests.robustness.loaders import LOADERS
from chorus.tests.robustness.worker import worker_process

CASES = {
    "Cas-DM heads": 500,
    "face refiners": 400,
    "face refiners as .pth": 500,
    "masked token transformers": 160,
    "masked token VQ-GANs": 120,
    "masked token text encoders": 100,
    "masked token LoRAs": 700,
    "seeds": 900,
    "tokens": 900,
    "training pairs": 500,
    "demo weights": 160,
}
SAMPLE = 8  # by default, one case in so many runs
MEMORY = 300  # MB that loading any file may use; the largest valid file has 3 MB
SECONDS = 10.0  # for one case on a busy machine


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    yield from in_two_processes(tmp_path_factory, SAMPLE)


@pytest.fixture(scope="module")
def all_results(tmp_path_factory):
    yield from in_two_processes(tmp_path_factory, 1)


def in_two_processes(tmp_path_factory, share: int):
    """Run one ``share``-th of the cases in two processes. Yields a function that waits for the result of a loader."""
    with ExitStack() as stack:
        workers = []
        for k in range(2):
            tasks = {name: CASES[name] // share for name in list(CASES)[k::2]}
            workers.append(stack.enter_context(worker_process(tmp_path_factory.mktemp("files"), tasks)))
        yield lambda name: workers[list(CASES).index(name) % 2](name)


def test_every_loader_has_cases():
    assert set(CASES) == set(LOADERS)
    assert sum(CASES.values()) >= 4000


@pytest.mark.parametrize("name", CASES)
def test_some_damaged_files_rejected_or_usable(results, name, record_property):
    check(results(name), CASES[name] // SAMPLE, record_property)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_rejected_or_usable(all_results, name, record_property):
    check(all_results(name), CASES[name], record_property)


def check(counts, expected, record_property):
    cases = counts["loaded"] + counts["refused"]
    for figure in ("loaded", "refused", "seconds", "slowest", "peak_growth_mb"):
        record_property(figure, counts[figure])
    record_property("cases", cases)
    assert not counts["broken"], counts["broken"]
    # the cases must have both outcomes
    assert cases >= expected
    assert counts["loaded"] and counts["refused"] >= cases // 5
    assert counts["peak_growth_mb"] < MEMORY and counts["slowest"] < SECONDS


# ---- paths that are not regular files ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    """ComfyUI's folders below a temporary folder."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    for name in ("cas_dm", "face_refiner", "masked_token", "loras", "text_encoders"):
        (tmp_path / "models" / name).mkdir(parents=True)
        kinds = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / "models" / name)], kinds))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def a_folder(path: Path):
    path.mkdir()


def a_pipe(path: Path):
    os.mkfifo(path)  # opening it would wait forever for a writer


def a_socket(path: Path):
    short = os.path.relpath(path)  # paths of sockets are limited to 107 characters
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(short if len(short) < len(str(path)) else str(path))


def a_dead_link(path: Path):
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path):
    path.symlink_to(path.name)


def a_link_to_a_device(path: Path):
    path.symlink_to("/dev/zero")  # endless


PLACES = {
    "LoadCasDMHead": ("models/cas_dm", "odd.safetensors", "file"),
    "LoadFaceRefiner": ("models/face_refiner", "odd.pth", "file"),
    "LoadSeed": ("input", "odd.seed.safetensors", "file"),
    "LoadMaskedTokens": ("input", "odd.tokens.safetensors", "file"),
    "LoadMaskedTokenLora": ("models/loras", "odd.safetensors", "lora_name"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize(
    "make",
    [a_folder, a_pipe, a_socket, a_dead_link, a_link_to_itself, a_link_to_a_device],
    ids=lambda make: make.__name__,
)
def test_special_file_rejected_without_blocking(home, make, monkeypatch):
    monkeypatch.chdir(home)
    inputs = {"LoadMaskedTokenLora": dict(model=object(), strength=1.0, alpha=0.0)}
    for node, (folder, name, id) in PLACES.items():
        path = home / folder / name
        monkeypatch.chdir(path.parent)
        make(path)
        cls = NODES[node]
        assert cls.define_schema()  # listing the options works
        if node != "LoadMaskedTokenLora":
            assert name in cls.validate_inputs(**{id: name})
        with pytest.raises(ValueError, match=name), torch.inference_mode():
            cls.execute(**{id: name}, **inputs.get(node, {}))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_special_files_do_not_hide_masked_token_models(home, monkeypatch):
    """A dead link once raised an error in the schema, so that ComfyUI did not offer the node."""
    for number, make in enumerate((a_folder, a_pipe, a_dead_link, a_link_to_itself)):
        for folder in ("models/masked_token", "models/text_encoders"):
            make(home / folder / f"odd{number}.safetensors")
    part = home / "models/masked_token/tiny/transformer"
    part.mkdir(parents=True)
    os.mkfifo(part / "config.json")
    (part / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert list(weight_files()) == list(text_files()) == ["tiny/transformer/diffusion_pytorch_model.safetensors"]
    assert list(model_folders()) == ["tiny"]
    assert NODES["LoadMaskedTokenModel"].define_schema()
    with pytest.raises(ValueError, match=r"the model folder .*tiny lacks "):
        NODES["LoadMaskedTokenModel"].execute("tiny", *["from the folder"] * 3)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_folder_with_a_pipe_for_its_list_rejected(home):
    (home / "input/pairs").mkdir()
    os.mkfifo(home / "input/pairs/prompts.jsonl")
    cls = NODES["LoadTrainingPairs"]
    assert "pairs" not in cls.define_schema().inputs[0].options
    assert "no folder of pairs 'pairs'" in cls.validate_inputs(folder="pairs")
    with pytest.raises(ValueError, match="no folder of pairs 'pairs'"):
        cls.execute("pairs", 0, 0)
