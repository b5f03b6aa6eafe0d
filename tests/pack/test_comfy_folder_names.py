"""Names that the pack's folder in custom_nodes/ may have, by the rules of ComfyUI's loader, server and page.

README.md states the rule: letters, digits, - and _.
"""

import asyncio
import json
import os
import sys
from urllib.parse import quote

import folder_paths
import nodes as comfy_nodes
import pytest
from aiohttp import web
from app.custom_node_manager import CustomNodeManager

from chorus.dev.tools.setup import ROOT
from chorus.nodes import NODES

make_mocked_request = pytest.importorskip("aiohttp.test_utils").make_mocked_request
IDS = sorted(node.define_schema().node_id for node in NODES)
STAND_IN = """
from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"

class FolderNameNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="FolderNameNode")

    @classmethod
    def execute(cls):
        pass

class Extension(ComfyExtension):
    async def get_node_list(self):
        return [FolderNameNode]

async def comfy_entrypoint():
    return Extension()
"""
ALL = {"nodes", "help", "templates", "translations"}
NAMES = {
    **dict.fromkeys(["ComfyUI-Chorus", "comfyui_chorus", "Chorus2", "2-chorus", "_", "-"], ALL),
    # the page cuts the name at a dot and at an @
    "chorus.2": ALL - {"help"},
    "chorus@1": ALL - {"help"},
    # the server compares the address with the quoted name
    "my chorus": ALL - {"help", "templates"},
    "chorus é": ALL - {"help", "templates"},
    "chorus%20": ALL - {"help", "templates"},
    "コーラス": ALL - {"help", "templates"},
    # glob does not list hidden folders, and brackets are a pattern
    ".chorus": ALL - {"help", "templates", "translations"},
    "chorus[1]": ALL - {"help", "templates", "translations"},
    "chorus.disabled": set(),
}


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A folder custom_nodes/, the only one that ComfyUI loads; its tables of loaded packs are restored afterwards."""
    for table in ("LOADED_MODULE_DIRS", "EXTENSION_WEB_DIRS", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"):
        monkeypatch.setattr(comfy_nodes, table, {})
    folder = tmp_path / "custom_nodes"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(folder)], set()))
    monkeypatch.setattr(sys, "path", [*sys.path])  # ComfyUI adds a folder
    modules = {*sys.modules}
    yield folder
    for name in {*sys.modules} - modules:
        del sys.modules[name]


def load():
    asyncio.run(comfy_nodes.init_external_custom_nodes())


def module_of(id):
    """The python_module of a node, as /object_info has it."""
    return comfy_nodes.NODE_CLASS_MAPPINGS[id].RELATIVE_PYTHON_MODULE


def name_in_the_page(python_module):
    """The folder name by which ComfyUI's page requests help (extractCustomNodeName)."""
    return python_module.split(".")[1].split("@")[0]


def server():
    """An application with the routes of ComfyUI that depend on the names of folders, and the data of two routes."""
    app, routes, manager = web.Application(), web.RouteTableDef(), CustomNodeManager()
    manager.add_routes(routes, app, comfy_nodes.LOADED_MODULE_DIRS.items())
    app.add_routes(routes)
    for name, folder in comfy_nodes.EXTENSION_WEB_DIRS.items():
        app.add_routes([web.static("/extensions/" + name, folder)])  # as in ComfyUI's server.py
    app.freeze()
    return app


def response(app, address):
    """The response to a request of the page, whose addresses are quoted by the browser; None for 404."""
    request = make_mocked_request("GET", quote(address), app=app)

    async def respond():
        try:
            match = await app.router.resolve(request)
            request._match_info = match
            return await match.handler(request)
        except web.HTTPNotFound:
            return None

    return asyncio.run(respond())


def served(id, template):
    """The abilities of a pack that work: its node, help page, template and translations."""
    if id not in comfy_nodes.NODE_CLASS_MAPPINGS:
        return set()
    app, found = server(), {"nodes"}
    if response(app, f"/extensions/{name_in_the_page(module_of(id))}/docs/{id}.md") is not None:
        found.add("help")
    listed = json.loads(response(app, "/workflow_templates").body)
    if any(response(app, f"/api/workflow_templates/{name}/{template}.json") is not None for name in listed):
        found.add("templates")
    if id in json.loads(response(app, "/i18n").body).get("ja", {}).get("nodeDefs", {}):
        found.add("translations")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_help_templates_and_translations_by_folder_name(host, name):
    folder = host / name
    for file, text in {
        "__init__.py": STAND_IN,
        "web/docs/FolderNameNode.md": "help",
        "example_workflows/An example.json": "{}",
        "locales/ja/nodeDefs.json": json.dumps({"FolderNameNode": {}}),
    }.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    load()
    assert served("FolderNameNode", "An example") == NAMES[name]


@pytest.mark.parametrize("name", ["Chorus_2-b", "chorus.v2 new"])
def test_pack_loads_under_another_folder_name(host, name):
    os.symlink(ROOT, host / name, target_is_directory=True)
    load()
    assert sorted(comfy_nodes.NODE_CLASS_MAPPINGS) == IDS
    template = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))[0]
    expected = ALL if name == "Chorus_2-b" else {"nodes", "translations"}
    assert served(IDS[0], template) == expected
