"""Who may import whom. The rooms are the folders of the pack; the table says what each may use besides itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "nodes": {"comfy_api", "host", "techniques", "networks", "training", "pictures", "demo.modules"},
    "host": {"comfy", "comfy_api"},
    "techniques": {"kernels"},
    "networks": {"kernels"},
    "training": {"techniques", "networks", "kernels"},
    "kernels": set(),
    "pictures": {"techniques"},
    "demo": {"comfy", "host", "techniques", "networks", "training", "kernels"},
}
# everything of the host that is not its node API; its nodes.py is told from our nodes/ by the import being absolute
COMFY = {
    *("comfy", "comfy_execution", "comfy_extras", "comfy_config", "folder_paths", "nodes", "node_helpers"),
    *("latent_preview", "execution", "server", "app", "utils", "comfyui_version"),
}
NOT_PACK = {"tests", "tools", "run", "benchmarks", "dev"}


def imports(path: Path, source: str) -> set[str]:
    """What a file imports, as names of the table: a room (with the file for demo), comfy, comfy_api or triton."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {absolute(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # `from chorus import host` names a room only in what it imports
            found |= {absolute(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            package = package[: len(package) - node.level + 1]
            parts = [*package, *(node.module or "").split(".")] if node.module else [*package]
            found |= {room(".".join([*parts, alias.name])) for alias in node.names}
    return found - {""}


def absolute(name: str) -> str:
    first, _, rest = name.partition(".")
    if first == "chorus":
        return room(rest)
    if first in COMFY:
        return "comfy"
    return first if first in {"comfy_api", "triton"} else ""


def room(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "demo":
        return ".".join(parts[:2])
    return parts[0] if parts[0] in {*MAY_IMPORT, *NOT_PACK} else ""


def forbidden(path: Path, source: str) -> set[str]:
    """The imports of a file that the table does not allow."""
    here = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[here] | {here}
    if here == "kernels" and path.name == "fused.py":
        allowed = allowed | {"triton"}
    return {name for name in imports(path, source) if name not in allowed and name.split(".")[0] not in allowed}


FILES = sorted(path for here in MAY_IMPORT for path in (ROOT / here).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_to_its_room(path):
    assert not forbidden(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pack_imports_itself_relatively(path):
    # ComfyUI loads the pack under a name made of its path; `chorus` exists only in tests and recipes
    if path.is_relative_to(ROOT / "demo" / "recipes"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    assert "chorus" not in {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("nodes/a.py", "import comfy.samplers", {"comfy"}),
        ("nodes/a.py", "import folder_paths", {"comfy"}),
        ("nodes/a.py", "from comfy_api.latest import io", set()),
        ("nodes/a.py", "from ..kernels.blend import blend", {"kernels"}),
        ("nodes/a.py", "from ..host import blend\nfrom ..techniques.blend import mix", set()),
        ("nodes/a.py", "from ..demo.modules import Net\nfrom ..demo import modules", set()),
        ("nodes/a.py", "from ..demo.recipes.vae import main", {"demo.recipes"}),
        ("nodes/a.py", "from ..demo import recipes", {"demo.recipes"}),
        ("nodes/a.py", "from . import demo, other", set()),
        ("nodes/a.py", "from .demo import NODES", set()),
        ("host/a.py", "from ..techniques import blend", {"techniques"}),
        ("host/a.py", "import nodes, comfy.utils", set()),
        ("techniques/a.py", "def f():\n    import comfy.utils", {"comfy"}),
        ("techniques/a.py", "from ..networks.head import Head", {"networks"}),
        ("networks/a.py", "from .. import techniques", {"techniques"}),
        ("training/a.py", "from ..host.memory import load", {"host"}),
        ("training/a.py", "from chorus.host import memory", {"host"}),
        ("training/a.py", "from chorus import host", {"host"}),
        ("kernels/blend/__init__.py", "import triton", {"triton"}),
        ("kernels/blend/fused.py", "import triton.language as tl\nfrom triton import jit", set()),
        ("kernels/blend/fused.py", "from ...techniques import blend\nfrom . import reference", {"techniques"}),
        ("demo/a.py", "from comfy_api.latest import io", {"comfy_api"}),
        ("dev/first_recipes/a.py", "from ...nodes.demo import NODES", {"nodes"}),
        ("dev/first_recipes/a.py", "from ..modules import Net\nimport comfy.sd", set()),
        ("techniques/a.py", "from ..tools.client import Comfy", {"tools"}),
    ],
)
def test_the_guard_sees(file, source, expected):
    assert forbidden(ROOT / file, source) == expected
