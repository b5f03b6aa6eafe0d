"""Two processes that save into one folder: every saver of the pack keeps the files of both."""

import errno
import functools
import io
import json
import os
import time
import traceback
from pathlib import Path

import folder_paths
import pytest
import safetensors.torch
import torch

from chorus.techniques.face_refiner import comfy_pairs
from chorus.techniques.face_refiner.comfy_pairs import PairFolder, load_pairs, save_pairs
from chorus.techniques.masked_tokens.comfy_lora_files import SUFFIX
from chorus.tests.robustness.savers import savers, with_prefix

pytestmark = pytest.mark.usefixtures("one_thread")

FILE_SAVERS = ["SaveSeed", "SaveCasDMHead", "SaveFaceRefiner", "SaveMaskedTokenLora", "SaveMaskedTokens"]
NAME = "pairs"
HERE = f"{NAME} [output]"


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """The output folder, whose folder loras/ is the only folder of LoRAs."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda folder=tmp_path / name: str(folder))
    loras = ([str(tmp_path / "output" / "loras")], {SUFFIX})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", loras)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path / "output"


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return savers(large=False)


def image(number):
    """An image [1, 4, 5, 3] with 8-bit values that depends on ``number``."""
    return torch.randint(0, 256, (1, 4, 5, 3), generator=torch.Generator().manual_seed(number)) / 255.0


def save_pair(number):
    save_pairs(NAME, [image(number)], [image(1000 + number)], [f"prompt {number} " + "x" * 5000], {})


def check_pairs(numbers):
    """Every pair is saved once, with its images and its prompt."""
    *sides, prompts = load_pairs(HERE)
    found = [int(prompt.split()[1]) for prompt in prompts]
    assert sorted(found) == sorted(numbers)
    for index, number in enumerate(found):
        assert torch.equal(sides[0][index], image(number)) and torch.equal(sides[1][index], image(1000 + number))


class Interruption:
    """Runs ``action`` once, before the call number ``call`` of a function; calls inside the action are not counted."""

    def __init__(self, function, call, action):
        self.function, self.left, self.action, self.running = function, call, action, False

    def __call__(self, *arguments, **options):
        if not self.running:
            self.left -= 1
            if self.left == 0:
                self.running = True
                self.action()
                self.running = False
        return self.function(*arguments, **options)


@pytest.mark.parametrize("name", FILE_SAVERS)
def test_number_taken_while_saving_is_skipped(monkeypatch, output, small, name):
    other = Interruption(safetensors.torch.save, 1, lambda: small[name].save("loras/x"))
    monkeypatch.setattr(safetensors.torch, "save", other)
    small[name].save("loras/x")
    assert sorted(path.name[:8] for path in (output / "loras").iterdir()) == ["x_00001_", "x_00002_"]
    for offered in small[name].offered():
        if offered != "none":
            small[name].load(offered)


@pytest.mark.parametrize("name", FILE_SAVERS)
def test_number_being_written_is_skipped(monkeypatch, output, small, name):
    """Both writers have read the folder when it was empty, as if ComfyUI's list of the folder were old."""
    original = folder_paths.get_save_image_path
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda *a: (*original(*a)[:2], 1, *original(*a)[3:]))
    monkeypatch.setattr(os, "fsync", Interruption(os.fsync, 1, lambda: small[name].save("loras/x")))
    small[name].save("loras/x")
    assert sorted(path.name[:8] for path in (output / "loras").iterdir()) == ["x_00001_", "x_00002_"]


# calls while a pair is saved: two images and prompts.jsonl are opened, two images are renamed by a link
@pytest.mark.parametrize(("function", "call"), [("open", 1), ("open", 2), ("open", 3), ("link", 1), ("link", 2)])
def test_pair_saved_by_another_process_meanwhile_is_kept(monkeypatch, output, function, call):
    save_pair(1)
    other = Interruption(getattr(os, function) if function == "link" else open, call, lambda: save_pair(2))
    monkeypatch.setattr(os if function == "link" else comfy_pairs, function, other, raising=False)
    save_pair(3)
    check_pairs([1, 2, 3])
    lines = (output / NAME / "prompts.jsonl").read_bytes().splitlines()
    assert sorted(json.loads(line)["number"] for line in lines) == [1, 2, 3]
    assert not list(output.rglob("*.part"))


def test_reader_never_replaces_a_finished_image(monkeypatch, output):
    """A reader renames the images of a killed process, while another process does the same and saves a pair."""
    save_pair(1)
    folder, names = PairFolder(output / NAME), []
    for side in comfy_pairs.SIDES:
        folder.image(side, 1).rename(folder.root / side / "00001.png.part")

    def another_process(function, *arguments):
        names.append("ran")
        if len(names) == 1:
            assert folder.numbers() == [1]
            (folder.root / "source" / "00001.png.part").touch()  # of a process that has read the folder before
        return function(*arguments)

    for name in ("link", "rename"):
        monkeypatch.setattr(os, name, functools.partial(another_process, getattr(os, name)))
    assert folder.numbers() == [1] and names
    check_pairs([1])


def test_pairs_are_saved_without_hard_links(monkeypatch, output):
    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    save_pair(1)
    save_pair(2)
    check_pairs([1, 2])
    assert not list(output.rglob("*.part"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_line_that_is_written_slowly_stays_whole(monkeypatch, output):
    """On some network file systems, other processes see the beginning of a line before its end."""

    class SlowFile(io.FileIO):
        def write(self, data):
            super().write(data[:20])
            os.write(halfway, b"x")  # lets the other process start
            time.sleep(0.2)
            return 20 + super().write(data[20:])

    def slow_open(path, mode, **options):
        return SlowFile(path, "a+") if Path(path).suffix == ".jsonl" else open(path, mode, **options)

    save_pair(1)
    wait, halfway = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(comfy_pairs, "open", slow_open, raising=False)
            save_pair(2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(halfway)  # so that read() ends if the child fails
    os.read(wait, 1)
    save_pair(3)
    assert os.waitpid(child, 0)[1] == 0
    check_pairs([1, 2, 3])
    assert len((output / NAME / "prompts.jsonl").read_bytes().splitlines()) == 3


def in_processes(count, action):
    """Run ``action(k)`` in ``count`` forked processes that start together; a failure is printed and fails the test."""
    ready, start = os.pipe()
    children = []
    for k in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(start)
                os.read(ready, 1)  # returns when the parent closes the pipe
                action(k)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    os.close(start)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(ready)
    assert codes == [0] * count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_lose_no_pair(output):
    in_processes(3, lambda k: [save_pair(100 * k + i) for i in range(12)])
    check_pairs([100 * k + i for k in range(3) for i in range(12)])
    lines = (output / NAME / "prompts.jsonl").read_bytes().splitlines()
    assert sorted(json.loads(line)["number"] for line in lines) == list(range(1, 37))
    assert not list(output.rglob("*.part"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", FILE_SAVERS)
def test_processes_lose_no_file(output, small, name):
    in_processes(3, lambda k: [small[name].save("loras/x") for _ in range(8)])
    offered = with_prefix(small[name].offered(), "loras/x")
    assert len(offered) == 24 and len(list((output / "loras").iterdir())) == 24
    for file in offered[::8]:
        small[name].load(file)
