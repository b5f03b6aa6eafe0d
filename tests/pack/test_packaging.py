"""What an installer reads: pyproject.toml (the Comfy registry), requirements.txt (ComfyUI-Manager), CHANGELOG.md.

tests/pack/test_comfy_install.py asks comfy-cli and ComfyUI themselves; what is here holds without either.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from chorus.dev.tools import setup
from chorus.host import host_version

ROOT = Path(__file__).parents[2]
# what is there before any package is asked for: torch is the host's choice, Triton its gift
HOST_BRINGS = {"torch", "triton", "comfy", "comfy_api", "comfy_execution", "comfyui_version"}
HOST_BRINGS |= {"folder_paths", "latent_preview", "node_helpers", "server"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_dependencies(pyproject):
    assert (ROOT / "requirements.txt").read_text().split() == pyproject["project"]["dependencies"]


def test_the_registry_can_read_it(pyproject):
    """The rules of docs.comfy.org/registry/specifications: what breaks one is dropped or refused when it is published."""
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", project["name"]) and len(project["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"].strip() and "\n" not in project["description"]
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert all(url.startswith(project["urls"]["Repository"]) for url in project["urls"].values())
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", comfy["PublisherId"]) and comfy["DisplayName"] == "ComfyUI-Chorus"
    # the archive holds what git tracks; nothing that git ignores is asked for besides
    assert not comfy.get("includes")


def test_the_host_that_is_asked_for_is_the_one_tested(pyproject):
    assert pyproject["tool"]["comfy"]["requires-comfyui"] == f">={host_version.TESTED}"
    assert host_version.TESTED == setup.HOST_VERSION


def test_every_package_that_is_imported_is_a_dependency(pyproject):
    packages = {"PIL": "Pillow"}
    files = [path for room in setup.SHIPPED for path in (ROOT / room).rglob("*.py")]
    names = {name.split(".")[0] for path in files for name in imported(path)}
    names -= sys.stdlib_module_names | HOST_BRINGS
    assert {packages.get(name, name) for name in names} == set(pyproject["project"]["dependencies"])


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


@pytest.mark.parametrize("file", ["run.py", "dev/tools/setup.py", "dev/tools/server.py", "dev/tools/progress.py"])
def test_set_up_needs_the_standard_library_only(file):
    names = {name.split(".")[0] for name in imported(ROOT / file)}
    assert names <= sys.stdlib_module_names | {"_winapi", "chorus"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports by their full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
