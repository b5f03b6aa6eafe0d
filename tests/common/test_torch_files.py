"""Files of torch that are not state dicts: the reason and the command, which is run here."""

import argparse
import pickle
import re
import runpy

import pytest
import torch
from torch import nn

from chorus.common.torch_files import explain_format, explain_pickle, pickled_names

OLD = dict(_use_new_zipfile_serialization=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x):
        return self.model(x)


def run_command(text, folder):
    """Run the Python code of the command in a message; returns what it saved."""
    [code] = re.findall(r'run: python -c "([^"]+)"', text)
    (folder / "command.py").write_text(code)
    runpy.run_path(str(folder / "command.py"))
    [target] = re.findall(r"'([^']+_state_dict\.pth)'", code)
    return torch.load(target, weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_torchscript_is_explained_and_converted(tmp_path):
    net, path = Net(), tmp_path / "a net.pth"
    torch.jit.trace(net, torch.zeros(1, 3, 8, 8)).save(str(path))
    text = explain_format(path)
    assert text.startswith("it is a TorchScript program, not a state dict")
    assert_same(run_command(text, tmp_path), net.state_dict())


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_pickled_module_is_explained_and_converted(tmp_path, options):
    net, path = Net(), tmp_path / "net.pth"
    torch.save(net, path, **options)
    assert explain_format(path) is None
    text = explain_pickle(path)
    assert f"a pickled object of the class {__name__}.Net, not a state dict" in text
    assert "code in a file is never run" in text and "if you trust the file" in text
    assert_same(run_command(text, tmp_path), net.state_dict())


def test_modules_in_a_dictionary_are_explained_and_converted(tmp_path):
    net, path = Net(), tmp_path / "net.ckpt"
    torch.save({"model": net, "epoch": 3, "args": argparse.Namespace(a=1)}, path)
    text = explain_pickle(path)
    assert text.startswith("it contains more than weights, and code in a file is never run: it names")
    assert_same(run_command(text, tmp_path)["model"], net.state_dict())


def test_onnx_graph_is_explained(tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(b"\x08\x07\x12\x07pytorch" + b"\0" * 200)
    text = explain_format(path)
    assert text.startswith("it is an ONNX graph") and "onnx.load(" in text and text.count('"') == 2


def test_safetensors_with_another_ending_is_explained(tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "rename it to .safetensors" in explain_format(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02", b"\0" * 64, b"<html>", b"\x08"], ids=repr)
def test_other_files_are_not_explained(tmp_path, data):
    path = tmp_path / "net.pth"
    path.write_bytes(data)
    assert explain_format(path) is None and pickled_names(path) is None
    assert "save only net.state_dict()" in explain_pickle(path)


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_names_of_a_file_are_listed(tmp_path, options):
    path = tmp_path / "net.pth"
    torch.save({"state_dict": Net().state_dict(), "parameter": nn.Parameter(torch.zeros(1))}, path, **options)
    assert pickled_names(path) == ("", [])
    torch.save({"state_dict": Net().state_dict(), "args": argparse.Namespace(a=1)}, path, **options)
    found = pickled_names(path)
    assert found == ("", ["argparse.Namespace"]) and not found.has_code


class Payload:
    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("1",)


@pytest.mark.parametrize("function", [eval, exec, open, __import__, getattr, pickle.loads])
def test_functions_that_run_code_are_recognised(tmp_path, function):
    path = tmp_path / "net.pth"
    torch.save({"a": torch.zeros(1), "b": Payload(function)}, path)
    assert pickled_names(path).has_code
