"""Packaging metadata: pyproject.toml (Comfy registry), requirements.txt (ComfyUI-Manager), CHANGELOG.md, notices, and
the links of the packed pages.

These tests need neither comfy-cli nor ComfyUI; tests/pack/test_comfy_install.py runs both.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from PIL import Image

from chorus.dev.tools import archive, links, setup
from chorus.host import host_version

ROOT = Path(__file__).parents[2]
# modules that come with ComfyUI, which also chooses the version of torch and thus of Triton
HOST_MODULES = {"torch", "triton", "comfy", "comfy_api", "comfy_execution", "comfyui_version"}
HOST_MODULES |= {"folder_paths", "latent_preview", "node_helpers", "nodes", "server"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_requirements_are_the_dependencies(pyproject):
    assert (ROOT / "requirements.txt").read_text().split() == pyproject["project"]["dependencies"]


def test_pyproject_meets_the_registry_rules(pyproject):
    """The rules are at docs.comfy.org/registry/specifications. The registry drops or rejects other values."""
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", project["name"]) and len(project["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"].strip() and "\n" not in project["description"]
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert all(url.startswith(project["urls"]["Repository"]) for url in project["urls"].values())
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", comfy["PublisherId"]) and comfy["DisplayName"] == "ComfyUI-Chorus"
    # so that the archive holds only the files that git tracks
    assert not comfy.get("includes")


def test_icon_and_banner_have_the_sizes_of_the_registry(pyproject):
    """A square of at most 400 pixels and a picture of 21:9, whose addresses are those of files in this repository."""
    for name, shape in (("Icon", (1, 1)), ("Banner", (21, 9))):
        address = pyproject["tool"]["comfy"][name]
        file, _ = links.resolve(address, ROOT / "pyproject.toml")
        assert address.startswith("https://raw.") and file.stat().st_size < 200_000
        with Image.open(file) as picture:
            assert picture.format == "PNG" and picture.width * shape[1] == picture.height * shape[0]
            assert picture.width <= 400 or name == "Banner"


def test_required_comfyui_is_the_tested_version(pyproject):
    assert pyproject["tool"]["comfy"]["requires-comfyui"] == f">={host_version.TESTED}"
    assert host_version.TESTED == setup.HOST_VERSION


def test_imported_packages_are_the_dependencies(pyproject):
    packages = {"PIL": "Pillow"}
    files = [path for folder in setup.SHIPPED for path in (ROOT / folder).rglob("*.py")]
    names = {name.split(".")[0] for path in files for name in imported(path)}
    names -= sys.stdlib_module_names | HOST_MODULES
    assert {packages.get(name, name) for name in names} == set(pyproject["project"]["dependencies"])


def test_torch_is_not_a_requirement():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert not {"torch", "torchvision", "torchaudio", "triton"} & set(names)


def test_changelog_has_the_version(pyproject):
    assert f"## [{pyproject['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_citation_has_the_version(pyproject):
    assert f"\nversion: {pyproject['project']['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def packed() -> list[str]:
    """Names of the files that the registry's archive holds."""
    try:
        return archive.packed()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files: {error}")


def test_relative_links_of_packed_pages_stay_in_the_archive(packed):
    folders = {parent.as_posix() for name in packed for parent in PurePosixPath(name).parents}
    pages = [ROOT / name for name in packed if name.endswith(".md")]
    assert ROOT / "README.md" in pages and ROOT / "web" / "docs" / "SeedSelect.md" in pages
    outside = set()
    for page in pages:
        for link in links.targets(page.read_text(encoding="utf-8")):
            target = None if re.match(r"\w+:", link) else links.resolve(link, page)
            if target and target[0].relative_to(ROOT).as_posix() not in {*packed, *folders}:
                outside.add(f"{page.relative_to(ROOT)}: {link}")
    assert not outside, f"write the whole address, which begins with {links.own_addresses()[0]}"


def test_readme_can_be_read_in_a_few_minutes():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


def test_archive_has_only_what_comfyui_and_users_need(packed):
    shipped = {*setup.SHIPPED, "example_workflows", "locales", "subgraphs", "web"}
    assert {name.partition("/")[0] for name in packed if "/" in name} == shipped
    assert {"__init__.py", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", "pyproject.toml"} <= {*packed}
    assert not {"run.py", "BENCHMARKS.md", "CONTRIBUTING.md"} & {*packed}


def test_notices_name_every_paper_and_package(pyproject):
    text = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")
    sources = [ROOT / "docs" / "nodes.md", *(ROOT / "web" / "docs").glob("*.md")]
    sources += [path for folder in setup.SHIPPED for path in (ROOT / folder).rglob("*.py")]
    paper = r"arXiv (\d{4}\.\d{5})"
    used = {number for path in sources for number in re.findall(paper, path.read_text(encoding="utf-8"))}
    assert set(re.findall(paper, text)) == used != set()
    table = text.partition("## Packages")[2].partition("## Papers")[0]
    assert re.findall(r"^\| \[([^]]+)\]", table, re.MULTILINE) == pyproject["project"]["dependencies"]


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "The ComfyUI-Chorus authors" in text


def test_web_directory_is_set_once(pyproject):
    assert 'WEB_DIRECTORY = "./web"' in (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert (ROOT / "web").is_dir()
    # this entry would serve the help pages under a name other than the folder's
    assert "web" not in pyproject["tool"]["comfy"]


@pytest.mark.parametrize("file", ["run.py", "dev/tools/setup.py", "dev/tools/server.py", "dev/tools/progress.py"])
def test_setup_needs_only_the_standard_library(file):
    names = {name.split(".")[0] for name in imported(ROOT / file)}
    assert names <= sys.stdlib_module_names | {"_winapi", "chorus"}


def imported(path: Path) -> set[str]:
    """Modules that a file imports absolutely."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
