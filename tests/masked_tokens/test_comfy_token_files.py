"""SaveMaskedTokens and LoadMaskedTokens: new numbered files, and errors that name invalid files."""

import json
import math
import pickle
from types import SimpleNamespace

import folder_paths
import pytest
import safetensors.torch
import torch
from comfy.cli_args import args

from chorus.dev.tools.client import Comfy
from chorus.nodes.masked_token_files import LoadMaskedTokens, SaveMaskedTokens
from chorus.tests.support.tiny_masked_tokens import CODES, MASK, SIDE, run, tokens

METADATA = {"codebook": str(CODES), "mask_id": str(MASK), "downscale": str(SIDE)}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    return SimpleNamespace(input=tmp_path / "input", output=tmp_path / "output")


def save(made, prefix="tokens/ComfyUI", hidden=None):
    node = type("Node", (SaveMaskedTokens,), {"hidden": hidden})
    [saved] = node.execute(tokens=made, filename_prefix=prefix).ui["tokens"]
    return saved


def write(folder, tensors, metadata=METADATA, name="x"):
    path = folder / f"{name}.tokens.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def assert_rejected(name, message):
    with pytest.raises(ValueError, match=f"'{name.replace('[', '.').replace(']', '.')}' cannot be read.*{message}"):
        run(LoadMaskedTokens, file=name)


def test_save_load_round_trip(folders):
    made = tokens(batch=2).with_ids(tokens(batch=2).ids.index_fill(1, torch.tensor([2]), MASK))
    saved = save(made)
    assert saved == {"filename": "ComfyUI_00001_.tokens.safetensors", "subfolder": "tokens", "type": "output"}
    name = "tokens/ComfyUI_00001_.tokens.safetensors [output]"
    assert LoadMaskedTokens.define_schema().inputs[0].options == [name]
    assert LoadMaskedTokens.validate_inputs(file=name) is True
    [loaded] = run(LoadMaskedTokens, file=name)
    assert torch.equal(loaded.ids, made.ids)
    assert (loaded.codebook, loaded.mask_id, loaded.downscale) == (CODES, MASK, SIDE)


def test_files_numbered_without_overwriting(folders):
    names = [save(tokens(seed=i), "a")["filename"] for i in range(3)]
    assert names == [f"a_0000{i}_.tokens.safetensors" for i in (1, 2, 3)]
    [first] = run(LoadMaskedTokens, file="a_00001_.tokens.safetensors [output]")
    assert torch.equal(first.ids, tokens(seed=0).ids)
    assert [path.name for path in folders.output.iterdir()] and not list(folders.output.rglob("*.part"))


def test_file_created_meanwhile_not_overwritten(folders, monkeypatch):
    save(tokens(), "a")
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda prefix, output: (output, "a", 1, "", prefix))
    before = (folders.output / "a_00001_.tokens.safetensors").read_bytes()
    save(tokens(seed=1), "a")
    assert (folders.output / "a_00001_.tokens.safetensors").read_bytes() == before
    [second] = run(LoadMaskedTokens, file="a_00002_.tokens.safetensors [output]")
    assert torch.equal(second.ids, tokens(seed=1).ids)
    assert len(list(folders.output.iterdir())) == 2


def test_full_disk_leaves_no_file(folders, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save(tokens(), "a")
    assert not list(folders.output.iterdir())


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../out"])
def test_prefix_outside_output_folder_rejected(folders, prefix):
    with pytest.raises(Exception, match=r"outside the output folder|an absolute path"):
        save(tokens(), prefix)
    assert not list(folders.output.parent.rglob("*.safetensors"))


@pytest.mark.parametrize("prefix", ["", ".", "a/.."])
def test_prefix_without_name_rejected(folders, prefix):
    with pytest.raises(ValueError, match="has no file name"):
        save(tokens(), prefix)


@pytest.mark.parametrize("disabled", [False, True])
def test_workflow_saved_unless_metadata_disabled(folders, monkeypatch, disabled):
    monkeypatch.setattr(args, "disable_metadata", disabled)
    hidden = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}, "codebook": 3})
    saved = save(tokens(), "a", hidden)
    with safetensors.safe_open(folders.output / saved["filename"], "pt") as file:
        metadata = file.metadata()
    if disabled:
        assert metadata == METADATA
    else:
        assert json.loads(metadata["workflow"]) == {"nodes": []} and json.loads(metadata["prompt"]) == {"1": {}}
        assert metadata["codebook"] == str(CODES)


IDS = tokens().ids


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"latent": IDS}, METADATA, "it holds latent instead of ids"),
        ({"ids": IDS, "more": IDS + 0}, METADATA, "it holds .* instead of ids"),
        ({"ids": IDS.int()}, METADATA, "torch.int32 .*not int64"),
        ({"ids": IDS.float()}, METADATA, "torch.float32"),
        ({"ids": IDS[0]}, METADATA, "8x6 are not int64 .batch, height, width"),
        ({"ids": IDS[:, :0]}, METADATA, "1x0x6"),
        ({"ids": IDS + CODES}, METADATA, "have the id"),
        ({"ids": IDS - 1000}, METADATA, "have the id -"),
        ({"ids": IDS}, None, "lack a number for codebook, mask_id, downscale"),
        ({"ids": IDS}, METADATA | {"mask_id": "x"}, "lack a number for mask_id"),
        ({"ids": IDS}, METADATA | {"downscale": "-1"}, "lack a number for downscale"),
        ({"ids": IDS}, METADATA | {"downscale": "0"}, "tokens of 0x0 pixels"),
        ({"ids": IDS}, METADATA | {"mask_id": "3"}, "mask id 3"),
    ],
)
def test_invalid_token_files_rejected(folders, tensors, metadata, message):
    write(folders.input, tensors, metadata)
    assert_rejected("x.tokens.safetensors", message)


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_truncated_files_rejected(folders, size):
    path = write(folders.output, {"ids": IDS})
    path.write_bytes(path.read_bytes()[:size])
    assert_rejected("x.tokens.safetensors [output]", "save it again")


def test_pickles_rejected_and_not_executed(folders):
    class MakeFolder:
        def __reduce__(self):
            return (folders.input.joinpath("executed").mkdir, ())

    (folders.input / "x.tokens.safetensors").write_bytes(pickle.dumps({"ids": MakeFolder()}))
    assert_rejected("x.tokens.safetensors", "save it again")
    torch.save({"ids": IDS}, folders.input / "y.tokens.safetensors")
    assert_rejected("y.tokens.safetensors", "save it again")
    assert not (folders.input / "executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.tokens.safetensors",
        "a/../../secret.tokens.safetensors [output]",
        "image.safetensors",
        "x.tokens.safetensors",
        "x\0.tokens.safetensors",
        "",
    ],
)
def test_invalid_file_names_rejected(folders, name):
    for folder in (folders.input, folders.input.parent):
        write(folder, {"ids": IDS}, name="secret")
    assert "token file" in LoadMaskedTokens.validate_inputs(file=name)
    with pytest.raises(ValueError, match="token file"):
        run(LoadMaskedTokens, file=name)


def test_fingerprint_depends_on_content(folders):
    path = write(folders.input, {"ids": IDS})
    first = LoadMaskedTokens.fingerprint_inputs(file=path.name)
    path.write_bytes(path.read_bytes())
    assert LoadMaskedTokens.fingerprint_inputs(file=path.name) == first
    write(folders.input, {"ids": IDS.flip(1)})
    assert LoadMaskedTokens.fingerprint_inputs(file=path.name) != first
    # a connected file name is not known before the run
    assert math.isnan(LoadMaskedTokens.fingerprint_inputs(file=None))
    assert LoadMaskedTokens.validate_inputs(file=None) is True


def test_input_and_output_folders_listed(folders):
    write(folders.input, {"ids": IDS}, name="b")
    (folders.output / "deep").mkdir()
    write(folders.output / "deep", {"ids": IDS}, name="a")
    (folders.output / "other.safetensors").touch()
    options = LoadMaskedTokens.define_schema().inputs[0].options
    assert options == ["b.tokens.safetensors", "deep/a.tokens.safetensors [output]"]


def test_server_saves_and_reloads_changed_file(server):
    """A file written while the server runs can be loaded. If it changes, it is loaded again and saved with a new number."""
    write(server.base / "input", {"ids": IDS}, name="server")
    graph = {
        "1": {"class_type": "LoadMaskedTokens", "inputs": {"file": "server.tokens.safetensors"}},
        "2": {"class_type": "SaveMaskedTokens", "inputs": {"tokens": ["1", 0], "filename_prefix": "t/x"}},
    }

    def saved():
        return sorted((server.base / "output" / "t").glob("x_*.tokens.safetensors"))

    with Comfy(server.address) as client:
        client.run(graph)
        assert len(saved()) == 1
        client.run(graph)
        assert len(saved()) == 1  # cached
        write(server.base / "input", {"ids": IDS.flip(1)}, name="server")
        client.run(graph)
    first, second = saved()
    assert torch.equal(safetensors.torch.load_file(second)["ids"], IDS.flip(1))
    assert torch.equal(safetensors.torch.load_file(first)["ids"], IDS)
    with safetensors.safe_open(second, "pt") as file:
        assert json.loads(file.metadata()["prompt"])["1"]["class_type"] == "LoadMaskedTokens"


def test_without_files_the_only_option_says_how_to_make_one(folders):
    assert LoadMaskedTokens.define_schema().inputs[0].options == ["none"]
    error = LoadMaskedTokens.validate_inputs(file="none")
    assert error == "there is no token file; save one with Save Masked Tokens, then refresh the list"
    save(tokens())
    assert LoadMaskedTokens.define_schema().inputs[0].options == ["tokens/ComfyUI_00001_.tokens.safetensors [output]"]
