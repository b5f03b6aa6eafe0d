"""The import rule of the pack, checked on the syntax trees of all modules.

Relative imports and imports inside functions are included.

Pure code imports pure code. Adapters (``comfy_*.py``, host/, nodes/, demo/) import pure code and lower adapters:
nodes/ and demo/ -> techniques/*/comfy_*.py -> host/. A technique imports no other technique, and host/ imports no
technique. Nothing that ships imports dev/ or tests/. Only the fused.py of a kernel imports Triton. Tests import no
other test module.
"""

import ast
import re
from pathlib import Path

import pytest

from chorus.dev.tools.setup import SHIPPED

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = ("dev", "tests", "run")
SHARED = ("common", "training", "kernels")  # pure code outside the techniques
# ComfyUI's top-level modules. An absolute import of ``nodes`` is ComfyUI's module, a relative import is the pack's
COMFYUI = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_config", "folder_paths", "nodes"),
    *("node_helpers", "latent_preview", "execution", "server", "app", "utils", "comfyui_version"),
}
FILES = sorted(path.relative_to(ROOT) for folder in SHIPPED for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path, source: str) -> set[str]:
    """The modules that a file imports: "ComfyUI", "triton", "chorus", or a path in the pack: "techniques.cas_dm.mix"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {external(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(external(node.module))
        elif isinstance(node, ast.ImportFrom):
            folder = path.parent.parts[: len(path.parent.parts) - node.level + 1]
            base = [*folder, *(node.module or "").split(".")] if node.module else [*folder]
            for alias in node.names:
                name = [*base, alias.name]
                found.add(".".join(name if is_module(name) else base))
    return found - {""}


def external(name: str) -> str:
    first = name.partition(".")[0]
    return "ComfyUI" if first in COMFYUI else first if first in ("triton", "chorus") else ""


def is_module(name: list[str]) -> bool:
    path = ROOT.joinpath(*name)
    return path.is_dir() or path.with_suffix(".py").is_file() or len(name) == 1


def technique(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "techniques" and len(parts) > 1 else ""


def is_adapter(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in ("host", "nodes", "demo") or parts[-1].startswith("comfy_")


def allowed(here: str, name: str) -> bool:
    """Whether the module ``here`` may import ``name``; both are dotted names relative to the pack."""
    folder, other = here.split(".")[0], name.split(".")[0]
    if name == "triton":
        return folder == "kernels" and here.endswith(".fused")
    if name == "ComfyUI":
        return is_adapter(here)
    if other not in SHIPPED:
        return False  # dev, tests, run; also chorus: ComfyUI imports the pack under another name
    if folder in ("nodes", "demo"):
        return other != "nodes" or folder == "nodes"
    if other in ("nodes", "demo") or (is_adapter(name) and not is_adapter(here)):
        return False
    if folder == "techniques":
        return other != "techniques" or technique(name) == technique(here)
    if folder == "host":
        return other == "host" or other in SHARED
    return other in SHARED and (folder == "training" or other in (folder, "kernels"))


def forbidden(path: Path, source: str) -> set[str]:
    here = ".".join(path.with_suffix("").parts)
    return {name for name in imported(path, source) if not allowed(here, name)}


def test_shipped_modules_follow_the_import_rule():
    wrong = {str(path): forbidden(path, (ROOT / path).read_text(encoding="utf-8")) for path in FILES}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_comfy_modules_import_comfyui_or_an_adapter():
    adapters = [path for path in FILES if path.name.startswith("comfy_")]
    sources = {path: imported(path, (ROOT / path).read_text(encoding="utf-8")) for path in adapters}
    assert adapters
    assert [str(p) for p, names in sources.items() if not any(n == "ComfyUI" or is_adapter(n) for n in names)] == []


def imported_test_modules(source: str) -> set[str]:
    """``test_*`` modules that a source imports, directly or in code that it contains as text for other processes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"(?:from|import) ([\w.]+)", node.value))
    return {name for name in found if any(part.startswith("test_") for part in name.split("."))}


def test_no_test_imports_another_test_module():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    found = {str(path.relative_to(ROOT)): imported_test_modules(source) for path, source in sources.items()}
    assert {path: names for path, names in found.items() if names} == {}


CASES = [
    ("nodes/a.py", "from comfy_api.latest import io\nimport folder_paths", set()),
    ("nodes/a.py", "from ..techniques.cas_dm import comfy_hook, mix\nfrom ..demo import modules", set()),
    ("nodes/a.py", "from ..dev.tools.client import Comfy", {"dev.tools.client"}),
    ("nodes/a.py", "from chorus.host import files", {"chorus"}),
    ("demo/a.py", "import comfy.sd\nfrom ..techniques.masked_tokens import comfy_files", set()),
    ("demo/a.py", "from ..nodes import demo", {"nodes.demo"}),
    ("host/a.py", "import nodes, comfy.utils\nfrom ..common import weights\nfrom ..training import finite", set()),
    ("host/a.py", "def f():\n    from ..techniques.cas_dm.mix import mix", {"techniques.cas_dm.mix"}),
    ("host/a.py", "def f():\n    from .. import techniques", {"techniques"}),
    ("techniques/cas_dm/comfy_a.py", "import comfy.sd\nfrom ...host import files\nfrom . import mix", set()),
    ("techniques/cas_dm/comfy_a.py", "from ...nodes import cas_dm", {"nodes.cas_dm"}),
    (
        "techniques/cas_dm/comfy_a.py",
        "from ..saliency_blend import comfy_hook",
        {"techniques.saliency_blend.comfy_hook"},
    ),
    ("techniques/cas_dm/a.py", "from ...kernels.linear import linear\nfrom .network import Head", set()),
    ("techniques/cas_dm/a.py", "def f():\n    import comfy.utils", {"ComfyUI"}),
    (
        "techniques/cas_dm/a.py",
        "class A:\n    def f(self):\n        from . import comfy_hook",
        {"techniques.cas_dm.comfy_hook"},
    ),
    ("techniques/cas_dm/a.py", "from ...host import files", {"host.files"}),
    ("techniques/cas_dm/a.py", "from ..seed_select.search import SeedSearch", {"techniques.seed_select.search"}),
    ("techniques/cas_dm/a.py", "import triton", {"triton"}),
    ("training/a.py", "from ..techniques.cas_dm import mix", {"techniques.cas_dm.mix"}),
    ("training/a.py", "from ..common.weights import weight_error", set()),
    ("common/a.py", "from ..training import metrics", {"training.metrics"}),
    ("common/a.py", "from ..host.files import OutputFiles", {"host.files"}),
    ("kernels/blend/__init__.py", "import triton", {"triton"}),
    ("kernels/blend/fused.py", "import triton.language as tl\nfrom . import reference", set()),
    ("kernels/blend/fused.py", "from ...common import weights", {"common.weights"}),
]


@pytest.mark.parametrize(("file", "source", "expected"), CASES)
def test_forbidden_imports_detected(file, source, expected):
    assert forbidden(Path(file), source) == expected
