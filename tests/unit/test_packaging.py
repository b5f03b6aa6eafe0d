"""What an installer reads: pyproject.toml, requirements.txt (ComfyUI-Manager reads nothing else), CHANGELOG.md."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_dependencies(pyproject):
    assert (ROOT / "requirements.txt").read_text().split() == pyproject["project"]["dependencies"]


def test_torch_is_left_to_the_host():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert not {"torch", "torchvision", "torchaudio", "triton"} & set(names)


def test_changelog_knows_the_version(pyproject):
    assert f"## [{pyproject['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "The ComfyUI-Chorus authors" in text


def test_web_directory_is_there_and_not_claimed_twice(pyproject):
    assert 'WEB_DIRECTORY = "./web"' in (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert (ROOT / "web").is_dir()
    assert "web" not in pyproject["tool"]["comfy"]  # it would serve the help under another name than the folder's


@pytest.mark.parametrize("file", ["run.py", "tools/setup.py", "tools/server.py", "tools/progress.py"])
def test_set_up_needs_the_standard_library_only(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names | {"_winapi", "chorus"}
