"""Installs packages with uv, or with pip if uv fails."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

from .progress import SetupError, step

UV_PIN = "uv==0.13.9"
# uv does not read pip's configuration. {setting of pip: (environment variable of uv, separator of several values)}
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
    """Install packages for ``python`` with uv. If uv fails, print its error and use pip. ``what``: arguments of pip
    install."""
    pip = [python, "-m", "pip", "install", "--progress-bar", "off"]
    try:
        # as with pip, take the best version of all indexes
        uv = [uv_program(pip, env, log), "pip", "install", "--index-strategy", "unsafe-best-match"]
        step(title, [*uv, "--python", python, *what], uv_environment(python, env), log)
    except SetupError as error:
        print(f"{error}; trying pip instead of uv", flush=True)
        # --no-compile: Python compiles modules when they are imported, and only about a tenth of them is ever imported
        step(title, [*pip, "--no-compile", *what], env, log)


def uv_program(pip: list, env: dict[str, str], log: Path) -> Path:
    """The program of the pinned uv, in a folder beside uv's cache. The first call installs it there with pip."""
    folder = Path(env["UV_CACHE_DIR"]).with_name(UV_PIN)
    program = folder / "bin" / ("uv.exe" if os.name == "nt" else "uv")
    if not program.exists():
        step("getting uv", [*pip, "--no-deps", "--target", folder, UV_PIN], env, log)
    return program


def uv_environment(python: Path, env: dict[str, str]) -> dict[str, str]:
    """``env`` with pip's configuration (files and variables) as uv's variables. Variables in ``env`` take
    precedence."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], env=env, capture_output=True, text=True).stdout
    lines = [line.partition("=") for line in listed.splitlines()]
    settings = {name: ast.literal_eval(value) for name, equals, value in lines if equals}
    found = {"UV_SYSTEM_CERTS": "1"}
    for name, (variable, between) in UV_SETTINGS.items():
        for section in ("global", "install", ":env:"):  # as in pip, later sections override earlier ones
            if value := settings.get(f"{section}.{name}"):
                found[variable] = between.join(value.split())
    return {**found, **env}
