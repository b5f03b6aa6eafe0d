"""SaveTrainingPairs and LoadTrainingPairs: complete pairs in order after any interrupt, and no overwritten files."""

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


def images(count, seed=0, height=6, width=5):
    """Images with 8-bit values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator) / 255.0


def save(source, target, prompt=None, folder=NAME, hidden=None):
    node = type("Node", (SaveTrainingPairs,), {"hidden": hidden})
    return node.execute(source=source, target=target, folder=[folder], prompt=prompt).ui["images"]


def load(name=HERE, first=0, count=0):
    return LoadTrainingPairs.execute(folder=name, first=first, count=count).args


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_saved_pairs_load(folders):
    source, target = images(3), images(3, seed=1)
    saved = save([source], [target], ["a cat", "an owl", 'Zoë\n"quoted"'])
    assert saved[:2] == [
        {"filename": "00001.png", "subfolder": f"{NAME}/{side}", "type": "output"} for side in ("source", "target")
    ]
    names = [f"{side}/0000{i}.png" for side in ("source", "target") for i in (1, 2, 3)]
    assert files(folders.output / NAME) == sorted(["prompts.jsonl", *names])
    assert LoadTrainingPairs.define_schema().inputs[0].options == [HERE, FACE_PAIRS]
    assert LoadTrainingPairs.validate_inputs(folder=HERE) is True
    pairs = load()
    assert torch.equal(torch.cat(pairs[0]), source) and torch.equal(torch.cat(pairs[1]), target)
    assert pairs[2] == ["a cat", "an owl", 'Zoë\n"quoted"']
    lines = (folders.output / NAME / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[2]) == {"number": 3, "prompt": 'Zoë\n"quoted"'} and "Zoë" in lines[2]


def test_later_run_appends(folders):
    for i in range(3):
        save([images(2, seed=i)], [images(2, seed=10 + i)], [f"run {i}"])
    pairs = load()
    assert torch.equal(torch.cat(pairs[0]), torch.cat([images(2, seed=i) for i in range(3)]))
    assert pairs[2] == ["run 0"] * 2 + ["run 1"] * 2 + ["run 2"] * 2
    assert torch.equal(torch.cat(load(first=2, count=2)[0]), images(2, seed=1))
    assert load(first=5)[2] == ["run 2"]
    with pytest.raises(ValueError, match="6 complete pairs, and 'first' 6 skips all of them; use a smaller 'first'"):
        load(first=6)


def test_comfyui_loader_reads_both_sides_in_the_same_order(folders, monkeypatch):
    save([images(9)], [1 - images(9)])
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
        ([images(4)], [p[None] for p in images(4, seed=1)]),
        ([images(1), images(3, seed=2, height=9)], [images(1), images(3, seed=3, height=9)]),
    ],
)
def test_batches_and_lists_save_the_same_pairs(folders, source, target):
    save(source, target)
    pairs = load()
    for loaded, saved in ((pairs[0], source), (pairs[1], target)):
        assert all(torch.equal(a[0], b) for a, b in zip(loaded, [p for batch in saved for p in batch]))
    assert len(pairs[0]) == 4 and pairs[2] == [""] * 4


def test_one_prompt_per_batch(folders):
    save([images(1), images(2)], [images(3)], ["first", "second"])
    assert load()[2] == ["first", "second", "second"]


@pytest.mark.parametrize(
    ("source", "target", "prompt", "message"),
    [
        ([images(2)], [images(3)], None, "got 2 source and 3 target images; connect equal numbers in the same order"),
        (
            [images(2)],
            [images(2, width=7)],
            None,
            "pair 1 is 5x6 in source and 7x6 in target; scale both to the same size",
        ),
        (
            [images(3)],
            [images(3)],
            ["a", "b"],
            "got 2 prompts for 3 pairs in 1 batches; connect one prompt for all pairs",
        ),
        ([torch.rand(1, 6, 5, 4)], [images(1)], None, "expected RGB images .* for source, got RGBA 1x6x5x4"),
        (
            [images(1)],
            [torch.full((1, 6, 5, 3), float("nan"))],
            None,
            "the images of target are not finite .NaN or infinite., so nothing is saved",
        ),
    ],
)
def test_invalid_inputs_rejected_before_writing(folders, source, target, prompt, message):
    with pytest.raises(ValueError, match=message):
        save(source, target, prompt)
    assert not files(folders.output)


@pytest.mark.parametrize("name", ["", " ", ".", "a/..", "..", "../x", "a/../../x", "/tmp/x", "a\0b", "link", "link/x"])
def test_folder_outside_of_output_rejected(folders, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (folders.output / "link").symlink_to(tmp_path / "elsewhere")
    reasons = (
        "is the output folder itself|outside the output folder|behind a link that leads out|an absolute path|characters"
    )
    with pytest.raises(ValueError, match=reasons):
        save([images(1)], [images(1)], folder=name)
    assert not files(tmp_path)


def test_source_folder_linked_elsewhere_rejected(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folders.output / "a").mkdir()
    (folders.output / "a" / "source").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="behind a link that leads out of the output folder"):
        save([images(1)], [images(1)], folder="a")


def test_folder_name_that_is_already_a_file_rejected(folders):
    (folders.output / "a").write_text("x")
    with pytest.raises(ValueError, match="'a' is a file"):
        save([images(1)], [images(1)], folder="a")


@pytest.mark.parametrize("name", ["pairs/none [output]", "../pairs [output]", "/etc"])
def test_unknown_folder_rejected(folders, name):
    assert "no folder of pairs" in LoadTrainingPairs.validate_inputs(folder=name)
    with pytest.raises(ValueError, match="there is no folder of pairs"):
        load(name)


def test_other_images_are_not_overwritten(folders):
    root = folders.output / NAME
    (root / "target").mkdir(parents=True)
    (root / "target" / "00041.png").write_bytes(b"mine")
    saved = save([images(1)], [images(1)])
    assert saved[0]["filename"] == "00042.png"
    assert (root / "target" / "00041.png").read_bytes() == b"mine"
    assert PairFolder(root).numbers() == [42]


# (function, n, number of complete pairs afterwards): a process that saves the second pair is killed in its n-th call of
# the function
KILLED = [
    ("open", 1, 1),
    ("open", 2, 1),
    ("open", 3, 1),
    ("link", 1, 2),
    ("link", 2, 2),
    ("unlink", 1, 2),
    ("unlink", 2, 2),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("call", "n", "complete"), KILLED)
@pytest.mark.parametrize("first", ["load", "save"])
def test_kill_leaves_only_complete_pairs(folders, call, n, complete, first):
    save([images(1)], [images(1, seed=1)], ["one"])
    child = os.fork()
    if child == 0:
        calls, original = [], getattr(builtins if call == "open" else os, call)

        def kill(*arguments, **options):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(module if call == "open" else os, call, kill)
        save([images(1, seed=2)], [images(1, seed=3)], ["two"])
        os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if first == "load":
        assert load()[2] == ["one", "two"][:complete]
    save([images(1, seed=4)], [images(1, seed=5)], ["three"])
    pairs = load()
    assert pairs[2] == [*["one", "two"][:complete], "three"]
    seeds = [*[0, 2][:complete], 4]
    for side, images_of_side in enumerate(pairs[:2]):
        assert all(torch.equal(p, images(1, seed=s + side)) for p, s in zip(images_of_side, seeds))
    # ComfyUI lists all images of a folder; source and target must have the same names
    root = folders.output / NAME
    listed = [sorted(path.name for path in (root / side).glob("*.png")) for side in ("source", "target")]
    assert listed[0] == listed[1] and len(listed[0]) == len(pairs[2])


def test_full_disk_leaves_no_partial_pair(folders, monkeypatch):
    save([images(1)], [images(1)], ["one"])
    before = files(folders.output)
    real = builtins.open

    def full(path, mode, **options):
        if str(path).endswith("prompts.jsonl"):
            raise OSError(28, "No space left on device")
        return real(path, mode, **options)

    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        save([images(1)], [images(1)], ["two"])
    assert files(folders.output) == before


def test_truncated_line_is_ignored(folders):
    save([images(1)], [images(1)], ["one"])
    with open(folders.output / NAME / "prompts.jsonl", "a") as file:
        file.write('{"number": 2, "prom')
    save([images(1)], [images(1)], ["two"])
    assert load()[2] == ["one", "two"]


def test_line_without_images_is_ignored(folders):
    save([images(3)], [images(3)], ["one", "two", "three"])
    (folders.output / NAME / "target" / "00002.png").unlink()
    before = LoadTrainingPairs.fingerprint_inputs(folder=HERE, first=0, count=0)
    assert load()[2] == ["one", "three"]
    save([images(1)], [images(1)], ["four"])
    assert load()[2] == ["one", "three", "four"]
    assert LoadTrainingPairs.fingerprint_inputs(folder=HERE, first=0, count=0) != before


def test_interrupt_stops_between_pairs(folders, monkeypatch):
    checks = []

    def interrupt_at_third():
        checks.append(1)
        if len(checks) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt_at_third)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save([images(4)], [images(4)])
    monkeypatch.undo()
    assert PairFolder(folders.output / NAME).numbers() == [1, 2]


@pytest.mark.parametrize("allowed", [True, False])
def test_workflow_is_saved_unless_metadata_is_disabled(folders, monkeypatch, allowed):
    monkeypatch.setattr(args, "disable_metadata", not allowed)
    hidden = SimpleNamespace(prompt={"1": {"class_type": "X"}}, extra_pnginfo={"workflow": {"nodes": []}})
    save([images(1)], [images(1)], hidden=hidden)
    for side in ("source", "target"):
        pairs = Image.open(folders.output / NAME / side / "00001.png").text
        assert pairs == ({"prompt": '{"1": {"class_type": "X"}}', "workflow": '{"nodes": []}'} if allowed else {})


def test_pairs_load_from_the_input_folder(folders):
    save([images(1)], [images(1)], ["one"])
    os.rename(folders.output / "pairs", folders.input / "moved")
    assert pair_folders() == ["moved/faces"]
    assert load_pairs("moved/faces")[2] == ["one"]
