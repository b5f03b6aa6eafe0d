"""Installation as by ComfyUI-Manager: a renamed clone or the registry's archive in a fresh custom_nodes/, without further
packages.

ComfyUI-Manager clones the repository, or downloads the archive from the registry and unpacks it. It passes each line of
requirements.txt to pip separately, runs install.py if present (the pack has none) and restarts ComfyUI.
"""

import asyncio
import importlib.util
import json
import logging
import os
import re
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

from chorus.dev.tools import archive
from chorus.dev.tools.client import Comfy
from chorus.dev.tools.server import free_port, stop, urlopen_no_proxy, wait_for
from chorus.dev.tools.setup import ROOT, Host, environment
from chorus.host import host_version
from chorus.nodes import NODES

FOLDER = "Chorus_clone-2"  # differs from the repository's name and is not a valid module name
IDS = sorted(node.define_schema().node_id for node in NODES)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of a clone."""
    try:
        return archive.tracked()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files of a clone: {error}")


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tracked) -> Path:
    """A clone in custom_nodes/ of an otherwise empty base folder."""
    folder = tmp_path_factory.mktemp("fresh") / "custom_nodes" / FOLDER
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def zipped(tmp_path_factory, tracked) -> Path:
    """The registry's archive."""
    file = tmp_path_factory.mktemp("registry") / "node.zip"
    archive.pack(file)
    return file


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory, zipped) -> Path:
    """The registry's archive, unpacked in custom_nodes/ of an otherwise empty base folder."""
    folder = tmp_path_factory.mktemp("fresh") / "custom_nodes" / FOLDER
    with zipfile.ZipFile(zipped) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module", params=["clone", "unpacked"])
def installed(request) -> Path:
    """The folder of the installed pack."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def before(installed) -> set[str]:
    """Files of the pack before ComfyUI loads it."""
    return files(installed)


@pytest.fixture(scope="module")
def fetch(installed, before):
    """Function fetch(path) -> bytes of a real server that has loaded the pack. fetch.log is the path of the server's log,
    fetch.address its address."""
    base, host = installed.parents[1], Host(Path(os.environ["COMFYUI_PATH"]), Path(sys.executable), None)
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

            fetch.log, fetch.address = log, address
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
def test_help_is_served_under_the_folder_name(fetch, installed):
    for id in IDS:
        page = installed / "web" / "docs" / f"{id}.md"
        assert fetch(f"/extensions/{FOLDER}/docs/{id}.md") == page.read_bytes()


@pytest.mark.slow
def test_templates_and_translations_are_served(fetch, installed):
    templates = sorted(path.stem for path in (installed / "example_workflows").glob("*.json"))
    assert sorted(json.loads(fetch("/workflow_templates"))[FOLDER]) == templates != []
    assert IDS[0] in json.loads(fetch("/i18n"))["ja"]["nodeDefs"]


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Plain blend", "Inpaint with masked tokens"])
def test_example_workflow_runs(fetch, installed, title):
    pytest.importorskip("comfy_cli", reason="`python run.py test` installs comfy-cli")
    workflow = json.loads((installed / "example_workflows" / f"{title}.json").read_text(encoding="utf-8"))
    with Comfy(fetch.address) as client:
        result = client.run(client.to_api(workflow))
        assert result.status == "success" and client.images(result)


@pytest.mark.slow
def test_loading_and_running_write_nothing_into_the_folder(fetch, installed, before):
    fetch("/object_info")
    assert files(installed) == before


@pytest.mark.slow
def test_archive_has_the_stated_size(zipped):
    size = zipped.stat().st_size
    assert size <= archive.LIMIT
    stated = int(re.search(r"The archive has (\d+) MB", (ROOT / "README.md").read_text("utf-8"))[1])
    assert abs(stated - size / 1e6) <= 1


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
def test_comfy_cli_validates_and_packs(clone, zipped, tmp_path):
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

    # comfy-cli packs the files that git tracks
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=clone, check=True)
    pack = [*command[:-1], "pack"]
    done = subprocess.run(pack, cwd=clone, env=env, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    node = clone / "node.zip"
    with zipfile.ZipFile(node) as file, zipfile.ZipFile(zipped) as ours:
        assert sorted(file.namelist()) == sorted(ours.namelist())
    node.unlink()

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
