"""No file can crash the pack, run code or eat the memory: thousands of damaged, lying and foreign ones, for every loader.

Each is loaded, and then of use and finite, or refused by a ValueError that names it and says what to do. Hypothesis
draws the same files in every run, and of those that fail shows the simplest; worker.py runs one loader alone. A quarter of
the cases are tried, and all before a release.
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
from chorus.tests.robustness.worker import working

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
MEMORY = 300  # MB that reading the worst file may take; the largest sample has 3
SECONDS = 10.0  # for a case, on a machine that does much else


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    yield from both_halves(tmp_path_factory, 4)


@pytest.fixture(scope="module")
def all_results(tmp_path_factory):
    yield from both_halves(tmp_path_factory, 1)


def both_halves(tmp_path_factory, share: int):
    """Two processes, one per core, are at work while the tests wait for one result after the other."""
    with ExitStack() as stack:
        halves = []
        for k in range(2):
            tasks = {name: CASES[name] // share for name in list(CASES)[k::2]}
            halves.append(stack.enter_context(working(tmp_path_factory.mktemp("files"), tasks)))
        yield lambda name: halves[list(CASES).index(name) % 2](name)


def test_every_loader_has_cases():
    assert set(CASES) == set(LOADERS)
    assert sum(CASES.values()) >= 4000


@pytest.mark.parametrize("name", CASES)
def test_some_damaged_files_are_refused_or_of_use(results, name, record_property):
    check(results(name), CASES[name] // 4, record_property)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_refused_or_of_use(all_results, name, record_property):
    check(all_results(name), CASES[name], record_property)


def check(found, expected, record_property):
    cases = found["loaded"] + found["refused"]
    for figure in ("loaded", "refused", "seconds", "slowest", "peak_growth_mb"):
        record_property(figure, found[figure])
    record_property("cases", cases)
    assert not found["broken"], found["broken"]
    # both kinds of files were there
    assert cases >= expected
    assert found["loaded"] and found["refused"] >= cases // 5
    assert found["peak_growth_mb"] < MEMORY and found["slowest"] < SECONDS


# ---- what is no file ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The host's folders, and no others."""
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
    os.mkfifo(path)  # who opens it waits for a writer for ever


def a_socket(path: Path):
    short = os.path.relpath(path)  # the system takes 107 characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(short if len(short) < len(str(path)) else str(path))


def a_dead_link(path: Path):
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path):
    path.symlink_to(path.name)


def a_link_to_a_device(path: Path):
    path.symlink_to("/dev/zero")  # it never ends


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
def test_what_is_no_file_is_refused_and_never_waited_for(home, make, monkeypatch):
    monkeypatch.chdir(home)
    inputs = {"LoadMaskedTokenLora": dict(model=object(), strength=1.0, alpha=0.0)}
    for node, (folder, name, id) in PLACES.items():
        path = home / folder / name
        monkeypatch.chdir(path.parent)
        make(path)
        cls = NODES[node]
        assert cls.define_schema()  # what it offers is asked without an error
        if node != "LoadMaskedTokenLora":
            assert name in cls.validate_inputs(**{id: name})
        with pytest.raises(ValueError, match=name), torch.inference_mode():
            cls.execute(**{id: name}, **inputs.get(node, {}))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_odd_things_among_masked_token_models_hide_none(home, monkeypatch):
    """A dead link was an error of the whole node, which the host then did not offer."""
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
    with pytest.raises(ValueError, match=r"the model folder .*tiny is not complete"):
        NODES["LoadMaskedTokenModel"].execute("tiny", *["from the folder"] * 3)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_pipe_in_place_of_the_list_is_no_data_set(home):
    (home / "input/pairs").mkdir()
    os.mkfifo(home / "input/pairs/prompts.jsonl")
    cls = NODES["LoadTrainingPairs"]
    assert "pairs" not in cls.define_schema().inputs[0].options
    assert "no folder of pairs 'pairs'" in cls.validate_inputs(folder="pairs")
    with pytest.raises(ValueError, match="no folder of pairs 'pairs'"):
        cls.execute("pairs", 0, 0)
