"""Installing packages with uv, which is fast, and with pip where uv cannot."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

from .progress import Problem, step

UV_PIN = "uv==0.13.9"
# uv reads no configuration of pip: its variable for each setting of pip's, and what stands between several values
UV_SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}


def install(title: str, python: Path, env: dict[str, str], log: Path, *what: str | Path) -> None:
    """Install for ``python`` what ``what`` says in pip's words; where uv fails, say so and use pip."""
    pip = [python, "-m", "pip", "install", "--progress-bar", "off"]
    try:
        # as with pip, the best version of all indexes is taken
        uv = [uv_program(pip, env, log), "pip", "install", "--index-strategy", "unsafe-best-match"]
        step(title, [*uv, "--python", python, *what], uv_environment(python, env), log)
    except Problem as problem:
        print(f"{problem}; trying pip instead of uv", flush=True)
        # --no-compile: Python compiles what is really imported, a tenth of it
        step(title, [*pip, "--no-compile", *what], env, log)


def uv_program(pip: list, env: dict[str, str], log: Path) -> Path:
    """The pinned uv, in a folder of its own beside its cache; pip fetches it there the first time."""
    folder = Path(env["UV_CACHE_DIR"]).with_name(UV_PIN)
    program = folder / "bin" / ("uv.exe" if os.name == "nt" else "uv")
    if not program.exists():
        step("getting uv", [*pip, "--no-deps", "--target", folder, UV_PIN], env, log)
    return program


def uv_environment(python: Path, env: dict[str, str]) -> dict[str, str]:
    """``env`` with pip's configuration, from its files and its variables, in uv's variables; those already set stay."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], env=env, capture_output=True, text=True).stdout
    lines = [line.partition("=") for line in listed.splitlines()]
    settings = {name: ast.literal_eval(value) for name, equals, value in lines if equals}
    found = {"UV_SYSTEM_CERTS": "1"}
    for name, (variable, between) in UV_SETTINGS.items():
        for section in ("global", "install", ":env:"):  # with pip the later of these decides
            if value := settings.get(f"{section}.{name}"):
                found[variable] = between.join(value.split())
    return {**found, **env}
