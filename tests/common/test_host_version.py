"""Errors and warnings if ComfyUI is too old. ComfyUI is replaced by fake modules."""

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


def install_fake_comfyui(monkeypatch, version: str | None, names: tuple[str, ...]) -> None:
    """Replace ComfyUI by fake modules that have only the dotted ``names``."""
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


def test_readme_and_packaging_state_the_tested_versions():
    oldest, newest = host_version.TESTED, host_version.NEWEST_TESTED
    page = " and ".join(host_version.FRONTENDS)
    row = f"| {oldest} and {newest} | tested, with versions {page} of its frontend |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    setup = (ROOT / "dev" / "tools" / "setup.py").read_text(encoding="utf-8")
    assert f'HOST_VERSION = "{oldest}"' in setup
    locks = (ROOT / "dev" / "tools" / "locks").glob("*.txt")
    assert all(f"comfyui-frontend-package=={host_version.FRONTENDS[0]}\n" in path.read_text() for path in locks)


def import_error() -> str:
    """Text of the ImportError that loading the pack raises."""
    with pytest.raises(ImportError) as error:
        asyncio.run(chorus.comfy_entrypoint())
    return str(error.value)


@pytest.mark.parametrize("missing", host_version.NEWEST)
def test_each_missing_feature_is_reported(monkeypatch, missing):
    install_fake_comfyui(monkeypatch, "0.26.0", tuple(name for name in host_version.NEWEST if name != missing))
    assert import_error() == (
        f"ComfyUI-Chorus needs ComfyUI {host_version.TESTED} or newer; this is 0.26.0, without {missing}. Update ComfyUI"
    )


@pytest.mark.parametrize(("version", "shown"), [("0.3.64", "0.3.64"), (None, "an unknown version")])
def test_comfyui_without_the_node_api_gets_a_one_line_error(monkeypatch, version, shown):
    install_fake_comfyui(monkeypatch, version, ())
    text = import_error()
    assert f"this is {shown}, without comfy_api.latest.io, " in text and "\n" not in text
    assert all(name in text for name in host_version.NEWEST)


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.27.0", True), ("0.29.9", True), (None, True), ("0.30.0", False), ("0.30.0rc1", False), ("1.0.0", False)],
)
def test_older_comfyui_with_all_features_gets_a_warning(monkeypatch, caplog, version, warned):
    install_fake_comfyui(monkeypatch, version, host_version.NEWEST)
    with caplog.at_level(logging.WARNING):
        host_version.check()
    assert [(version or "an unknown version") in record.message for record in caplog.records] == [True] * warned


def test_every_checked_feature_is_used():
    used = set()
    for path in (p for folder in ("nodes", "techniques", "host", "demo") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    assert {name.rpartition(".")[2] for name in host_version.NEWEST} <= used
