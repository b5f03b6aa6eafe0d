"""Installation as by ComfyUI-Manager: a renamed clone in a fresh custom_nodes/, without further packages.

ComfyUI-Manager clones the repository and passes each line of requirements.txt to pip separately. It runs install.py if
present (the pack has none) and restarts ComfyUI.
"""

import asyncio
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import comfyui_version
import folder_paths
import nodes as comfy_nodes
import pytest
from comfy_config import config_parser

from chorus.dev.tools.server import free_port, stop, urlopen_no_proxy, wait_for
from chorus.dev.tools.setup import ROOT, Host, environment
from chorus.host import host_version
from chorus.nodes import NODES

FOLDER = "Chorus_clone-2"  # differs from the repository's name and is not a valid module name
IDS = sorted(node.define_schema().node_id for node in NODES)


def tracked() -> list[str]:
    """Files that a clone of this repository would hold if everything were committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files of a clone: {error}")
    return [name for name in names if name and (ROOT / name).is_file()]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone in custom_nodes/ of an otherwise empty base folder."""
    folder = tmp_path_factory.mktemp("fresh") / "custom_nodes" / FOLDER
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def before(clone) -> set[str]:
    """Files of the clone before ComfyUI loads it."""
    return files(clone)


@pytest.fixture(scope="module")
def fetch(clone, before):
    """Function fetch(path) -> bytes of a real server that has loaded the clone. fetch.log is the path of the server's log."""
    base, host = clone.parents[1], Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), None)
    address, log = f"127.0.0.1:{free_port()}", base / "server.log"
    command = [sys.executable, "main.py", "--port", address.split(":")[1], "--base-directory", str(base), "--cpu"]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=host.root, env=environment(host), stdout=output, stderr=output)
        try:
            wait_for(process, address, log)

            def fetch(path: str) -> bytes:
                with urlopen_no_proxy(f"http://{address}{urllib.parse.quote(path)}", timeout=60) as response:
                    return response.read()

            fetch.log = log
            yield fetch
        finally:
            stop(process)


@pytest.mark.slow
def test_server_offers_every_node(fetch):
    info = json.loads(fetch("/object_info"))
    ours = {id: node for id, node in info.items() if node["python_module"] == f"custom_nodes.{FOLDER}"}
    assert sorted(ours) == IDS
    log = fetch.log.read_text(errors="replace")
    assert "IMPORT FAILED" not in log and "Error while calling comfy_entrypoint" not in log


@pytest.mark.slow
def test_help_is_served_under_the_folder_name(fetch, clone):
    for id in IDS:
        page = clone / "web" / "docs" / f"{id}.md"
        assert fetch(f"/extensions/{FOLDER}/docs/{id}.md") == page.read_bytes()


@pytest.mark.slow
def test_templates_and_translations_are_served(fetch, clone):
    templates = sorted(path.stem for path in (clone / "example_workflows").glob("*.json"))
    assert sorted(json.loads(fetch("/workflow_templates"))[FOLDER]) == templates != []
    assert IDS[0] in json.loads(fetch("/i18n"))["ja"]["nodeDefs"]


@pytest.mark.slow
def test_loading_writes_nothing_into_the_clone(fetch, clone, before):
    fetch("/object_info")
    assert files(clone) == before


@pytest.mark.slow
def test_requirements_are_already_satisfied():
    if not importlib.util.find_spec("pip"):
        pytest.skip(f"{sys.executable} has no pip")
    # without an index, pip fails if a requirement is not already installed
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--no-index"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    done = subprocess.run([*command, *filter(None, lines)], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout
    assert done.stdout.count("Requirement already satisfied") >= len([*filter(None, lines)])


def test_comfyui_reads_pyproject():
    config = config_parser.extract_node_configuration(str(ROOT))
    project, comfy = config.project, config.tool_comfy
    assert (project.name, project.license.file) == ("comfyui-chorus", "LICENSE")
    assert project.supported_os == ["OS Independent"] and project.urls.repository.startswith("https://")
    assert project.supported_comfyui_version == f">={host_version.TESTED}"
    assert comfy.publisher_id and comfy.display_name == "ComfyUI-Chorus" and not comfy.web


@pytest.mark.slow
def test_comfy_cli_validates_and_packs(clone, tmp_path):
    for tool in ("comfy_cli", "ruff"):
        if not importlib.util.find_spec(tool):
            pytest.skip(f"{tool} is not installed; `python run.py test` installs it")
    # comfy-cli is GPL, so it runs in a separate process; its configuration goes to a temporary home folder
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    env |= {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, encoding="utf-8", errors="replace")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    # comfy-cli exits with 0 despite warnings
    assert "All validation checks passed" in output and "warning" not in output.lower()

    pack = [*command[:-1], "pack"]
    done = subprocess.run(pack, cwd=clone, env=env, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    archive = clone / "node.zip"
    with zipfile.ZipFile(archive) as file:
        packed = {name.split("/")[0] for name in file.namelist()}
    archive.unlink()
    assert packed >= {"__init__.py", "nodes", "techniques", "demo", "example_workflows", "subgraphs", "web", "locales"}
    assert not packed & {"dev", "tests", "run.py", ".ci", ".github"}

    # the registry scans the archive with ruff and ignores noqa comments
    scan = [sys.executable, "-m", "ruff", "check", ".", "--isolated", "--ignore-noqa", "--select", "S102,S307,E702"]
    done = subprocess.run(scan, cwd=clone, env=env, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stdout


def test_older_comfyui_logs_one_line(monkeypatch, caplog):
    for table in ("LOADED_MODULE_DIRS", "EXTENSION_WEB_DIRS", "NODE_CLASS_MAPPINGS"):
        monkeypatch.setattr(comfy_nodes, table, {**getattr(comfy_nodes, table)})
    known = {*comfy_nodes.NODE_CLASS_MAPPINGS}
    monkeypatch.setattr(comfyui_version, "__version__", "0.26.0")
    monkeypatch.delattr(folder_paths, "is_within_directory")
    modules = {*sys.modules}
    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(comfy_nodes.load_custom_node(str(ROOT)))
    for name in {*sys.modules} - modules:
        monkeypatch.delitem(sys.modules, name)
    (record,) = caplog.records
    assert "\n" not in record.message
    assert (
        "ComfyUI-Chorus needs ComfyUI 0.30.0 or newer; this is 0.26.0, without folder_paths.is_within_directory"
        in record.message
    )
    assert {*comfy_nodes.NODE_CLASS_MAPPINGS} == known
