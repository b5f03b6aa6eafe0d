"""What the pack says to a ComfyUI that is too old, with stand-ins for its modules."""

import ast
import asyncio
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

import chorus
from chorus.host import host_version

ROOT = Path(__file__).parents[2]


def stand_in(monkeypatch, version: str | None, names: tuple[str, ...]) -> None:
    """A ComfyUI that has these dotted names of functions and nothing else, instead of the one on the path."""
    for module in [*sys.modules]:
        if module.split(".")[0] in {"comfy", "comfy_api", "folder_paths", "comfyui_version"}:
            monkeypatch.delitem(sys.modules, module)
    for root in ("comfy", "comfy_api", "folder_paths", "comfyui_version"):
        monkeypatch.setitem(sys.modules, root, ModuleType(root))
    if version:
        sys.modules["comfyui_version"].__version__ = version
    for name in names:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            module = ".".join(parts[:cut])
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[".".join(parts[:-1])], parts[-1], object())


def refusal() -> str:
    with pytest.raises(ImportError) as error:
        asyncio.run(chorus.comfy_entrypoint())
    return str(error.value)


@pytest.mark.parametrize("missing", host_version.NEWEST)
def test_each_name_is_missed(monkeypatch, missing):
    stand_in(monkeypatch, "0.26.0", tuple(name for name in host_version.NEWEST if name != missing))
    assert refusal() == (
        f"ComfyUI-Chorus needs ComfyUI {host_version.TESTED} or newer; this is 0.26.0, without {missing}. Update ComfyUI"
    )


@pytest.mark.parametrize(("version", "told"), [("0.3.64", "0.3.64"), (None, "an unknown version")])
def test_a_host_without_the_node_api_gets_one_line(monkeypatch, version, told):
    stand_in(monkeypatch, version, ())
    text = refusal()
    assert f"this is {told}, without comfy_api.latest.io, " in text and "\n" not in text
    assert all(name in text for name in host_version.NEWEST)


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.27.0", True), ("0.29.9", True), (None, True), ("0.30.0", False), ("0.30.0rc1", False), ("1.0.0", False)],
)
def test_an_older_host_that_lacks_nothing_is_warned_of(monkeypatch, caplog, version, warned):
    stand_in(monkeypatch, version, host_version.NEWEST)
    with caplog.at_level(logging.WARNING):
        host_version.check()
    assert [(version or "an unknown version") in record.message for record in caplog.records] == [True] * warned


def test_nothing_is_asked_for_that_the_pack_does_not_use():
    used = set()
    for path in (p for folder in ("nodes", "techniques", "host", "demo") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    assert {name.rpartition(".")[2] for name in host_version.NEWEST} <= used
