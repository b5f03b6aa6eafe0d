"""A real ComfyUI server with this pack as its only custom node."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from .progress import ProgressLine, SetupError
from .setup import BASE, ROOT, Host, command_ok, environment

# opens a URL without the proxies of the environment, because our server is local
urlopen_no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Server(NamedTuple):
    address: str
    base: Path
    log: Path | None
    process: subprocess.Popen


def make_base(base: Path) -> Path:
    """Create ComfyUI's base directory (models, input, output, ...) with this pack as the only custom node."""
    for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "ComfyUI-Chorus"
    if not link.exists() or link.resolve() != ROOT:
        if link.is_symlink():
            link.unlink()
        if os.name == "nt":
            import _winapi  # a junction, because symbolic links require special rights on Windows

            _winapi.CreateJunction(str(ROOT), str(link))
        else:
            link.symlink_to(ROOT, target_is_directory=True)
    return base


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def own_address(args: tuple) -> str:
    """The address at which this machine reaches a server started with ComfyUI's --listen [ADDRESS[,ADDRESS]]."""
    words = [word for arg in args for word in str(arg).split("=", 1)]
    after = words[words.index("--listen") + 1 :][:1] if "--listen" in words else []
    address = "".join(after).split(",")[0]
    return "127.0.0.1" if not address or address.startswith(("-", "0.0.0.0", "::")) else address


def need_port(port: int, address: str = "127.0.0.1") -> None:
    with socket.socket() as s:
        if os.name != "nt":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed counts as free
        try:
            s.bind((address, port))
        except (OSError, OverflowError) as error:
            raise SetupError(
                f"port {port} of {address} cannot be used ({error}); choose another with --port"
            ) from error


def has_accelerator(host: Host) -> bool:
    code = (
        "import sys, torch; "
        "sys.exit(not any(d.is_available() for d in (torch.cuda, torch.backends.mps, getattr(torch, 'xpu', torch.cuda))))"
    )
    return command_ok(host.python, "-c", code)


@contextlib.contextmanager
def server(host: Host, base: Path = BASE, port: int | None = None, args: tuple = (), quiet: bool = True):
    """Run ComfyUI with this pack; yields a ``Server``. ``quiet``: write its log to a file instead of the screen."""
    port, address = port or free_port(), own_address(args)
    need_port(port, address)
    make_base(base)
    command = [host.python, "main.py", "--port", port, "--base-directory", base, "--disable-auto-launch"]
    command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes", *args]
    if not {"--cpu", "--directml"} & set(args) and not has_accelerator(host):
        command.append("--cpu")
    log = base / "server.log" if quiet else None
    with open(log, "w") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen(
            [str(c) for c in command], cwd=host.root, env=environment(host), stdout=output, stderr=output
        )
        try:
            wait_for(process, f"{address}:{port}", log)
            yield Server(f"{address}:{port}", base, log, process)
        finally:
            stop(process)


def wait_for(process: subprocess.Popen, address: str, log: Path | None, limit: float = 300) -> None:
    line = ProgressLine("starting ComfyUI")
    while True:
        with contextlib.suppress(OSError):
            urlopen_no_proxy(f"http://{address}/system_stats", timeout=5).read()
            break
        if process.poll() is not None or line.seconds > limit:
            ended = process.poll() is not None
            what = f"ended with exit status {process.returncode}" if ended else f"did not start within {limit} s"
            text = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
            raise SetupError(f"ComfyUI {what}: {''.join(text)} (its log: {log or 'above'})")
        if log:
            line.tick()
        time.sleep(0.2)
    line.done()


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
