"""SaveTrainingPairs and LoadTrainingPairs: whole pairs in matching order, whenever a run was stopped, and nothing overwritten."""

import builtins
import json
import os
import signal
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.cli_args import args
from comfy_extras.nodes_dataset import LoadImageDataSetFromFolderNode
from PIL import Image

from chorus.demo.modules import FACE_PAIRS
from chorus.nodes.training_pairs import LoadTrainingPairs, SaveTrainingPairs
from chorus.techniques.face_refiner import comfy_pairs as module
from chorus.techniques.face_refiner.comfy_pairs import PairFolder, load_pairs, pair_folders

NAME = "pairs/faces"
HERE = f"{NAME} [output]"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    return SimpleNamespace(input=tmp_path / "input", output=tmp_path / "output")


def pictures(count, seed=0, height=6, width=5):
    """Such as 8 bits can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator) / 255.0


def save(source, target, prompt=None, folder=NAME, hidden=None):
    node = type("Node", (SaveTrainingPairs,), {"hidden": hidden})
    return node.execute(source=source, target=target, folder=[folder], prompt=prompt).ui["images"]


def load(name=HERE, first=0, count=0):
    return LoadTrainingPairs.execute(folder=name, first=first, count=count).args


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_what_was_saved_is_loaded(folders):
    source, target = pictures(3), pictures(3, seed=1)
    saved = save([source], [target], ["a cat", "an owl", 'Zoë\n"quoted"'])
    assert saved[:2] == [
        {"filename": "00001.png", "subfolder": f"{NAME}/{side}", "type": "output"} for side in ("source", "target")
    ]
    names = [f"{side}/0000{i}.png" for side in ("source", "target") for i in (1, 2, 3)]
    assert files(folders.output / NAME) == sorted(["prompts.jsonl", *names])
    assert LoadTrainingPairs.define_schema().inputs[0].options == [HERE, FACE_PAIRS]
    assert LoadTrainingPairs.validate_inputs(folder=HERE) is True
    found = load()
    assert torch.equal(torch.cat(found[0]), source) and torch.equal(torch.cat(found[1]), target)
    assert found[2] == ["a cat", "an owl", 'Zoë\n"quoted"']
    lines = (folders.output / NAME / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2]) == {"number": 3, "prompt": 'Zoë\n"quoted"'} and "Zoë" in lines[2]


def test_a_later_run_goes_on(folders):
    for i in range(3):
        save([pictures(2, seed=i)], [pictures(2, seed=10 + i)], [f"run {i}"])
    found = load()
    assert torch.equal(torch.cat(found[0]), torch.cat([pictures(2, seed=i) for i in range(3)]))
    assert found[2] == ["run 0"] * 2 + ["run 1"] * 2 + ["run 2"] * 2
    assert [torch.equal(picture, pictures(2, seed=1)[k : k + 1]) for k, picture in enumerate(load(first=2, count=2)[0])]
    assert load(first=5)[2] == ["run 2"]
    with pytest.raises(ValueError, match="holds 6 whole pairs, none from 6 on"):
        load(first=6)


def test_the_hosts_loader_reads_both_sides_alike(folders, monkeypatch):
    save([pictures(9)], [1 - pictures(9)])
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folders.output))
    [source], [target] = (
        LoadImageDataSetFromFolderNode.execute(f"{NAME}/{side}").args for side in ("source", "target")
    )
    assert len(source) == 9
    for one, other in zip(source, target):
        torch.testing.assert_close(one, 1 - other)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([pictures(4)], [p[None] for p in pictures(4, seed=1)]),
        ([pictures(1), pictures(3, seed=2, height=9)], [pictures(1), pictures(3, seed=3, height=9)]),
    ],
)
def test_batches_and_lists(folders, source, target):
    save(source, target)
    found = load()
    for ours, theirs in ((found[0], source), (found[1], target)):
        assert all(torch.equal(a[0], b) for a, b in zip(ours, [p for batch in theirs for p in batch]))
    assert len(found[0]) == 4 and found[2] == [""] * 4


def test_prompts_of_batches(folders):
    save([pictures(1), pictures(2)], [pictures(3)], ["first", "second"])
    assert load()[2] == ["first", "second", "second"]


@pytest.mark.parametrize(
    ("source", "target", "prompt", "message"),
    [
        ([pictures(2)], [pictures(3)], None, "2 source and 3 target pictures are no pairs"),
        ([pictures(2)], [pictures(2, width=7)], None, "pair 1 has 5x6 and 7x6 pixels"),
        ([pictures(3)], [pictures(3)], ["a", "b"], "2 prompts for 3 pairs in 1 batches"),
        ([torch.rand(1, 6, 5, 4)], [pictures(1)], None, r"source \(1, 6, 5, 4\) is no RGB"),
        ([pictures(1)], [torch.full((1, 6, 5, 3), float("nan"))], None, "target holds numbers that are NaN"),
    ],
)
def test_refused_before_anything_is_written(folders, source, target, prompt, message):
    with pytest.raises(ValueError, match=message):
        save(source, target, prompt)
    assert not files(folders.output)


@pytest.mark.parametrize("name", ["", " ", ".", "a/..", "..", "../x", "a/../../x", "/tmp/x", "a\0b", "link", "link/x"])
def test_folders_elsewhere_are_refused(folders, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (folders.output / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no folder below the output folder|characters that no file name may have"):
        save([pictures(1)], [pictures(1)], folder=name)
    assert not files(tmp_path)


def test_a_side_that_leads_elsewhere_is_refused(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folders.output / "a").mkdir()
    (folders.output / "a" / "source").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no folder below"):
        save([pictures(1)], [pictures(1)], folder="a")


def test_a_file_of_that_name_is_refused(folders):
    (folders.output / "a").write_text("x")
    with pytest.raises(ValueError, match="'a' is a file"):
        save([pictures(1)], [pictures(1)], folder="a")


@pytest.mark.parametrize("name", ["pairs/none [output]", "../pairs [output]", "/etc"])
def test_what_is_no_folder_of_pairs_is_not_read(folders, name):
    assert "no folder of pairs" in LoadTrainingPairs.validate_inputs(folder=name)
    with pytest.raises(ValueError, match="there is no folder of pairs"):
        load(name)


def test_pictures_of_others_are_not_overwritten(folders):
    root = folders.output / NAME
    (root / "target").mkdir(parents=True)
    (root / "target" / "00041.png").write_bytes(b"mine")
    saved = save([pictures(1)], [pictures(1)])
    assert saved[0]["filename"] == "00042.png"
    assert (root / "target" / "00041.png").read_bytes() == b"mine"
    assert PairFolder(root).numbers() == [42]


# where a program is killed while it writes its second pair, and the whole pairs that are there then
KILLED = [("open", 1, 1), ("open", 2, 1), ("open", 3, 1), ("rename", 1, 2), ("rename", 2, 2)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("call", "time", "whole"), KILLED)
@pytest.mark.parametrize("first", ["load", "save"])
def test_killed_at_any_moment(folders, call, time, whole, first):
    save([pictures(1)], [pictures(1, seed=1)], ["one"])
    child = os.fork()
    if child == 0:
        calls, original = [], getattr(os if call == "rename" else builtins, call)

        def killing(*arguments, **options):
            calls.append(1)
            if len(calls) == time:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os if call == "rename" else module, call, killing)
        save([pictures(1, seed=2)], [pictures(1, seed=3)], ["two"])
        os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if first == "load":
        assert load()[2] == ["one", "two"][:whole]
    save([pictures(1, seed=4)], [pictures(1, seed=5)], ["three"])
    found = load()
    assert found[2] == [*["one", "two"][:whole], "three"]
    seeds = [*[0, 2][:whole], 4]
    for side, pictures_of_side in enumerate(found[:2]):
        assert all(torch.equal(p, pictures(1, seed=s + side)) for p, s in zip(pictures_of_side, seeds))
    # and the host, which lists all pictures, finds the same on both sides
    root = folders.output / NAME
    listed = [sorted(path.name for path in (root / side).glob("*.png")) for side in ("source", "target")]
    assert listed[0] == listed[1] and len(listed[0]) == len(found[2])


def test_a_full_disk_leaves_no_pair(folders, monkeypatch):
    save([pictures(1)], [pictures(1)], ["one"])
    before = files(folders.output)
    real = builtins.open

    def full(path, mode, **options):
        if str(path).endswith("prompts.jsonl"):
            raise OSError(28, "No space left on device")
        return real(path, mode, **options)

    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        save([pictures(1)], [pictures(1)], ["two"])
    assert files(folders.output) == before


def test_a_line_that_was_cut_off(folders):
    save([pictures(1)], [pictures(1)], ["one"])
    with open(folders.output / NAME / "prompts.jsonl", "a") as file:
        file.write('{"number": 2, "prom')
    save([pictures(1)], [pictures(1)], ["two"])
    assert load()[2] == ["one", "two"]


def test_a_line_without_its_pictures_is_no_pair(folders):
    save([pictures(3)], [pictures(3)], ["one", "two", "three"])
    (folders.output / NAME / "target" / "00002.png").unlink()
    before = LoadTrainingPairs.fingerprint_inputs(folder=HERE, first=0, count=0)
    assert load()[2] == ["one", "three"]
    save([pictures(1)], [pictures(1)], ["four"])
    assert load()[2] == ["one", "three", "four"]
    assert LoadTrainingPairs.fingerprint_inputs(folder=HERE, first=0, count=0) != before


def test_cancel_ends_between_pairs(folders, monkeypatch):
    asked = []

    def asking():
        asked.append(1)
        if len(asked) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", asking)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save([pictures(4)], [pictures(4)])
    monkeypatch.undo()
    assert PairFolder(folders.output / NAME).numbers() == [1, 2]


@pytest.mark.parametrize("allowed", [True, False])
def test_workflow_goes_along_where_the_user_allows_it(folders, monkeypatch, allowed):
    monkeypatch.setattr(args, "disable_metadata", not allowed)
    hidden = SimpleNamespace(prompt={"1": {"class_type": "X"}}, extra_pnginfo={"workflow": {"nodes": []}})
    save([pictures(1)], [pictures(1)], hidden=hidden)
    for side in ("source", "target"):
        found = Image.open(folders.output / NAME / side / "00001.png").text
        assert found == ({"prompt": '{"1": {"class_type": "X"}}', "workflow": '{"nodes": []}'} if allowed else {})


def test_pairs_of_the_input_folder(folders):
    save([pictures(1)], [pictures(1)], ["one"])
    os.rename(folders.output / "pairs", folders.input / "moved")
    assert pair_folders() == ["moved/faces"]
    assert load_pairs("moved/faces")[2] == ["one"]
